"""Pictures to the tensor CLIP was trained on: RGB, square, resized, normalised; bit for bit.

    pad      the whole picture, on a square of CLIP's mean colour (stages 2 and 3 of the paper)
    square   the middle of the picture; what overhangs the square is lost (stage 1)

CuMo: as in the original, Pillow's `convert("RGB")` comes first and nothing else: the rotation in a
camera's EXIF is not looked at, transparency is dropped, and 16-bit greys are cut off at 255.
"""

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
PAD_COLOR = tuple(int(m * 255) for m in (0.48145466, 0.4578275, 0.40821073))
MODES = ("pad", "square")
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million: where Pillow itself suspects a bomb


def open_image(path):
    """The picture at `path`, fully read, RGB. ValueError with one line if there is none."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
        image.filename = str(path)  # as Pillow's own have it, to name it in an error
        return image
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; name an image file in it") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is no image Pillow can read; make it a PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: has more than {MAX_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # a damaged file makes Pillow's many readers raise almost anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image ({text})") from None


def squared(image, size, mode="pad"):
    """What CLIP looks at of a PIL image: RGB, size x size. ValueError for a mode other than `pad`
    and `square`, and for a picture so narrow that its square, or the picture enlarged, would take
    gigabytes."""
    if mode not in MODES:
        raise ValueError(f"image mode {mode!r} is unknown; choose from {', '.join(MODES)}")
    image = image.convert("RGB")
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if (long if mode == "pad" else size * size / short) * long > MAX_PIXELS:
        raise ValueError(f"a picture of {width}x{height} is too narrow for mode {mode}; crop it")
    if mode == "pad" and width != height:
        canvas = Image.new("RGB", (long, long), PAD_COLOR)
        canvas.paste(image, ((long - width) // 2, (long - height) // 2))
        image = canvas
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def preprocess(image, size, mode="pad"):
    """PIL image -> [3, size, size] float32; a ValueError when `squared` has one."""
    x = (np.asarray(squared(image, size, mode)).astype(np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy(((x - MEAN) / STD).transpose(2, 0, 1).copy())
