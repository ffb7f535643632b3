"""How often is the answer exactly right? By question type, on scenes nobody has trained on.

    python eval.py                       # the furthest stage in out/, all splits
    python eval.py --model DIR --n 1000

Three splits (data/world.py): `seen` (fresh scenes), `pairs` (pairs of things that never met in
training), `style` (a drawing style never trained on). Beside each accuracy stand two baselines:

    blank    the same model and question, the picture painted over with one colour
    chance   the best fixed answer to each form of question, learned from 8,000 training questions

A model whose accuracy is not far above both is not looking. Results are printed as a table and
written to `out/eval.json`; `out/answers.png` shows some answers, `out/experts.png` how evenly the
experts share the tokens of the split `seen`.
"""

import collections
import os
import pathlib
import re
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from cumo import CuMo, check_device, has_fast_bf16
from data import world
from data.chat import render
from data.flags import parse, run
from data.hub import resolve
from data.images import preprocess
from data.tokenizer import Tokenizer
from data.weights import write_json
from mlp_moe import SparseMoE
from plots import draw_load, pyplot
from sample import find_model


@dataclass
class EvalConfig:
    model: str = ""  # a checkpoint; empty: the furthest stage in out/
    out: str = "out"  # folder for eval.json and experts.png
    n: int = 1600  # questions a split
    batch: int = 50  # questions at a time
    seed: int = 1  # of the scenes and questions
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


SPLITS = ("seen", "pairs", "style")


def exam(split, n, seed):
    """`n` questions of a split, every type in turn: [(type, question, answer, picture)]."""
    asked, i = [], 0
    while len(asked) < n:
        rng = np.random.default_rng((seed, world.SPLITS.index(split), 99, i))
        i += 1
        scene = world.sample_scene(rng, split)
        kind = world.QUESTION_TYPES[len(asked) % len(world.QUESTION_TYPES)]
        pair = world.ASK[kind](scene, rng)
        if pair:
            asked.append((kind, *pair, world.draw(scene)))
    return asked


def question_form(question):
    """The question with every concept and place blanked: what can be known without the picture."""
    words = "|".join(sorted({*world.CONCEPTS, *map(world.plural, world.CONCEPTS),
                             *world.CATEGORIES.values()}, key=len, reverse=True))  # fmt: skip
    return re.sub(rf"\b(an? )?({words})\b", "_", question)


def fixed_answers(n=4000):
    """question form -> the answer most often right in training."""
    counts = collections.defaultdict(collections.Counter)
    for i in range(n):
        rng = np.random.default_rng((3, 99, i))
        for _, question, answer in world.questions(world.sample_scene(rng, "train"), rng, 2):
            counts[question_form(question)][answer] += 1
    return {form: answers.most_common(1)[0][0] for form, answers in counts.items()}


@torch.no_grad()
def answer(model, tokenizer, questions, pictures, max_new_tokens=48):
    """Greedy answers to a batch of questions, each about one picture (PIL)."""
    prompts = []
    for question in questions:
        turns = [{"from": "human", "value": "<image>\n" + question}]
        prompts.append(render(turns, tokenizer, model.cfg.template, model.image_tokens, 1)[0])
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    segments = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    size, mode = model.cfg.vision.image_size, model.cfg.image_mode
    pixels = torch.stack([preprocess(p, size, mode) for p in pictures]).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, has_fast_bf16(model.device)):
        ids = model.generate(tokens, pixels, segments, max_new_tokens=max_new_tokens,
                             eos_token_id=tokenizer.eos)  # fmt: skip
    return [tokenizer.decode(row).strip() for row in ids.tolist()]


def accuracy(model, tokenizer, asked, batch, blank=False, label=""):
    """{type: [right or wrong, ...]} over an exam; `blank` paints every picture over with gray."""
    hits = collections.defaultdict(list)
    for start in tqdm(range(0, len(asked), batch), desc=label, leave=False):
        kinds, questions, answers, pictures = zip(*asked[start : start + batch])
        if blank:
            pictures = [picture.copy() for picture in pictures]
            for picture in pictures:
                picture.paste((128, 128, 128), (0, 0, *picture.size))
        for kind, right, said in zip(kinds, answers, answer(model, tokenizer, questions, pictures)):
            hits[kind].append(said == right)
    return hits


def means(hits):
    """Share of right answers of each type, and of all types together under "all"."""
    table = {
        kind: round(float(np.mean(hits[kind])), 4) for kind in world.QUESTION_TYPES if kind in hits
    }
    return table | {"all": round(float(np.mean([x for h in hits.values() for x in h])), 4)}


@torch.no_grad()
def expert_load(model, pictures, batch=50):
    """{name of the sparse block: share of the assignments each expert got, [E]} over `pictures`."""
    counts, hooks = {}, []

    def watch(name):
        def hook(module, inputs, output):
            experts = len(module.gate.weight)
            chosen = output[1].choice.flatten()
            counts[name] = counts.get(name, 0) + torch.bincount(chosen, minlength=experts)[:experts]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, SparseMoE):
            hooks.append(module.register_forward_hook(watch(name)))
    size, mode = model.cfg.vision.image_size, model.cfg.image_mode
    for start in range(0, len(pictures), batch):
        pixels = torch.stack([preprocess(p, size, mode) for p in pictures[start : start + batch]])
        model.encode_images(pixels.to(model.device))
    for hook in hooks:
        hook.remove()
    return {name: (c / c.sum()).tolist() for name, c in counts.items()}


def draw_answers(model, tokenizer, file, seed=7):
    """Two scenes of each split and what they can be asked: green is right, red shows the truth."""
    plt = pyplot()
    if not plt:
        return
    figure = plt.figure(figsize=(13, 7))
    for cell in range(6):
        row, column = divmod(cell, 3)
        rng = np.random.default_rng((seed, cell))
        scene = world.sample_scene(rng, SPLITS[column], n_objects=2 + row)
        asked = [pair for ask in world.ASK.values() if (pair := ask(scene, rng))]
        pictures = [world.draw(scene)] * len(asked)
        said = answer(model, tokenizer, [question for question, _ in asked], pictures)
        left, top = column / 3 + 0.01, 0.95 - 0.49 * row
        axis = figure.add_axes((left, top - 0.25, 0.135, 0.25))
        axis.imshow(world.draw(scene, scale=4))
        axis.axis("off")
        axis.set_title(SPLITS[column], fontsize=11)
        for k, ((question, right), text) in enumerate(zip(asked, said)):
            shown, color, size = text, "#007A53", 8.5
            if text != right:
                shown, color, size = textwrap.fill(f"{text} (truth: {right})", 44), "#B3261E", 7.5
            at = top - 0.055 * k
            figure.text(left + 0.142, at, question, fontsize=7.5, color="#666666")
            figure.text(left + 0.142, at - 0.01, shown, fontsize=size, color=color, va="top")
    figure.savefig(file, dpi=100)
    plt.close(figure)
    print(f"wrote {file}")


def print_table(results):
    columns = [(split, row) for split in SPLITS for row in ("model", "blank", "chance")]
    print(f"{'':12}" + "".join(f"{split:^24}" for split in SPLITS))
    print(f"{'':12}" + "".join(f"{row:>8}" for _, row in columns))
    for kind in (*world.QUESTION_TYPES, "all"):
        cells = (results[split][row].get(kind) for split, row in columns)
        print(f"{kind:12}" + "".join(f"{cell:8.1%}" for cell in cells))


def main():
    cfg, _ = parse(EvalConfig, description=__doc__.split("\n")[0])
    if cfg.n < len(world.QUESTION_TYPES) or cfg.batch < 1:
        raise ValueError(f"--n {cfg.n} must be {len(world.QUESTION_TYPES)} or more, --batch "
                         f"{cfg.batch} 1 or more")  # fmt: skip
    check_device(cfg.device)
    out = pathlib.Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out} cannot be written; name another folder")
    path = resolve(cfg.model) if cfg.model else find_model(cfg.out)
    model = CuMo.from_pretrained(path, device=cfg.device).eval()
    tokenizer = Tokenizer.from_pretrained(path)
    fixed, results = fixed_answers(), {}
    for split in SPLITS:
        asked = exam(split, cfg.n, cfg.seed)
        guesses = collections.defaultdict(list)
        for kind, question, right, _ in asked:
            guesses[kind].append(fixed.get(question_form(question)) == right)
        results[split] = {
            "model": means(accuracy(model, tokenizer, asked, cfg.batch, label=split)),
            "blank": means(
                accuracy(model, tokenizer, asked, cfg.batch, blank=True, label=split + " blank")
            ),
            "chance": means(guesses),
        }
    print_table(results)
    load = expert_load(model, [picture for *_, picture in exam("seen", 400, cfg.seed + 1)])
    write_json(out / "eval.json",
               {"model": str(path), "questions": cfg.n, "accuracy": results,
                "expert_load": load})  # fmt: skip
    print(f"wrote {out / 'eval.json'}")
    draw_answers(model, tokenizer, out / "answers.png")
    if load:
        draw_load(load, out / "experts.png")


if __name__ == "__main__":
    run(main)
