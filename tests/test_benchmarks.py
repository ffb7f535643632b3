"""Public benchmarks: read from their released files, asked and scored as by others."""

import base64
import io
import json
import random
import sys
from pathlib import Path

import pytest
from PIL import Image
from refused import knows_kinds, refusal
from tiny import TOKENIZER, tiny_cumo

import eval as evaluation
from data.weights import fingerprint
from extras import plots, scores
from extras.benchmarks import (
    LETTER,
    LETTER_CN,
    SHORT,
    Question,
    ask_and_score,
    load_questions,
    open_picture,
    read_mmbench,
    read_scienceqa,
)
from extras.scores import (
    SCORES,
    agreement,
    letter,
    normalize,
    only_letter,
    says_no,
    vqav2_agreement,
    yes_or_no,
)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jpg", ".png"):
        Image.new("RGB", (20, 10), content).save(path)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(json.dumps(content))


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_pope(folder):
    kinds, asked = ("adversarial", "popular", "random"), []
    for kind in kinds:
        labels = []
        for k, thing in enumerate(("cat", "dog", "car", "cup")):
            text = f"Is there a {thing} in the image?"
            label = "yes" if k % 2 == 0 else "no"
            labels.append({"question_id": k, "image": "1.jpg", "text": text, "label": label})
            asked.append({"question_id": len(asked), "image": "1.jpg", "text": text + SHORT,
                          "category": kind})  # fmt: skip
        write(folder / "coco" / f"coco_pope_{kind}.json", jsonl(*labels))
    write(folder / "llava_pope_test.jsonl", jsonl(*asked))
    write(folder / "val2014" / "1.jpg", "red")


def make_gqa(folder):
    truth = {"20": {"answer": "no", "imageId": "n1"}, "21": {"answer": "traffic light"}}
    write(folder / "data" / "testdev_balanced_questions.json", truth)
    rows = (
        {"question_id": id, "image": "n1.jpg", "text": f"Question {id}?{SHORT}"} for id in truth
    )
    write(folder / "llava_gqa_testdev_balanced.jsonl", jsonl(*rows))
    write(folder / "data" / "images" / "n1.jpg", "red")


def make_textvqa(folder):
    people = [["nokia"] * 8 + ["a phone", "Nokia."], ["two"] + ["3"] * 9]
    data = [
        {"image_id": "aa", "question": q, "question_id": k, "answers": answers}
        for k, (q, answers) in enumerate(zip(("What BRAND is it?", "how many?"), people))
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"data": data, "dataset_type": "val"})
    text = f"What brand is it?\nReference OCR token: NOKIA, 3{SHORT}", f"How many?{SHORT}"
    rows = (
        {"question_id": "aa", "image": "aa.jpg", "text": t, "category": "default"} for t in text
    )
    write(folder / "llava_textvqa_val_v051_ocr.jsonl", jsonl(*rows))
    write(folder / "train_images" / "aa.jpg", "red")


def make_vqav2(folder):
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": k + 1}
               for k, a in enumerate(["yes"] * 3 + ["no"] * 7)]  # fmt: skip
    items = [
        {
            "question_id": k,
            "image_id": 42,
            "answers": answers,
            "answer_type": kind,
            "multiple_choice_answer": "no",
        }
        for k, kind in enumerate(("yes/no", "other"))
    ]
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": items})
    asked = [{"question_id": k, "image_id": 42, "question": f"Is it {k}?"} for k in range(2)]
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write(folder / "val2014" / "COCO_val2014_000000000042.jpg", "red")


def make_scienceqa(folder):
    right = {"4": ("xy", 0), "5": ("xy", 1), "6": ("xyz", 2)}
    problems = {id: {"choices": list(xs), "answer": k} for id, (xs, k) in right.items()}
    write(folder / "problems.json", problems)
    talk = lambda text: [
        {"from": "human", "value": text},
        {"from": "gpt", "value": "The answer is A."},
    ]
    write(folder / "llava_test_CQM-A.json", [
        {"id": "4", "image": "4/image.png", "conversations": talk("<image>\nQ4\nA. x\nB. y")},
        {"id": "5", "conversations": talk("Q5\nA. x\nB. y")},
        {"id": "6", "image": "4/image.png", "conversations": talk("Q6\nA. x\nB. y\nC. z\n<image>")},
    ])  # fmt: skip
    write(folder / "images" / "test" / "4" / "image.png", "red")


def make_mme(folder):
    release, rows = folder / "MME_Benchmark_release_version", []
    for task, texts, images in (("count", "", ""), ("posters", "questions_answers_YN", "images"),
                                ("code_reasoning", "", "")):  # fmt: skip
        for name in ("1", "2"):
            asked = [(f"Is it {name}?", "Yes"), (f"Is it no {name}?", "No")]
            ask = "Please answer yes or no."
            text = "".join(f"{q} {' ' * (name == '2')}{ask}\t{a}\n" for q, a in asked)
            write(release / task / texts / f"{name}.txt", text + "\n")
            write(release / task / images / f"{name}.jpg", "red")
            image = "/".join(filter(None, (task, images, f"{name}.jpg")))
            rows += [{"question_id": f"{task}/{name}.jpg", "image": image, "text": q + SHORT,
                      "category": task} for q, _ in asked]  # fmt: skip
    write(folder / "llava_mme.jsonl", jsonl(*rows))


def make_seed(folder):
    kinds = {"Scene Understanding": 1, "Instance Counting": 5, "Action": 10}
    items = [
        {"question_id": "11", "answer": "B", "data_type": "image", "question_type_id": 1},
        {"question_id": "12", "answer": "C", "data_type": "image", "question_type_id": 5},
        {"question_id": "v_1", "answer": "A", "data_type": "video", "question_type_id": 10},
    ]
    write(folder / "SEED-Bench.json", {"question_type": kinds, "questions": items})
    rows = [{"question_id": id, "image": image, "text": f"Q?\nA. a\nB. b{LETTER}"}
            for id, image in ((11, "SEED-Bench-image/1"), ("12", "SEED-Bench-image/1"),
                              ("v_1", "SEED-Bench-video-image/absent.png"))]  # fmt: skip
    write(folder / "llava-seed-bench.jsonl", jsonl(*rows))
    write(folder / "SEED-Bench-image" / "1.png", "red")
    (folder / "SEED-Bench-image" / "1.png").rename(folder / "SEED-Bench-image" / "1")


def make_mmbench(folder, name="mmbench_dev_20230712.tsv"):
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    rows = [(7, "Which?", "It is \"big\".", "cat", "dog", "", "", "A", image),
            (1_000_007, "Which?", "It is big.", "dog", "cat", "", "", "B", "7"),
            (8, "Where?", "", "in", "", "on", "", "A", image)]  # fmt: skip
    head = "index question hint A B C D answer image".split()
    quoted = lambda value: '"' + str(value).replace('"', '""') + '"'
    write(folder / name, "\n".join("\t".join(map(quoted, row)) for row in (head, *rows)))


MAKE = {
    "pope": make_pope,
    "gqa": make_gqa,
    "textvqa": make_textvqa,
    "vqav2": make_vqav2,
    "scienceqa": make_scienceqa,
    "mme": make_mme,
    "mmbench": make_mmbench,
    "seed": make_seed,
    "mmbench_cn": lambda folder: make_mmbench(folder, "mmbench_dev_cn_20231003.tsv"),
}


@pytest.fixture
def made(tmp_path):
    """made(benchmark) -> its folder, filled."""

    def make(name):
        MAKE[name](tmp_path / name)
        return tmp_path / name

    return make


def best(question):
    """An answer that gets the full score."""
    return max(question.truth, key=question.truth.count) if isinstance(question.truth, list) else (
        question.truth)  # fmt: skip


@pytest.mark.parametrize("name", MAKE)
def test_right_answers_score_all_there_is_and_silence_nothing_but_popes_yes(name, made, tmp_path):
    folder = made(name)
    questions = load_questions(name, folder)
    assert len(questions) > 1 and set(SCORES) == set(MAKE)
    table = SCORES[name]([(q, best(q)) for q in questions])
    assert next(iter(table.values())) == 400 if name == "mme" else 100
    nothing = SCORES[name]([(q, "") for q in questions])
    if name == "pope":
        assert nothing["recall"] == nothing["yes"] == 100 and nothing["accuracy"] == 50
    else:
        assert not any(nothing.values())


@pytest.mark.parametrize("name, prompts", [
    ("pope", ["Is there a cat in the image?" + SHORT]),
    ("textvqa", [f"What brand is it?\nReference OCR token: NOKIA, 3{SHORT}", "How many?" + SHORT]),
    ("vqav2", ["Is it 0?" + SHORT]),
    ("scienceqa", [f"<image>\nQ4\nA. x\nB. y{LETTER}", f"Q5\nA. x\nB. y{LETTER}",
                   f"<image>\nQ6\nA. x\nB. y\nC. z{LETTER}"]),
    ("mme", ["Is it 1?" + SHORT, "Is it no 1?" + SHORT]),
    ("mmbench", [f'It is "big".\nWhich?\nA. cat\nB. dog{LETTER}',
                 f"It is big.\nWhich?\nA. dog\nB. cat{LETTER}", f"Where?\nA. in{LETTER}"]),
    ("mmbench_cn", [f'It is "big".\nWhich?\nA. cat\nB. dog{LETTER_CN}']),
])  # fmt: skip
def test_prompts_are_the_originals(name, prompts, made):
    questions = load_questions(name, made(name))
    assert [q.prompt for q in questions[: len(prompts)]] == prompts


@pytest.mark.parametrize("name", MAKE)
def test_pictures_open_and_a_question_without_one_has_none(name, made):
    questions = load_questions(name, made(name))
    seen = [open_picture(question) for question in questions]
    assert [image is None for image in seen] == [q.group == "text" for q in questions]
    assert all(image.size == (20, 10) for image in seen if image)


def test_seeds_videos_are_left_out(made):
    questions = load_questions("seed", made("seed"))
    assert [(q.id, q.group) for q in questions] == [
        (11, "Scene Understanding"), ("12", "Instance Counting")]  # fmt: skip


# ----------------------------------------------------------------------- what an answer says


@pytest.mark.parametrize("text, no", [
    ("No", True), ("no", True), ("No, there is not.", True), ("There is not a cat", True),
    ("NO", False), ("Nope", False), ("yes. No", False), ("", False), ("no.", True),
    ("Yes, no doubt", True), ("it isn't", False), ("a\nno", False),
])  # fmt: skip
def test_pope_reads_the_first_sentence(text, no):
    assert says_no(text) is no


@pytest.mark.parametrize("text, said", [
    ("Yes", "yes"), ("NO.", "no"), ("Yes, no", "yes"), ("not", "no"), (" no", "no"), ("", None),
    ("The answer is yes", None), ("know", "no"), ("y", None),
])  # fmt: skip
def test_mme_reads_four_letters(text, said):
    assert yes_or_no(text) == said


@pytest.mark.parametrize("text, option", [
    ("B", "B"), ("B. a dog", "B"), ("B.", None), ("b", None), ("F", None), ("", None),
    ("The answer is C.", "C"), ("So The answer is C. Or The answer is D.", None),
    ("The answer is C", None), ("AB", None), ("A, B", None),
])  # fmt: skip
def test_scienceqa_reads_letters_as_the_original(text, option):
    assert letter(text) == option


@pytest.mark.parametrize("text, option", [
    ("B", "B"), ("A.", "A"), ("(A)", "A"), ("A: cat", "A"), ("A. cat", "A"), ("C, it is", "C"),
    ("The answer is D", "D"), ("[B]", "B"), ("A or B", None), ("A A", "A"), ("b", None), ("", None),
    ("Banana", None), ("A cat", "A"), ("**C**", "C"),
])  # fmt: skip
def test_mmbench_reads_the_only_letter_as_the_official_toolkit(text, option):
    assert only_letter(text) == option
    assert SCORES["mmbench"](answers([(7, option or "A", text)]))["circular"] == 100 * bool(option)


@pytest.mark.parametrize("empty", ["", "NA", "N/A", "n/a", "nan", "NaN", "NAN", "None", "NONE",
                                   "null", "NULL", "<NA>", "#N/A", "1.#QNAN"])  # fmt: skip
def test_mmbenchs_empty_options_and_hints_are_those_of_pandas(empty, tmp_path):
    row = f"1\tWhich?\t{empty}\tno\tNo\t{empty}\tcat\tA\t" + "x" * 70
    write(tmp_path / "mmbench_dev_20230712.tsv",
          f"index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n{row}")  # fmt: skip
    (question,) = read_mmbench(tmp_path)
    assert question.prompt == f"Which?\nA. no\nB. No{LETTER}"


def test_popes_files_of_today_are_refused_with_the_commit_to_take(made):
    folder = made("pope")
    file = folder / "coco" / "coco_pope_random.json"
    file.write_text(file.read_text().replace("cup", "bus"))
    with pytest.raises(ValueError, match="line 12: take output/coco of .* at commit e3e3926; .*"
                       "no answer to .'random', '1.jpg', 'Is there a cup"):  # fmt: skip
        load_questions("pope", folder)


@pytest.mark.parametrize("text, same", [
    ("The Two dogs.", "2 dogs"), ("a cat's tail", "cat 's tail"), ("dont", "don't"),
    ("couldntve", "couldntve"), ("couldn'tve", "couldn't've"), ("3.5 kg.", "3.5 kg"),
    ("1,000", "1000"), ("black/white", "black white"), ("black / white", "black white"),
    ("well-known", "well known"), ("well- known", "well known"), ("None", "0"), ("", ""),
    ("an", ""), ("what?!", "what"), ("U.S.A", "usa"), ("line\nbreak", "line break"),
])  # fmt: skip
def test_vqa_answers_are_normalised(text, same):
    assert normalize(text) == same and normalize(same.replace(" 's", "'s")) == same


@pytest.mark.parametrize("matches, value", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_agreement_of_ten_people(matches, value):
    people = ["yes"] * matches + [f"other {k}" for k in range(10 - matches)]
    assert agreement("Yes.", people) == pytest.approx(value)


def test_agreement_is_the_mean_over_people_left_out():
    """The definition, spelled out: each of ten is left out, three of the other nine are enough."""
    r = random.Random(0)
    for _ in range(300):
        people = [r.choice(["a", "1", "one", "b c", "b-c", "Don't", "dont"]) for _ in range(10)]
        said = r.choice(people)
        values = []
        for k in range(10):
            others = [normalize(p) for p in people[:k] + people[k + 1 :]]
            values.append(min(1, others.count(normalize(said)) / 3))
        assert agreement(said, people) == pytest.approx(sum(values) / 10)


@pytest.mark.parametrize("said, humans, value", [
    ("none", ["none"] * 10, 0),  # all the same: theirs stay as they are, ours has become "0"
    ("none", ["none"] * 9 + ["2"], 1), ("0", ["0"] * 10, 1), ("2", ["two"] * 10, 0),
    ("Dog.", ["dog"] * 10, 1), ("dog", ["Dog"] * 10, 1), ("the dog", ["the dog"] * 10, 0),
    ("a cat's", ["cat's"] * 5 + ["cats"] * 5, 0),  # 's is split in ours and never in theirs
    ("1,000", ["1,000"] * 9 + ["2"], 1), ("1,000", ["1,000"] * 10, 0), ("yes", [" yes\n"] * 10, 1),
    ("a-b", ["1,000 a-b"] * 9 + ["x"], 0), ("1,000 ab", ["1,000 a-b"] * 9 + ["x"], 1),
    ("ow's'at", ["ow's'at", "'ows'at"] * 5, 0), ("'ows'at", ["ow's'at", "'ows'at"] * 5, 1),
])  # fmt: skip
def test_vqav2_is_scored_by_the_official_rule_after_llavas_converter(said, humans, value):
    assert vqav2_agreement(said, humans) == pytest.approx(value)
    assert SCORES["vqav2"](answers([("", humans, said)])) == {"accuracy": 100 * value}


def test_normalising_twice_changes_only_what_the_first_pass_joined():
    r = random.Random(1)
    words = ["the", "two", "cat", "x-y", "(", "3.5", "dont", "None", "?", "é", "isn't"]
    for _ in range(500):
        text = " ".join(r.choices(words, k=4))
        assert normalize(text) == normalize(normalize(text)) == normalize(f"  {text.upper()} ")


# ----------------------------------------------------------------------- scores


def answers(triples):
    return [(Question(k, "", None, truth, group), text)
            for k, (group, truth, text) in enumerate(triples)]  # fmt: skip


def test_pope_by_hand():
    table = SCORES["pope"](answers(
        [("random", "yes", "Yes")] * 3 + [("random", "yes", "no")] + [("random", "no", "Yes")]
        + [("random", "no", "No")] * 3 + [("popular", "yes", "Yes")] * 2))  # fmt: skip
    assert table["random"] == {
        "f1": 75, "accuracy": 75, "precision": 75, "recall": 75, "yes": 50}  # fmt: skip
    assert table["popular"]["f1"] == 100 and table["f1"] == 87.5 and next(iter(table)) == "f1"


def test_mme_by_hand():
    rows = [
        (("count", "1"), "yes", "Yes"),
        (("count", "1"), "no", "no"),  # both: 100 + 100
        (("count", "2"), "yes", "yes"),
        (("count", "2"), "no", "yes"),  # one: 50 + 0
        (("code_reasoning", "1"), "yes", "x"),
        (("code_reasoning", "1"), "no", "no"),
    ]
    assert SCORES["mme"](answers(rows)) == {
        "perception": 125, "cognition": 50, "count": 125, "code_reasoning": 50}  # fmt: skip


def test_totals_add_exact_parts_and_are_rounded_once():
    """LLaVA-1.5-13B: 1531.3187 by MME's own script; the sum of rounded parts was 1531.31."""
    thirds = [((f"task {k}", str(n)), "yes", "yes" if n else "no") for k in range(9)
              for n in range(3)]  # fmt: skip
    assert SCORES["mme"](answers(thirds))["perception"] == 1200  # 9 x (66.67 + 66.67)
    rows = [(kind, "yes", "yes" if n < right else "no") for n in range(3)
            for kind, right in (("random", 0), ("popular", 2), ("adversarial", 2))]  # fmt: skip
    assert SCORES["pope"](answers(rows))["recall"] == 44.44  # (0 + 66.67 + 66.67) / 3 is 44.45


def test_gqa_forgives_full_stops_and_capitals_only():
    rows = [
        ("", "traffic light", t) for t in ("Traffic light.", "traffic lights", "a traffic light")
    ]
    assert SCORES["gqa"](answers(rows)) == {"accuracy": 33.33}


def test_scienceqa_counts_pictures_first():
    rows = [
        ("picture", "A", "A"),
        ("picture", "B", "A"),
        ("text", "C", "C. it is"),
        ("text", "A", "A"),
    ]
    assert SCORES["scienceqa"](answers(rows)) == {
        "picture": 50, "total": 75, "text": 100}  # fmt: skip
    assert SCORES["scienceqa"](answers(rows[:2])) == {"picture": 50, "total": 50}


def test_mmbench_wants_all_turns_right():
    rows = [(7, "A", "A"), (7, "B", "B. cat"), (8, "A", "A"), (8, "B", "A")]
    assert SCORES["mmbench"](answers(rows)) == {"circular": 50, "accuracy": 75}


def test_vqav2_counts_answer_types_apart(made):
    questions = load_questions("vqav2", made("vqav2"))
    table = SCORES["vqav2"]([(q, text) for q, text in zip(questions, ("yes", "No."))])
    assert table == {"accuracy": 95, "yes/no": 90, "other": 100}


@pytest.mark.parametrize("name", MAKE)
def test_scores_do_not_depend_on_order(name, made):
    questions = load_questions(name, made(name))
    r = random.Random(2)
    said = [(q, best(q) if r.random() < 0.5 else "A") for q in questions]
    mixed = r.sample(said, len(said))
    assert SCORES[name](said) == SCORES[name](mixed)


# ----------------------------------------------------------------------- against others' scorers


@pytest.fixture
def lmms():
    """lmms(path of a module in lmms-eval) -> the module."""
    pytest.importorskip("lmms_eval")
    import importlib

    return lambda path: importlib.import_module(f"lmms_eval.tasks.{path}")


def noise(r):
    parts = [
        *scores.CONTRACTIONS,
        *scores.NUMBERS,
        *';/[]"{}()=+\\_-><@`,?!.',
        "'s",
        "a",
        "An",
        "the",
        "3",
        "1.5",
        "1,000",
        "\n",
        "\t",
        "  ",
        "cat",
        "St.",
        "é",
        "Don't",
        "'",
    ]
    return "".join(r.choice(parts) + r.choice(["", " "]) for _ in range(r.randint(1, 7)))


def test_normalised_is_lmms_evals(lmms):
    theirs, r = lmms("_task_utils.vqa_eval_metric").EvalAIAnswerProcessor(), random.Random(0)
    for text in [noise(r) for _ in range(20_000)] + ["." * 40]:
        assert normalize(text) == theirs(text), text


def test_textvqa_accuracy_is_lmms_evals(lmms):
    theirs, r = lmms("textvqa.utils").textvqa_process_results, random.Random(0)
    for k in range(300):
        few = [noise(r) for _ in range(3)]
        people = r.choices(few, k=10)
        doc = {"answers": list(people), "question_id": k}
        said = r.choice(few)
        assert agreement(said, people) == pytest.approx(theirs(doc, [said])["exact_match"])


def test_pope_f1_and_accuracy_are_lmms_evals_where_it_understands_the_answer(lmms):
    utils, r = lmms("pope.utils"), random.Random(0)
    rows = [("random", r.choice(["yes", "no"]), r.choice(["Yes", "no", "No"])) for _ in range(200)]
    docs = [{"answer": truth, "question_id": k} for k, (_, truth, _) in enumerate(rows)]
    results = [
        utils.pope_process_results(d, [text])["pope_accuracy"] for d, (*_, text) in zip(docs, rows)
    ]
    ours = SCORES["pope"](answers(rows))
    for name, theirs in (
        ("f1", utils.pope_aggregate_f1_score),
        ("recall", utils.pope_aggregate_recall),
        ("accuracy", utils.pope_aggregate_accuracy),
        ("precision", utils.pope_aggregate_precision),
    ):
        assert ours[name] == round(100 * theirs(results), 2), name


def test_mme_is_lmms_evals(lmms):
    utils, r = lmms("mme.utils"), random.Random(0)
    said = ["Yes", "No", "yes, it is", "No.", "perhaps", "Not"]
    rows = [
        ((task, f"{k}.jpg"), truth, r.choice(said))
        for task in ("count", "OCR", "code_reasoning")
        for k in range(20)
        for truth in ("yes", "no")
    ]
    theirs = {"mme_perception_score": [], "mme_cognition_score": []}
    for (task, name), truth, text in rows:
        doc = {"category": task, "question_id": f"{task}/{name}", "answer": truth}
        for key, result in utils.mme_process_results(doc, [text]).items():
            theirs[key].append(result)
    ours = SCORES["mme"](answers(rows))
    for name in ("perception", "cognition"):
        total = utils.mme_aggregate_results(theirs[f"mme_{name}_score"])
        assert ours[name] == pytest.approx(total, abs=0.02)


def test_scienceqa_is_lmms_evals_for_letters(lmms):
    utils = lmms("scienceqa.utils")
    for truth in range(3):
        for text in ("A", "B", "B. it", "C", "C. so", "D", "none", ""):
            theirs = utils.sqa_process_results({"choices": "xyz", "answer": truth}, [text])
            assert (letter(text) == "ABC"[truth]) == theirs["exact_match"]


# ----------------------------------------------------------------------- a run


def asker(log=None, fail_after=None):
    """A model that answers the first letter of the prompt's last line but one."""

    def ask(prompts, pictures, max_new_tokens):
        if fail_after is not None and len(log) >= fail_after:
            raise KeyboardInterrupt
        if log is not None:
            log.extend(prompts)
        return [prompt.split("\n")[-2][0] for prompt in prompts]

    return ask


def test_answers_are_written_in_llavas_format(made, tmp_path):
    results = ask_and_score(
        "scienceqa", load_questions("scienceqa", made("scienceqa")), asker(), tmp_path, "m", batch=2
    )
    rows = [json.loads(line) for line in (tmp_path / "scienceqa.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "question_id": "4",
        "prompt": f"<image>\nQ4\nA. x\nB. y{LETTER}",
        "text": "B",
        "model_id": "m",
        "metadata": {},
    }
    assert ["<image>" in row["prompt"] for row in rows] == [True, False, True]
    assert results["score"] == results["picture"] == 50 and results["total"] == 66.67
    assert results["questions"] == 3
    assert not (tmp_path / "scienceqa.begun.jsonl").exists()


@pytest.mark.parametrize("name", MAKE)
def test_answers_in_a_file_get_the_score_of_the_run_that_wrote_them(
    name, made, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(Path(__file__).parent / "campaigns")
    from published import score_file

    folder = made(name)
    questions = load_questions(name, folder)
    results = ask_and_score(name, questions, asker(), tmp_path, "m")
    table = score_file(name, folder, tmp_path / f"{name}.jsonl")
    assert table and table.items() <= results.items()
    lines = (tmp_path / f"{name}.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="cut.jsonl: has no answer to 1 of "):
        score_file(name, folder, tmp_path / "cut.jsonl")


def test_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(made, tmp_path):
    questions, first, again = load_questions("mme", made("mme")), [], []
    whole = ask_and_score("mme", questions, asker(), tmp_path, "m", batch=5)
    text = (tmp_path / "mme.jsonl").read_text()
    with pytest.raises(KeyboardInterrupt):
        ask_and_score("mme", questions, asker(first, fail_after=4), tmp_path, "m", batch=4)
    begun = tmp_path / "mme.begun.jsonl"
    with open(begun, "a") as file:
        file.write('{"question_id": "count/2.jpg", "pro')  # the power went
    assert ask_and_score("mme", questions, asker(again), tmp_path, "m", batch=5) == whole
    assert (tmp_path / "mme.jsonl").read_text() == text
    assert len(first) == 4 and len(again) == 8 and not begun.exists()


def test_another_models_answers_are_not_continued(made, tmp_path):
    questions = load_questions("mme", made("mme"))
    with pytest.raises(KeyboardInterrupt):
        ask_and_score("mme", questions, asker([], fail_after=1), tmp_path, "m", batch=1)
    with pytest.raises(
        ValueError,
        match="has the first answers of an interrupted run of m; delete it.* or name another",
    ):
        ask_and_score("mme", questions, asker(), tmp_path, "other")


def test_answers_of_other_weights_or_another_dtype_are_not_continued(made, tmp_path):
    questions, by = load_questions("mme", made("mme")), {"weights": "12ab", "dtype": "float32"}
    resume = lambda by, log: ask_and_score("mme", questions, asker(log), tmp_path, "m", 1, by)
    with pytest.raises(KeyboardInterrupt):
        ask_and_score("mme", questions, asker([], fail_after=3), tmp_path, "m", 1, by)
    for other, named in ({"weights": "34cd"}, "weights"), ({"dtype": "bfloat16"}, "dtype"):
        with pytest.raises(ValueError, match=f"of m before its {named} changed; delete it"):
            resume(by | other, [])
    resume(by, log := [])
    assert len(log) == len(questions) - 3
    row = json.loads((tmp_path / "mme.jsonl").read_text().splitlines()[0])
    assert row["model_id"] == "m" and row["metadata"] == by


def test_fingerprint_is_of_the_models_files_alone(tmp_path):
    tiny_cumo(vocab=1024).save_pretrained(tmp_path)
    before = fingerprint(tmp_path)
    (tmp_path / "pope.json").write_text("{}")
    assert fingerprint(tmp_path) == before
    tiny_cumo(vocab=1024, seed=1).save_pretrained(tmp_path)
    assert fingerprint(tmp_path) != before, "other weights under the same name and of the same size"


@pytest.mark.parametrize("damaged", ['{"question_id": "cou', "[]", '{"question_id": []}', "\0\0"])
def test_a_damaged_line_is_one_error_and_as_the_last_it_is_dropped(damaged, made, tmp_path):
    questions = load_questions("mme", made("mme"))
    with pytest.raises(KeyboardInterrupt):
        ask_and_score("mme", questions, asker(log := [], fail_after=2), tmp_path, "m", 1)
    begun = tmp_path / "mme.begun.jsonl"
    first, second = begun.read_text().splitlines()
    begun.write_text(f"{first}\n{damaged}\n{second}\n")
    with pytest.raises(ValueError, match=r"mme.begun.jsonl, line 2: is damaged; delete it") as e:
        ask_and_score("mme", questions, asker(), tmp_path, "m", 1)
    assert "\n" not in str(e.value) and begun.read_text().count("\n") == 3, "nothing was lost"
    begun.write_text(f"{first}\n{damaged}\n")
    ask_and_score("mme", questions, asker(log), tmp_path, "m", 1)
    assert len(log) == 2 + len(questions) - 1


def test_limit_takes_the_first_questions_and_says_so(made, tmp_path):
    questions = load_questions("pope", made("pope"), limit=3)
    assert questions == load_questions("pope", tmp_path / "pope")[:3]
    assert ask_and_score("pope", questions, asker(), tmp_path, "m")["questions"] == 3


# ----------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "name, file, content, complaint",
    [
        ("pope", "coco/coco_pope_popular.json", None, "_popular.json: cannot be read (No such"),
        (
            "pope",
            "llava_pope_test.jsonl",
            '{"question_id": 1}\n',
            "test.jsonl, line 1: has no 'image'",
        ),
        ("pope", "llava_pope_test.jsonl", "\n{oops\n", "line 2: is not valid JSON"),
        ("pope", "llava_pope_test.jsonl", "", "has no question of pope"),
        ("pope", "val2014/1.jpg", None, "1.jpg: no such image (12 of 12 questions lack theirs)"),
        (
            "gqa",
            "data/testdev_balanced_questions.json",
            {"1": {}},
            "line 1: the benchmark's own files have no answer to '20'",
        ),
        ("gqa", "data/testdev_balanced_questions.json", [], "has a wrong format ("),
        ("textvqa", "TextVQA_0.5.1_val.json", [1], "record 0: has a wrong format"),
        ("textvqa", "TextVQA_0.5.1_val.json", {"data": 5}, "has no list 'data'"),
        (
            "vqav2",
            "v2_mscoco_val2014_annotations.json",
            {"annotations": [{}]},
            "record 0: has no 'answers'",
        ),
        (
            "textvqa",
            "TextVQA_0.5.1_val.json",
            {"data": [{"image_id": "aa", "question": "What brand is it?", "answers": []}]},
            "_val.json, record 0: has a wrong format (its answers are no list, or an empty one",
        ),
        (
            "vqav2",
            "v2_mscoco_val2014_annotations.json",
            {"annotations": [{"question_id": 0, "answers": [], "answer_type": "other"}]},
            "record 0: has a wrong format (its answers are no list, or an empty one",
        ),
        (
            "pope",
            "coco/coco_pope_random.json",
            '{"image": "1.jpg", "text": "Is there a cat in the image?", "label": "maybe"}',
            "_random.json, line 1: has a wrong format (its answer 'maybe' is none of yes, no",
        ),
        (
            "mme",
            "MME_Benchmark_release_version/count/1.txt",
            "Is it 1? Please answer yes or no.\tYess",
            "1.txt, line 1: has a wrong format (its answer 'yess' is none of yes, no",
        ),
        (
            "seed",
            "SEED-Bench.json",
            {
                "question_type": {"Scene Understanding": 1},
                "questions": [
                    {
                        "question_id": "11",
                        "answer": "b",
                        "data_type": "image",
                        "question_type_id": 1,
                    }
                ],
            },
            "record 0: has a wrong format (its answer 'b' is none of A, B",
        ),
        (
            "mmbench",
            "mmbench_dev_20230712.tsv",
            "index\tquestion\thint\tA\tanswer\timage\n1\ty\t\tz\t\t" + "x" * 70,
            "record 0: has a wrong format (its answer '' is none of A, B",
        ),
        ("scienceqa", "problems.json", {}, "record 0: problems.json has no answer to '4'"),
        ("scienceqa", "llava_test_CQM-A.json", {"a": 1}, "has no list"),
        (
            "mme",
            "MME_Benchmark_release_version/count/1.txt",
            "Is it?",
            "1.txt, line 1: is not a question",
        ),
        (
            "mme",
            "MME_Benchmark_release_version/count/1.txt",
            None,
            "have no answer to ('count', '1', 'Is",
        ),
        ("seed", "SEED-Bench.json", {"questions": []}, "SEED-Bench.json: has no 'question_type'"),
        (
            "mmbench",
            "mmbench_dev_20230712.tsv",
            "index\tquestion\nx\ty\n",
            "record 0: has a wrong format",
        ),
        (
            "mmbench",
            "mmbench_dev_20230712.tsv",
            "index\tquestion\n1\ty\n",
            "record 0: has no 'image'",
        ),
    ],
)
def test_faulty_folder_is_one_line_that_names_the_place(name, file, content, complaint, made):
    folder = made(name)
    (folder / file).unlink()
    if content is not None:
        write(folder / file, content)
    with pytest.raises(ValueError) as error:
        load_questions(name, folder)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert str(folder) in str(error.value) and (
        "extras/benchmarks.py lists at its top which files belong in --folder" in str(error.value)
        or "not valid JSON" in str(error.value))  # fmt: skip


def test_popes_labels_may_have_capitals(made):
    folder = made("pope")
    plain = load_questions("pope", folder)
    for file in (folder / "coco").iterdir():
        file.write_text(file.read_text().replace('"yes"', '"Yes"').replace('"no"', '"No "'))
    assert load_questions("pope", folder) == plain


def test_damaged_picture_names_its_question(made):
    questions = load_questions("mmbench", made("mmbench"))
    with pytest.raises(ValueError, match="^the picture of question 7: has a wrong format"):
        open_picture(questions[0]._replace(image=base64.b64encode(b"x" * 100).decode()))


# ----------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_cumo(experts=4, vocab=1024).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return folder


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device", "cpu", *map(str, flags)])
    evaluation.main()


def test_command_writes_score_and_answers(model, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("extras.benchmarks.BENCHMARKS", {"scienceqa": (read_scienceqa, 3)})
    command(
        monkeypatch,
        "--model",
        model,
        "--out",
        tmp_path,
        "--benchmark",
        "scienceqa",
        "--folder",
        made("scienceqa"),
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "scienceqa.json").read_text())
    assert shown["model"] == str(model) and shown["questions"] == 3
    rows = [json.loads(line) for line in (tmp_path / "scienceqa.jsonl").read_text().splitlines()]
    by = {"weights": fingerprint(model), "dtype": "float32"}
    assert [row["metadata"] for row in rows] == [by] * 3


def test_questions_with_and_without_a_picture_share_a_batch(model):
    net = evaluation.CuMo.from_pretrained(model).eval()
    tokenizer = evaluation.Tokenizer.from_pretrained(model)
    questions, image = ["What is it?", "Say a word, any word.", "Why?"], Image.new("RGB", (30, 30))
    pictures = [image, None, image]
    together = evaluation.answer_batch(net, tokenizer, questions, pictures, 6)
    alone = [
        evaluation.answer_batch(net, tokenizer, [q], [p], 6)[0] for q, p in zip(questions, pictures)
    ]
    assert together == alone
    only_text = evaluation.answer_batch(net, tokenizer, questions[1:2], [None], 6)
    assert only_text == together[1:2]


def test_experts_load_over_ones_own_pictures(model, tmp_path, monkeypatch, capsys):
    write(tmp_path / "pics" / "a.png", "red")
    write(tmp_path / "pics" / "b.png", "blue")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": k, "image": f"{k}.png", "conversations": talk} for k in "ab"]
    write(tmp_path / "mine.json", rows)
    drawn = []
    monkeypatch.setattr(plots, "draw_load", lambda load, file: drawn.append((load, file)))
    flags = ["--model", model, "--out", tmp_path / "out", "--data", tmp_path / "mine.json",
             "--image-folder", tmp_path / "pics"]  # fmt: skip
    command(monkeypatch, *flags, "--experts", tmp_path / "e.png")
    command(monkeypatch, *flags)
    command(monkeypatch, *flags, "--n", 1)
    default = str(tmp_path / "out" / "own_experts.png")
    assert [str(file) for _, file in drawn] == [str(tmp_path / "e.png"), default, default]
    net = evaluation.CuMo.from_pretrained(model).eval()
    pictures = [Image.open(tmp_path / "pics" / f"{k}.png") for k in "ab"]
    assert drawn[0][0] == drawn[1][0] == plots.expert_load(net, pictures)
    assert drawn[2][0] == plots.expert_load(net, pictures[:1])
    assert not (tmp_path / "out" / "eval.json").exists()


@pytest.mark.parametrize("flags, complaint", [
    (["--benchmark", "popo", "--folder", "x"], "'popo' is unknown; choose from pope, gqa"),
    (["--benchmark", "pope"], "--benchmark NAME and --folder DIR go together"),
    (["--folder", "x"], "--benchmark NAME and --folder DIR go together"),
    (["--benchmark", "pope", "--folder", "x", "--experts", "e.png"], "go together, without --data"),
    (["--benchmark", "pope", "--folder", "x"], "cannot be read (No such file or directory)"),
    (["--image-folder", "pics"], "--image-folder pics goes with --data FILE"),
    (["--dtype", "float8"], "--dtype 'float8' is unknown"),
    (["--experts", "nowhere/e.png"], "--experts nowhere/e.png cannot be written; name a file in"),
    pytest.param(["--experts", "e.doc"], "e.doc: its name must end in .png", marks=knows_kinds),
    (["--out", TOKENIZER], "tokenizer.json cannot be written (File exists); name another folder"),
    (["--model", TOKENIZER.parent], "is no CuMo but a language model without vision"),
    (["--n", "3"], "--n 3 must be 24 or more"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, complaint, model, tmp_path, monkeypatch, capsys):
    flags = ["--model", model, "--out", tmp_path, "--device", "cpu", *flags]
    assert complaint in refusal(evaluation.main, flags, monkeypatch, capsys)


def test_dense_model_has_no_experts_to_draw(tmp_path, monkeypatch, capsys):
    tiny_cumo(vocab=1024).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    write(tmp_path / "a.png", "red")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    write(tmp_path / "mine.json", [{"image": "a.png", "conversations": talk}])
    flags = ["--model", tmp_path / "dense", "--out", tmp_path, "--data", tmp_path / "mine.json",
             "--image-folder", tmp_path, "--device", "cpu"]  # fmt: skip
    drawn = [*flags, "--experts", tmp_path / "e.png"]
    assert "no expert sees a picture" in refusal(evaluation.main, drawn, monkeypatch, capsys)
    monkeypatch.setattr(evaluation, "evaluate_scenes", lambda *_: pytest.fail("asked first"))
    drawn = ["--model", tmp_path / "dense", "--device", "cpu", "--experts", tmp_path / "e.png"]
    assert "no expert sees a picture" in refusal(evaluation.main, drawn, monkeypatch, capsys)
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    evaluation.main()
    assert "1 answers of 1 records" in capsys.readouterr().out
    assert not (tmp_path / "own_experts.png").exists()
