"""Pictures as CLIP expects them: RGB, square, resized, normalised; the original's, bit for bit.

    pad      the whole picture, padded to a square with CLIP's mean colour (stages 2 and 3)
    square   the middle of the picture, a centre crop (stage 1)

CuMo: like the original, this calls Pillow's `convert("RGB")` first and changes nothing else: the
camera rotation in the EXIF data is ignored, transparency is dropped, and 16-bit grey values are
clipped at 255.
"""

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
PAD_COLOR = tuple(int(m * 255) for m in (0.48145466, 0.4578275, 0.40821073))
MODES = ("pad", "square")
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million; above, Pillow refuses to open a picture


def open_image(path):
    """The picture at `path`, fully read, RGB. ValueError (one line) if it cannot be read."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
        image.filename = str(path)  # `convert` drops the name; errors show it
        return image
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; name an image file in it") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is no image Pillow can read; make it a PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: has more than {MAX_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image ({text})") from None


def squared(image, size, mode="pad"):
    """The size x size RGB picture that CLIP sees of a PIL image.

    ValueError for a mode other than `pad` and `square`, and for a picture so narrow that padding
    or enlarging it would take gigabytes.
    """
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


def pixels_of(image, size, mode="pad"):
    """PIL image -> array [3, size, size], float32. ValueError as in `squared`."""
    x = (np.asarray(squared(image, size, mode)).astype(np.float64) * (1 / 255)).astype(np.float32)
    return ((x - MEAN) / STD).transpose(2, 0, 1).copy()


def preprocess(image, size, mode="pad"):
    """PIL image -> tensor [3, size, size], float32. ValueError as in `squared`."""
    return torch.from_numpy(pixels_of(image, size, mode))
