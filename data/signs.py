"""Words, the second kind of picture: signs that say a word or a number.

    +--------+     "a sign at the top that says MILK, a cat at the bottom left"
    |  MILK  |     "What does the sign at the top say?"   "MILK"
    | cat    |     "Read the sign."                       "MILK"
    +--------+

A number counts as a word, and a digit as a letter. The split `pairs` has words that no training
sign has: they must be spelled, because they cannot be recalled. In the split `style`, letters are
slanted and white on a dark plate.
"""

import functools
import pathlib
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data.drawings import SIDE, pick, rgb_of

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
# The words of training, then those of `pairs`. Each letter is one token of data/mini/llm, which has
# tokens ST, " D" and " I": no word contains or begins with one.
WORDS, HELD_OUT_WORDS = (
    tuple(part.split())
    for part in (pathlib.Path(__file__).resolve().parent / "words.txt").read_text().split("\n\n")
)
ROWS = {  # place of a sign -> the first row of pixels that it may cover, and the one after the last
    "in the middle": (SIDE // 4, 3 * SIDE // 4),
    "at the top": (0, SIDE // 2),
    "at the bottom": (SIDE // 2, SIDE),
}


@dataclass(frozen=True)
class Sign:
    text: str
    place: str  # one of ROWS
    box: tuple  # left, top, width, height in pixels
    plate: str  # its color
    ink: str


def captions(scene):
    """The parts of a caption about signs."""
    return [f"a sign {sign.place} that says {sign.text}" for sign in scene.signs]


# ------------------------------------------------------------------------------------- pictures


def is_held_out(text):
    """Whether only the split `pairs` shows this text, a word or a number of several digits."""
    if text.isdigit():
        return len(text) > 1 and int(text) % 8 == 3
    return text in HELD_OUT_WORDS


def sample_text(rng, split):
    """A word, or a number of two to four digits; in `pairs` one that training never shows."""
    words = HELD_OUT_WORDS if split == "pairs" else WORDS
    while True:
        number = rng.random() < 0.25
        text = str(rng.integers(10, 10 ** pick(rng, 2, 3, 4))) if number else pick(rng, *words)
        if is_held_out(text) == (split == "pairs"):
            return text


def random_letters(rng, n):
    """`n` random letters and digits, often one of them twice in a row; never a held-out word."""
    while True:
        letters = rng.choice(LETTERS, n)
        if n > 1 and rng.random() < 0.3:
            k = rng.integers(1, n)
            letters[k] = letters[k - 1]
        if not is_held_out(text := "".join(letters)):
            return text


def sample_sign(rng, split, place, background, text=None, largest=14):
    """A sign in one of ROWS, on a plate whose color is not the background's. Its letters are at
    least 10 pixels apart, and at most `largest`."""
    first, end = ROWS[place]
    plate = pick(rng, *[c for c in ("white", "yellow", "gray") if c != background])
    ink = "black" if plate == "gray" else pick(rng, "black", "black", "blue", "red")
    if split == "style":
        plate, ink = pick(rng, *sorted({"black", "blue", "purple"} - {background})), "white"
    text = text or sample_text(rng, split)
    pitch = rng.uniform(10, min(largest, (SIDE - 2) / (len(text) + 0.5)))
    width = int(pitch * (len(text) + 0.5))
    height = int(min(rng.uniform(1.4, 2.4) * pitch, end - first))
    left, top = int(rng.integers(1, SIDE - width)), int(rng.integers(first, end - height + 1))
    return Sign(text, place, (left, top, width, height), plate, ink)


def letter_middles(sign):
    """The middle of each letter of a sign, (x, y) in pixels: letters are evenly spaced."""
    left, top, width, height = sign.box
    pitch = width / (len(sign.text) + 0.5)
    return [(left + pitch * (k + 0.75), top + height / 2) for k in range(len(sign.text))]


@functools.cache
def font(size):
    return ImageFont.load_default(size)


def draw_sign(canvas, sign, style, scale, rng=None):
    """Draw a sign, stretched to the height of its box. With `rng`, its colors are changed, and it
    is slightly turned and sometimes blurred."""
    left, top, width, height = (scale * n for n in sign.box)
    plate, ink = rgb_of(sign.plate, rng), rgb_of(sign.ink, rng)
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


# ------------------------------------------------------------------------------------- questions


def ask_read(scene, rng):
    if scene.signs:
        sign = pick(rng, *scene.signs)
        alone = len(scene.signs) == 1 and rng.random() < 0.7
        which = "the sign" if alone else f"the sign {sign.place}"
        return pick(rng, f"What does {which} say?", f"Read {which}."), sign.text


ASK = {"read": ask_read}
