"""Your own data: a LLaVA JSON list or JSONL file, with image paths relative to a folder.

    [{"id": "1", "image": "pics/cat.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                        {"from": "gpt", "value": "a cat"}]}, ...]

`image` may be missing (a text-only sample) or a list (one `<image>` tag for each). The whole file
is checked before the first step of a training: a faulty record is an error, and so is an image
that is not there; a record that teaches nothing (an empty answer) is left out and its reason kept
in `rejected`. A picture itself is opened when its turn comes; data/check.py opens them all.
"""

import json
import os
import pathlib

from data.chat import IGNORE, IMAGE_TOKEN, Rejected, check, lacks, render
from data.images import open_image, preprocess


def read_records(path):
    """The records of a .json list or a .jsonl file. ValueError with the line if it is neither."""
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
        return [parse(line, f"{path}, line {n}") for n, line in lines if line.strip()]
    records = parse(text, path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds a {type(records).__name__}, not a list of samples")
    return records


def parse(text, where):
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply to be a list of samples") from None
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if each line is a sample" if error.msg == "Extra data" else ""
        raise ValueError(f"{where}: is not valid JSON ({error}){hint}") from None


def check_record(record, k, path, folder):
    """The image paths of record `k` of the file `path`, all of them inside `folder`.

    ValueError, naming the record, for a fault; `Rejected` where there is nothing to learn.
    """
    name = record.get("id") if isinstance(record, dict) else None
    where = f"{path}: record {k} (id {name!r:.60})"
    paths = image_paths(record, folder, where)
    fault = lacks(check(record["conversations"], len(paths), where))
    absent = [image for image in paths if not os.path.isfile(image)]
    if absent:
        raise ValueError(f"{where}: no image {str(absent[0])!r:.300}; see --image-folder")
    if fault:
        raise Rejected(f"{where}: {fault}")
    return paths


def image_paths(record, folder, where):
    if not isinstance(record, dict) or "conversations" not in record:
        raise ValueError(f'{where}: has no field "conversations"')
    names = record.get("image") or []
    names = names if isinstance(names, list) else [names]
    for name in names:
        path = pathlib.Path(name) if isinstance(name, str) else None
        if path is None or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: image {name!r:.80} is no path inside --image-folder")
    return [pathlib.Path(folder) / name for name in names]


def open_sample(record, k, paths):
    """Record `k` with its pictures read: {"id", "images": [PIL], "conversations"}."""
    name = str(record.get("id", k))
    try:
        images = [open_image(path) for path in paths]
    except ValueError as error:
        raise ValueError(f"sample {name}: {error}") from None
    return {"id": name, "images": images, "conversations": record["conversations"]}


class LlavaData:
    """The samples of a LLaVA file; used like World."""

    def __init__(self, path, image_folder=""):
        self.folder, self.records, self.rejected, faults = image_folder, [], [], []
        for k, record in enumerate(read_records(path)):
            try:
                check_record(record, k, path, image_folder)
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
        return open_sample(record, k, image_paths(record, self.folder, f"record {k}"))


def encode(sample, tokenizer, template, image_tokens, image_size, image_mode="pad",
           max_tokens=None):  # fmt: skip
    """A sample -> (ids, labels, [image tensors [3, S, S]]), ready to be packed.

    What goes past `max_tokens` is cut off, as in the original; but an image that would be cut goes
    as a whole. Raises `Rejected` when nothing is left to learn.
    """
    where, images = f"sample {sample['id']}", sample["images"]
    turns = sample["conversations"]
    ids, labels = render(turns, tokenizer, template, image_tokens, len(images), where)
    if max_tokens and len(ids) > max_tokens:
        ids, labels = ids[:max_tokens], labels[:max_tokens]
        if images:
            whole, rest = divmod(ids.count(IMAGE_TOKEN), image_tokens)
            keep = len(ids) - rest
            ids, labels, images = ids[:keep], labels[:keep], images[:whole]
    if all(label == IGNORE for label in labels):
        raise Rejected(f"{where}: there is no answer to learn in its first {len(ids)} tokens")
    try:
        return ids, labels, [preprocess(image, image_size, image_mode) for image in images]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
