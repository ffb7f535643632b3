"""Your own data: a LLaVA JSON list or JSONL file, with image paths relative to a folder.

    [{"id": "1", "image": "pics/cat.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                        {"from": "gpt", "value": "a cat"}]}, ...]

`image` may be missing (a text-only sample) or a list, with one `<image>` tag for each entry.

The whole file is checked before the first training step. A faulty record, a missing image file and
a picture under another key (`images`, `video`) are errors. A record that teaches nothing (an empty
answer) is left out, and the reason is kept in `rejected`. A picture is only opened when its sample
is used; data/check.py opens all of them.
"""

import json
import os
import pathlib
import re
from bisect import bisect_right
from collections import Counter
from typing import NamedTuple

from data.chat import IGNORE, IMAGE_TAG, Rejected, check_turns, render, write
from data.images import open_image, pixels_of

PICTURE_KEY = re.compile(
    "(image|img|picture|photo|video|frame|audio)s?"
    "(path|file|filename|name|url|uri|src|list|data|bytes|base64)?s?"
)
NOT_READ = "video", "frame", "audio"
NAMED_IN_TEXT = re.compile(r"<img>[^<\n]*\.(?:jpe?g|png|webp|gif|bmp|tiff?)\s*</img>", re.I)
LIKE_A_TAG = re.compile(r"<\|?(?:image|img|picture|video)[ _-]?\w*\|?>", re.I)


class Unreadable(ValueError):
    """(id, path, reason) of a sample whose picture cannot be used; training skips it."""

    def __str__(self):
        return f"sample {self.args[0]}: {self.args[2]}"


# ------------------------------------------------------------------------------ records on disk


def read_records(path):
    """The records of a .json list or a .jsonl file. ValueError, with the line, otherwise."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); --data wants a JSON or JSONL "
                         "file") from None  # fmt: skip
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; --data wants a JSON or JSONL file") from None
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)  # splitlines would also cut at U+2028
        return [parse_json(line, f"{path}, line {n}") for n, line in lines if line.strip()]
    records = parse_json(text, path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds a {type(records).__name__}, not a list of samples")
    return records


def parse_json(text, where):
    """The value of a JSON text. ValueError, one line that starts with `where`, if it has none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply to be a list of samples") from None
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if each line is a sample" if error.msg == "Extra data" else ""
        before = re.findall(r'"id"\s*:\s*("[^"\n]*"|\d+)', text[: error.pos])
        hint += f"; the last id before it is {before[-1]:.60}" if before else ""
        raise ValueError(f"{where}: is not valid JSON ({error}){hint}") from None
    except ValueError:
        raise ValueError(f"{where}: holds a number with too many digits") from None


def where_of(record, k, path):
    """The name of record `k` of the file `path` in messages."""
    name = record.get("id") if isinstance(record, dict) else None
    return f"{path}: record {k} (id {name!r:.60})"


def turns_of(record):
    """The turns of a record that may have any fault."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []


def texts_of(record):
    """The texts of a record that may have any fault."""
    return [t["value"] for t in turns_of(record) if isinstance(t.get("value"), str)]


def check_keys(record, where):
    """ValueError for a picture that would be ignored: under another key than `image`, in a turn, or
    named in the text as <img>FILE</img>."""
    fields = [(key, value) for key, value in record.items() if key != "image"]
    fields += [pair for turn in turns_of(record) for pair in turn.items()]
    for key, value in fields:
        kind = PICTURE_KEY.fullmatch(re.sub("[^a-z]", "", key.lower()))
        if value and kind and kind[1] in NOT_READ:
            raise ValueError(f"{where}: has the key {key!r:.60}, which is not supported; remove "
                             "the key or the record")  # fmt: skip
        if value and kind and not record.get("image"):
            raise ValueError(f'{where}: has no key "image", but {key!r:.60}; rename it to "image"')
    named = NAMED_IN_TEXT.search("\n".join(texts_of(record)))
    if named and not record.get("image"):
        raise ValueError(f'{where}: holds {named[0]:.80}; name the file under the key "image", and '
                         f"write {IMAGE_TAG} in its place")  # fmt: skip


def picture_line(path, records):
    """How many records have a picture, and in how many others text looks like the tag of one."""
    blind = [r for r in records if not (isinstance(r, dict) and r.get("image"))]
    found = [set(LIKE_A_TAG.findall("\n".join(texts_of(record)))) for record in blind]
    line = f"{path}: {len(records) - len(blind):,} of {len(records):,} records have a picture"
    if any(found):
        common = Counter(tag for tags in found for tag in tags).most_common(3)
        shown = ", ".join(f"{tag:.30}" for tag, _ in common)
        line += f"; in {sum(map(bool, found)):,} of the others {shown} is read as text"
    return line


def image_paths(record, folder, where):
    """The paths of a record's images, all inside `folder`. ValueError for any other path."""
    if not isinstance(record, dict) or "conversations" not in record:
        raise ValueError(f'{where}: has no field "conversations"')
    names = record.get("image") or []
    names = names if isinstance(names, list) else [names]
    for name in names:
        path = pathlib.Path(name) if isinstance(name, str) else None
        if path is None or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: image {name!r:.80} is no path inside --image-folder")
    return [pathlib.Path(folder) / name for name in names]


def check_record(record, k, path, folder, template=""):
    """The image paths of record `k` of the file `path`, if `template` can write it.

    ValueError, naming the record, for a fault; `Rejected` if it teaches nothing.
    """
    where = where_of(record, k, path)
    paths = image_paths(record, folder, where)
    check_keys(record, where)
    absent = [image for image in paths if not os.path.isfile(image)]
    if absent:
        raise ValueError(f"{where}: no image {str(absent[0])!r:.300}; see --image-folder")
    if len(check_turns(record["conversations"], len(paths), where, template)) == 1:
        raise Rejected(f"{where}: it has no answer")
    return paths


def open_sample(record, name, paths):
    """A record with its pictures read: {"id": name, "images": [PIL], "conversations"}."""
    images = []
    for path in paths:
        try:
            images.append(open_image(path))
        except ValueError as error:
            raise Unreadable(name, str(path), str(error)) from None
    return {"id": name, "images": images, "conversations": record["conversations"]}


class LlavaData:
    """The samples of a LLaVA file, used like `World`. `limit`: only its first records; 0: all.
    template: each record must suit it. pictures: a line that says how many have one."""

    def __init__(self, path, image_folder="", limit=0, template=""):
        self.folder, self.records, self.rejected, faults = image_folder, [], [], []
        records = read_records(path)[: limit or None]
        self.pictures = picture_line(path, records)
        for k, record in enumerate(records):
            try:
                check_record(record, k, path, image_folder, template)
                self.records.append((k, record))
            except Rejected as reason:
                self.rejected.append(str(reason))
            except ValueError as error:
                faults.append(error)
        if faults:
            more = f" ({len(faults) - 1} more records have faults)" if len(faults) > 1 else ""
            raise ValueError(f"{faults[0]}{more}")
        if not self.records:
            first = f"; the first: {self.rejected[0]}" if self.rejected else ""
            raise ValueError(f"{path}: holds no sample to learn from{first}")

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        k, record = self.records[i]
        return open_sample(record, self.name(i), image_paths(record, self.folder, f"record {k}"))

    def name(self, i):
        """The sample's id, or else the number of its record."""
        k, record = self.records[i]
        return str(record.get("id", k))


# ------------------------------------------------------------------------------ samples to arrays


class Encoded(NamedTuple):
    ids: list
    labels: list  # as long as `ids`; IGNORE where nothing is learned
    images: list  # of arrays [3, S, S]
    dropped: int  # pairs of question and answer that did not fit


def encode(sample, tokenizer, template, image_tokens, image_size, image_mode="pad",
           max_tokens=None):  # fmt: skip
    """A sample -> Encoded, ready to be packed.

    A sample longer than `max_tokens` loses its last questions, with their answers and images.
    Errors: those of `check_turns`; `Rejected` if nothing is left to learn; `Unreadable` for a
    picture that cannot be made square.
    CuMo: the original cuts at any token, even inside an image, and ignores the image's features.
    """
    where, images = sample.get("where", f"sample {sample['id']}"), sample["images"]
    turns = check_turns(sample["conversations"], len(images), where, template)
    how = tokenizer, template, image_tokens if images else None
    ids, labels = write(turns, *how)
    pairs = fit = (len(turns) + 1) // 2  # the last may be a question alone
    if max_tokens and len(ids) > max_tokens:
        length = lambda pairs: len(write(turns[: 2 * pairs], *how)[0])
        fit = bisect_right(range(1, pairs), max_tokens, key=length)
        if not fit:
            raise Rejected(f"{where}: its first question and answer alone do not fit in "
                           f"--row-tokens {max_tokens}")  # fmt: skip
        turns = turns[: 2 * fit]
        ids, labels = write(turns, *how)
    if all(label == IGNORE for label in labels):
        raise Rejected(f"{where}: there is no answer to learn in its {len(ids)} tokens")
    pixels = []
    for image in images[: sum(turn["value"].count(IMAGE_TAG) for turn in turns)]:
        try:
            pixels.append(pixels_of(image, image_size, image_mode))
        except ValueError as error:
            path = getattr(image, "filename", "")
            raise Unreadable(sample["id"], path, str(error)) from None
    return Encoded(ids, labels, pixels, pairs - fit)


def check_row(row_tokens, tokenizer, template, image_tokens):
    """ValueError if a row of `row_tokens` has no room for an image, a question and an answer."""
    talk = [{"from": "human", "value": IMAGE_TAG}, {"from": "gpt", "value": "a"}]
    least = len(render(talk, tokenizer, template, image_tokens, n_images=1)[0])
    if row_tokens < least:
        enough = -(-(least + 64) // 64) * 64  # at least 64 tokens for question and answer
        raise ValueError(f"--row-tokens {row_tokens} is too short: an image takes {image_tokens} "
                         f"tokens, {least} with what template {template} writes around it; take "
                         f"--row-tokens {enough} or more")  # fmt: skip
