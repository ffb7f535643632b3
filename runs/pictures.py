"""Pictures: the architecture, the web page, bench/speed.py's races, what experts do, ablations.

    python runs/pictures.py architecture     # draw bench/architecture.png
    python runs/pictures.py web              # bench/web.png: the page of the last stage in out/

The page is photographed in a browser, which needs `pip install ".[web]" selenium`, and Debian's
packages chromium, chromium-driver and fonts-dejavu-core. The last three pictures show the rows of
a table in docs/RESULTS.md; runs/results.py writes these tables and redraws their pictures.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
from PIL import ImageColor

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.images import open_image
from extras.plots import COLORS, expert_legend, pyplot, save_figure

SHOWN = (  # rows of bench/speed.py in the table and the picture: (section, start of the case)
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
PEERS = {  # first letters of a peer's name in bench/speed.py: color, marker, legend
    "transformers": (COLORS[1], "s", "transformers"),
    "llama.cpp": (COLORS[2], "^", "llama.cpp"),
    "loop": (COLORS[5], "D", "the original's loop over experts"),
    "dense": (COLORS[3], "v", "a dense MLP of the same work"),
    "": (COLORS[0], "o", "ours, another variant (named at the right)"),
}


CONTENT = {  # views of bench/experts.py, in words
    "kind": "kind of picture",
    "part": "what a patch shows",
    "position": "position",
    "object": "which object",
    "category": "category of the object",
    "background": "color of the background",
}
OTHER = ("category", "object")  # the category of things that have no other


# ---------------------------------------------------------------------------- the architecture

CARD, INK, GRAY = "#FBFAF7", "#222222", "#7A7A7A"  # the card is light in dark mode too
IMAGE, TEXT, SPARSE, CHOSEN = "#CFE3F1", "#F6E3B8", "#0072B2", "#009E73"


def box(axis, x, y, width, height, text="", fill="white", ink=INK, edge=INK, size=22, **style):
    """A rounded box around (x, y) with a text."""
    from matplotlib.patches import FancyBboxPatch

    corner = x - width / 2, y - height / 2
    shape = "round,pad=0,rounding_size=0.12"
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=fill,
                                  edgecolor=edge, linewidth=1.8, **style))  # fmt: skip
    axis.text(x, y, text, fontsize=size, color=ink, ha="center", va="center_baseline")


def arrow(axis, start, end, **style):
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 2, "mutation_scale": 22} | style
    axis.annotate("", xy=end, xytext=start, arrowprops=style)


def draw_moe_block(axis, x, top):
    """One sparse block, enlarged: the router, two chosen experts of four, the weighted sum."""
    columns = [x + 1.45 * (e - 1.5) for e in range(4)]
    weights = {1: "0.7", 3: "0.3"}
    axis.text(x, top, "one MoE block", fontsize=25, ha="center", va="center", weight="bold")
    box(axis, x, top - 0.85, 2.3, 0.62, "a token", IMAGE)
    arrow(axis, (x, top - 1.16), (x, top - 1.56))
    box(axis, x, top - 1.9, 4.9, 0.68, "router: top-2 of 4 experts")
    for e, column in enumerate(columns):
        chosen = e in weights
        color = CHOSEN if chosen else GRAY
        line = dict(color=color, linewidth=3 if chosen else 1.5)
        line |= {} if chosen else {"linestyle": ":", "arrowstyle": "-"}
        arrow(axis, (x + 0.5 * (column - x), top - 2.24), (column, top - 3.05), **line)
        box(axis, column, top - 3.45, 1.25, 0.8, f"MLP {e + 1}", CHOSEN if chosen else CARD,
            "white" if chosen else GRAY, color)  # fmt: skip
        if chosen:
            end = x + 0.35 * (column - x)
            arrow(axis, (column, top - 3.85), (end, top - 4.72), **line)
            left = x + (2.1 if column > x else -1.1)
            axis.text(left, top - 4.45, f"× {weights[e]}", fontsize=23, weight="bold",
                      color=CHOSEN, ha="center", va="center")  # fmt: skip
    box(axis, x, top - 5.05, 3.2, 0.66, "weighted sum", IMAGE)


def draw_architecture(file):
    """From a picture and a question to the answer, with one sparse block enlarged."""
    plt = pyplot()
    if not plt:
        return
    figure, axis = plt.subplots(figsize=(10, 10), facecolor=CARD)
    axis.set(xlim=(0, 10), ylim=(0, 10))
    axis.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    left, right = 1.75, 6.75
    axis.imshow(open_image(ROOT / "cat.jpg"), extent=(left - 0.85, left + 0.85, 8.05, 9.75))
    arrow(axis, (left, 8.0), (left, 7.48))
    box(axis, left, 7.05, 2.6, 0.85, "CLIP-MoE", SPARSE, "white", SPARSE, 26)
    arrow(axis, (left, 6.62), (left, 5.98))
    box(axis, left, 5.55, 2.6, 0.85, "MLP-MoE", SPARSE, "white", SPARSE, 26)

    box(axis, right, 6.85, 6.1, 5.9, fill="white", edge=SPARSE, linestyle="--")
    for y in (7.05, 5.55):
        axis.plot([left + 1.3, right - 3.05], [y, y], "--", color=SPARSE, linewidth=1.8)
    draw_moe_block(axis, right, 9.45)

    tokens = [("[INST]", 1.2), *[("", 0.55)] * 5, ("Where is the cat?", 3.6), ("[/INST]", 1.3)]
    x = 0.25
    for text, width in tokens:
        box(axis, x + width / 2, 3.3, width - 0.1, 0.72, text, TEXT if text else IMAGE, size=20)
        x += width + 0.09
    arrow(axis, (left, 5.12), (3.05, 3.72))
    axis.text(0.3, 2.58, "image tokens, spliced in among the text tokens", fontsize=20, va="center")
    axis.plot([0.3, 0.3, 9.68, 9.68], [2.9, 2.84, 2.84, 2.9], color=INK, linewidth=2)
    arrow(axis, (8.8, 2.84), (8.8, 2.33))
    box(axis, 5, 1.9, 9.4, 0.85, "LLM", size=26)
    arrow(axis, (5, 1.47), (5, 0.98))
    box(axis, 5, 0.6, 4.2, 0.72, "at the bottom left", TEXT, size=23)
    save_figure(figure, file)


# ---------------------------------------------------------------------------- the web page


def until(ready, seconds=120):
    """Wait until `ready()` returns something, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.2)
    raise SystemExit(f"error: the page has not become ready within {seconds} seconds")


def photograph_page(file, port=7869, width=1280, height=740):
    """Ask the page two questions about cat.jpg as a visitor would, and save what it shows."""
    try:
        from selenium import webdriver
    except ImportError:
        raise SystemExit('error: needs selenium: pip install ".[web]" selenium') from None
    driver = shutil.which("chromedriver")
    if not driver:
        raise SystemExit("error: needs a browser: apt-get install chromium chromium-driver")
    url, options = f"http://127.0.0.1:{port}", webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-proxy-server", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    command = [sys.executable, "extras/web.py", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT)

    def serves():
        if server.poll() is not None:
            raise SystemExit("error: extras/web.py has ended")
        try:
            return urllib.request.urlopen(url)
        except urllib.error.URLError:
            return None

    try:
        until(serves)
        with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
            screen = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            find = lambda css: browser.find_elements("css selector", css)
            browser.get(url)
            until(lambda: find(".gallery-item"))[0].click()  # the first picture to try
            until(lambda: find(".thumbnail-item img, .thumbnail-image"))
            find("textarea")[0].send_keys("\n")
            until(lambda: find("#map img"))
            find("textarea")[0].send_keys("List all objects.\n")
            until(lambda: len(find(".message.bot")) == 2 and find("button.submit-button"))
            time.sleep(2)  # scrolls to the end of the chat
            browser.save_screenshot(str(file))
    finally:
        server.terminate()
        server.wait()


# ------------------------------------------------------------------------- bench/speed.py's races


def shown(rows):
    """The `rows` of bench/speed.py that the table and the picture show, in order."""
    return [row for section, case in SHOWN for row in rows
            if row["section"] == section and row["case"].startswith(case)
            and len(row["ratios"]) > 1]  # fmt: skip


def variant(row):
    """The name of our own variant that counts as 1, unless it is the obvious one."""
    first = next(iter(row["ratios"]))
    return "" if first in ("ours", "ours, compiled") else f" ({first})"


def peer(name):
    """Color, marker and legend of a contestant in bench/speed.py."""
    return next(who for start, who in PEERS.items() if name.startswith(start))


def draw_ratios(run, file):
    """Draw a result of bench/speed.py: the time of each peer as a multiple of ours."""
    plt, rows = pyplot(), shown(run["rows"])
    if not plt or not rows:
        return
    figure, axis = plt.subplots(figsize=(11, 0.36 * len(rows) + 1.8), layout="constrained")
    dots = {}  # legend of a peer -> one of its dots
    for y, row in enumerate(rows):
        _, *others = row["ratios"].items()  # the first is ours
        others.sort(key=lambda other: other[1])  # from left to right
        for name, ratio in others:
            color, marker, label = peer(name)
            ring = dict(markerfacecolor="none", markeredgewidth=2)  # shows what is behind
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
    threads = {str(section["threads"]) for section in run["sections"].values()}
    axis.set(xscale="log", xlim=(low, high),
             title=f"{run['machine']}, {' or '.join(sorted(threads))} cores, {precision}; medians",
             xlabel="\u2190 the other is faster      1 = ours      ours is faster \u2192\n"
                    "time of the other as a multiple of ours, on a logarithmic scale")  # fmt: skip
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    names = (f"{row['section']}: {row['case']}{variant(row)}" for row in rows)
    axis.set_yticks(range(len(rows)), [name.replace(" (", "\n(") for name in names])
    axis.tick_params(axis="y", labelsize=8)
    axis.minorticks_off()
    axis.grid(axis="x", alpha=0.4)
    axis.invert_yaxis()
    save_figure(figure, file)


# ---------------------------------------------------------------------------- the ablations


VERDICTS = {"confirmed": COLORS[2], "contradicted": COLORS[5], "undecided": GRAY,
            "better": COLORS[0], "worse": COLORS[0], "": GRAY}  # fmt: skip
MARKERS = {"things": "o", "words": "s", "charts": "^"}  # kinds of pictures


def draw_row(axis, y, row, reach):
    """A row of `draw_ablations`: the difference with its interval, each kind of picture as a small
    marker below, the paper's difference, and the verdict at the right."""
    right = dict(fontsize=10, va="center", transform=axis.get_yaxis_transform())
    color = VERDICTS[row["verdict"]]
    if not row["found"]:
        reference = row["runs"] and not row["versus"]
        said = f"{row['means']['all'][0]:.1f} %" if reference else "not measured"
        axis.text(1.02, y, said, **right)
        return
    mean, low, high = row["found"]["all"]["right"]
    axis.text(1.02, y, row["verdict"] or "one seed", color=color, **right)
    if abs(mean) > reach:
        sign = 1 if mean > 0 else -1
        axis.plot(sign * (reach - 0.3), y, ">" if sign > 0 else "<", color=color, markersize=9)
        said = f"{mean:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if row["verdict"] else "")
        said += "" if row["paper"] is None else f"; the paper {row['paper']:+.1f}"
        axis.text(sign * (reach - 0.7), y, said, fontsize=10, va="center",
                  ha="right" if sign > 0 else "left")  # fmt: skip
        return
    if row["verdict"]:  # one seed has no interval
        axis.plot([low, high], [y, y], color=color, linewidth=3, solid_capstyle="butt", zorder=3)
    axis.plot(mean, y, "o", color=color, markersize=8, zorder=4)
    for kind, marker in MARKERS.items():
        value = row["found"][kind]["right"][0]
        axis.plot(np.clip(value, -reach, reach), y + 0.3, marker, color=COLORS[4], markersize=4.5,
                  zorder=3, clip_on=False)  # fmt: skip
        if abs(value) > reach:
            sign = 1 if value > 0 else -1
            axis.text(sign * (reach - 0.2), y + 0.3, f"{value:+.1f}", fontsize=7, va="center",
                      ha="right" if sign > 0 else "left")  # fmt: skip
    if row["paper"] is not None:
        axis.plot(row["paper"], y, "D", markersize=8, markeredgewidth=1.6, zorder=5,
                  markerfacecolor="none", markeredgecolor="black")  # fmt: skip


def draw_ablations(groups, file, reach=7):
    """Draw each row's difference to the row that it is compared with, ours and the paper's.

    `groups` come from runs/verdicts.py. A difference of more than `reach` points is an arrow with
    its number, so that small differences stay visible; that of a kind is a number at the edge.
    """
    plt = pyplot()
    if not plt:
        return
    n_lines = sum(len(group["rows"]) + 1.4 for group in groups)
    figure, axis = plt.subplots(layout="constrained", figsize=(8.3, 0.3 * n_lines + 1.6))
    y, ticks = 0, []
    for group in groups:
        top = y
        ticks.append((y, f"({group['group']}) {group['title']}"))
        for row in group["rows"]:
            y += 1
            versus = row["versus"] and f" vs. {row['versus']}"
            ticks.append((y, row["label"] + versus))
            draw_row(axis, y, row, reach)
        axis.axhspan(top + 0.5, y + 0.5, color="#F4F4F4", zorder=0)
        axis.plot([0, 0], [top + 0.5, y + 0.5], color="black", linewidth=1, zorder=1)
        y += 1.4
    axis.set_yticks(*zip(*ticks), fontsize=10)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("(") else "normal")
    axis.set(xlim=(-reach, reach), ylim=(y - 0.8, -0.7))
    axis.set_xlabel(
        "difference in exact answers, points (small: by kind, intervals in the table)", fontsize=10
    )
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    legend = [plt.Line2D([], [], color=GRAY, marker="o", linewidth=3, markersize=8),
              plt.Line2D([], [], color="black", marker="D", linewidth=0, markerfacecolor="none"),
              *(plt.Line2D([], [], color=COLORS[4], marker=marker, linewidth=0, markersize=5)
                for marker in MARKERS.values())]  # fmt: skip
    names = ["this miniature, 95 % interval", "the paper, Table 3", *MARKERS]
    figure.legend(legend, names, ncols=len(names), loc="outside upper center", frameon=False,
                  fontsize=10, columnspacing=1.2, handletextpad=0.4)  # fmt: skip
    save_figure(figure, file, dpi=200)


# --------------------------------------------------------------------------- what experts do


def draw_content(content, file):
    """Draw a result of bench/experts.py: for each sparse block the expert with the largest load at
    each position, and the load of each expert by what a patch shows."""
    plt = pyplot()
    if not plt:
        return
    load, rows = content["load"], {(row["block"], row["view"]): row for row in content["rows"]}
    figure, axes = plt.subplots(2, len(load), layout="constrained", figsize=(6.4, 6.5),
                                height_ratios=(1, 6), squeeze=False)  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for (block, views), (top, axis) in zip(load.items(), axes.T):
        shares_PE = np.array([*views["position"].values()])
        side, even = int(len(shares_PE) ** 0.5), 1 / shares_PE.shape[1]
        colors_E3 = np.array([ImageColor.getrgb(color) for color in COLORS]) / 255
        color_P3 = colors_E3[shares_PE.argmax(1) % len(COLORS)]
        strength_P1 = (shares_PE.max(1, keepdims=True) / even - 1).clip(0, 1)
        top.imshow((1 - strength_P1 * (1 - color_P3)).reshape(side, side, 3))
        top.set(xticks=[], yticks=[])
        top.set_title(block.replace("CLIP layer", "CLIP"), fontsize=8)
        y, ticks = 0, []
        for view, title in CONTENT.items():
            bits = [rows[block, view][when]["bits"] for when in ("before", "after")]
            chance = rows[block, view]["after"]["permuted_mean"]
            center = dict(ha="center", va="center")
            color = "black" if bits[1] >= chance else "#888888"  # no more than by chance
            said = " \u2192 ".join(f"{x:.3f}".lstrip("0") for x in bits)
            axis.text(0.5, y, said, fontsize=7.5, weight="bold", color=color, **center)
            axis.text(0.5, y + 0.9, f"({chance:.4f})".replace("0.", "."), fontsize=7,
                      color="#555555", **center)  # fmt: skip
            ticks.append((y, title))
            bars = views[view] if view in views and view != "position" else {}
            y += 0.9
            for word, shares in bars.items():
                y += 1
                ticks.append((y, "other object" if (view, word) == OTHER else word))
                for e, (share, end) in enumerate(zip(shares, np.cumsum(shares))):
                    axis.barh(y, share, left=end - share, height=0.86,
                              color=COLORS[e % len(COLORS)])  # fmt: skip
            y += 1.5
        axis.set(xlim=(0, 1), ylim=(y - 0.9, -0.7), xticks=[])
        axis.set_yticks(*zip(*ticks) if axis is axes[1, 0] else ((), ()), fontsize=8)
        axis.tick_params(length=0, pad=2)
        axis.spines[:].set_visible(False)
    for label in axes[1, 0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in CONTENT.values() else "normal")
    expert_legend(figure, shares_PE.shape[1])
    figure.supxlabel("After stage 3. Map: the expert with the largest load at each position; "
                     "white: even. Bars: each expert's load.\nBits of mutual information "
                     "before \u2192 after stage 3 (after, labels permuted); gray: no more than "
                     "that.", fontsize=7.5)  # fmt: skip
    save_figure(figure, file, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("picture", choices=["architecture", "web"], help="the picture to draw")
    parser.add_argument("--out", help="a file; by default the one in bench/")
    args = parser.parse_args()
    file = args.out or ROOT / "bench" / f"{args.picture}.png"
    {"architecture": draw_architecture, "web": photograph_page}[args.picture](file)


if __name__ == "__main__":
    main()
