"""The pictures of training, evaluation and sampling; the only file that wants matplotlib."""

import functools
import json
import math
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import ImageColor

from data.images import preprocess, squared

# told apart by the colour-blind too (Okabe and Ito), and what can be read on each
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
INKS = ("white", "black", "white", "black", "black", "white", "black", "white")


@functools.cache  # says it once
def pyplot():
    """matplotlib.pyplot, or None and a line that says how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures without matplotlib: pip install matplotlib", file=sys.stderr)
        return None
    return plt


def check_target(file, flag="--experts"):
    """ValueError unless `file` is "" or a picture can be drawn into it; asked before a large model
    is loaded."""
    folder, suffix = Path(file).parent, Path(file).suffix
    if not file:
        return
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(file).is_dir():
        raise ValueError(f"{flag} {file} cannot be written; name a file in a folder that exists")
    kinds = pyplot().FigureCanvasBase.get_supported_filetypes() if pyplot() else [suffix[1:]]
    if suffix[1:].lower() not in kinds or not suffix:
        raise ValueError(f"{flag} {file}: its name must end in .png, or another kind of picture "
                         f"that matplotlib writes ({', '.join(sorted(kinds))})")  # fmt: skip


def save(figure, file, dpi=100):
    """Write a figure to a file, which is said on stderr (stdout is for results), or to a buffer."""
    figure.savefig(file, dpi=dpi)
    pyplot().close(figure)
    if not hasattr(file, "write"):
        print(f"wrote {file}", file=sys.stderr)


def draw_load(load, file):
    """{name of a sparse block: share of each expert}: a bar for each block, a colour an expert."""
    plt = pyplot()
    if not plt:
        return
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(load) + 1.2))
    for y, shares in enumerate(load.values()):
        left = 0
        for e, share in enumerate(shares):
            axis.barh(y, share, left=left, color=COLORS[e % len(COLORS)], edgecolor="white",
                      label=None if y else f"expert {e}")  # fmt: skip
            axis.text(left + share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=8,
                      color=INKS[e % len(INKS)])  # fmt: skip
            left += share
    names = [name.replace("vision.layers.", "CLIP layer ").replace(".moe", "") for name in load]
    axis.set(yticks=range(len(load)), yticklabels=names, xlim=(0, 1),
             xlabel="share of the token-to-expert assignments")  # fmt: skip
    axis.invert_yaxis()
    axis.legend(ncols=len(shares), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.tight_layout()
    save(figure, file)


def expert_map(picture, choice):
    """Patches in their experts' colors, the picture's outlines drawn over them: [S, S, 3] in 0..1.

    `picture` is square (PIL); `choice` [rows, columns] has each patch's expert, the top row first.
    """
    pixels = np.asarray(picture) / 255
    patch_S = np.arange(len(pixels)) * len(choice) // len(pixels)  # the patch a pixel lies in
    colors = np.array([ImageColor.getrgb(color) for color in COLORS]) / 255
    map_SS3 = colors[choice[patch_S][:, patch_S] % len(COLORS)]
    # Grey shades or colors shining through would change the experts' colors; outlines do not.
    steps = [np.diff(pixels, axis=axis, append=pixels.take([-1], axis)) for axis in (0, 1)]
    outline_SS1 = np.linalg.norm(steps, axis=(0, 3))[..., None]
    strong = max(0.1, np.quantile(outline_SS1, 0.98))
    outline_SS1 = (outline_SS1 / strong - 0.2).clip(0, 0.6)  # without the noise of a JPEG
    white_on_black = map_SS3.mean(-1, keepdims=True) < 0.2
    return map_SS3 * (1 - outline_SS1) + white_on_black * outline_SS1


@torch.no_grad()
def routing(model, pixels):
    """Where the patches of a picture [3, S, S] go -> ({name of a sparse block: the expert that each
    patch chose first [rows, columns]}, {name: each expert's share of all choices}); {} if dense."""
    _, aux = model.encode_images(pixels[None].to(model.device), with_aux=True)
    choices, load = {}, {}
    if aux["clip"]:  # at several scales: the choices of the whole image, the load of its tiles too
        for layer, (choice, share) in enumerate(zip(aux["clip"].choice, aux["clip"].load)):
            choices[f"CLIP layer {layer}"] = choice[0, 1:, 0]  # the class token is no patch
            load[f"CLIP layer {layer}"] = share
    if aux["mlp"]:
        choices["connector"], load["connector"] = aux["mlp"].choice[0, :, 0], aux["mlp"].load
    side = int(model.image_tokens**0.5)
    choices = {name: choice.view(side, side).cpu().numpy() for name, choice in choices.items()}
    return choices, {name: share.tolist() for name, share in load.items()}


def draw_experts(picture, choices, load, file):
    """Which expert sees which part of a picture (PIL, square): a map and bars a sparse block.

    `choices` {name: each patch's expert, as in `expert_map`}, `load` {name: share of each expert}.
    """
    plt = pyplot()
    if not plt:
        return
    columns = math.ceil((1.5 * (1 + len(choices))) ** 0.5)
    rows = math.ceil((1 + len(choices)) / columns)
    figure, axes = plt.subplots(rows, columns, layout="constrained",
                                figsize=(max(7.6, 1.9 * columns), 1.55 * rows + 0.8))  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.06)
    for axis in axes.flat:
        axis.axis("off")
    axes.flat[0].imshow(picture)
    axes.flat[0].set_title("the picture", fontsize=9)
    for axis, (name, choice) in zip(axes.flat[1:], choices.items()):
        end = len(choice) - 0.5
        axis.imshow(expert_map(picture, choice), extent=(-0.5, end, end, -0.5))  # row 0 at the top
        axis.set_title(name, fontsize=9)
        if len(choice) <= 12:  # more numbers could not be read
            for (row, column), e in np.ndenumerate(choice):
                axis.text(column, row, e, ha="center", va="center", fontsize=6,
                          color=INKS[e % len(INKS)])  # fmt: skip
        bars = axis.inset_axes((1.12, 0, 0.3, 1))
        colors = [COLORS[e % len(COLORS)] for e in range(len(load[name]))]
        bars.barh(range(len(colors)), load[name], color=colors)
        bars.axvline(1 / len(colors), color="black", linewidth=0.6, linestyle=":")
        bars.set(yticks=range(len(colors)), xticks=[], xlim=(0, max(map(max, load.values()))))
        bars.invert_yaxis()
        bars.tick_params(length=0, labelsize=7, pad=1)
        bars.spines[:].set_visible(False)
    experts = range(max(map(len, load.values())))
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLORS[e % len(COLORS)]) for e in experts]
    figure.legend(patches, [f"expert {e}" for e in experts], ncols=len(experts), fontsize=9,
                  loc="outside upper center", frameon=False)  # fmt: skip
    figure.supxlabel(
        "Color: the expert a patch goes to first. Bars: each expert's share of all choices, not "
        "only the first; dotted: an even share.\nThe connector routes each patch once, on the "
        "channels of all its S2 scales together.", fontsize=8, color="#444444")  # fmt: skip
    save(figure, file, dpi=150)


def draw_routing(model, image, file):
    """Draw which expert sees which patch of `image` (PIL). ValueError when none sees any."""
    choices = {}
    if hasattr(model, "encode_images"):
        size, mode = model.cfg.vision.image_size, model.cfg.image_mode
        choices, load = routing(model, preprocess(image, size, mode))
    if not choices:
        raise ValueError(f"--experts {file}: no expert of this model sees pictures; leave it out, "
                         "or give a sparse --model (train.py --stage 3 makes one)")  # fmt: skip
    draw_experts(squared(image, 336, mode), choices, load, file)  # sharper than a small CLIP's 64


def draw_answers(cells, file):
    """Pictures and what was asked about them, three in a row: green is right, red shows the truth.

    `cells` [(title, picture, [(question, truth, answer), ...]), ...].
    """
    plt = pyplot()
    if not plt:
        return
    figure = plt.figure(figsize=(13, 7))
    for cell, (title, picture, asked) in enumerate(cells):
        row, column = divmod(cell, 3)
        left, top = column / 3 + 0.01, 0.95 - 0.49 * row
        axis = figure.add_axes((left, top - 0.25, 0.135, 0.25))
        axis.imshow(picture)
        axis.axis("off")
        axis.set_title(title, fontsize=11)
        for k, (question, right, text) in enumerate(asked):
            shown, color, size = text, "#007A53", 8.5
            if text != right:
                shown, color, size = textwrap.fill(f"{text} (truth: {right})", 44), "#B3261E", 7.5
            at = top - 0.055 * k
            figure.text(left + 0.142, at, question, fontsize=7.5, color="#666666")
            figure.text(left + 0.142, at - 0.01, shown, fontsize=size, color=color, va="top")
    save(figure, file)


def draw_ablations(groups, file, reach=6):
    """Differences to each group's first row: ours with every seed, beside the paper's.

    `groups` as `ablations` of runs/results.py makes them. What lies further off than `reach` points
    becomes an arrow with its number, so that the small differences stay visible.
    """
    plt = pyplot()
    if not plt:
        return
    n_lines = sum(len(group["rows"]) + 1.5 for group in groups)
    figure, axes = plt.subplots(1, 2, sharex=True, sharey=True, layout="constrained",
                                figsize=(11, 0.28 * n_lines + 1.5))  # fmt: skip

    def line(axis, y, row, key, average, remark, color):
        far = row[key] is not None and abs(row[key]) > reach - 0.5
        if far:
            edge = (reach - 0.3) * (1 if row[key] > 0 else -1)
            axis.plot(edge, y, ">" if edge > 0 else "<", color=color, markersize=8)
            axis.text(edge * 0.93, y, f"{row[key]:+.1f}", fontsize=9, va="center",
                      ha="right" if edge > 0 else "left")  # fmt: skip
        elif row[key] is not None:
            axis.plot(row[key], y, "|", color=color, markersize=15, markeredgewidth=3, zorder=4)
        elif remark:
            axis.text(0.2, y, remark, fontsize=9, va="center", style="italic", color="#555555")
        if row[average] is not None:
            axis.text(1.01, y, f"{row[average]:.1f}", va="center", fontsize=9,
                      transform=axis.get_yaxis_transform())  # fmt: skip
        return far

    ours, paper = axes
    y, ticks = 0, []
    for group in groups:
        top, first = y, group["rows"][0]
        ticks.append((y, f"({group['group']}) {group['title']}"))
        for row in group["rows"]:
            y += 1
            ticks.append((y, row["label"]))
            far = line(ours, y, row, "difference", "average", "not measured", COLORS[0])
            if row["difference"] is not None and not far:
                seeds = [average - first["average"] for average in row["averages"]]
                ours.plot([min(seeds), max(seeds)], [y, y], color=COLORS[4], linewidth=2, zorder=2)
                ours.plot(seeds, [y] * len(seeds), "o", color="white", markersize=5, zorder=5,
                          markeredgecolor="black", markeredgewidth=0.8)  # fmt: skip
            line(paper, y, row, "paper", "paper_average", row["paper_remark"], COLORS[5])
        for axis in axes:
            axis.axhspan(top + 0.5, y + 0.5, color="#F4F4F4", zorder=0)
            axis.plot([0, 0], [top + 0.5, y + 0.5], color="black", linewidth=0.8, zorder=1)
        y += 1.5
    ours.set_yticks(*zip(*ticks), fontsize=9)
    for label in ours.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("(") else "normal")
    ours.set(xlim=(-reach, reach), ylim=(y - 0.8, -0.7))
    ours.set_title("this miniature: exact answers, mean of three splits\n"
                   "bar: mean of the seeds, circles: each seed; right: percent",
                   fontsize=10)  # fmt: skip
    paper.set_title("the paper, Table 3: mean of SQA,\nTextVQA, MM-Vet, SEED; right: the mean",
                    fontsize=10)  # fmt: skip
    for axis in axes:
        axis.set_xlabel("points above the group's first row")
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    save(figure, file, dpi=110)


def draw_ratios(rows, file):
    """Rows of bench.py: how many times as long as we each peer takes, on a logarithmic scale."""
    plt = pyplot()
    rows = [row for row in rows if "ours" in next(iter(row.get("ratios", "-"))) and
            len(row["ratios"]) > 1]  # fmt: skip
    if not plt or not rows:
        return
    figure, axis = plt.subplots(figsize=(11, 0.36 * len(rows) + 1), layout="constrained")
    for y, row in enumerate(rows):
        names = list(row["ratios"])[1:]
        for x in (row["ratios"][name] for name in names):
            axis.plot(x, y, "o", color=COLORS[0] if x >= 1 else COLORS[5])
        said = "; ".join(f"{name} {row['ratios'][name]:.2f}" for name in names)
        axis.text(1.01, y, said, fontsize=7, va="center", transform=axis.get_yaxis_transform())
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time of the other / ours: right of the line we are faster",
             yticks=range(len(rows)))  # fmt: skip
    labels = [f"{row['section']}: {row['case']}" for row in rows]
    axis.set_yticklabels(labels, fontsize=7)
    axis.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    axis.minorticks_off()
    axis.grid(axis="x", alpha=0.3)
    axis.invert_yaxis()
    save(figure, file, dpi=110)


def draw_metrics(folder):
    """loss.png, and for a sparse stage experts.png: the load over the last fifth of the steps."""
    plt = pyplot()
    if not plt:
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    every = dict.fromkeys(name for row in rows for name in row)
    names = [k for k in every if k == "lm_loss" or k.endswith(("_balance", "_z"))]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names):
        points = [(row["samples"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points), linewidth=0.8)
        axis.set(title=name, xlabel="samples", yscale="log" if name == "lm_loss" else "linear")
    figure.tight_layout()
    save(figure, folder / "loss.png")
    late, load = rows[-(len(rows) // 5 + 1) :], {}
    for part in ("clip", "mlp", "llm"):
        shares = [np.atleast_2d(row[f"{part}_load"]) for row in late if f"{part}_load" in row]
        if shares:
            layers = np.mean(shares, axis=0)
            load |= {f"{part} {layer}": row.tolist() for layer, row in enumerate(layers)}
    if load:
        draw_load(load, folder / "experts.png")
