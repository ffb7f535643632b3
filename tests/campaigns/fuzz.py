"""Fuzz the readers of untrusted files: each damaged file is read, or refused by one clear line.

    python tests/campaigns/fuzz.py --seconds 600 images checkpoint   # these targets; none: all
    python tests/campaigns/fuzz.py --input 4711 images               # repeat one, show its error
    python tests/campaigns/fuzz.py --coverage --seconds 600 images   # guided by coverage: atheris

An input is a valid file of a target, damaged: bytes changed, cut, doubled; JSON values replaced,
nested, left out. It depends only on target, seed and number. Findings are

    - any exception that is not the project's own: a ValueError of one line, raised by one of our
      files, or an OSError
    - more than 20 seconds of CPU time, more than 6 GB of memory
    - a broken promise: text that its tokens do not decode to, labels and ids of different lengths,
      a picture that does not become [3, S, S] finite numbers

Findings are printed, counted (`--out FILE`: into its `inputs`) and make the exit status 1.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"
import torch

INSTRUMENTED = contextlib.nullcontext()
if "--coverage" in sys.argv:
    import atheris

    INSTRUMENTED = atheris.instrument_imports(include=["data", "PIL"])
with INSTRUMENTED:
    import numpy as np
    from PIL import Image
    from tiny import TOKENIZER, tiny_cumo, tiny_weights

    from clip_moe import CLIPVision
    from cumo import CuMo
    from data.chat import TEMPLATES, render, render_next
    from data.images import MODES, open_image, preprocess
    from data.llava import LlavaData, encode
    from data.tokenizer import Tokenizer, protobuf
    from data.weights import write_json, write_tensors
    from llm import LLM
    from runs.results import commit, machine

HOSTILE = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "", " ", "<image>", "<image><image>", "</s>", "[INST]", "\0", "\ud800", "\u2028",
    "▁", "a" * 5000, "../../x", "/etc/passwd", "human", "gpt", "BPE", [], {}, [[]], {"a": {}},
    [None], {"": []}, "0x1", "é", "🚀",
]  # fmt: skip
BLOBS = [b"", b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\x7f", b'"', b"{", b"[", b"9"]


# ------------------------------------------------------------------------------------- mutation


def mutated(name, blob, dice):
    """One to four changes of a file; most changes of a JSON file keep it valid JSON."""
    if name.endswith(".json") and dice.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):  # nested too deeply to copy
            content = json.loads(blob)
            for _ in range(dice.randint(1, 4)):
                content = changed_json(content, dice)
            text = json.dumps(content)
            if dice.random() < 0.03:
                text = text.replace("1", "9" * 5000, 1)  # more digits than Python converts
            return text.encode()
    blob = bytearray(blob)
    for _ in range(dice.randint(1, 4)):
        at, way = dice.randrange(len(blob) + 1), dice.randrange(7)
        if dice.random() < 0.3:
            at = min(at, dice.randrange(200))  # headers
        end = min(len(blob), at + dice.choice((1, 2, 4, 30, 1000)))
        if way == 0:
            blob[at : at + 1] = bytes([dice.randrange(256)])
        elif way == 1 and at < len(blob):
            blob[at] ^= 1 << dice.randrange(8)
        elif way == 2:
            blob[at:end] = dice.choice(BLOBS)
        elif way == 3:
            blob[at:at] = blob[at:end]
        elif way == 4:
            del blob[at:end]
        elif way == 5 and dice.random() < 0.3:
            del blob[at:]
        else:
            blob[at : at + 4] = dice.randbytes(4)
    return bytes(blob)


def changed_json(content, dice):
    """A copy with one change at a random place."""
    if not isinstance(content, dict | list) or not content or dice.random() < 0.05:
        value = copy.deepcopy(dice.choice(HOSTILE))
        for _ in range(dice.choice((0, 0, 0, 0, 0, 1, 2, 400))):
            value = [value]
        return value
    content = copy.copy(content)
    key = dice.choice(list(content)) if isinstance(content, dict) else dice.randrange(len(content))
    way = dice.random()
    if way < 0.1:
        del content[key]
    elif way < 0.2 and isinstance(content, list):
        content.append(copy.deepcopy(content[key]))
    elif way < 0.2:
        content[str(dice.choice(HOSTILE))] = content[key]
    elif way < 0.3 and isinstance(content, list):
        dice.shuffle(content)
    else:
        content[key] = changed_json(content[key], dice)
    return content


# ------------------------------------------------------------------------------------- targets


class Llava:
    """The reader of LLaVA JSON, and the encoding of its samples."""

    def __init__(self, place):
        self.place, self.tokenizer = place, Tokenizer.from_pretrained(TOKENIZER.parent)
        Image.new("RGB", (40, 30), "red").save(place / "a.png")
        (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")

        def record(k, image, *said):
            turns = [{"from": ("human", "gpt")[i % 2], "value": x} for i, x in enumerate(said)]
            return {"id": k, "image": image, "conversations": turns}

        records = [
            record("1", "a.png", "<image>\nWhat is this?", "a red picture"),
            record(2, ["a.png", "a.png"], "<image> and <image>", "red", "Sure?", "yes"),
            record("t", None, "Hello", "Hi"),
            record("b", "broken.png", "<image>", "nothing"),
            record("e", "a.png", "<image>", ""),
        ]
        lines = "\n".join(map(json.dumps, records))
        self.files = {"data.json": json.dumps(records).encode(), "data.jsonl": lines.encode()}

    def read(self, name, blob):
        (self.place / name).write_bytes(blob)
        data = LlavaData(self.place / name, self.place)
        for i in range(len(data)):
            for template in ("mistral_instruct", "plain"):
                with contextlib.suppress(ValueError):  # the error names the sample
                    ids, labels, images, _ = encode(
                        data[i], self.tokenizer, template, 9, 24, max_tokens=60
                    )
                    assert len(ids) == len(labels) <= 60 and len(images) * 9 == ids.count(-200)


class Chat:
    """Conversations to ids and labels."""

    def __init__(self, place):
        self.tokenizer = Tokenizer.from_pretrained(TOKENIZER.parent)
        turns = [{"from": w, "value": v} for w, v in (
            ("human", "<image>\nWhat </s> is [INST] this?"), ("gpt", "a cat"), ("human", "Why?"),
            ("gpt", "Because."))]  # fmt: skip
        case = {"turns": turns, "template": "mistral_instruct", "images": 1, "next": "<image>?"}
        self.files = {f"{t}.json": json.dumps(case | {"template": t}).encode() for t in TEMPLATES}

    def read(self, name, blob):
        case = json.loads(blob) if plausible(blob) else None
        if not isinstance(case, dict):
            return
        n = case.get("images")
        n = n if type(n) is int else 1
        template = case.get("template")
        template = template if isinstance(template, str) else "mistral_instruct"
        turns = case.get("turns")
        ids, labels = render(turns, self.tokenizer, template, 9, n)
        assert len(ids) == len(labels) and ids.count(-200) == 9 * n
        assert all(label in (-100, i) for i, label in zip(ids, labels))
        if isinstance(case.get("next"), str):
            render_next(case["next"], self.tokenizer, template, 9, case["next"].count("<image>"))


class Text:
    """Any text to ids and back, with three kinds of tokenizers."""

    def __init__(self, place):
        self.all = []
        for name, blob in tokenizer_files().items():
            (place / name).mkdir()
            (place / name / name.removeprefix("sp_")).write_bytes(blob)
            self.all.append(Tokenizer.from_pretrained(place / name))
        words = "It's 12 o'clock,\t\n  Ünïcode 你好 👩\u200d🚀 </s> [INST] ▁x e\u0301 ½ \x7f\x00"
        self.files = {"words": words.encode(), "blanks": b"  a  b \r\n\n  ", "more": bytes(256)}

    def read(self, name, blob):
        for text in (blob.decode(errors="replace"), blob.decode(errors="surrogateescape")):
            for tokenizer in self.all:
                ids = tokenizer.encode(text)
                assert all(0 <= i < tokenizer.vocab_size for i in ids)
                assert not set(ids) & set(tokenizer.special.values())
                back = tokenizer.decode(ids)
                plain = text.encode(errors="replace").decode() == text and "▁" not in text
                if plain and not tokenizer.gone:
                    assert back == text, (text, back)


class TokenizerFiles:
    """tokenizer.model, tokenizer.json, tekken.json, tokenizer_config.json."""

    def __init__(self, place):
        self.place, self.files = place, tokenizer_files()
        named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
        self.files["tokenizer_config.json"] = json.dumps(named).encode()

    def read(self, name, blob):
        for file in self.place.iterdir():
            file.unlink()
        if name == "tokenizer_config.json":
            shutil.copy(TOKENIZER, self.place)
        (self.place / name.removeprefix("sp_")).write_bytes(blob)
        tokenizer = Tokenizer.from_pretrained(self.place)
        for text in ("", "Hello, a cat! 12\n", "é你🚀\ud800\0"):
            ids = tokenizer.encode(text)
            assert all(type(i) is int for i in ids), ids
            tokenizer.decode(ids)


class Images:
    """Pictures in every format that Pillow writes, to the tensor that CLIP takes."""

    def __init__(self, place):
        self.place, self.files = place, {}
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 31, 3), np.uint8))
        for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX"):
            file = io.BytesIO()
            noise.save(file, kind)
            self.files[kind] = file.getvalue()
        for mode in ("1", "L", "P", "LA", "RGBA", "I;16"):
            file = io.BytesIO()
            noise.convert("L" if mode[0] == "I" else mode).convert(mode).save(file, "PNG")
            self.files[f"PNG {mode}"] = file.getvalue()

    def read(self, name, blob):
        if name.startswith("PNG"):
            blob = with_checksums(blob)
        (self.place / "picture").write_bytes(blob)
        image = open_image(self.place / "picture")
        for mode in MODES:
            x = preprocess(image, 24, mode)
            assert x.shape == (3, 24, 24) and bool(x.isfinite().all())


class Checkpoint:
    """config.json, safetensors and their index of a CuMo, a CLIP and a language model."""

    def __init__(self, place):
        self.kinds = {"cumo": CuMo, "clip": CLIPVision, "llm": LLM}
        tiny_cumo(experts=2).save_pretrained(place / "cumo")
        tiny_weights(place)
        sharded = place / "sharded"
        tensors = tiny_cumo().public_state_dict()
        write_tensors(sharded, tensors, max_shard_bytes=40_000)
        write_json(sharded / "config.json", tiny_cumo().cfg.to_original())
        self.kinds["sharded"] = CuMo
        self.place, self.files = place, {}
        for kind in self.kinds:
            for file in (place / kind).glob("*"):
                if file.name == "config.json" or file.name.startswith("model.safetensors"):
                    self.files[f"{kind}/{file.name}"] = file.read_bytes()

    def read(self, name, blob):
        file = self.place / name
        if name.endswith(".safetensors"):
            blob = with_length(blob)
        file.write_bytes(blob)
        try:
            self.kinds[name.split("/")[0]].from_pretrained(file.parent)
        finally:
            file.write_bytes(self.files[name])


TARGETS = {"llava": Llava, "chat": Chat, "text": Text, "tokenizer-files": TokenizerFiles,
           "images": Images, "checkpoint": Checkpoint}  # fmt: skip


def plausible(blob):
    try:
        json.loads(blob)
    except (ValueError, RecursionError):
        return False
    return True


def tokenizer_files():
    """{name: content} of a small file of each kind; "sp_" keeps tokenizer.model apart."""
    import mistral_common

    mistral = Path(mistral_common.__file__).parent / "data"
    model, n = b"", 0
    for number, value in protobuf((mistral / "tokenizer.model.v1").read_bytes()):
        n += number == 1
        if number != 1 or n < 500:
            model += bytes([number << 3 | 2]) + varint(len(value)) + value
    tekken = {"config": {"pattern": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
                         "num_vocab_tokens": 258, "default_vocab_size": 278,
                         "default_num_special_tokens": 20, "version": "v3"},
              "vocab": [{"rank": i, "token_bytes": b64(bytes([i])), "token_str": None}
                        for i in range(256)]}  # fmt: skip
    for i, piece in enumerate((b"he", b"ll"), 256):
        tekken["vocab"].append({"rank": i, "token_bytes": b64(piece), "token_str": piece.decode()})
    return {"sp_tokenizer.model": model, "tokenizer.json": TOKENIZER.read_bytes(),
            "tekken.json": json.dumps(tekken).encode()}  # fmt: skip


def b64(raw):
    import base64

    return base64.b64encode(raw).decode()


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def with_checksums(png):
    """A damaged PNG with valid chunk checksums, so that Pillow reads on."""
    out, at = png[:8], 8
    while at + 12 <= len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind_data = png[at + 4 : at + 8 + size]
        if len(kind_data) < size + 4:
            break
        out += png[at : at + 4] + kind_data + struct.pack(">I", zlib.crc32(kind_data))
        at += 12 + size
    return out + png[at:]


def with_length(blob):
    """Give half of the damaged safetensors the right header length."""
    end = blob.find(b"]}}")
    if end < 0 or zlib.crc32(blob) % 2:
        return blob
    return struct.pack("<Q", end + 3 - 8) + blob[8:] if end > 8 else blob


# ------------------------------------------------------------------------------------- the loop


class TooSlow(BaseException):
    pass


def too_slow(*_):
    raise TooSlow


def attempt(target, name, blob):
    """ "read", "refused", or the traceback of a finding."""
    signal.setitimer(signal.ITIMER_PROF, 20)  # CPU time
    try:
        target.read(name, blob)
        return "read"
    except OSError:
        return "refused"
    except ValueError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if Path(frame.filename).is_relative_to(ROOT) and "\n" not in str(error):
            return "refused"
        return traceback.format_exc()
    except KeyboardInterrupt:
        raise
    except BaseException:  # a Rust panic is not an Exception
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def input_of(target, kind, seed, number):
    dice = random.Random(f"{kind} {seed} {number}")
    name = dice.choice(sorted(target.files))
    return name, mutated(name, target.files[name], dice)


def fuzz(kind, target, seed, seconds):
    """-> {"tried", "read", "refused", "lost"}; prints each finding with a new traceback."""
    counts, seen, start = dict(tried=0, read=0, refused=0, lost=0), set(), time.process_time()
    while time.process_time() - start < seconds:
        name, blob = input_of(target, kind, seed, counts["tried"])
        end = attempt(target, name, blob)
        if end not in counts:
            where = tuple(line for line in end.splitlines() if line.startswith("  File "))[-2:]
            if where not in seen:
                print(f"\nFINDING {kind} {counts['tried']} ({name}):\n{end}", flush=True)
            seen.add(where)
            end = "lost"
        counts[end] += 1
        counts["tried"] += 1
    return counts


def fuzz_by_coverage(kind, seconds):
    """The same with atheris, which keeps and mutates inputs that reach new lines."""
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as corpus:
        target = TARGETS[kind](Path(place))
        names = sorted(target.files)
        for k, name in enumerate(names):
            (Path(corpus) / str(k)).write_bytes(bytes([k]) + target.files[name])

        def one(blob):
            if blob:
                end = attempt(target, names[blob[0] % len(names)], blob[1:])
                if end not in ("read", "refused"):
                    raise RuntimeError(end)

        def mutate(blob, most, seed):
            dice = random.Random(seed)
            if not blob or dice.random() < 0.5:
                return atheris.Mutate(blob, most)
            name = names[blob[0] % len(names)]
            return (blob[:1] + mutated(name, blob[1:], dice))[:most]

        options = [f"-max_total_time={seconds}", "-max_len=100000", "-rss_limit_mb=6000",
                   "-timeout=60", corpus]  # fmt: skip
        atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate)
        atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)} [all]")
    parser.add_argument("--seconds", type=float, default=10, help="CPU time of each target [10]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=int, help="only this input")
    parser.add_argument("--coverage", action="store_true", help="guided by coverage; one target")
    parser.add_argument("--out", help="JSON file whose `inputs` get the counts")
    args = parser.parse_args()
    for kind in args.targets:
        if kind not in TARGETS:
            parser.error(f"{kind} is not a target; choose from {', '.join(TARGETS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Pillow's warnings about odd files
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, -1))
    signal.signal(signal.SIGPROF, too_slow)
    if args.coverage:
        fuzz_by_coverage(args.targets[0], int(args.seconds))
    lost = 0
    for kind in args.targets or TARGETS:
        with tempfile.TemporaryDirectory() as place:
            target = TARGETS[kind](Path(place))
            if args.input is not None:
                print(attempt(target, *input_of(target, kind, args.seed, args.input)))
                continue
            found = fuzz(kind, target, args.seed, args.seconds)
        lost += found["lost"]
        print(f"{kind:16} {found}", flush=True)
        if args.out:
            file = Path(args.out)
            there = json.loads(file.read_text()) if file.is_file() else {}
            flags = f"--seconds {args.seconds:g} --seed {args.seed} {kind}"
            go = f"python tests/campaigns/fuzz.py {flags}"
            about = {"command": go, "commit": commit(), "machine": machine()}
            write_json(file, there | {"inputs": there.get("inputs", {}) | {kind: about | found}})
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
