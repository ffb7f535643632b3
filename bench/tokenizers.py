"""Our tokenizer compared with the reference libraries: are the ids equal, and how fast is it?

    python bench/tokenizers.py     # 10 MB, some minutes; prints a table, writes tokenizers.json

Five kinds of text of about 2 MB each, from local files, equal in each run on a machine: Python's
own sources; the documents of the installed packages; words of many languages, one script a text
(the pieces of Mistral's tekken vocabulary); emoji and Unicode names; random code points. Each
reference encodes the same texts, alternating with ours. The best CPU time of three rounds counts,
so other jobs matter less. SmolLM2 is measured if its weights are in weights/.

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
sys.path[0] = str(ROOT)  # not bench/, where this file would be found as the library tokenizers
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import mistral_common
import sentencepiece
import tokenizers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from data.tokenizer import Tokenizer

MISTRAL = pathlib.Path(mistral_common.__file__).parent / "data"
TEKKEN = MISTRAL / "tekken_240911.json"
CHARACTERS = 4_000  # about the length of a text


def split_text(text):
    return [text[k : k + CHARACTERS] for k in range(0, len(text), CHARACTERS)]


def files(folder, *patterns):
    """Yields the contents of the files of a tree, sorted by name."""
    for file in sorted(f for pattern in patterns for f in pathlib.Path(folder).rglob(pattern)):
        if file.is_file() and "site-packages" not in str(file.relative_to(folder)):
            yield file.read_text(encoding="utf-8", errors="replace")


def languages(rng):
    """Yields texts without end, each with words of one script."""
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


def random_unicode(rng):
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    while True:
        some = rng.choices(ranges, k=CHARACTERS)
        yield "".join(chr(rng.randrange(*limits)) + " " * (rng.random() < 0.1) for limits in some)


def texts_by_kind(size):
    """{kind: texts}, `size` bytes of UTF-8 each, or less if there is less."""
    rng = random.Random(0)
    paths = sysconfig.get_paths()
    sources = {
        "Python sources": files(paths["stdlib"], "*.py"),
        "documents": files(paths["purelib"], "*.md", "*.rst", "*.txt", "METADATA", "LICENSE*"),
        "languages": languages(rng),
        "emoji, names": emoji(rng),
        "random Unicode": random_unicode(rng),
    }
    out = {}
    for kind, texts in sources.items():
        out[kind], left = [], size
        for text in (part for whole in texts for part in split_text(whole)):
            out[kind].append(text)
            left -= len(text.encode())
            if left <= 0:
                break
    return out


def tokenizer_pairs(folder):
    """Yields (name, our encode, the reference's encode) for each kind of tokenizer file."""

    def ours(name, *sources):
        (folder / name).mkdir()
        for source, target in sources:
            shutil.copy(source, folder / name / target)
        return Tokenizer.from_pretrained(folder / name).encode

    def library(file):  # without added tokens, since it would find them in the text
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
    """-> (texts with different ids, our CPU seconds, the reference's), best of `repeats` rounds."""
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
    rows, texts = [], texts_by_kind(args.mb * 1e6 / 5)
    print(f"{'tokenizer, reference':28} {'text':15} {'MB':>5} {'differ':>7} {'ours':>6} "
          f"{'theirs':>7} {'ratio':>6}  in MB/s")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, ours, reference in tokenizer_pairs(pathlib.Path(folder)):
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
