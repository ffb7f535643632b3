"""Public benchmarks: their questions, as the original asks them, from files on disk.

    python eval.py --benchmark pope --folder eval/pope --model weights/CuMo-mistral-7b

Nothing is downloaded. `--folder` is the benchmark's folder of LLaVA's `eval.zip` (z: the file comes
with it), into which its own release is unpacked as well, as LLaVA's docs/Evaluation.md says:

    pope        z llava_pope_test.jsonl
                POPE: coco/coco_pope_adversarial.json, ..._popular.json, ..._random.json
                COCO: val2014/
    gqa         z llava_gqa_testdev_balanced.jsonl
                GQA: data/testdev_balanced_questions.json, data/images/
    textvqa     z llava_textvqa_val_v051_ocr.jsonl
                TextVQA: TextVQA_0.5.1_val.json, train_images/
    scienceqa   z llava_test_CQM-A.json
                ScienceQA: problems.json, images/test/
    mme         z llava_mme.jsonl
                MME: MME_Benchmark_release_version/, in it a folder for each task
    seed        z llava-seed-bench.jsonl
                SEED-Bench: SEED-Bench.json, SEED-Bench-image/
    mmbench     MMBench: mmbench_dev_20230712.tsv, which holds the pictures too
    mmbench_cn  MMBench: mmbench_dev_cn_20231003.tsv
    vqav2       VQA: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json
                COCO: val2014/ (papers report test-dev, whose answers are not public)

A question is a prompt and a picture, or none. LLaVA's files hold the whole prompt, with SHORT or
LETTER at its end; for the others it is written here. `<image>` and a line break come before it.
Answers are greedy, and go to `out/<benchmark>.jsonl` in LLaVA's format (question_id, prompt, text,
model_id, metadata), which the benchmarks' own scorers read, too. How they are scored here is told
in extras/scores.py. Until all are there the file is called `<benchmark>.begun.jsonl`. The same
command goes on with it, if the model has the same path, weights and dtype.
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
from data.images import open_image
from data.llava import parse_json
from extras.scores import OPTIONS, SCORES

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
YES_NO = ("yes", "no")
LAYOUT = "which files go where stands at the top of extras/benchmarks.py"


class Question(NamedTuple):
    id: str | int  # as in the question file; MME and TextVQA use one several times
    prompt: str
    image: Path | str | None  # a file, or one in base64
    truth: object
    group: object = ""  # what is also scored apart


# ------------------------------------------------------------------------------- reading files


def read(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({why}); {LAYOUT}") from None


def lines(path):
    """(where it stands, record) for each line of a JSONL file."""
    for n, line in enumerate(read(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {n}", parse_json(line, f"{path}, line {n}")


def records(path, name=None):
    """The same for a JSON list, or the list that is called `name` in a JSON object."""
    content = parse_json(read(path), path)
    rows = content.get(name) if name and isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds no list{f' {name!r}' * bool(name)}; {LAYOUT}")
    return [(f"{path}, record {k}", row) for k, row in enumerate(rows)]


@contextlib.contextmanager
def faults(where, lacks="has no"):
    """What is looked up in vain becomes a ValueError that tells where."""
    try:
        yield
    except LookupError as error:
        raise ValueError(f"{where}: {lacks} {error!s:.160}; {LAYOUT}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: is not what it should be ({error!s:.160}); {LAYOUT}") from None


def llava(folder, file, images, answer):
    """The questions of a file of LLaVA's. `answer(record)` -> (truth, group), or None to leave the
    question out; a KeyError if the benchmark's own files do not know it."""
    questions = []
    for where, record in lines(folder / file):
        with faults(where):
            id, image, prompt = record["question_id"], record["image"] + "", record["text"] + ""
        with faults(where, "the benchmark's own files have no answer to"):
            found = answer(record)
        if found:
            questions.append(Question(id, prompt, folder / images / image, *found))
    return questions


def first_line(text):
    return text.split("\n")[0].strip()


def one_of(options, text):
    """`text`, if it is one of the options. ValueError: the score would count every answer wrong."""
    if text not in options:
        raise ValueError(f"its answer {text!r} is none of {', '.join(options)}")
    return text


def people(answers):
    """What people have answered. ValueError if nobody has."""
    if not isinstance(answers, list) or not answers:
        raise ValueError("its answers are no list, or nobody's")
    return [answer + "" for answer in answers]


# ------------------------------------------------------------------------------- the benchmarks


def read_pope(folder):
    labels = {}
    for kind in ("adversarial", "popular", "random"):
        for where, record in lines(folder / "coco" / f"coco_pope_{kind}.json"):
            with faults(where):
                key = kind, record["image"], record["text"].strip()
                labels[key] = one_of(YES_NO, record["label"].strip().lower())

    def answer(record):
        kind = record["category"]
        return labels[kind, record["image"], first_line(record["text"])], kind

    return llava(folder, "llava_pope_test.jsonl", "val2014", answer)


def read_gqa(folder):
    truth = parse_json(read(file := folder / "data" / "testdev_balanced_questions.json"), file)
    return llava(folder, "llava_gqa_testdev_balanced.jsonl", "data/images",
                 lambda record: (truth[str(record["question_id"])]["answer"], ""))  # fmt: skip


def read_textvqa(folder):
    truth = {}
    for where, item in records(folder / "TextVQA_0.5.1_val.json", "data"):
        with faults(where):
            truth[item["image_id"], item["question"].strip().lower()] = people(item["answers"])

    def answer(record):  # the lines after the question hold the words that OCR found, and SHORT
        return truth[record["question_id"], first_line(record["text"]).lower()], ""

    return llava(folder, "llava_textvqa_val_v051_ocr.jsonl", "train_images", answer)


def read_mme(folder):
    release = folder / "MME_Benchmark_release_version"
    truth, ask = {}, "Please answer yes or no."  # which LLaVA's prompts leave out
    for file in sorted(release.rglob("*.txt")):  # of each picture, in its task's folder or below
        for n, line in enumerate(read(file).splitlines(), start=1):
            question, tab, answer = line.rpartition("\t")
            if not line.strip():
                continue
            if not tab:
                raise ValueError(f"{file}, line {n}: is no question, tab, and answer; {LAYOUT}")
            key = file.relative_to(release).parts[0], file.stem, question.replace(ask, "").strip()
            with faults(f"{file}, line {n}"):
                truth[key] = one_of(YES_NO, answer.strip().lower())

    def answer(record):
        task, *_, name = record["question_id"].split("/")
        question = first_line(record["text"]).replace(ask, "").strip()
        return truth[task, Path(name).stem, question], (task, name)

    return llava(folder, "llava_mme.jsonl", release.name, answer)


def read_seed(folder):
    file = folder / "SEED-Bench.json"
    with faults(file):
        kinds = parse_json(read(file), file)["question_type"]
        names = {number: name for name, number in kinds.items()}
    truth = {}
    for where, item in records(file, "questions"):
        with faults(where):
            kind = names[item["question_type_id"]] if item["data_type"] == "image" else None
            answer = one_of(OPTIONS, item["answer"])
            truth[str(item["question_id"])] = answer, kind

    def answer(record):
        found = truth[str(record["question_id"])]
        return found if found[1] else None  # it is about a video

    return llava(folder, "llava-seed-bench.jsonl", "", answer)


def read_scienceqa(folder):
    problems = parse_json(read(file := folder / "problems.json"), file)
    questions = []
    for where, record in records(folder / "llava_test_CQM-A.json"):
        with faults(where):
            id, image = record["id"], record.get("image")
            prompt = record["conversations"][0]["value"].replace(IMAGE_TAG, "").strip() + LETTER
            image = folder / "images" / "test" / image if image else None
        with faults(where, "problems.json has no answer to"):
            truth = OPTIONS[problems[id]["answer"]]
        prompt = f"{IMAGE_TAG}\n" * bool(image) + prompt  # LLaVA's scorer tells them apart by it
        questions.append(Question(id, prompt, image, truth, "picture" if image else "text"))
    return questions


def read_mmbench(folder, name="mmbench_dev_20230712.tsv", suffix=LETTER):
    csv.field_size_limit(1 << 30)  # a field holds a picture
    given = lambda text: text and text not in ("NA", "N/A") and text.lower() not in ("nan", "none")
    questions, images = [], {}
    table = csv.DictReader(io.StringIO(read(folder / name)), delimiter="\t")
    for k, row in enumerate(table):
        with faults(f"{folder / name}, record {k}"):
            index, image = int(row["index"]), row["image"]
            images[index] = image if len(image) > 64 else images[int(image)]  # as of another record
            options = itertools.takewhile(given, map(row.get, "ABCD"))
            parts = [row["hint"]] * bool(given(row["hint"])) + [row["question"]]
            parts += [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
            truth = one_of(OPTIONS, row["answer"].strip())
            group = index % 1_000_000  # the same, with options turned
        questions.append(Question(index, "\n".join(parts) + suffix, images[index], truth, group))
    return questions


def read_vqav2(folder):
    truth, questions = {}, []
    for where, item in records(folder / "v2_mscoco_val2014_annotations.json", "annotations"):
        with faults(where):
            said = people([answer["answer"] for answer in item["answers"]])
            truth[item["question_id"]] = said, item["answer_type"]
    for where, item in records(folder / "v2_OpenEnded_mscoco_val2014_questions.json", "questions"):
        with faults(where):
            image = folder / "val2014" / f"COCO_val2014_{item['image_id']:012d}.jpg"
            id, prompt = item["question_id"], item["question"] + SHORT
        with faults(where, "the annotations have no answer to"):
            questions.append(Question(id, prompt, image, *truth[id]))
    return questions


BENCHMARKS = {  # how its questions are read, and the longest answer in tokens
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


def load(name, folder, limit=0):
    """The questions of a benchmark, the first `limit` or (0) all. ValueError when a file or a
    picture is not there, or not what it should be."""
    if name not in BENCHMARKS:
        raise ValueError(f"--benchmark {name} is unknown; choose from {', '.join(BENCHMARKS)}")
    questions = BENCHMARKS[name][0](Path(folder))[: limit or None]
    absent = [q.image for q in questions if isinstance(q.image, Path) and not q.image.is_file()]
    if absent:
        raise ValueError(f"{absent[0]}: no such image ({len(absent)} of {len(questions)} questions "
                         f"lack theirs); {LAYOUT}")  # fmt: skip
    if not questions:
        raise ValueError(f"{folder}: holds no question of {name}; {LAYOUT}")
    return questions


def picture(question):
    """The picture (PIL) that a question is about, or None."""
    if not isinstance(question.image, str):
        return open_image(question.image) if question.image else None
    with faults(f"the picture of question {question.id!r:.60}"):
        return open_image(io.BytesIO(base64.b64decode(question.image)))


def earlier(file, model, metadata):
    """(id, prompt) -> answer, of a run that was interrupted; a last line that was cut off (as when
    the power fails) is removed. ValueError if another line is damaged, if the answers are another
    model's, or this one's with other `metadata`."""
    advice = "delete it, which begins anew, or name another --out"
    said, end = {}, 0
    *lines, cut = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            key, text = (row["question_id"], row["prompt"]), row["text"] + ""
            by, before = row["model_id"], row.get("metadata", {}) | {}
            said[key] = text
        except (ValueError, TypeError, KeyError):
            if n == len(lines) and not cut:
                break
            raise ValueError(f"{file}, line {n}: is damaged; {advice}") from None
        changed = [name for name in metadata if before.get(name) != metadata[name]]
        if by != model or changed:
            since = f" before its {' and '.join(changed)} changed" if by == model else ""
            raise ValueError(f"{file}: holds the first answers of {by}{since}, whose run was "
                             f"interrupted; {advice}")  # fmt: skip
        end += len(line) + 1
    if file.is_file():
        os.truncate(file, end)
    return said


def run(name, questions, ask, out, model, batch=8, metadata=None):
    """Ask the questions of a benchmark and score the answers -> its results.

    `ask(prompts, pictures, max_new_tokens)` -> answers; a picture may be None. An interrupted run
    goes on where it was, if it is the same `model`'s with the same `metadata` ({name: value}: what
    else the answers depend on), which stand beside each answer.
    """
    by = {"model_id": model, "metadata": metadata or {}}
    begun, key = out / f"{name}.begun.jsonl", lambda question: (question.id, question.prompt)
    said = earlier(begun, model, metadata or {})
    rest = [question for question in questions if key(question) not in said]
    bar = tqdm(total=len(questions), initial=len(questions) - len(rest), desc=name)
    with open(begun, "a") as file, bar:
        for start in range(0, len(rest), batch):
            part = rest[start : start + batch]
            pictures = [picture(question) for question in part]
            texts = ask([q.prompt for q in part], pictures, BENCHMARKS[name][1])
            for question, text in zip(part, texts):
                said[key(question)] = text
                row = dict(question_id=question.id, prompt=question.prompt, text=text)
                file.write(json.dumps(row | by) + "\n")
            file.flush()
            bar.update(len(part))
    begun.replace(out / f"{name}.jsonl")
    table = SCORES[name]([(question, said[key(question)]) for question in questions])
    score = next(iter(table.values()))
    about = {"benchmark": name, "model": model, "questions": len(questions)}
    return about | {"score": score} | table
