"""Public benchmarks: questions from local files, asked as the original does, answered and scored.

    python eval.py --benchmark pope --folder eval/pope --model weights/CuMo-mistral-7b

Nothing is downloaded. `--folder` holds the files below, laid out as LLaVA's docs/Evaluation.md
says. Files marked z come from LLaVA's `eval.zip`, the others from the benchmark's own release.

    pope        z llava_pope_test.jsonl, val2014/ (COCO), coco/coco_pope_adversarial.json,
                ..._popular.json, ..._random.json from AoiDragon/POPE at commit e3e3926
    gqa         z llava_gqa_testdev_balanced.jsonl,
                data/testdev_balanced_questions.json, data/images/
    textvqa     z llava_textvqa_val_v051_ocr.jsonl, TextVQA_0.5.1_val.json, train_images/
    scienceqa   z llava_test_CQM-A.json, problems.json, images/test/
    mme         z llava_mme.jsonl, MME_Benchmark_release_version/ with a folder for each task
    seed        z llava-seed-bench.jsonl, SEED-Bench.json, SEED-Bench-image/
    mmbench     mmbench_dev_20230712.tsv, which contains the pictures
    mmbench_cn  mmbench_dev_cn_20231003.tsv
    vqav2       v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json,
                val2014/ (COCO); papers report test-dev, whose answers are not public

Greedy answers go to `out/<benchmark>.jsonl` in LLaVA's format, which the benchmarks' own scorers
read (SEED's also wants the rows about videos). The same command continues an interrupted run.
"""

import base64
import contextlib
import csv
import io
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.chat import IMAGE_TAG
from data.flags import check_choice
from data.images import open_image
from data.records import parse_json
from data.weights import fingerprint, make_folder, write_json
from extras.scores import OPTIONS, SCORES

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
YES_NO = ("yes", "no")
NO_ANSWER = "the benchmark's own files have no answer to"
OTHER_POPE = (
    "take output/coco of github.com/AoiDragon/POPE at commit e3e3926; later ones have other "
    "questions than LLaVA's file and the published results (3,000 random ones, not 2,910), and no "
    "answer to"
)
PANDAS_NA = {  # LLaVA reads MMBench's table with pandas, for which these are empty
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
LAYOUT = "extras/benchmarks.py lists at its top which files belong in --folder"


class Question(NamedTuple):
    id: str | int  # as in the question file; not unique in MME and TextVQA
    prompt: str
    image: Path | str | None  # a file, or its content in base64
    truth: object
    group: object = ""  # questions of a group get a score of their own


# ------------------------------------------------------------------------------- reading files


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({why}); {LAYOUT}") from None


def jsonl_records(path):
    """Yields (file and line, record) for each line of a JSONL file."""
    for n, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {n}", parse_json(line, f"{path}, line {n}")


def json_records(path, name=None):
    """[(file and number, record)] of a JSON list, or of the list `name` in a JSON object."""
    content = parse_json(read_text(path), path)
    rows = content.get(name) if name and isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{path}: has no list{f' {name!r}' * bool(name)}; {LAYOUT}")
    return [(f"{path}, record {k}", row) for k, row in enumerate(rows)]


@contextlib.contextmanager
def locate_errors(where, lacks="has no"):
    """Turn a failed look-up or a wrong type into a ValueError that names the place."""
    try:
        yield
    except LookupError as error:
        raise ValueError(f"{where}: {lacks} {error!s:.160}; {LAYOUT}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: has a wrong format ({error!s:.160}); {LAYOUT}") from None


def llava_questions(folder, file, images, answer, lacks=NO_ANSWER):
    """The questions of one of LLaVA's files. `answer(record)` -> (truth, group), or None to skip
    the question; a KeyError, reported as `lacks`, if the benchmark's own files do not have it."""
    questions = []
    for where, record in jsonl_records(folder / file):
        with locate_errors(where):
            id, image, prompt = record["question_id"], record["image"] + "", record["text"] + ""
        with locate_errors(where, lacks):
            found = answer(record)
        if found:
            questions.append(Question(id, prompt, folder / images / image, *found))
    return questions


def first_line(text):
    return text.split("\n")[0].strip()


def one_of(options, text):
    """`text`, if it is an option. ValueError otherwise: every answer would be scored as wrong."""
    if text not in options:
        raise ValueError(f"its answer {text!r} is none of {', '.join(options)}")
    return text


def human_answers(answers):
    """The annotators' answers. ValueError if there are none."""
    if not isinstance(answers, list) or not answers:
        raise ValueError("its answers are no list, or an empty one")
    return [answer + "" for answer in answers]


# ------------------------------------------------------------------------------- the benchmarks


def read_pope(folder):
    labels = {}
    for kind in ("adversarial", "popular", "random"):
        for where, record in jsonl_records(folder / "coco" / f"coco_pope_{kind}.json"):
            with locate_errors(where):
                key = kind, record["image"], record["text"].strip()
                labels[key] = one_of(YES_NO, record["label"].strip().lower())

    def answer(record):
        kind = record["category"]
        return labels[kind, record["image"], first_line(record["text"])], kind

    return llava_questions(folder, "llava_pope_test.jsonl", "val2014", answer, OTHER_POPE)


def read_gqa(folder):
    truth = parse_json(read_text(file := folder / "data" / "testdev_balanced_questions.json"), file)
    return llava_questions(folder, "llava_gqa_testdev_balanced.jsonl", "data/images",
                 lambda record: (truth[str(record["question_id"])]["answer"], ""))  # fmt: skip


def read_textvqa(folder):
    truth = {}
    for where, item in json_records(folder / "TextVQA_0.5.1_val.json", "data"):
        with locate_errors(where):
            key = item["image_id"], item["question"].strip().lower()
            truth[key] = human_answers(item["answers"])

    def answer(record):  # after the question's line come the OCR words, and SHORT
        return truth[record["question_id"], first_line(record["text"]).lower()], ""

    return llava_questions(folder, "llava_textvqa_val_v051_ocr.jsonl", "train_images", answer)


def read_mme(folder):
    release = folder / "MME_Benchmark_release_version"
    truth, ask = {}, "Please answer yes or no."  # LLaVA's prompts leave `ask` out
    for file in sorted(release.rglob("*.txt")):  # one file a picture, in or below its task's folder
        for n, line in enumerate(read_text(file).splitlines(), start=1):
            question, tab, answer = line.rpartition("\t")
            if not line.strip():
                continue
            if not tab:
                raise ValueError(f"{file}, line {n}: is not a question, tab, answer; {LAYOUT}")
            key = file.relative_to(release).parts[0], file.stem, question.replace(ask, "").strip()
            with locate_errors(f"{file}, line {n}"):
                truth[key] = one_of(YES_NO, answer.strip().lower())

    def answer(record):
        task, *_, name = record["question_id"].split("/")
        question = first_line(record["text"]).replace(ask, "").strip()
        return truth[task, Path(name).stem, question], (task, name)

    return llava_questions(folder, "llava_mme.jsonl", release.name, answer)


def read_seed(folder):
    file = folder / "SEED-Bench.json"
    with locate_errors(file):
        kinds = parse_json(read_text(file), file)["question_type"]
        names = {number: name for name, number in kinds.items()}
    truth = {}
    for where, item in json_records(file, "questions"):
        with locate_errors(where):
            kind = names[item["question_type_id"]] if item["data_type"] == "image" else None
            answer = one_of(OPTIONS, item["answer"])
            truth[str(item["question_id"])] = answer, kind

    def answer(record):
        found = truth[str(record["question_id"])]
        return found if found[1] else None  # None: about a video

    return llava_questions(folder, "llava-seed-bench.jsonl", "", answer)


def read_scienceqa(folder):
    problems = parse_json(read_text(file := folder / "problems.json"), file)
    questions = []
    for where, record in json_records(folder / "llava_test_CQM-A.json"):
        with locate_errors(where):
            id, image = record["id"], record.get("image")
            prompt = record["conversations"][0]["value"].replace(IMAGE_TAG, "").strip() + LETTER
            image = folder / "images" / "test" / image if image else None
        with locate_errors(where, "problems.json has no answer to"):
            truth = OPTIONS[problems[id]["answer"]]
        prompt = f"{IMAGE_TAG}\n" * bool(image) + prompt  # LLaVA's scorer looks for the tag
        questions.append(Question(id, prompt, image, truth, "picture" if image else "text"))
    return questions


def read_mmbench(folder, name="mmbench_dev_20230712.tsv", suffix=LETTER):
    csv.field_size_limit(1 << 30)  # a field contains a picture
    given = lambda text: text and text not in PANDAS_NA and text.lower() not in ("nan", "none")
    questions, images = [], {}
    table = csv.DictReader(io.StringIO(read_text(folder / name)), delimiter="\t")
    for k, row in enumerate(table):
        with locate_errors(f"{folder / name}, record {k}"):
            index, image = int(row["index"]), row["image"]
            if len(image) <= 64:  # the number of another record that has the picture
                image = images[int(image)]
            images[index] = image
            options = itertools.takewhile(given, map(row.get, "ABCD"))
            parts = [row["hint"]] * bool(given(row["hint"])) + [row["question"]]
            parts += [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
            truth = one_of(OPTIONS, row["answer"].strip())
            group = index % 1_000_000  # the same question with its options rotated
        questions.append(Question(index, "\n".join(parts) + suffix, images[index], truth, group))
    return questions


def read_vqav2(folder):
    truth, questions = {}, []
    for where, item in json_records(folder / "v2_mscoco_val2014_annotations.json", "annotations"):
        with locate_errors(where):
            answers = human_answers([answer["answer"] for answer in item["answers"]])
            truth[item["question_id"]] = answers, item["answer_type"]
    file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    for where, item in json_records(file, "questions"):
        with locate_errors(where):
            image = folder / "val2014" / f"COCO_val2014_{item['image_id']:012d}.jpg"
            id, prompt = item["question_id"], item["question"] + SHORT
        with locate_errors(where, "the annotations have no answer to"):
            questions.append(Question(id, prompt, image, *truth[id]))
    return questions


BENCHMARKS = {  # how to read its questions, and the most tokens of an answer
    "pope": (read_pope, 128),
    "gqa": (read_gqa, 128),
    "textvqa": (read_textvqa, 128),
    "vqav2": (read_vqav2, 128),
    "scienceqa": (read_scienceqa, 1024),
    "mme": (read_mme, 128),
    "mmbench": (read_mmbench, 1024),
    "mmbench_cn": (lambda f: read_mmbench(f, "mmbench_dev_cn_20231003.tsv", LETTER_CN), 1024),
    "seed": (read_seed, 128),
}


# ------------------------------------------------------------------------------- asking


def load_questions(name, folder, limit=0):
    """The questions of a benchmark, the first `limit` or (0) all. ValueError for a missing picture,
    and for a file that is missing or has a wrong format."""
    check_choice("benchmark", name, BENCHMARKS)
    questions = BENCHMARKS[name][0](Path(folder))[: limit or None]
    absent = [q.image for q in questions if isinstance(q.image, Path) and not q.image.is_file()]
    if absent:
        raise ValueError(f"{absent[0]}: no such image ({len(absent)} of {len(questions)} questions "
                         f"lack theirs); {LAYOUT}")  # fmt: skip
    if not questions:
        raise ValueError(f"{folder}: has no question of {name}; {LAYOUT}")
    return questions


def open_picture(question):
    """The picture (PIL) of a question, or None."""
    if not isinstance(question.image, str):
        return open_image(question.image) if question.image else None
    with locate_errors(f"the picture of question {question.id!r:.60}"):
        return open_image(io.BytesIO(base64.b64decode(question.image)))


def read_begun(file, model, metadata):
    """{(id, prompt): answer} of an interrupted run; a damaged last line (power failure) is cut off.

    ValueError if another line is damaged, or if `model` or `metadata` differ from the run's.
    """
    advice = "delete it to start again, or name another --out"
    answers, end = {}, 0
    *lines, cut = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            key, text = (row["question_id"], row["prompt"]), row["text"] + ""
            by, before = row["model_id"], row.get("metadata", {}) | {}
            answers[key] = text
        except (ValueError, TypeError, KeyError):
            if n == len(lines) and not cut:
                break
            raise ValueError(f"{file}, line {n}: is damaged; {advice}") from None
        changed = [name for name in metadata if before.get(name) != metadata[name]]
        if by != model or changed:
            since = f" before its {' and '.join(changed)} changed" if by == model else ""
            raise ValueError(f"{file}: has the first answers of an interrupted run of {by}{since}; "
                             f"{advice}")  # fmt: skip
        end += len(line) + 1
    if file.is_file():
        os.truncate(file, end)
    return answers


def ask_and_score(name, questions, ask, out, model, batch=8, metadata=None):
    """Ask the questions of a benchmark and score the answers -> its results.

    `ask(prompts, pictures, max_new_tokens)` -> answers; a picture may be None. `metadata` {name:
    value}: what else the answers depend on, written with each answer. An interrupted run continues
    if `model` and `metadata` are the same.
    """
    by = {"model_id": model, "metadata": metadata or {}}
    begun, key = out / f"{name}.begun.jsonl", lambda question: (question.id, question.prompt)
    answers = read_begun(begun, model, metadata or {})
    rest = [question for question in questions if key(question) not in answers]
    bar = tqdm(total=len(questions), initial=len(questions) - len(rest), desc=name)
    with open(begun, "a") as file, bar:
        for start in range(0, len(rest), batch):
            part = rest[start : start + batch]
            pictures = [open_picture(question) for question in part]
            texts = ask([q.prompt for q in part], pictures, BENCHMARKS[name][1])
            for question, text in zip(part, texts):
                answers[key(question)] = text
                row = dict(question_id=question.id, prompt=question.prompt, text=text)
                file.write(json.dumps(row | by) + "\n")
            file.flush()
            bar.update(len(part))
    begun.replace(out / f"{name}.jsonl")
    table = SCORES[name]([(question, answers[key(question)]) for question in questions])
    score = next(iter(table.values()))
    about = {"benchmark": name, "model": model, "questions": len(questions)}
    return about | {"score": score} | table


def evaluate(cfg, limit, open_model):
    """eval.py --benchmark: the whole evaluation; prints the results and writes them to --out.
    `open_model(cfg)` -> (folder, model, ask), called after the benchmark's files have been read."""
    out = make_folder(cfg.out)
    questions = load_questions(cfg.benchmark, cfg.folder, limit)
    path, _, ask = open_model(cfg)
    metadata = {"weights": fingerprint(path), "dtype": cfg.dtype or "float32"}
    results = ask_and_score(cfg.benchmark, questions, ask, out, str(path), cfg.batch, metadata)
    write_json(out / f"{cfg.benchmark}.json", results)
    print(json.dumps(results, indent=1))
