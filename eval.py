"""Exact-answer accuracy on held-out scenes, by question type, compared with two baselines.

    python eval.py                       # the last finished stage in out/, all splits
    python eval.py --model DIR --n 1000
    python eval.py --model DIR --benchmark pope --folder eval/pope     # extras/benchmarks.py
    python eval.py --data val.json --image-folder pics      # your own data: loss, exact answers

The splits (data/world.py): `new` (fresh scenes), `pairs` (pairs of objects, words and heights of
bars that training held out), `style` (drawings, letters and bars of a style never trained on). The
baselines:

    blank    the same model and question, every picture painted gray
    fixed    the most frequent answer to each form of question, from 8,000 training questions

A model that uses the picture is far above both. Writes `out/eval.json`, some answers as
`out/answers.png`, and each expert's share of the tokens as `out/experts.png`; with --data the two
numbers and all answers as `out/own_data.json` (extras/own_data.py), and `own_experts.png`.
"""

import data  # noqa: F401  isort: skip  before torch: sets how OpenMP waits
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cumo import CuMo
from data.chat import end_tokens
from data.exam import LEAST, SPLITS, exam, fixed_answers, question_form
from data.flags import check_choice, check_device, check_numbers, parse, run
from data.hub import find_model
from data.tokenizer import Tokenizer
from data.weights import check_folder, make_folder, write_json
from data.world import KINDS, QUESTION_TYPES
from engine.conversation import prompt
from engine.rate import has_fast_bf16
from sample import DTYPES


@dataclass
class EvalConfig:
    model: str = ""  # a checkpoint or a folder of stages; empty: the last finished stage in --out
    out: str = "out"  # folder for eval.json and the pictures
    n: int = 2400  # questions a split; of a benchmark or --data: the first n, not given: all
    benchmark: str = ""  # a public one instead of the scenes: pope, gqa, ... (extras/benchmarks.py)
    folder: str = ""  # the benchmark's files
    experts: str = ""  # draw the experts' load into this file; empty: a file in --out
    data: str = ""  # a LLaVA file instead of the scenes: its loss, exact answers, experts' load
    image_folder: str = ""  # image paths in --data are relative to this folder
    batch: int = 50  # questions a batch
    dtype: str = ""  # of the weights: float32 or bfloat16; empty: float32
    seed: int = 1  # of the scenes and questions
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


@torch.no_grad()
def answer_batch(model, tokenizer, questions, pictures, max_new_tokens=48):
    """Greedy answers to a batch of questions, each about one picture (PIL) or None."""
    prompts = [prompt(model, tokenizer, q, [p] if p else []) for q, p in zip(questions, pictures)]
    width = max(len(ids) for ids, _ in prompts)
    pad_left = lambda rows: torch.tensor([[0] * (width - len(row)) + row for row in rows])
    tokens = pad_left([ids for ids, _ in prompts]).to(model.device)
    segments = pad_left([[1] * len(ids) for ids, _ in prompts]).to(model.device)
    images = [pixels for _, pixels in prompts if pixels is not None]
    images = torch.cat(images).to(model.device) if images else None
    with torch.autocast(model.device.type, torch.bfloat16, has_fast_bf16(model.device)):
        ids = model.generate(tokens, images, segments, max_new_tokens=max_new_tokens,
                             eos_token_id=end_tokens(tokenizer, model.cfg.template))  # fmt: skip
    return [tokenizer.decode(row).strip() for row in ids.tolist()]


def accuracy(ask, questions, batch, label=""):
    """{question type, kind of picture or "all": share of right answers}; `ask(questions, pictures)`
    -> answers."""
    hits = {of_type: [] for of_type in QUESTION_TYPES}
    for start in tqdm(range(0, len(questions), batch), desc=label, leave=False):
        types, texts, truths, pictures = zip(*questions[start : start + batch])
        for of_type, truth, answer in zip(types, truths, ask(texts, pictures)):
            hits[of_type].append(answer == truth)
    kinds = {kind: sum((hits[name] for name in types), []) for kind, types in KINDS.items()}
    hits |= kinds | {"all": sum(kinds.values(), [])}
    return {name: round(float(np.mean(some)), 4) for name, some in hits.items() if some}


def evaluate_scenes(ask, cfg):
    """-> {split: {"model" | "blank" | "fixed": a result of `accuracy`}}."""
    splits = tqdm(SPLITS, desc="drawing scenes", leave=False)
    fixed, exams = fixed_answers(), {split: exam(split, cfg.n, cfg.seed) for split in splits}
    rows = {
        "model": ask,
        "blank": lambda asked, seen: ask(asked, [Image.new("RGB", p.size, "gray") for p in seen]),
        "fixed": lambda asked, _: [fixed.get(question_form(question)) for question in asked],
    }
    return {split: {name: accuracy(row, asked, cfg.batch, f"{split} {name}")
                    for name, row in rows.items()} for split, asked in exams.items()}  # fmt: skip


def print_table(results):
    columns = [(split, row) for split in SPLITS for row in results[split]]
    print(f"{'':12}" + "".join(f"{split:^24}" for split in SPLITS))
    print(f"{'':12}" + "".join(f"{row:>8}" for _, row in columns))
    for name in (*QUESTION_TYPES, *KINDS, "all"):
        print(f"{name:12}" + "".join(f"{results[split][row][name]:8.1%}" for split, row in columns))


def check_flags(cfg, given):
    least = 1 if cfg.benchmark or cfg.data else LEAST
    if cfg.n < least:
        raise ValueError(f"--n {cfg.n} must be {least} or more")
    check_numbers(cfg, counts=("batch",))
    if bool(cfg.benchmark) != bool(cfg.folder) or cfg.benchmark and (cfg.data or cfg.experts):
        raise ValueError("--benchmark NAME and --folder DIR go together, without --data, --experts")
    if cfg.image_folder and not cfg.data:
        raise ValueError(f"--image-folder {cfg.image_folder} goes with --data FILE")
    if "seed" in given and (cfg.data or cfg.benchmark):
        raise ValueError(f"--seed {cfg.seed} has no effect on given questions; leave it out")
    check_choice("dtype", cfg.dtype, DTYPES)
    check_device(cfg.device)


def open_model(cfg):
    """-> (its folder, the model, ask(questions, pictures, max_new_tokens=48) -> answers)."""
    path = find_model(cfg.model, cfg.out)
    model = CuMo.from_pretrained(path, device=cfg.device, dtype=DTYPES[cfg.dtype]).eval()
    return path, model, partial(answer_batch, model, Tokenizer.from_pretrained(path))


def main():
    cfg, given = parse(EvalConfig, description=__doc__)
    check_flags(cfg, given)
    from extras import benchmarks, own_data, plots

    limit = cfg.n if "n" in given else 0  # for --benchmark and --data; 0: none
    if cfg.benchmark:
        return benchmarks.evaluate(cfg, limit, open_model)
    plots.check_target(cfg.experts)
    check_folder(cfg.out)
    if cfg.data:
        return own_data.evaluate(cfg, limit, open_model)
    path, model, ask = open_model(cfg)
    load = plots.expert_load(model, [picture for *_, picture in exam("new", 400, cfg.seed + 1)])
    if load or cfg.experts:
        plots.draw_load(load, cfg.experts or make_folder(cfg.out) / "experts.png")
    results = evaluate_scenes(ask, cfg)
    print_table(results)
    about, out = {"model": str(path), "questions": cfg.n}, make_folder(cfg.out)
    write_json(out / "eval.json", about | {"accuracy": results, "expert_load": load})
    print(f"wrote {out / 'eval.json'}", file=sys.stderr)
    plots.draw_answers(plots.example_answers(ask), out / "answers.png")


if __name__ == "__main__":
    run(main)
