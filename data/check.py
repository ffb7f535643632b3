"""Check a LLaVA data set before training on it: what would be rejected, cut, or learned.

    python -m data.check my.json --image-folder pics                       # stage 3 of `mini`
    python -m data.check captions.json --image-folder pics --stage 1
    python -m data.check my.json --image-folder pics --preset mistral-7b --stage 2 --show 3

Every record is read, every picture opened and every conversation tokenized as in
`train.py --preset P --stage N --data my.json`: both take the template, the image mode and the
tokens a row from data/stages.py, --init and the command line.

    stops       a faulty record: roles, image tags, a missing picture. Training would not start.
    skipped     its picture is damaged. 10 of them end a training, if they are more than 1 %.
    left out    it teaches nothing: an empty answer, or none within --row-tokens.
    cut         longer than --row-tokens; it loses its last questions and answers.
    one color   its picture shows nothing, as black pictures of a broken conversion do. It is used.

All but `cut` are listed with record, id and reason. The exit status is 1 if training would stop or
would have nothing to learn, else 0.

`--show N` prints the first N samples. Learned text is green, or between « and » where there are no
colors (no terminal, or NO_COLOR is set).
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from tqdm import tqdm

from data import configs
from data.chat import IGNORE, IMAGE_TOKEN, Rejected, check_template, render
from data.checkpoint import start_from
from data.flags import check_choice, check_numbers, parse, run
from data.hub import local_folder
from data.images import MODES
from data.llava import (
    Unreadable,
    check_record,
    check_row,
    encode,
    open_sample,
    picture_line,
    tags_without_picture,
    where_of,
)
from data.loader import too_many
from data.packing import check_positions
from data.records import Records
from data.stages import table_of
from data.tokenizer import Tokenizer
from data.weights import read_config


@dataclass
class CheckConfig:
    data: str  # LLaVA JSON or JSONL
    image_folder: str = ""  # the folder that the image paths are relative to
    preset: str = "mini"  # check for a training of this preset
    stage: int = 3  # and of this stage: 1, 2 or 3
    init: str = ""  # for a training that starts from this checkpoint
    limit: int = 0  # use only the first so many records; 0: all
    llm: str = ""  # folder with the tokenizer and config.json; empty: the preset's
    clip: str = ""  # folder with CLIP's config.json; empty: the preset's
    template: str = ""  # prompt template of the conversations; empty: the stage's
    image_mode: str = ""  # how pictures become square: pad or square; empty: the stage's
    row_tokens: int = 0  # tokens a row, a longer conversation loses its last turns; 0: the stage's
    show: int = 0  # samples to show
    list: int = 20  # records of each kind to list; 0: all of them


class Report:
    """What was found: the lengths of the samples used, the reasons for all others."""

    def __init__(self):
        self.faults, self.skipped, self.left_out, self.sizes, self.flat = [], [], [], [], []
        self.lengths, self.learned, self.cut, self.dropped = [], [], 0, 0
        self.kinds = Counter()  # the records by their tags_without_picture

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
        for kind, reasons in (*kinds, ("one color", self.flat)):
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


def resolve(cfg, given):
    """Set what no flag gives, from --init and the table of the stages, as train.py does."""
    values = {name: getattr(cfg, name) for name in given}
    values = start_from(values, cfg.stage) if cfg.init else values
    cfg.preset = values.get("preset", cfg.preset)
    table = table_of(cfg.preset, cfg.stage) | values
    for name in {"llm", "clip", "template", "image_mode", "row_tokens"} - given:
        setattr(cfg, name, table[name])
    check_choice("image-mode", cfg.image_mode, MODES)
    check_numbers(cfg, counts=("row_tokens",))
    return cfg


def model_fields(cfg):
    """Fields of CLIP and of the language model, from --init, or from --clip and --llm."""
    if cfg.init:
        return configs.cumo_fields(read_config(local_folder(cfg.init, "config")), cfg.init)[:2]
    clip, llm = (read_config(local_folder(name, "config")) for name in (cfg.clip, cfg.llm))
    return configs.clip_fields(clip), configs.llm_fields(llm)


def image_side(cfg, clip):
    """Pixels of a side of the pictures that the model sees, and of a patch."""
    flag, name = ("init", cfg.init) if cfg.init else ("clip", cfg.clip)
    size, patch = clip["image_size"], clip["patch_size"]
    if type(size) is not int or type(patch) is not int or not 0 < patch <= size:
        raise ValueError(f"--{flag} {name}: pictures of {size!r:.40} cannot be cut into patches of "
                         f"{patch!r:.40}")  # fmt: skip
    return size, patch


def check_records(cfg, tokenizer, records):
    """-> (Report, the first --show samples as text)."""
    clip, llm = model_fields(cfg)
    size, patch = image_side(cfg, clip)
    patches, report, shown = (size // patch) ** 2, Report(), []
    check_template(cfg.template, tokenizer)
    positions = llm.get("max_positions", cfg.row_tokens)
    check_positions(cfg.row_tokens, positions, llm.get("sliding_window"))
    check_row(cfg.row_tokens, tokenizer, cfg.template, patches)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    how = tokenizer, cfg.template, patches
    for k, record in enumerate(tqdm(records, unit="record", leave=False)):
        where = where_of(record, k, cfg.data)
        report.kinds[tags_without_picture(record)] += 1
        try:
            paths = check_record(record, k, cfg.data, cfg.image_folder, cfg.template)
            sample = open_sample(record, str(record.get("id", k)), paths) | {"where": where}
            images = sample["images"]
            whole, _ = render(sample["conversations"], *how, len(images), where)
            coded = encode(sample, *how, size, cfg.image_mode, cfg.row_tokens)
        except Rejected as reason:
            report.left_out.append(str(reason))  # the error itself keeps its record alive
        except Unreadable as fault:
            report.skipped.append(f"{where}: {fault.args[2]}")
        except ValueError as fault:
            report.faults.append(str(fault))
        else:
            report.add(coded, len(whole), [image.size for image in images])
            report.flat += [f"{where}: {image.filename}" for image in images if is_flat(image)]
            if len(shown) < cfg.show:
                shown.append(f"--- {sample['id']}\n{painted(*coded[:2], tokenizer, color)}")
    return report, shown


def is_flat(image):
    """Whether an RGB picture has one color."""
    return all(low == high for low, high in image.getextrema())


def main():
    cfg = resolve(*parse(CheckConfig, description=__doc__.split("\n")[0]))
    records = Records(cfg.data, cfg.limit)
    print(f"checked for --preset {cfg.preset} --stage {cfg.stage}: --template {cfg.template} "
          f"--image-mode {cfg.image_mode} --row-tokens {cfg.row_tokens}")  # fmt: skip
    tokenizer = Tokenizer.from_pretrained(cfg.init or cfg.llm)
    report, shown = check_records(cfg, tokenizer, records)
    print(picture_line(cfg.data, report.kinds))
    report.print(cfg, len(records))
    for text in shown:
        print(text)
    if not report.lengths:
        print("no record is left to learn from, so training would not start")
    if report.stops(len(records)) or not report.lengths:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
