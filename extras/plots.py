"""The plots of training, evaluation and sampling.

Everything shipped that needs matplotlib is here or imports `pyplot` from here. Without matplotlib
no picture is drawn, and one line says how to install it. Callers import this file only when they
draw.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import ImageColor
from tqdm import tqdm

from data import world
from data.exam import SPLITS
from data.images import preprocess, squared
from data.llava import Unreadable
from mlp_moe import SparseMoE

# Okabe and Ito's colors, safe for color blindness, and the text color readable on each.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
INKS = ("white", "black", "white", "black", "black", "white", "black", "white")
STAGES = {1: "connector pre-training", 2: "pre-finetuning", 3: "instruction tuning"}
LM_LOSS = {"lm_loss": "training", "val_loss": "held out"}
FEW = 20  # points of a curve that are also drawn one by one
CELL = 2.05  # inches of a map with its bars
PARTS = {"clip": "CLIP-MoE", "mlp": "MLP-MoE", "llm": "LLM-MoE"}
BLOCKS = {"clip": "CLIP layer {}", "mlp": "connector", "llm": "LLM layer {}"}


@functools.cache  # prints the hint once
def pyplot():
    """matplotlib.pyplot; without matplotlib None, and a line on stderr that says how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures without matplotlib: pip install matplotlib", file=sys.stderr)
        return None
    return plt


def check_target(file, inputs=(), flag="--experts"):
    """ValueError unless `file` is "" or a plot can be saved as it, without replacing one of the
    pictures `inputs`. Call it before loading a large model."""
    folder, suffix = Path(file).parent, Path(file).suffix
    if not file:
        return
    there = [used for used in (*inputs, file) if os.path.exists(used)]
    if file in there and any(os.path.samefile(file, used) for used in there[:-1]):
        raise ValueError(f"{flag} {file} would replace your picture; name another file")
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(file).is_dir():
        raise ValueError(f"{flag} {file} cannot be written; name a file in a folder that exists")
    kinds = pyplot().FigureCanvasBase.get_supported_filetypes() if pyplot() else [suffix[1:]]
    if suffix[1:].lower() not in kinds or not suffix:
        raise ValueError(f"{flag} {file}: its name must end in .png, or another format "
                         f"that matplotlib writes ({', '.join(sorted(kinds))})")  # fmt: skip


def save_figure(figure, file, dpi=110):
    """Write a figure to a file, and say so on stderr (stdout is for results), or to a buffer."""
    figure.savefig(file, dpi=dpi)
    pyplot().close(figure)
    if not hasattr(file, "write"):
        print(f"wrote {file}", file=sys.stderr)


def expert_legend(figure, experts, *more, columns=None):
    """Put the color of each expert, then the handles `more`, above a figure, in so many columns
    (None: in one row)."""
    colors = [COLORS[e % len(COLORS)] for e in range(experts)]
    patch = pyplot().Rectangle
    handles = [patch((0, 0), 1, 1, color=c, label=f"expert {e}") for e, c in enumerate(colors)]
    handles += more
    figure.legend(handles=handles, ncols=columns or len(handles), fontsize=9, frameon=False,
                  loc="outside upper center", handlelength=1.3, columnspacing=1.2)  # fmt: skip


@torch.no_grad()
def expert_load(model, pictures, batch=50):
    """{name of a sparse block: each expert's share of all choices, [E]} over `pictures` (PIL)."""
    names = {block: name for name, block in model.named_modules() if isinstance(block, SparseMoE)}
    counts = {}

    def count(block, _, output):
        name, E = names[block], len(block.gate.weight)
        chosen = torch.bincount(output[1].choice.flatten(), minlength=E)[:E]
        counts[name] = counts.get(name, 0) + chosen

    hooks = [block.register_forward_hook(count) for block in names]
    size, mode = model.cfg.vision.image_size, model.cfg.image_mode
    for start in tqdm(range(0, len(pictures), batch), desc="experts", leave=False):
        pixels = torch.stack([preprocess(p, size, mode) for p in pictures[start : start + batch]])
        model.encode_images(pixels.to(model.device))
    for hook in hooks:
        hook.remove()
    return {name: (c / c.sum()).tolist() for name, c in counts.items()}


def own_load(model, data, most=400):
    """The expert load over the pictures of the first records of a LlavaData that can be read."""
    pictures = []
    for i in range(min(most, len(data))):
        with contextlib.suppress(Unreadable):
            pictures += data[i]["images"]
    return expert_load(model, pictures)


def draw_load(load, file):
    """Draw {name of a sparse block: share of each expert}: a bar a block, a color an expert.
    ValueError for a load without a block."""
    if not load:
        raise ValueError("no expert sees a picture: --experts wants a sparse --model (train.py "
                         "--stage 3 makes one), and pictures")  # fmt: skip
    plt = pyplot()
    if not plt:
        return
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(load) + 1.1), layout="constrained")
    for y, shares in enumerate(load.values()):
        for e, (share, end) in enumerate(zip(shares, np.cumsum(shares))):
            axis.barh(y, share, left=end - share, color=COLORS[e % len(COLORS)], edgecolor="white")
            if share >= 0.04:  # a narrower bar has no room for its number
                axis.text(end - share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=9,
                          color=INKS[e % len(INKS)])  # fmt: skip
    names = [name.replace("vision.layers.", "CLIP layer ").replace(".moe", "") for name in load]
    even = f"(even: {100 / len(shares):.3g} % each)"
    axis.set(yticks=range(len(load)), yticklabels=names, xlim=(0, 1), ylim=(-0.6, len(load) - 0.4),
             xlabel=f"share of the tokens' choices {even}")  # fmt: skip
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    expert_legend(figure, max(map(len, load.values())))
    save_figure(figure, file)


def expert_map(picture, choice):
    """Color each patch as its expert, and draw the picture's outlines on top: [S, S, 3] in 0..1.

    `picture` is square (PIL). `choice` [rows, columns]: each patch's expert, the top row first.
    """
    pixels = np.asarray(picture) / 255
    patch_S = np.arange(len(pixels)) * len(choice) // len(pixels)  # the patch of each pixel
    colors = np.array([ImageColor.getrgb(color) for color in COLORS]) / 255
    map_SS3 = colors[choice[patch_S][:, patch_S] % len(COLORS)]
    # Blending the picture in would change the experts' colors; outlines do not.
    steps = [np.diff(pixels, axis=axis, append=pixels.take([-1], axis)) for axis in (0, 1)]
    outline_SS1 = np.linalg.norm(steps, axis=(0, 3))[..., None]
    strong = max(0.1, np.quantile(outline_SS1, 0.98))
    outline_SS1 = (outline_SS1 / strong - 0.2).clip(0, 0.6)  # cuts off JPEG noise
    white_on_black = map_SS3.mean(-1, keepdims=True) < 0.2
    return map_SS3 * (1 - outline_SS1) + white_on_black * outline_SS1


@torch.no_grad()
def routing(model, pixels):
    """Route a picture [3, S, S] -> ({name of a sparse block: the first choice of each patch [rows,
    columns]}, {name: each expert's share of all choices}); both empty for a dense model."""
    _, aux = model.encode_images(pixels[None].to(model.device), with_aux=True)
    choices, load = {}, {}
    if aux["clip"]:  # with several scales, the load counts all tiles, the map shows the whole image
        for layer, (choice, share) in enumerate(zip(aux["clip"].choice, aux["clip"].load)):
            choices[f"CLIP layer {layer}"] = choice[0, 1:, 0]  # without the class token
            load[f"CLIP layer {layer}"] = share
    if aux["mlp"]:
        choices["connector"], load["connector"] = aux["mlp"].choice[0, :, 0], aux["mlp"].load
    side = int(model.image_tokens**0.5)
    choices = {name: choice.view(side, side).cpu().numpy() for name, choice in choices.items()}
    return choices, {name: share.tolist() for name, share in load.items()}


def draw_experts(picture, choices, load, file, scales=1, width=None):
    """Draw which expert sees which part of a picture (PIL, square): a map and bars a sparse block.

    `choices` {name: each patch's expert, as in `expert_map`}, `load` {name: share of each expert},
    `scales`: the number of scales of the vision tower. `width`: of the plot, in inches, as on a
    phone; None: as wide as it takes.
    """
    plt = pyplot()
    if not plt:
        return
    from matplotlib.patheffects import withStroke

    most, n_experts = max(map(max, load.values())), max(map(len, load.values()))
    columns = math.ceil((1.5 * (1 + len(choices))) ** 0.5)
    columns = max(1, round(width / CELL)) if width else columns
    rows = math.ceil((1 + len(choices)) / columns)
    size = width or max(8, CELL * columns, 1.15 * n_experts), 1.65 * rows + (1.4 if width else 0.8)
    figure, axes = plt.subplots(rows, columns, layout="constrained", figsize=size, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.06)
    for axis in axes.flat:
        axis.axis("off")
    axes.flat[0].imshow(picture)
    axes.flat[0].set_title("the picture", fontsize=9)
    for axis, (name, choice) in zip(axes.flat[1:], choices.items()):
        end = len(choice) - 0.5
        axis.imshow(expert_map(picture, choice), extent=(-0.5, end, end, -0.5))  # row 0 at the top
        axis.set_title(name, fontsize=9)
        if len(choice) <= 12:  # larger grids have no room for numbers
            for (row, column), e in np.ndenumerate(choice):
                halo = withStroke(linewidth=2, foreground=COLORS[e % len(COLORS)])
                axis.text(column, row, e, ha="center", va="center", fontsize=7,
                          color=INKS[e % len(INKS)], path_effects=[halo])  # fmt: skip
        experts, even = len(load[name]), 1 / len(load[name])
        bars = axis.inset_axes((1.12, 0, 0.46, 1))
        for e, share in enumerate(load[name]):
            bars.barh(e, share, color=COLORS[e % len(COLORS)])
            bars.text(1.7 * most, e, f"{share:.0%}", ha="right", va="center", fontsize=7)
        bars.axvline(even, color="black", linewidth=0.8, linestyle=":")
        bars.set(xlim=(0, 1.85 * most), xticks=[even], xticklabels=[f"{100 * even:.3g} %"],
                 yticks=range(experts))  # fmt: skip
        bars.invert_yaxis()
        bars.tick_params(length=0, labelsize=7, pad=1)
        bars.spines[["top", "right", "bottom"]].set_visible(False)
    dotted = plt.Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="an even share")
    expert_legend(figure, n_experts, dotted, columns=width and max(1, int(width / 1.9)))
    note = ("Map: the expert that a patch goes to first. Bars: each expert's share of all choices, "
            "not only the first.")  # fmt: skip
    if scales > 1:
        note += ("\nThe bars of CLIP count the tiles of the larger scales too; the connector "
                 "routes a patch once, on the channels of all scales.")  # fmt: skip
    note = "\n".join(textwrap.wrap(note, int(15 * width))) if width else note
    figure.supxlabel(note, fontsize=8, color="#444444")
    save_figure(figure, file, dpi=140)


def draw_routing(model, image, file, width=None):
    """Draw which expert sees which patch of `image` (PIL), as in `draw_experts`. ValueError for a
    model without experts on the vision side."""
    choices = {}
    if hasattr(model, "encode_images"):
        size, mode = model.cfg.vision.image_size, model.cfg.image_mode
        choices, load = routing(model, preprocess(image, size, mode))
    if not choices:
        raise ValueError(f"--experts {file}: no expert of this model sees pictures; leave it out, "
                         "or give a sparse --model (train.py --stage 3 makes one)")  # fmt: skip
    sharp = squared(image, 336, mode)  # the miniature itself sees 64 pixels a side
    draw_experts(sharp, choices, load, file, len(model.cfg.vision.scales), width)


def example_answers(ask, seed=16):
    """A scene of each split and kind, with up to four questions of different types about it.

    `ask(questions, pictures)` -> answers. Returns [(title, picture, [(question, truth, answer)])].
    """
    cells = []
    for split, (kind, types) in itertools.product(SPLITS, world.ASKED.items()):
        rng = np.random.default_rng((seed, len(cells)))
        scene = world.sample_scene(rng, split, kind)
        pairs = [pair for name in dict.fromkeys(types) if (pair := world.ASK[name](scene, rng))]
        questions, truths = zip(*(pairs[i] for i in sorted(rng.permutation(len(pairs))[:4])))
        answers = ask(questions, [world.draw(scene)] * len(questions))
        asked = list(zip(questions, truths, answers))
        cells.append((f"{kind}, {split}", world.draw(scene, scale=4), asked))
    return cells


def draw_answers(cells, file):
    """Draw pictures with questions and answers, three in a row, the truth after a wrong answer.

    `cells` [(title, picture, [(question, truth, answer), ...]), ...].
    """
    plt = pyplot()
    if not plt:
        return
    width, height, side = 9.8, 7.3, 1.2  # inches
    figure = plt.figure(figsize=(width, height))
    for cell, (title, picture, asked) in enumerate(cells):
        row, column = divmod(cell, 3)
        left, y = column * width / 3 + 0.05, height - 0.35 - 2.3 * row
        axis = figure.add_axes((left / width, (y - side) / height, side / width, side / height))
        axis.imshow(picture)
        axis.axis("off")
        axis.set_title(title, fontsize=11)
        for question, right, text in asked:
            shown, color = f"\u2713 {text}", "#007A53"
            if text != right:
                shown, color = f"\u2717 {text} (truth: {right})", "#B3261E"
            lines = [(line, "#555555") for line in textwrap.wrap(question, 31)]
            for line, ink in lines + [(line, color) for line in textwrap.wrap(shown, 31)]:
                figure.text((left + side + 0.08) / width, y / height, line, fontsize=8.5, va="top",
                            color=ink)  # fmt: skip
                y -= 0.155
            y -= 0.06
    note = ("new: fresh scenes; pairs: objects that never met in training, held-out words and "
            "heights of bars;\nstyle: drawings, signs and bars never trained on")  # fmt: skip
    figure.text(0.5, 0.012, note, fontsize=9, color="#555555", ha="center")
    save_figure(figure, file)


def running_mean(values):
    """Centered running mean over a tenth of the values; the window is cut off at the ends."""
    window = np.ones(len(values) // 20 * 2 + 1)
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


def draw_losses(stages, file):
    """Draw {stage: rows of its metrics.jsonl}: the language model's loss of each stage, then the
    balance and z losses of the last stage's routers."""
    plt = pyplot()
    if not plt:
        return
    panels = []
    for k, rows in stages.items():
        panels.append((rows, f"stage {k}: {STAGES[k]}", "nats a token of an answer", LM_LOSS))
    known = {name for row in rows for name in row}
    for kind, what in (("balance", "balance loss"), ("z", "router z-loss")):
        curves = {f"{p}_{kind}": part for p, part in PARTS.items() if f"{p}_{kind}" in known}
        if curves:
            panels.append((rows, f"stage {k}: {what}", what, curves))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, layout="constrained",
                                figsize=(3.6 * columns, 2.7 * lines))  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (rows, title, unit, curves) in zip(axes.flat, panels):
        known = [curve for curve in curves.items() if any(curve[0] in row for row in rows)]
        for (name, label), color in zip(known, COLORS):
            samples, values = zip(*((r["samples"], r[name]) for r in rows if name in r))
            points = dict(marker="o", markersize=4) if len(values) < FEW else {}  # no line for one
            axis.plot(samples, values, color=color, linewidth=0.6, alpha=0.35)
            axis.plot(samples, running_mean(values), color=color, linewidth=2, label=label,
                      **points)  # fmt: skip
        axis.set(xlabel="samples", ylabel=unit)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if "balance" in title:
            axis.axhline(1, color="black", linewidth=1, linestyle=":", label="1: even")
        if curves is LM_LOSS:
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            some = (1, 2, 5) if high > 5 * low else range(1, 10)  # a short run: labels at 4, 5, 6
            axis.yaxis.set_major_locator(plt.LogLocator(subs=some))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        if len(known) > 1 or curves is not LM_LOSS:
            axis.legend(frameon=False, fontsize=9)
    figure.supxlabel("thin: each step; thick: running mean over a tenth of all steps", fontsize=9,
                     color="#555555")  # fmt: skip
    save_figure(figure, file)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def draw_metrics(folder, stage):
    """Draw loss.png and, for a sparse stage, experts.png: the load over its last fifth of steps."""
    rows = read_metrics(folder)
    draw_losses({stage: rows}, folder / "loss.png")
    late, load = rows[-(len(rows) // 5 + 1) :], {}
    for part, name in BLOCKS.items():
        shares = [np.atleast_2d(row[f"{part}_load"]) for row in late if f"{part}_load" in row]
        if shares:
            layers = np.mean(shares, axis=0)
            load |= {name.format(layer): row.tolist() for layer, row in enumerate(layers)}
    if load:
        draw_load(load, folder / "experts.png")
