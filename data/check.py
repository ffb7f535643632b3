"""Check a LLaVA data set before training on it: what would be rejected, cut, or learned.

    python -m data.check my.json --image-folder pics            # the miniature
    python -m data.check my.json --image-folder pics --llm weights/mistral --clip weights/clip \\
        --row-tokens 4096 --show 3
    python -m data.check captions.json --image-folder pics --template plain   # as stage 1 reads it

Every record is read, every picture opened and every conversation tokenized, as in training.

    stops       a faulty record: roles, image tags, a missing picture. Training would not start.
    skipped     its picture is damaged. 10 of them end a training, if they are more than 1 %.
    left out    it teaches nothing: an empty answer, or none within --row-tokens.
    cut         longer than --row-tokens; it loses its last questions and answers.

All but the last kind are listed with id and reason. The exit status is 1 if training would stop or
would have nothing to learn, else 0.

`--show N` prints the first N samples. Learned text is green, or between « and » where there are no
colours (no terminal, or NO_COLOR is set).
"""

import os
import sys
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from tqdm import tqdm

from data import configs
from data.chat import IGNORE, IMAGE_TOKEN, Rejected, check_template, render, template_of
from data.flags import check_choice, parse, run
from data.hub import local_folder
from data.images import MODES
from data.llava import Unreadable, check_record, check_row, encode, open_sample, read_records
from data.loader import too_many
from data.tokenizer import Tokenizer
from data.weights import read_config


@dataclass
class CheckConfig:
    data: str  # LLaVA JSON or JSONL
    image_folder: str = ""  # the folder that the image paths are relative to
    llm: str = "data/mini/llm"  # folder with the tokenizer
    clip: str = "data/mini/clip"  # folder with CLIP's config.json
    template: str = ""  # prompt template of the conversations; empty: the tokenizer's
    image_mode: str = "pad"  # how pictures become square: pad or square
    row_tokens: int = 256  # tokens a row; a longer conversation loses its last turns
    show: int = 0  # samples to show
    list: int = 20  # records of each kind to list; 0: all of them


class Report:
    """What was found: the lengths of the samples used, the reasons for all others."""

    def __init__(self):
        self.faults, self.skipped, self.left_out, self.sizes = [], [], [], []
        self.lengths, self.learned, self.cut, self.dropped = [], [], 0, 0

    def add(self, coded, length, sizes):
        self.sizes += sizes
        self.lengths.append(length)
        self.learned.append(sum(label != IGNORE for label in coded.labels))
        self.cut += coded.dropped > 0
        self.dropped += coded.dropped

    def stops(self, n):
        """Whether training on these `n` records would stop."""
        return bool(self.faults) or too_many(len(self.skipped), n)

    def print(self, cfg, n):
        print(f"{cfg.data}: {n:,} records; {len(self.lengths):,} are used, {len(self.left_out):,} "
              f"left out, {len(self.skipped):,} skipped, {len(self.faults):,} would stop "
              "training")  # fmt: skip
        kinds = ("stops", self.faults), ("skipped", self.skipped), ("left out", self.left_out)
        for kind, reasons in kinds:
            shown = reasons[: cfg.list or None]
            for reason in shown:
                print(f"  {kind}: {reason}")
            if len(reasons) > len(shown):
                print(f"  {kind}: {len(reasons) - len(shown):,} more; --list 0 lists all")
        if too_many(len(self.skipped), n):
            print(f"{len(self.skipped):,} of {n:,} cannot be read; so many would stop training")
        if self.sizes:
            w, h = np.array(self.sizes).T
            print(f"images: {len(w):,}; width {w.min()} to {w.max()}, median {np.median(w):.0f}; "
                  f"height {h.min()} to {h.max()}, median {np.median(h):.0f}")  # fmt: skip
        if self.lengths:
            percentiles("tokens a sample", self.lengths)
            percentiles("of them learned", self.learned)
            print(f"longer than --row-tokens {cfg.row_tokens}, hence cut: {self.cut:,} "
                  f"({100 * self.cut / len(self.lengths):.1f} %), by {self.dropped:,} questions "
                  "with their answers")  # fmt: skip


def percentiles(name, values):
    shares = np.percentile(values, (5, 50, 95, 99, 100))
    parts = zip(("5 %", "50 %", "95 %", "99 %", "most"), shares)
    print(f"{name}: " + ", ".join(f"{share} {value:,.0f}" for share, value in parts))


def painted(ids, labels, tokenizer, color):
    """A sample as text: special tokens by name, learned text in green or in « »."""
    name = {i: token for token, i in tokenizer.special.items()}
    green, plain = ("\033[32m", "\033[0m") if color else ("«", "»")

    def spelled(kind, ids):
        if kind == "image":
            return f"<image: {len(ids)} tokens>"
        return "".join(name[i] for i in ids) if kind == "special" else tokenizer.decode(ids)

    def kind(i):
        return "image" if i == IMAGE_TOKEN else "special" if i in name else "text"

    text = ""
    for learned, pairs in groupby(zip(ids, labels), lambda pair: pair[1] != IGNORE):
        runs = groupby([i for i, _ in pairs], kind)
        said = "".join(spelled(k, list(some)) for k, some in runs)
        text += f"{green}{said}{plain}" if learned else said
    return text


def clip_sizes(name):
    """(width of the pictures that a CLIP takes, patches of one). ValueError if it is no CLIP."""
    fields = configs.clip_fields(read_config(local_folder(name, "config")))
    size, patch = (fields[k] for k in ("image_size", "patch_size"))
    if type(size) is not int or type(patch) is not int or not 0 < patch <= size:
        raise ValueError(f"--clip {name}: pictures of {size!r:.40} cannot be cut into patches of "
                         f"{patch!r:.40}")  # fmt: skip
    return size, (size // patch) ** 2


def main():
    cfg, _ = parse(CheckConfig, description=__doc__.split("\n")[0])
    tokenizer = Tokenizer.from_pretrained(cfg.llm)
    size, patches = clip_sizes(cfg.clip)
    template = cfg.template or template_of(tokenizer)
    check_template(template, tokenizer)
    check_choice("image-mode", cfg.image_mode, MODES)
    check_row(cfg.row_tokens, tokenizer, template, patches)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    report, shown, records = Report(), [], read_records(cfg.data)
    for k, record in enumerate(tqdm(records, unit="record", leave=False)):
        try:
            name = str(record.get("id", k)) if isinstance(record, dict) else str(k)
            paths = check_record(record, k, cfg.data, cfg.image_folder)
            sample = open_sample(record, name, paths)
            images = sample["images"]
            options = (tokenizer, template, patches)
            whole, _ = render(sample["conversations"], *options, len(images))
            coded = encode(sample, *options, size, cfg.image_mode, cfg.row_tokens)
        except Rejected as reason:
            report.left_out.append(reason)
        except Unreadable as fault:
            report.skipped.append(fault)
        except ValueError as fault:
            report.faults.append(fault)
        else:
            report.add(coded, len(whole), [image.size for image in images])
            if len(shown) < cfg.show:
                shown.append(f"--- {sample['id']}\n{painted(*coded[:2], tokenizer, color)}")
    report.print(cfg, len(records))
    for text in shown:
        print(text)
    if report.stops(len(records)) or not report.lengths:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
