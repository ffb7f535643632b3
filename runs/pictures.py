"""The pictures of what was measured: bench/speed.py's races, and the ablations.

Both stand beside a table of the README, and show the rows of that table: `shown` picks those of
bench/speed.py for the two of them (runs/results.py writes the tables, and redraws all pictures).
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from extras.plots import COLORS, pyplot, save

SHOWN = (  # rows of bench/speed.py that the README shows: (section, start of the case)
    ("moe", "CLIP-L, 16"),
    ("moe", "miniature CLIP, 16"),
    ("moe", "Mixtral"),
    ("moe", "CLIP-L, more"),
    ("scale", "attention"),
    ("llm", ""),
    ("train", "half"),
    ("load", ""),
    ("decode", "first token, bf"),
    ("decode", "first token, int8"),
    ("decode", "a token, fl"),
    ("decode", "a token, bf"),
    ("decode", "a token, int8"),
    ("decode", "a token of each"),
)
PEERS = {  # how the name of a peer in bench/speed.py begins: its color and marker, and who that is
    "transformers": (COLORS[1], "s", "transformers"),
    "llama.cpp": (COLORS[2], "^", "llama.cpp"),
    "loop": (COLORS[5], "D", "the original's loop over experts"),
    "dense": (COLORS[3], "v", "a dense MLP of the same work"),
    "": (COLORS[0], "o", "ours, done in the way named at the right"),
}


def shown(rows):
    """Those of bench/speed.py's `rows` that the README's table and picture show, in their order."""
    return [row for section, case in SHOWN for row in rows
            if row["section"] == section and row["case"].startswith(case)
            and len(row["ratios"]) > 1]  # fmt: skip


def done_how(row):
    """Which of our own ways stands for 1, where that does not go without saying."""
    first = next(iter(row["ratios"]))
    return "" if first in ("ours", "ours, compiled") else f" ({first})"


def peer(name):
    """Color, marker and legend of a contestant in bench/speed.py."""
    return next(who for start, who in PEERS.items() if name.startswith(start))


def draw_ratios(run, file):
    """A result of bench/speed.py: how many times as long as we each peer takes."""
    plt, rows = pyplot(), shown(run["rows"])
    if not plt or not rows:
        return
    figure, axis = plt.subplots(figsize=(11, 0.36 * len(rows) + 1.8), layout="constrained")
    dots = {}  # a peer's dots, one a peer for the legend
    for y, row in enumerate(rows):
        _, *others = row["ratios"].items()  # the first is ours
        others.sort(key=lambda other: other[1])  # as they lie, from left to right
        for name, ratio in others:
            color, marker, label = peer(name)
            ring = dict(markerfacecolor="none", markeredgewidth=2)  # what lies behind it shows
            edge = dict(markeredgecolor="black", markeredgewidth=0.5)
            (dots[label],) = axis.plot(ratio, y, marker, color=color, markersize=8, label=label,
                                       **(ring if marker == "o" else edge))  # fmt: skip
        said = ",  ".join(f"{name} {ratio:.2f}" for name, ratio in others)
        axis.text(1.01, y, said, fontsize=8, va="center", transform=axis.get_yaxis_transform())
    figure.legend(handles=[dots[label] for *_, label in PEERS.values() if label in dots], ncols=3,
                  loc="outside upper center", frameon=False, fontsize=9)  # fmt: skip
    every = [ratio for row in rows for ratio in row["ratios"].values()]
    low, high = 0.8 * min(every), 1.25 * max(every)
    ticks = [2.0**k for k in range(-10, 11) if low < 2.0**k < high]
    axis.axvline(1, color="black", linewidth=1.5, zorder=1)
    axis.axvspan(1, high, color="#EAF3F8", zorder=0)
    precision = run["precision"].removeprefix("torch.")
    axis.set(xscale="log", xlim=(low, high),
             title=f"{run['machine']}, {run['threads']} cores, {precision}; medians",
             xlabel="\u2190 the other is faster      1 = ours      ours is faster \u2192\n"
                    "time of the other as a multiple of ours, on a logarithmic scale")  # fmt: skip
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    names = (f"{row['section']}: {row['case']}{done_how(row)}" for row in rows)
    axis.set_yticks(range(len(rows)), [name.replace(" (", "\n(") for name in names])
    axis.tick_params(axis="y", labelsize=8)
    axis.minorticks_off()
    axis.grid(axis="x", alpha=0.4)
    axis.invert_yaxis()
    save(figure, file)


def draw_difference(axis, y, value, seeds, color, reach):
    """A bar at `value` and a circle for each of the `seeds`; what is far off is an arrow."""
    if abs(value) > reach - 0.5:
        sign = 1 if value > 0 else -1
        axis.plot(sign * (reach - 0.3), y, ">" if sign > 0 else "<", color=color, markersize=8)
        said = f"{value:+.1f}" + (f" ({min(seeds):+.1f} to {max(seeds):+.1f})" if seeds else "")
        axis.text(sign * (reach - 0.7), y, said, fontsize=9, va="center",
                  ha="right" if sign > 0 else "left")  # fmt: skip
        return
    axis.plot(value, y, "|", color=color, markersize=15, markeredgewidth=3, zorder=4)
    axis.plot(seeds, [y] * len(seeds), "o-", color=COLORS[4], markersize=5, linewidth=2, zorder=5,
              markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.8)  # fmt: skip


def draw_ablations(groups, file, reach=6):
    """Differences to each group's first row: ours with every seed, beside the paper's.

    `groups` as `ablations` of runs/results.py makes them. What lies further off than `reach` points
    becomes an arrow with its number, so that the small differences stay visible.
    """
    plt = pyplot()
    if not plt:
        return
    n_lines = sum(len(group["rows"]) + 1.5 for group in groups)
    figure, (ours, paper) = plt.subplots(1, 2, sharex=True, sharey=True, layout="constrained",
                                         figsize=(11, 0.28 * n_lines + 1.9))  # fmt: skip
    sides = ((ours, "difference", "average", COLORS[0]),
             (paper, "paper", "paper_average", COLORS[5]))  # fmt: skip
    y, ticks = 0, []
    for group in groups:
        top, (first, *_) = y, group["rows"]
        ticks.append((y, f"({group['group']}) {group['title']}"))
        for row in group["rows"]:
            y += 1
            ticks.append((y, row["label"] + (" (reference)" if row is first else "")))
            for axis, key, average, color in sides:
                if row[key] is not None:
                    seeds = row["averages"] if axis is ours else []
                    seeds = sorted(seed - first["average"] for seed in seeds)
                    draw_difference(axis, y, row[key], seeds, color, reach)
                else:
                    remark = row["paper_remark"] if axis is paper else "not measured"
                    axis.text(0.2, y, remark, fontsize=9, va="center", style="italic")
                if row[average] is not None:
                    axis.text(1.01, y, f"{row[average]:.1f}", va="center", fontsize=9,
                              transform=axis.get_yaxis_transform())  # fmt: skip
        for axis in (ours, paper):
            axis.axhspan(top + 0.5, y + 0.5, color="#F4F4F4", zorder=0)
            axis.plot([0, 0], [top + 0.5, y + 0.5], color="black", linewidth=0.8, zorder=1)
        if first["averages"]:
            spread = [seed - first["average"] for seed in first["averages"]]
            ours.fill_betweenx([top + 0.5, y + 0.5], min(spread), max(spread), color="#D3E6F2",
                               linewidth=0, zorder=0.5)  # fmt: skip
        y += 1.5
    ours.set_yticks(*zip(*ticks), fontsize=9)
    for label in ours.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("(") else "normal")
    ours.set(xlim=(-reach, reach), ylim=(y - 0.8, -0.7))
    ours.set_title("this miniature: percent of exact answers,\nmean of three splits (at the right)",
                   fontsize=10)  # fmt: skip
    paper.set_title("the paper, Table 3: mean of SQA, TextVQA,\nMM-Vet and SEED (at the right)",
                    fontsize=10)  # fmt: skip
    for axis in (ours, paper):
        axis.set_xlabel("points above the reference")
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    said = ("Thick mark: mean; circles: our seeds; blue band: the seeds of the reference; arrow: "
            'off the scale. "..." goes on from the rows above.')  # fmt: skip
    figure.supxlabel(said, fontsize=9)
    save(figure, file)
