"""Signs with a word or a number, and bar charts: what a picture says beside the things in it.

    +--------+  "What does the sign at the top say?"  "MILK"
    | MILK   |
    | cat    |  "Which bar is the tallest?"           "red"
    +--------+  "How high is the red bar?"            "four"

Most words are of data/words.txt. The split `pairs` has words and numbers that no training sign has
(they must be spelled, they cannot be recalled), and bars whose colour never had that height; the
split `style` has slanted letters on dark signs, and bars of stripes.
"""

import functools
import pathlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data.drawings import COLORS, SIDE, pick

NUMBERS = ("zero", "one", "two", "three", "four", "five")
WORDS = tuple((pathlib.Path(__file__).resolve().parent / "words.txt").read_text().split())
HELD_OUT_WORDS = frozenset(WORDS[k] for k in np.random.default_rng(24).permutation(len(WORDS))[:90])
ROWS = {
    "in the middle": (SIDE // 4, 3 * SIDE // 4),
    "at the top": (0, SIDE // 2),
    "at the bottom": (SIDE // 2, SIDE),
}
BAR_COLORS = ("red", "green", "blue", "yellow", "purple", "black")
HEIGHTS = (1, 2, 3, 4, 5)
STEP = 11  # pixels of a bar for each unit of its height
HELD_OUT_BARS = frozenset(zip(BAR_COLORS, (4, 2, 5, 3, 1, 2)))  # one height of each colour


@dataclass(frozen=True)
class Sign:
    text: str
    place: str  # one of ROWS
    box: tuple  # left, top, width, height in pixels
    plate: str  # its color
    ink: str


@dataclass(frozen=True)
class Chart:
    bars: tuple  # of (color, height from 1 to 5), from left to right


# --------------------------------------------------------------------------------------- signs


def sample_text(rng, split):
    """A word, or a number of two to four digits; in `pairs` one that training never shows."""
    while True:
        number = rng.random() < 0.25
        text = str(rng.integers(10, 10 ** pick(rng, 2, 3, 4))) if number else pick(rng, *WORDS)
        held_out = int(text) % 8 == 3 if number else text in HELD_OUT_WORDS
        if held_out == (split == "pairs"):
            return text


def sample_sign(rng, split, place, background, text=None):
    """A sign in one of ROWS, on a plate whose colour is not the background's."""
    top, bottom = ROWS[place]
    plate = pick(rng, *[c for c in ("white", "yellow", "gray") if c != background])
    ink = "black" if plate == "gray" else pick(rng, "black", "black", "blue", "red")
    if split == "style":
        plate, ink = pick(rng, *sorted({"black", "blue", "purple"} - {background})), "white"
    text = text or sample_text(rng, split)
    pitch = rng.uniform(8.5, min(14, (SIDE - 2) / (len(text) + 0.5)))
    width = int(pitch * (len(text) + 0.5))
    height = int(min(rng.uniform(1.4, 2.4) * pitch, SIDE // 2))
    left = int(rng.integers(1, SIDE - width))
    return Sign(text, place, (left, int(rng.integers(top, bottom - height + 1)), width, height),
                plate, ink)  # fmt: skip


def letter_middles(sign):
    """The middle of each letter of a sign, (x, y) in pixels: they stand at even distances."""
    left, top, width, height = sign.box
    pitch = width / (len(sign.text) + 0.5)
    return [(left + pitch * (k + 0.75), top + height / 2) for k in range(len(sign.text))]


@functools.cache
def font(size):
    return ImageFont.load_default(size)


def draw_sign(canvas, sign, style, scale, rng=None):
    """Draw a sign, its letters as tall as the plate allows. With `rng` slightly turned, smeared and
    in other colours."""
    left, top, width, height = (scale * n for n in sign.box)
    plate, ink = (np.array(COLORS[c], float) for c in (sign.plate, sign.ink))
    if rng:
        plate, ink = plate + rng.normal(0, 10, 3), ink + rng.normal(0, 10, 3)
    plate, ink = (tuple(int(v) for v in color.clip(0, 255)) for color in (plate, ink))
    pitch = 4 * width / (len(sign.text) + 0.5)  # drawn 4 times larger, then reduced
    image = Image.new("RGBA", (4 * width, int(1.4 * pitch)), (*plate, 255))
    pen = ImageDraw.Draw(image)
    for k, letter in enumerate(sign.text):
        pen.text((pitch * (k + 0.75), 0.7 * pitch), letter, ink, font(int(1.3 * pitch)), "mm")
    if style == "fluent":  # slanted
        affine = (1, 0.25, -0.125 * image.height, 0, 1, 0)
        image = image.transform(image.size, Image.Transform.AFFINE, affine, Image.BILINEAR)
    if rng:
        image = image.rotate(rng.uniform(-4, 4), Image.BICUBIC, fillcolor=(*plate, 255))
        if rng.random() < 0.3:
            image = image.filter(ImageFilter.GaussianBlur(4 * scale * rng.uniform(0.2, 0.5)))
    image = image.resize((width, height), Image.BILINEAR, reducing_gap=3)
    canvas.paste(image, (left, top), image)


# --------------------------------------------------------------------------------------- charts


def sample_chart(rng, split, background):
    """Two to four bars of different colours; in `pairs` one colour has its held-out height."""
    colors = [c for c in BAR_COLORS if c != background]
    while True:
        n = int(rng.integers(2, 5))
        chosen = [colors[i] for i in rng.permutation(len(colors))[:n]]
        bars = tuple((color, int(rng.integers(1, 6))) for color in chosen)
        if any(bar in HELD_OUT_BARS for bar in bars) == (split == "pairs"):
            return Chart(bars)


def bar_boxes(chart):
    """Left, top, width, height in pixels of each bar."""
    pitch = (SIDE - 4) / len(chart.bars)
    width = int(min(14, 0.72 * pitch))
    lefts = [int(2 + pitch * k + (pitch - width) / 2) for k in range(len(chart.bars))]
    return [(left, SIDE - 3 - STEP * height, width, STEP * height)
            for left, (_, height) in zip(lefts, chart.bars)]  # fmt: skip


def draw_chart(canvas, chart, style, scale, rng=None):
    """Draw bars on an axis, with a thin line at each unit."""
    pen = ImageDraw.Draw(canvas)
    ground = np.array(canvas.getpixel((0, 0)), float)
    line = tuple(int(v) for v in ground * 0.82 + (20 if ground.mean() < 80 else 0))
    for unit in range(6):
        y = scale * (SIDE - 3 - STEP * unit)
        pen.line(
            (0, y, canvas.width, y), line if unit else tuple(int(v) for v in 255 - ground), scale
        )
    for (color, _), box in zip(chart.bars, bar_boxes(chart)):
        rgb = np.array(COLORS[color], float) + (rng.normal(0, 10, 3) if rng else 0)
        rgb = tuple(int(v) for v in rgb.clip(0, 255))
        left, top, width, height = (scale * n for n in box)
        right, bottom = left + width - 1, top + height - 1
        pen.rectangle((left, top, right, bottom), rgb)
        if style == "fluent":  # stripes
            pale = tuple((v + 255) // 2 for v in rgb)
            for y in range(top, bottom, 4 * scale):
                pen.rectangle((left, y, right, min(y + 2 * scale - 1, bottom)), pale)


# ------------------------------------------------------------------------------------ questions


def ask_read(scene, rng):
    """None for a picture without a sign."""
    if scene.signs:
        sign = pick(rng, *scene.signs)
        which = (
            "the sign" if len(scene.signs) == 1 and rng.random() < 0.7 else f"the sign {sign.place}"
        )
        return pick(rng, f"What does {which} say?", f"Read {which}."), sign.text


def ask_tallest(scene, rng):
    if scene.chart:
        word = pick(rng, "tallest", "shortest")
        order = sorted(scene.chart.bars, key=lambda bar: bar[1] * (-1 if word == "tallest" else 1))
        if order[0][1] != order[1][1]:
            return f"Which bar is the {word}?", order[0][0]


def ask_bars(scene, rng):
    if scene.chart:
        return pick(rng, "How many bars are there?", "How many bars do you see?"), NUMBERS[
            len(scene.chart.bars)
        ]


def ask_height(scene, rng):
    if scene.chart:
        color, height = pick(rng, *scene.chart.bars)
        return pick(
            rng, f"How high is the {color} bar?", f"What is the value of the {color} bar?"
        ), NUMBERS[height]


def ask_compare(scene, rng):
    if scene.chart:
        (a, high), (b, low) = (
            scene.chart.bars[i] for i in rng.permutation(len(scene.chart.bars))[:2]
        )
        if high != low:
            return f"Is the {a} bar higher than the {b} bar?", "yes" if high > low else "no"


def caption(scene):
    """The parts of a caption about signs and bars."""
    signs = [f"a sign {sign.place} that says {sign.text}" for sign in scene.signs]
    bars = scene.chart.bars if scene.chart else ()
    return signs + [f"a {color} bar of {NUMBERS[height]}" for color, height in bars]
