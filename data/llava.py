"""Your own data: a LLaVA JSON list or JSONL file, with image paths relative to a folder.

    [{"id": "1", "image": "pics/cat.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                        {"from": "gpt", "value": "a cat"}]}, ...]

`image` may be missing (a text-only sample) or a list (one `<image>` tag for each). The whole file is
checked before the first step of a training; a picture is opened when its turn comes.
"""

import json
import pathlib

from data.chat import check, render
from data.images import open_image, preprocess


def read_records(path):
    """The records of a .json list or a .jsonl file. ValueError with the line if it is neither."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); --data wants a JSON or JSONL file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; --data wants a JSON or JSONL file") from None
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        records = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds a {type(records).__name__}; LLaVA data is a list of samples")
    return records


class LlavaData:
    """Samples `{"id", "images": [PIL], "conversations"}` of a LLaVA file; the same interface as World."""

    def __init__(self, path, image_folder=""):
        self.folder = pathlib.Path(image_folder)
        self.records = read_records(path)
        if not self.records:
            raise ValueError(f"{path}: holds no samples")
        for k, record in enumerate(self.records):
            if not isinstance(record, dict) or "conversations" not in record:
                name = record.get("id") if isinstance(record, dict) else None
                raise ValueError(f'{path}: record {k} (id {name!r}) has no field "conversations"')
            where = f"{path}: record {k} (id {record.get('id')!r})"
            if not isinstance(record["conversations"], list):
                raise ValueError(f'{where}: "conversations" must be a list of turns')
            check(record["conversations"], len(self.paths(record, where)), where)

    def paths(self, record, where):
        """Image paths of a record, all of them inside the image folder."""
        names = record.get("image") or []
        names = [names] if isinstance(names, str) else names
        for name in names:
            if not isinstance(name, str) or pathlib.Path(name).is_absolute() or ".." in pathlib.Path(name).parts:
                raise ValueError(f"{where}: image {name!r} must be a path inside --image-folder")
        return [self.folder / name for name in names]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record = self.records[i]
        name = str(record.get("id", i))
        images = [open_image(path) for path in self.paths(record, name)]
        return {"id": name, "images": images, "conversations": record["conversations"]}


def encode(sample, tokenizer, template, image_tokens, image_size, image_mode="pad"):
    """A sample -> (ids, labels, [image tensors [3, S, S]]), ready to be packed."""
    images = [preprocess(image, image_size, image_mode) for image in sample["images"]]
    where = f"sample {sample['id']}"
    ids, labels = render(sample["conversations"], tokenizer, template, image_tokens, len(images), where)
    return ids, labels, images
