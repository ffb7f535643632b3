"""Charts, the third kind of picture: two to four bars of heights from one to five.

    +--------+     "a red bar of three, a blue bar of one"
    | #      |     "How high is the red bar?"                    "three"
    | #      |     "Which bar is the tallest?"                   "red"
    | #  #   |     "Is the blue bar higher than the red bar?"    "no"
    +--------+

Each color has one height that it never has in training. In the split `pairs`, every chart has such
a bar. In the split `style`, bars have stripes.
"""

from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

from data.drawings import NUMBERS, SIDE, pick, rgb_of

BAR_COLORS = ("red", "green", "blue", "yellow", "purple", "black")
HELD_OUT_BARS = frozenset(zip(BAR_COLORS, (4, 2, 5, 3, 1, 2)))  # (color, height)
HIGHEST = 5
STEP = 11  # pixels of a bar for each unit of its height


@dataclass(frozen=True)
class Chart:
    bars: tuple  # (color, height from 1 to HIGHEST) of each, from left to right
    shift: int = 0  # of all bars, in pixels to the right


def captions(scene):
    """The parts of a caption about bars."""
    bars = scene.chart.bars if scene.chart else ()
    return [f"a {color} bar of {NUMBERS[height]}" for color, height in bars]


# ------------------------------------------------------------------------------------- pictures


def pitch_and_width(n):
    """Of `n` bars, in pixels: the distance from one to the next, and the width of one."""
    pitch = (SIDE - 4) / n
    return pitch, int(min(14, 0.72 * pitch))


def sample_chart(rng, split, background):
    """Two to four bars of different colors; some held out in the split `pairs`, none elsewhere."""
    colors = [c for c in BAR_COLORS if c != background]
    while True:
        n = int(rng.integers(2, 5))
        chosen = [colors[i] for i in rng.permutation(len(colors))[:n]]
        bars = tuple((color, int(rng.integers(1, HIGHEST + 1))) for color in chosen)
        if any(bar in HELD_OUT_BARS for bar in bars) == (split == "pairs"):
            pitch, width = pitch_and_width(n)
            room = int((pitch - width) / 2)
            return Chart(bars, int(rng.integers(-room, room + 1)))


def bar_boxes(chart):
    """Left, top, width, height in pixels of each bar."""
    pitch, width = pitch_and_width(len(chart.bars))
    lefts = [int(2 + pitch * k + (pitch - width) / 2 + chart.shift) for k in range(len(chart.bars))]
    return [(left, SIDE - 3 - STEP * height, width, STEP * height)
            for left, (_, height) in zip(lefts, chart.bars)]  # fmt: skip


def draw_chart(canvas, chart, style, scale, rng=None):
    """Draw bars on an axis, with a thin line at each unit. With `rng`, their colors are changed."""
    pen = ImageDraw.Draw(canvas)
    ground = np.array(canvas.getpixel((0, 0)), float)
    # A line is darker than the background, but lighter than a black one.
    thin = tuple(int(v) for v in ground * 0.82 + (20 if ground.mean() < 80 else 0))
    axis = tuple(int(v) for v in 255 - ground)
    for unit in range(HIGHEST + 1):
        y = scale * (SIDE - 3 - STEP * unit)
        pen.line((0, y, canvas.width, y), thin if unit else axis, scale)
    for (color, _), box in zip(chart.bars, bar_boxes(chart)):
        rgb = rgb_of(color, rng)
        left, top, width, height = (scale * n for n in box)
        right, bottom = left + width - 1, top + height - 1
        pen.rectangle((left, top, right, bottom), rgb)
        if style == "fluent":  # stripes
            pale = tuple((v + 255) // 2 for v in rgb)
            for y in range(top, bottom, 4 * scale):
                pen.rectangle((left, y, right, min(y + 2 * scale - 1, bottom)), pale)


# ------------------------------------------------------------------------------------- questions


def ask_tallest(scene, rng):
    """None if two bars are the tallest, or the shortest."""
    if scene.chart:
        word = pick(rng, "tallest", "shortest")
        end, other = sorted(scene.chart.bars, key=lambda bar: bar[1], reverse=word == "tallest")[:2]
        if end[1] != other[1]:
            return f"Which bar is the {word}?", end[0]


def ask_height(scene, rng):
    """In the split `pairs`, of a bar that is held out."""
    if scene.chart:
        held_out = [bar for bar in scene.chart.bars if bar in HELD_OUT_BARS]
        color, height = pick(rng, *(held_out or scene.chart.bars))
        q = f"How high is the {color} bar?", f"What is the value of the {color} bar?"
        return pick(rng, *q), NUMBERS[height]


def ask_bars(scene, rng):
    if scene.chart:
        q = pick(rng, "How many bars are there?", "How many bars do you see?")
        return q, NUMBERS[len(scene.chart.bars)]


def ask_compare(scene, rng):
    """None if both bars are equally high."""
    if scene.chart:
        bars = scene.chart.bars
        (one, height), (other, limit) = (bars[i] for i in rng.permutation(len(bars))[:2])
        if height != limit:
            answer = "yes" if height > limit else "no"
            return f"Is the {one} bar higher than the {other} bar?", answer


ASK = {"tallest": ask_tallest, "height": ask_height, "bars": ask_bars, "compare": ask_compare}
