"""The drawings of the emoji world: 100 concepts in eight styles, and how training changes them.

`data/emoji/` has one atlas a style (ATTRIBUTION.md names authors and licences). Training mixes
styles, changes colors and bends shapes, so that a style never seen is less of a surprise.
"""

import functools
import json
import pathlib

import numpy as np
from PIL import Image, ImageFilter

HERE = pathlib.Path(__file__).resolve().parent / "emoji"
SIDE, GLYPH = 64, 64  # side in pixels of a scene and of a glyph in the atlas
TRAIN_STYLES = ("noto", "twemoji", "openmoji", "emojione", "oldnoto", "fxemoji", "streamline")
SPLITS = ("train", "new", "pairs", "style")
STYLES = dict.fromkeys(SPLITS, TRAIN_STYLES) | {"style": ("fluent",)}
COLORS = {"white": (250, 250, 250), "gray": (150, 150, 150), "black": (20, 20, 20),
          "red": (220, 50, 50), "green": (60, 170, 80), "blue": (70, 110, 230),
          "yellow": (250, 220, 80), "purple": (150, 80, 190)}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five")
CONCEPTS_JSON = json.loads((HERE / "concepts.json").read_text())
CATEGORIES = {name: concept["category"] for name, concept in CONCEPTS_JSON.items()}
CONCEPTS = tuple(CATEGORIES)


def pick(rng, *options):
    return options[rng.integers(len(options))]


def rgb_of(color, rng=None):
    """The RGB of a color by its name; with `rng` a slightly different one."""
    rgb = np.array(COLORS[color], float) + (rng.normal(0, 10, 3) if rng else 0)
    return tuple(int(v) for v in rgb.clip(0, 255))


@functools.cache
def atlas(style):
    """The glyphs of one style, [concepts, 64, 64, 4] uint8, in the order of CONCEPTS."""
    sheet = np.asarray(Image.open(HERE / f"{style}.webp").convert("RGBA"))
    columns = sheet.shape[1] // GLYPH
    tiles = sheet.reshape(-1, GLYPH, columns, GLYPH, 4).swapaxes(1, 2)
    return tiles.reshape(-1, GLYPH, GLYPH, 4)[: len(CONCEPTS)]


@functools.cache
def backgrounds(style):
    """concept -> the background colors from which most of its pixels clearly differ; none if the
    style lacks the concept."""
    allowed = {}
    for name, glyph in zip(CONCEPTS, atlas(style)):
        pixels = glyph[glyph[..., 3] > 128][:, :3].astype(float)
        far = {c: np.linalg.norm(pixels - rgb, axis=1) > 80 for c, rgb in COLORS.items()}
        allowed[name] = {c for c, differs in far.items() if differs.sum() > 0.6 * len(pixels)}
    return allowed


def between_styles(style, k, rng):
    """Drawing `k` of a style, mixed with that of another training style (if it has the concept)."""
    glyph, other = (atlas(s)[k].astype(np.float32) for s in (style, pick(rng, *TRAIN_STYLES)))
    share = min(1, rng.uniform(0.4, 1.3)) if other.any() else 1
    own_alpha, other_alpha = share * glyph[..., 3:], (1 - share) * other[..., 3:]
    rgb = own_alpha * glyph[..., :3] + other_alpha * other[..., :3]
    alpha = own_alpha + other_alpha
    return np.concatenate([rgb / alpha.clip(1), alpha], -1).round().astype(np.uint8)


def recolor(glyph, rng):
    """The glyph in other colors: channels mixed, saturation changed, lit from one side, and with
    the relief of a rounded body."""
    rgb = glyph[..., :3].astype(np.float32)
    mix = np.eye(3, dtype=np.float32) + rng.normal(0, 0.1, (3, 3)).astype(np.float32)
    mix /= mix.sum(1, keepdims=True)
    gray = rgb.mean(-1, keepdims=True)
    rgb = gray + (rgb @ mix.T - gray) * rng.uniform(0.5, 1.3)
    slope = rng.normal(0, 0.25, 2)
    y, x = np.mgrid[-0.5 : 0.5 : GLYPH * 1j, -0.5 : 0.5 : GLYPH * 1j]
    light = rng.uniform(0.8, 1.15) + slope[0] * y + slope[1] * x
    body = Image.fromarray(glyph[..., 3]).filter(ImageFilter.GaussianBlur(rng.uniform(2, 6)))
    body = np.asarray(body, np.float32) / 255
    light += rng.uniform(0, 0.8) * (np.roll(body, rng.integers(-5, 6, size=2), (0, 1)) - body)
    rgb = rgb * light[..., None] + rng.normal(0, 12)
    return np.concatenate([rgb.clip(0, 255).astype(np.uint8), glyph[..., 3:]], -1)


def warp(glyph, angle, rng):
    """The glyph (PIL) rotated, sheared, narrower or lower, and sometimes blurred."""
    if rng.random() < 0.3:
        glyph = glyph.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    matrix = np.array([[cos, -sin], [sin, cos]])
    matrix += rng.uniform(-0.15, 0.15, (2, 2)) + np.diag(rng.uniform(0, 0.2, 2))
    shift = GLYPH / 2 * (1 - matrix.sum(1))  # the centre stays
    affine = np.concatenate([matrix, shift[:, None]], axis=1).ravel().tolist()
    return glyph.transform((GLYPH, GLYPH), Image.Transform.AFFINE, affine, Image.BILINEAR)
