"""Our tokenizer beside the libraries it stands for: the same ids? and how fast?

    python bench/tokenizers.py     # 10 MB, some minutes; prints a table, writes tokenizers.json

Five kinds of text of about 2 MB each, made from what is on the disk, the same at each run on one
machine: Python's own sources; the documents of the installed packages; words of many languages, one
script a text (the pieces of Mistral's tekken vocabulary); emoji and the names of Unicode; and code
points drawn at random. Each reference reads the same texts in the same run, alternating with ours,
and its best of three times counts (seconds of the processor, so other jobs matter less). SmolLM2 is
measured when its weights' folder is there.

Needs the packages of the extra `test`. One thread each.
"""

import argparse
import base64
import json
import os
import pathlib
import platform
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import unicodedata

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # instead of bench/, where this file has the name of a library
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import mistral_common
import sentencepiece
import tokenizers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from data.tokenizer import Tokenizer

MISTRAL = pathlib.Path(mistral_common.__file__).parent / "data"
TEKKEN = MISTRAL / "tekken_240911.json"
CHARACTERS = 4_000  # of one text, about


def cut(text):
    return [text[k : k + CHARACTERS] for k in range(0, len(text), CHARACTERS)]


def files(folder, *patterns):
    """The contents of files of a tree, in the order of their names."""
    for file in sorted(f for pattern in patterns for f in pathlib.Path(folder).rglob(pattern)):
        if file.is_file() and "site-packages" not in str(file.relative_to(folder)):
            yield file.read_text(encoding="utf-8", errors="replace")


def languages(rng):
    """Endless texts of words of one script each."""
    scripts = {}
    for token in json.loads(TEKKEN.read_text())["vocab"]:
        word = base64.b64decode(token["token_bytes"]).decode(errors="ignore").strip()
        if len(word) > 1 and word.isalpha() and not word.isascii():
            scripts.setdefault(unicodedata.name(word[-1], "?").split()[0], []).append(word)
    scripts = {name: words for name, words in scripts.items() if len(words) > 20}
    while True:
        name = rng.choice(sorted(scripts))
        space = "" if name in ("CJK", "HIRAGANA", "KATAKANA", "THAI") else " "
        ends = [*[space] * 9, ", ", ". ", "。" if space == "" else ".\n"]
        yield "".join(w + rng.choice(ends) for w in rng.choices(scripts[name], k=CHARACTERS // 6))


def emoji(rng):
    points = [chr(c) for c in (*range(0x1F300, 0x1FAFF), *range(0x2600, 0x27BF))]
    names = [unicodedata.name(chr(c), "") for c in range(0x30000)]
    names = [name for name in names if name and not name.startswith("CJK")]
    glue = ["", "", " ", "\u200d", "\ufe0f", "\U0001f3fd"]
    while True:
        some = "".join(e + rng.choice(glue) for e in rng.choices(points, k=CHARACTERS // 6))
        yield some + "\n".join(rng.choices(names, k=CHARACTERS // 50))


def anything(rng):
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    while True:
        some = rng.choices(ranges, k=CHARACTERS)
        yield "".join(chr(rng.randrange(*limits)) + " " * (rng.random() < 0.1) for limits in some)


def corpus(size):
    """{kind: texts}, `size` bytes of UTF-8 each, or what there is."""
    rng = random.Random(0)
    paths = sysconfig.get_paths()
    sources = {
        "Python sources": files(paths["stdlib"], "*.py"),
        "documents": files(paths["purelib"], "*.md", "*.rst", "*.txt", "METADATA", "LICENSE*"),
        "languages": languages(rng),
        "emoji, names": emoji(rng),
        "random Unicode": anything(rng),
    }
    out = {}
    for kind, texts in sources.items():
        out[kind], left = [], size
        for text in (part for whole in texts for part in cut(whole)):
            out[kind].append(text)
            left -= len(text.encode())
            if left <= 0:
                break
    return out


def pairs(folder):
    """(name, our encode, the reference's encode) of each kind of tokenizer file."""

    def ours(name, *sources):
        (folder / name).mkdir()
        for source, target in sources:
            shutil.copy(source, folder / name / target)
        return Tokenizer.from_pretrained(folder / name).encode

    def library(file):  # which would find special tokens in the text, so it is given none
        spec = json.loads(file.read_text()) | {"added_tokens": []}
        reference = tokenizers.Tokenizer.from_str(json.dumps(spec))
        return lambda text: reference.encode(text, add_special_tokens=False).ids

    model = MISTRAL / "tokenizer.model.v1"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    yield "Mistral v1, sentencepiece", ours("v1", (model, "tokenizer.model")), reference.encode
    tekken = Tekkenizer.from_file(TEKKEN)
    reference = lambda text: tekken.encode(text, bos=False, eos=False)
    yield "tekken, mistral-common", ours("tekken", (TEKKEN, "tekken.json")), reference
    mini = ROOT / "data" / "mini" / "llm" / "tokenizer.json"
    yield "miniature, tokenizers", ours("mini", (mini, mini.name)), library(mini)
    smol = ROOT / "weights" / "SmolLM2-135M-Instruct"
    if smol.is_dir():
        copies = [(smol / name, name) for name in ("tokenizer.json", "tokenizer_config.json")]
        yield "SmolLM2, tokenizers", ours("smol", *copies), library(smol / "tokenizer.json")


def compare(ours, reference, texts, repeats=3):
    """(texts with other ids, our seconds, the reference's), the best times of `repeats` rounds."""
    best, different = [float("inf")] * 2, 0
    for _ in range(repeats):
        results = []
        for k, encode in enumerate((ours, reference)):
            start = time.process_time()
            results.append([encode(text) for text in texts])
            best[k] = min(best[k], time.process_time() - start)
        different = sum(a != b for a, b in zip(*results))
    return different, *best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--mb", type=float, default=10, help="megabytes of text [10]")
    args = parser.parse_args()
    rows, texts = [], corpus(args.mb * 1e6 / 5)
    print(f"{'tokenizer, reference':28} {'text':15} {'MB':>5} {'differ':>7} {'ours':>6} "
          f"{'theirs':>7} {'ratio':>6}  MB/s")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, ours, reference in pairs(pathlib.Path(folder)):
            total = [0, 0, 0, 0]
            for kind, some in [*texts.items(), ("all", [])]:
                measured = total
                if some:
                    measured = (sum(len(t.encode()) for t in some) / 1e6,
                                *compare(ours, reference, some))  # fmt: skip
                    total = [a + b for a, b in zip(total, measured)]
                mb, different, mine, theirs = measured
                row = dict(tokenizer=name, text=kind, mb=round(mb, 2), texts_that_differ=different,
                           ours_mb_s=round(mb / mine, 2), reference_mb_s=round(mb / theirs, 2),
                           ratio=round(theirs / mine, 2))  # fmt: skip
                rows.append(row)
                print(f"{name:28} {kind:15} {mb:5.1f} {different:7} {mb / mine:6.2f} "
                      f"{mb / theirs:7.2f} {theirs / mine:6.2f}", flush=True)  # fmt: skip
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    content = {"command": "python bench/tokenizers.py", "machine": cpu[1] if cpu else "unknown",
               "python": platform.python_version(), "rows": rows}  # fmt: skip
    (ROOT / "bench" / "tokenizers.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
