"""Pictures to the tensor CLIP was trained on: RGB, square, resized, normalised; bit for bit.

`pad` puts the whole picture on a square of CLIP's mean colour (stages 2 and 3 of the paper); `square`
keeps the centre and loses what overhangs (stage 1). REFERENCE: the image processor of the original.
"""

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
PAD_COLOR = tuple(int(m * 255) for m in (0.48145466, 0.4578275, 0.40821073))
MODES = ("pad", "square")


def open_image(path):
    """The picture at `path`, fully read, RGB. ValueError with one line if there is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; name an image file in it") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is not an image Pillow can read; convert it to PNG or JPEG") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from None


def preprocess(image, size, mode="pad"):
    """PIL image -> [3, size, size] float32. ValueError for a mode other than `pad` and `square`."""
    if mode not in MODES:
        raise ValueError(f"image mode {mode!r} is unknown; choose from {', '.join(MODES)}")
    image = image.convert("RGB")
    width, height = image.size
    if mode == "pad" and width != height:
        side = max(width, height)
        canvas = Image.new("RGB", (side, side), PAD_COLOR)
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image = canvas
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    x = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy(((x - MEAN) / STD).transpose(2, 0, 1).copy())
