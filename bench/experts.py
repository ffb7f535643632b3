"""What do experts do? How far a patch's experts depend on where it is and on what it shows.

    python bench/experts.py --model out/stage3 --before out/stage2       # a minute

A scene says what each of its patches shows (`shown`). Over new scenes, a third of each kind, a
sparse block has n(s, e) choices of expert e by patches that show s. Their mutual information is

    I = sum over s, e of p(s, e) log2(p(s, e) / (p(s) p(e)))        bits

Each of a token's K choices is one sample, because all K experts compute the token and the load that
is drawn counts all K. So I is at most log2(E / K): 1 bit with 2 of 4 experts.

Patches of one picture are alike, so they are not independent samples. The comparison gives each
picture the labels of a random picture, 20 times. What remains is the bias of a finite sample and
the effect of position, since things stand at the same places in many pictures. Positions are the
same in every picture, so they are permuted within each picture.

`--before` is upcycled as at step 0 of stage 3: its experts are equal, its routers random. A random
router is a function of the token too, so it has mutual information as well.

Writes bench/experts.json and bench/experts.png, or --out FILE.json and FILE.png.
"""

import itertools
import pathlib
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from bench.speed import conditions
from cumo import CuMo
from data import exam, world
from data.charts import bar_boxes
from data.checkpoint import recorded
from data.flags import parse, run
from data.hub import local_folder
from data.images import preprocess
from data.weights import write_json
from engine.resume import read_state
from extras.plots import check_target
from runs.make.pretrain_clip import patch_targets
from runs.make.text_world import GRID, PATCH
from runs.pictures import draw_content
from upcycle import upcycle


@dataclass
class ExpertsConfig:
    model: str = "out/stage3"  # a sparse miniature
    before: str = "out/stage2"  # the dense one that it was upcycled from
    pictures: int = 1000  # number of new scenes
    seed: int = 0  # seeds the scenes and the random routers
    out: str = ""  # a .json file; the picture stands next to it; empty: bench/experts.json


def shown(scene):
    """{view: what each patch shows, [P] words}; "" where the view does not apply, as at the border
    of an object. A view also needs a title in runs/pictures.py."""
    targets, n = patch_targets(scene), len(world.CONCEPTS)
    objects = [world.CONCEPTS[t] if 0 <= t < n else "" for t in targets]
    parts = np.array(["background" if t >= n else "thing" if t >= 0 else "" for t in targets])
    bars = bar_boxes(scene.chart) if scene.chart else []
    for part, boxes in (("word", [sign.box for sign in scene.signs]), ("bar", bars)):
        share_P = covered(boxes)
        parts[share_P > 0] = ""
        parts[share_P > 0.5] = part
    return {
        "kind": [scene.kind] * len(targets),
        "part": parts,
        "position": [f"{patch:02}" for patch in range(len(targets))],
        "object": objects,
        "category": [world.CATEGORIES.get(name, "") for name in objects],
        "background": [scene.background if part == "background" else "" for part in parts],
    }


def covered(boxes):
    """The share of each patch [P] that boxes (left, top, width, height) cover."""
    mask = np.zeros((GRID * PATCH, GRID * PATCH))
    for left, top, width, height in boxes:
        mask[top : top + height, left : left + width] = 1
    return mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).ravel()


def labels_of(scenes):
    """{view: (its words, their indices [n, P], -1 where the view does not apply)}"""
    every, views = [shown(scene) for scene in scenes], {}
    for view in every[0]:
        words_nP = np.array([one[view] for one in every])
        words = np.unique(words_nP[words_nP != ""])
        labels_nP = np.searchsorted(words, words_nP)
        views[view] = words.tolist(), np.where(words_nP == "", -1, labels_nP)
    return views


@torch.no_grad()
def choices_of(model, pictures, batch=50):
    """{sparse block: the experts of each patch [n, P, K]} of pictures (PIL)."""
    found, size = {}, model.cfg.vision.image_size
    for start in tqdm(range(0, len(pictures), batch), unit_scale=batch, unit="picture"):
        pixels = [preprocess(picture, size) for picture in pictures[start : start + batch]]
        _, aux = model.encode_images(torch.stack(pixels).to(model.device), with_aux=True)
        blocks = {}
        if aux["clip"]:  # without the class token
            blocks |= {f"CLIP layer {k}": c[:, 1:] for k, c in enumerate(aux["clip"].choice)}
        if aux["mlp"]:
            blocks["connector"] = aux["mlp"].choice
        for name, choice_nPK in blocks.items():
            found.setdefault(name, []).append(choice_nPK.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def count(choice_nPK, label_nP):
    """How often a patch of each label goes to each expert: [L, E]."""
    real_nP, L, E = label_nP >= 0, label_nP.max() + 1, choice_nPK.max() + 1
    pairs = label_nP[real_nP][:, None] * E + choice_nPK[real_nP]
    return np.bincount(pairs.ravel(), minlength=L * E).reshape(L, E)


def mutual_information(counts_LE):
    """Mutual information of label and expert, in bits, from their counts."""
    joint_LE = counts_LE / counts_LE.sum()
    product_LE = joint_LE.sum(1, keepdims=True) * joint_LE.sum(0)
    some = joint_LE > 0
    return float((joint_LE[some] * np.log2(joint_LE[some] / product_LE[some])).sum())


def permuted(label_nP, rng):
    """The labels of a random picture for each picture; if all pictures have the same labels, these
    in another order for each picture."""
    if (label_nP == label_nP[0]).all():
        return rng.permuted(label_nP, axis=1)
    return label_nP[rng.permutation(len(label_nP))]


def measure(choice_nPK, label_nP, times=20):
    """Mutual information in bits, and mean and maximum over permuted labels."""
    rng = np.random.default_rng(0)
    bits = lambda labels: mutual_information(count(choice_nPK, labels))
    chance = [bits(permuted(label_nP, rng)) for _ in range(times)]
    return {"bits": round(bits(label_nP), 5), "permuted_mean": round(float(np.mean(chance)), 5),
            "permuted_max": round(max(chance), 5)}  # fmt: skip


def check_start(after, before):
    """ValueError if their train.json files say that `after` was not trained from `before`. Without
    such a file, nothing is known and nothing is refused."""
    settings, then = recorded(after), recorded(before)
    for name in ("preset", "clip", "llm", "scales"):
        ours, theirs = settings.get(name), then.get(name)
        if settings and then and ours != theirs:
            raise ValueError(f"--before {before} is of another training: its {name} is {theirs}, "
                             f"that of --model {after} is {ours}")  # fmt: skip
    start = pathlib.Path(settings.get("init") or pathlib.Path(after).parent / "stage2")
    sums = [(read_state(pathlib.Path(folder)) or {}).get("crc32") for folder in (start, before)]
    if settings and all(sums) and sums[0] != sums[1]:
        raise ValueError(f"--before {before} is of another training: --model {after} started "
                         f"from {start}, whose weights differ")  # fmt: skip


def open_models(after, before, seed):
    """-> {"before": the dense model `before`, upcycled; "after": the sparse model `after`}"""
    check_start(after, before)
    model, dense = (CuMo.from_pretrained(local_folder(path)).eval() for path in (after, before))
    if dense.cfg.vision.num_experts or dense.cfg.mlp_experts:
        raise ValueError(f"--before {before} is sparse; give the dense stage 2 that --model "
                         f"{after} started from")  # fmt: skip
    vision, patches = model.cfg.vision, GRID * GRID
    sizes = {"clip": (vision.num_experts, vision.top_k),
             "mlp": (model.cfg.mlp_experts, model.cfg.mlp_top_k)}  # fmt: skip
    sparse = {part: size for part, size in sizes.items() if size[0]}
    if not sparse or model.image_tokens != patches:
        raise ValueError(f"--model {after} has {sizes['clip'][0]} experts in CLIP, "
                         f"{sizes['mlp'][0]} in the connector, and {model.image_tokens} patches; "
                         f"give a sparse miniature ({patches} patches), as train.py --stage 3 "
                         "makes it")  # fmt: skip
    upcycled = upcycle(dense, tuple(sparse), *next(iter(sparse.values())), seed).eval()
    return {"before": upcycled, "after": model}


def compare(choices, views):
    """{"before" | "after": {block: choice [n, P, K]}} and views of `labels_of` -> (one row for each
    block and view, {block: {view: {word: load of each expert after training}}})."""
    rows, load = [], {}
    for block, choice in choices["after"].items():
        load[block] = {}
        for view, (words, labels) in views.items():
            bits = {when: measure(found[block], labels) for when, found in choices.items()}
            rows.append({"block": block, "view": view, "labels": len(words)} | bits)
            if view != "object":  # too many to draw
                counts = count(choice, labels)
                shares = (counts / counts.sum(1, keepdims=True)).round(3).tolist()
                load[block][view] = dict(zip(words, shares))
    return rows, load


def main():
    cfg, _ = parse(ExpertsConfig, description=__doc__)
    if cfg.pictures < 100:
        raise ValueError(f"--pictures {cfg.pictures} must be 100 or more; fewer say nothing")
    file = pathlib.Path(cfg.out or ROOT / "bench" / "experts.json")
    if file.suffix != ".json":
        raise ValueError(f"--out {file} must end in .json")
    check_target(file.with_suffix(".png"), flag="--out")
    models = open_models(cfg.model, cfg.before, cfg.seed)
    rngs = (np.random.default_rng((cfg.seed, 98, i)) for i in range(cfg.pictures))
    kinds = itertools.cycle(world.KINDS)
    scenes = [world.sample_scene(rng, exam.SPLITS[0], kind) for rng, kind in zip(rngs, kinds)]
    pictures = [world.draw(scene) for scene in scenes]
    choices = {when: choices_of(model, pictures) for when, model in models.items()}
    rows, load = compare(choices, labels_of(scenes))
    for row in rows:
        before, after = row["before"], row["after"]
        print(f"{row['view']:10} {row['block']:13} before {before['bits']:.3f}  after "
              f"{after['bits']:.3f} bits  permuted {after['permuted_mean']:.4f}, at most "
              f"{after['permuted_max']:.4f}")  # fmt: skip
    content = conditions() | {"pictures": cfg.pictures, "rows": rows, "load": load}
    write_json(file, content)
    draw_content(content, file.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
