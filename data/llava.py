"""Your own data: a LLaVA JSON list or JSONL file, with image paths relative to (or in) a folder.

    [{"id": "1", "image": "pics/cat.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                        {"from": "gpt", "value": "a cat"}]}, ...]

`image` may be missing (a text-only sample) or a list, with one `<image>` tag for each entry. A
conversation may begin with a turn from "system".

The whole file is checked before the first training step. A faulty record, a missing image file and
a picture under another key (`images`, `video`) are errors. A record that teaches nothing (an empty
answer) is left out, and the reason is kept in `rejected`. A picture is only opened when its sample
is used; data/check.py opens all of them.
"""

import os
import pathlib
import re
from array import array
from bisect import bisect_right
from collections import Counter
from typing import NamedTuple

from data.chat import IGNORE, IMAGE_TAG, Rejected, check_turns, render, write
from data.images import open_image, preprocess
from data.records import Records, progress

PICTURE_KEY = re.compile(
    "(image|img|picture|photo|video|frame|audio)s?"
    "(path|file|filename|name|url|uri|src|list|data|bytes|base64)?s?"
)
NOT_READ = "video", "frame", "audio"
NAMED_IN_TEXT = re.compile(r"<img>[^<\n]*\.(?:jpe?g|png|webp|gif|bmp|tiff?)\s*</img>", re.I)
NOT_A_PATH = (  # what stands in a name that is no path on this machine, and the way out
    (re.compile(r"\b\w\w+:/|\bdata:"), "it is a URL; save the picture as a file and name that"),
    (re.compile(r"\\|\b\w:/"), "it is a Windows path; write it with / and inside --image-folder"),
)
LIKE_A_TAG = re.compile(r"<\|?(?:image|img|picture|video)[ _-]?\w*\|?>", re.I)


class Unreadable(ValueError):
    """(id, path, reason) of a sample whose picture cannot be used; training skips it."""

    def __str__(self):
        return f"sample {self.args[0]}: {self.args[2]}"


# ------------------------------------------------------------------------------ checking records


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


def tags_without_picture(record):
    """What looks like the tag of a picture in a record without one; None for one with a picture."""
    if isinstance(record, dict) and record.get("image"):
        return None
    return frozenset(LIKE_A_TAG.findall("\n".join(texts_of(record))))


def picture_line(path, kinds):
    """How many records have a picture, and in how many others text looks like the tag of one.
    kinds: a Counter of their `tags_without_picture`."""
    common = Counter()
    for tags, n in kinds.items():
        common.update(dict.fromkeys(tags or (), n))
    line = f"{path}: {kinds[None]:,} of {kinds.total():,} records have a picture"
    if common:
        shown = ", ".join(f"{tag:.30}" for tag, _ in common.most_common(3))
        found = sum(n for tags, n in kinds.items() if tags)
        line += f"; in {found:,} of the others {shown} is read as text"
    return line


def is_inside(path, folder):
    """Whether a path without `..` is relative, or absolute and inside `folder`."""
    roots = (os.path.abspath(folder), os.path.realpath(folder)) if path.is_absolute() else ()
    return not roots or any(path.is_relative_to(root) for root in roots)


def image_paths(record, folder, where):
    """The paths of a record's images, relative to `folder` or inside it. ValueError for others."""
    if not isinstance(record, dict) or "conversations" not in record:
        raise ValueError(f'{where}: has no field "conversations"')
    names = record.get("image") or []
    names = names if isinstance(names, list) else [names]
    for name in names:
        path = pathlib.Path(name) if isinstance(name, str) else None
        if path is None or ".." in path.parts or not is_inside(path, folder):
            raise ValueError(f"{where}: image {name!r:.80} is no path inside --image-folder")
    return [pathlib.Path(folder) / name for name in names]


def conversation_of(record):
    """The turns of a record. A system turn at their start becomes the beginning of the first
    question, followed by an empty line, as in Mistral's own chat template."""
    match record["conversations"]:
        case [{"from": "system"} as system, {"from": "gpt" | "assistant"}, *rest]:
            return conversation_of({"conversations": [system, *rest]})  # as `check_turns` drops it
        case [{"from": "system", "value": str(rule)},
              {"from": "human" | "user", "value": str(question)} as first, *rest]:  # fmt: skip
            whole = f"{rule}\n\n{question}" if rule.strip() and question.strip() else question
            return [first | {"value": whole}, *rest]
        case turns:
            return turns


def check_record(record, k, path, folder, template=""):
    """The image paths of record `k` of the file `path`, if `template` can write it.

    ValueError, naming the record, for a fault; `Rejected` if it teaches nothing.
    """
    where = where_of(record, k, path)
    paths = image_paths(record, folder, where)
    check_keys(record, where)
    for image in paths:
        if not os.path.isfile(image):
            why = next((way for sign, way in NOT_A_PATH if sign.search(str(image))),
                       "see --image-folder")  # fmt: skip
            raise ValueError(f"{where}: no image {str(image)!r:.300}; {why}")
    if len(check_turns(conversation_of(record), len(paths), where, template)) == 1:
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
    return {"id": name, "images": images, "conversations": conversation_of(record)}


class LlavaData:
    """The samples of a LLaVA file, used like `World`. `limit`: only its first records; 0: all.
    template: each record must suit it. pictures: a line that says how many have one."""

    def __init__(self, path, image_folder="", limit=0, template=""):
        self.folder, self.records, self.rejected = image_folder, Records(path, limit), []
        self.used, kinds, faults, first = array("q"), Counter(), 0, ""
        for k, record in enumerate(progress(self.records)):
            kinds[tags_without_picture(record)] += 1
            try:
                check_record(record, k, path, image_folder, template)
                self.used.append(k)
            except Rejected as reason:
                self.rejected.append(str(reason))
            except ValueError as error:
                faults, first = faults + 1, first or str(error)
        if faults:
            more = f" ({faults - 1} more records have faults)" if faults > 1 else ""
            raise ValueError(f"{first}{more}")
        self.pictures = picture_line(path, kinds)
        if not self.used:
            first = f"; the first: {self.rejected[0]}" if self.rejected else ""
            raise ValueError(f"{path}: holds no sample to learn from{first}")

    def __len__(self):
        return len(self.used)

    def record(self, i):
        """The record of sample `i`, as it is in the file."""
        return self.records[self.used[i]]

    def __getitem__(self, i):
        record = self.record(i)
        paths = image_paths(record, self.folder, f"record {self.used[i]}")
        return open_sample(record, self.name(i, record), paths)

    def name(self, i, record=None):
        """The sample's id, or else the number of its record."""
        return str((record or self.record(i)).get("id", self.used[i]))


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
            pixels.append(preprocess(image, image_size, image_mode).numpy())
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
