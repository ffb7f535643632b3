"""Signs: each letter stands where `letter_middles` says, in a patch of its own, and is legible."""

import functools
import string

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data import signs, world

LETTERS = string.ascii_uppercase + string.digits
PATCH, BOX = 8, (12, 16)


def drawn_signs(split, n, seed=17):
    """[(scene, sign)] of scenes with signs."""
    for i in range(n):
        rng = np.random.default_rng((seed, world.SPLITS.index(split), i))
        scene = world.sample_scene(rng, split, "words")
        yield from ((scene, sign) for sign in scene.signs)


@pytest.mark.parametrize("split", world.SPLITS)
def test_letters_stand_10_pixels_apart_inside_the_plate_and_share_no_patch(split):
    for _, sign in drawn_signs(split, 400):
        left, top, width, height = sign.box
        first, last = signs.ROWS[sign.place]
        assert 0 <= left and left + width <= 64 and first <= top and top + height <= last
        middles = signs.letter_middles(sign)
        for x, y in middles:
            assert left + 3 < x < left + width - 3 and top + 4 < y < top + height - 4
        assert all(9.99 <= right[0] - x[0] for x, right in zip(middles, middles[1:]))
        patches = {(int(x) // PATCH, int(y) // PATCH) for x, y in middles}
        assert len(patches) == len(sign.text)


def test_signs_leave_the_things_of_their_scene_alone():
    for scene, sign in drawn_signs("new", 300):
        _, top, _, height = sign.box
        for _, y, size in (o.box for o in scene.objects):
            assert top + height <= y or y + size <= top
        assert sign.plate != scene.background and sign.ink != sign.plate


def ink_of(scene, sign, scale=1):
    """[height, width]: how far each pixel of a sign is from the plate to the ink, 0 to 1."""
    left, top, width, height = (scale * n for n in sign.box)
    pixels = np.asarray(world.draw(scene, scale=scale), float)[top : top + height]
    plate, ink = (np.array(world.COLORS[color], float) for color in (sign.plate, sign.ink))
    along = (pixels[:, left : left + width] - plate) @ (ink - plate)
    return (along / ((ink - plate) @ (ink - plate))).clip(0, 1)


@functools.cache
def shapes():
    """{letter: its shape}, from the font alone."""
    found = {}
    for letter in LETTERS:
        image = Image.new("L", (100, 140))
        font = ImageFont.load_default(130)
        ImageDraw.Draw(image).text((50, 70), letter, 255, font, "mm")
        found[letter] = np.asarray(image.resize(BOX, Image.BOX), float).ravel()
    return found


def read(scene, sign):
    """The text of a sign by the nearest shape of each letter, from its pixels."""
    ink, middles = ink_of(scene, sign, 2), signs.letter_middles(sign)
    pitch, text = 2 * sign.box[2] / (len(sign.text) + 0.5), ""
    for x, _ in middles:
        start = round(2 * (x - sign.box[0]) - pitch / 2)
        cut = Image.fromarray((255 * ink[:, start : start + round(pitch)]).astype(np.uint8))
        shape = np.asarray(cut.resize(BOX, Image.BOX), float).ravel()
        alike = {letter: np.corrcoef(shape, other)[0, 1] for letter, other in shapes().items()}
        text += max(alike, key=alike.get)
    return text


def test_signs_say_what_they_are_said_to_say():
    """A nearest neighbour among the font's letters reads new signs."""
    pairs = [(read(scene, sign), sign.text) for scene, sign in drawn_signs("new", 60)]
    letters = [a == b for said, text in pairs for a, b in zip(said, text, strict=True)]
    assert len(letters) > 200 and np.mean(letters) > 0.97, pairs


@pytest.mark.parametrize("split", world.SPLITS)
def test_every_letter_is_ink_on_its_plate_at_the_size_that_the_model_sees(split):
    for scene, sign in drawn_signs(split, 100):
        ink, left = ink_of(scene, sign), sign.box[0]
        for x, _ in signs.letter_middles(sign):
            near = ink[:, max(0, round(x - left) - 4) : round(x - left) + 4]
            assert near.max() > 0.5 and near.min() < 0.1, (sign, x)
            assert 0.06 < near.mean() < 0.6, (sign, x)
