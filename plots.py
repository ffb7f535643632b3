"""The pictures that training and evaluation draw; the only file that wants matplotlib."""

import functools
import json

import numpy as np

# told apart by the colour-blind too (Okabe and Ito)
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


@functools.cache  # says it once
def pyplot():
    """matplotlib.pyplot, or None and a line that says how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures without matplotlib: pip install matplotlib")
        return None
    return plt


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
                      color="white")  # fmt: skip
            left += share
    names = [name.replace("vision.layers.", "CLIP layer ").replace(".moe", "") for name in load]
    axis.set(yticks=range(len(load)), yticklabels=names, xlim=(0, 1),
             xlabel="share of the token-to-expert assignments")  # fmt: skip
    axis.invert_yaxis()
    axis.legend(ncols=len(shares), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
    print(f"wrote {file}")


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
    figure.savefig(folder / "loss.png", dpi=100)
    plt.close(figure)
    print(f"wrote {folder / 'loss.png'}")
    late, load = rows[-(len(rows) // 5 + 1) :], {}
    for part in ("clip", "mlp", "llm"):
        shares = [np.atleast_2d(row[f"{part}_load"]) for row in late if f"{part}_load" in row]
        if shares:
            layers = np.mean(shares, axis=0)
            load |= {f"{part} {layer}": row.tolist() for layer, row in enumerate(layers)}
    if load:
        draw_load(load, folder / "experts.png")
