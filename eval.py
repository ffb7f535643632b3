"""How often is the answer exactly right? By question type, on scenes nobody has trained on.

    python eval.py                       # the furthest stage in out/, all splits
    python eval.py --model DIR --n 1000
    python eval.py --model DIR --benchmark pope --folder eval/pope     # extras/benchmarks.py
    python eval.py --experts load.png --data mine.json --image-folder pics

Three splits (data/world.py): `seen` (fresh scenes), `pairs` (pairs of things that never met in
training), `style` (a drawing style never trained on). Beside each accuracy stand two baselines:

    blank    the same model and question, the picture painted over with one colour
    chance   the best fixed answer to each form of question, learned from 8,000 training questions

A model whose accuracy is not far above both is not looking. Results are printed as a table and
written to `out/eval.json`; `out/answers.png` shows some answers, `out/experts.png` how evenly the
experts share the tokens of the split `seen`.
"""

import collections
import json
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from cumo import CuMo
from data import world
from data.exam import SPLITS, exam, fixed_answers, question_form
from data.flags import check_device, parse, run
from data.hub import local_folder
from data.images import preprocess
from data.llava import LlavaData
from data.tokenizer import Tokenizer
from data.weights import fingerprint, make_folder, write_json
from engine.conversation import prompt
from engine.memory import has_fast_bf16
from extras import benchmarks
from extras.plots import check_target, draw_answers, draw_load
from mlp_moe import SparseMoE
from sample import DTYPES, find_model


@dataclass
class EvalConfig:
    model: str = ""  # a checkpoint; empty: the furthest stage in out/
    out: str = "out"  # folder for eval.json and experts.png
    n: int = 1600  # questions a split; of a benchmark: the first so many, not given: all
    benchmark: str = ""  # a public one instead of the scenes: pope, gqa, ... (extras/benchmarks.py)
    folder: str = ""  # where the benchmark's files are
    experts: str = ""  # draw the experts' load into this file; empty: experts.png in --out
    data: str = ""  # draw it for the pictures of this LLaVA file, and do nothing else
    image_folder: str = ""  # what image paths in --data are relative to
    batch: int = 50  # questions at a time
    dtype: str = ""  # of the weights: float32 or bfloat16; empty: float32
    seed: int = 1  # of the scenes and questions
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


@torch.no_grad()
def answer(model, tokenizer, questions, pictures, max_new_tokens=48):
    """Greedy answers to a batch of questions, each about one picture (PIL) or None."""
    asked = [prompt(model, tokenizer, q, [p] if p else []) for q, p in zip(questions, pictures)]
    width = max(len(ids) for ids, _ in asked)
    padding = [[0] * (width - len(ids)) for ids, _ in asked]
    tokens = torch.tensor([pad + ids for pad, (ids, _) in zip(padding, asked)])
    segments = torch.tensor([pad + [1] * len(ids) for pad, (ids, _) in zip(padding, asked)])
    seen = [pixels.to(model.device) for _, pixels in asked if pixels is not None]
    with torch.autocast(model.device.type, torch.bfloat16, has_fast_bf16(model.device)):
        ids = model.generate(tokens.to(model.device), torch.cat(seen) if seen else None,
                             segments.to(model.device), max_new_tokens=max_new_tokens,
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


def shown_answers(model, tokenizer, seed=7):
    """Two scenes of each split and what they can be asked: [(split, picture, [(question, truth,
    answer)])]."""
    cells = []
    for cell in range(6):
        rng, split = np.random.default_rng((seed, cell)), SPLITS[cell % 3]
        scene = world.sample_scene(rng, split, n_objects=2 + cell // 3)
        questions, truths = zip(*(pair for ask in world.ASK.values() if (pair := ask(scene, rng))))
        said = answer(model, tokenizer, questions, [world.draw(scene)] * len(questions))
        cells.append((split, world.draw(scene, scale=4), list(zip(questions, truths, said))))
    return cells


def print_table(results):
    columns = [(split, row) for split in SPLITS for row in ("model", "blank", "chance")]
    print(f"{'':12}" + "".join(f"{split:^24}" for split in SPLITS))
    print(f"{'':12}" + "".join(f"{row:>8}" for _, row in columns))
    for kind in (*world.QUESTION_TYPES, "all"):
        cells = (results[split][row].get(kind) for split, row in columns)
        print(f"{kind:12}" + "".join(f"{cell:8.1%}" for cell in cells))


def scenes(model, tokenizer, cfg):
    """The exam in all splits -> {split: {"model" | "blank" | "chance": {type: accuracy}}}."""
    fixed, results = fixed_answers(), {}
    for split in SPLITS:
        asked = exam(split, cfg.n, cfg.seed)
        guesses = collections.defaultdict(list)
        for kind, question, right, _ in asked:
            guesses[kind].append(fixed.get(question_form(question)) == right)
        how = model, tokenizer, asked, cfg.batch
        results[split] = {
            "model": means(accuracy(*how, label=split)),
            "blank": means(accuracy(*how, blank=True, label=split + " blank")),
            "chance": means(guesses),
        }
    return results


def main():
    cfg, given = parse(EvalConfig, description=__doc__.split("\n")[0])
    own = not (cfg.benchmark or cfg.data)
    if own and cfg.n < len(world.QUESTION_TYPES) or min(cfg.n, cfg.batch) < 1:
        raise ValueError(f"--n {cfg.n} must be {len(world.QUESTION_TYPES)} or more, --batch "
                         f"{cfg.batch} 1 or more")  # fmt: skip
    if bool(cfg.benchmark) != bool(cfg.folder) or cfg.benchmark and (cfg.data or cfg.experts):
        raise ValueError("--benchmark NAME and --folder DIR go together, without --data, --experts")
    if cfg.image_folder and not cfg.data:
        raise ValueError(f"--image-folder {cfg.image_folder} goes with --data FILE")
    if cfg.dtype not in DTYPES:
        raise ValueError(f"--dtype {cfg.dtype!r} is unknown; choose float32 or bfloat16")
    check_device(cfg.device)
    check_target(cfg.experts)
    out = make_folder(cfg.out)
    if cfg.benchmark:  # what is wrong with its files shows before a large model is loaded
        questions = benchmarks.load(cfg.benchmark, cfg.folder, cfg.n if "n" in given else 0)
    elif cfg.data:
        data = LlavaData(cfg.data, cfg.image_folder, cfg.n if "n" in given else 400)
    path = local_folder(cfg.model) if cfg.model else find_model(cfg.out)
    model = CuMo.from_pretrained(path, device=cfg.device, dtype=DTYPES[cfg.dtype]).eval()
    tokenizer = Tokenizer.from_pretrained(path)
    if cfg.benchmark:
        ask = lambda *asked: answer(model, tokenizer, *asked)
        by = {"weights": fingerprint(path), "dtype": cfg.dtype or "float32"}
        results = benchmarks.run(cfg.benchmark, questions, ask, out, str(path), cfg.batch, by)
        write_json(out / f"{cfg.benchmark}.json", results)
        return print(json.dumps(results, indent=1))
    if own:
        pictures = [picture for *_, picture in exam("seen", 400, cfg.seed + 1)]
    else:
        pictures = [image for sample in data for image in sample["images"]]
    load = expert_load(model, pictures) if pictures else {}
    if own:
        results = scenes(model, tokenizer, cfg)
        print_table(results)
        write_json(out / "eval.json", {"model": str(path), "questions": cfg.n, "accuracy": results,
                                       "expert_load": load})  # fmt: skip
        print(f"wrote {out / 'eval.json'}", file=sys.stderr)
        draw_answers(shown_answers(model, tokenizer), out / "answers.png")
    if load:
        draw_load(load, cfg.experts or out / "experts.png")
    elif cfg.experts or not own:
        raise ValueError("no expert sees a picture: --experts and --data want a sparse --model "
                         "(train.py --stage 3 makes one), and pictures")  # fmt: skip


if __name__ == "__main__":
    run(main)
