"""Pictures as CLIP expects them: upright, RGB, square, resized, normalised.

    pad      the whole picture, padded to a square with CLIP's mean color (stages 2 and 3)
    square   the middle of the picture, a centre crop (stage 1)

CuMo: the pixels are the original's, bit for bit, with two exceptions. A photo is turned as its
camera says in the EXIF data (`upright=False`: not, as in the original). Grey values that do not fit
in 8 bits are refused: the original clips 16-bit values at 255, so that an X-ray becomes white.
As in the original, transparency is dropped. MEAN and STD are OpenAI's; for a CLIP with others,
clip_moe.py folds the difference into its weights.
"""

import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
PAD_COLOR = tuple(int(m * 255) for m in (0.48145466, 0.4578275, 0.40821073))
MODES = ("pad", "square")
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million; above, Pillow refuses to open a picture
ORIENTATION = 0x0112  # the EXIF field that says how to turn a photo, 1 (not at all) to 8
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # fmt: skip
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # the picture itself may be good
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # below MAX_PIXELS


class Unscaled(ValueError):
    """A picture whose grey values do not fit in 8 bits."""


def check_grey(image):
    """`Unscaled` unless 8 bits can hold the values of a picture with 16, 32 or float bits each."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    share = image.mode == "F" and 0 < high <= 1  # 0 to 1 would become 0, 0, ... 1
    if not (0 <= low <= high <= 255) or share:
        raise Unscaled(f"its values x go from {low:,.6g} to {high:,.6g} (mode {image.mode}), not "
                       "from 0 to 255; scale them to 8 bits first, as "
                       "np.uint8((x - x.min()) / (x.max() - x.min()) * 255) does")  # fmt: skip


def rgb(image, upright=True):
    """A PIL image as RGB, turned as its camera says if `upright`. `Unscaled` as in `check_grey`."""
    image.load()  # some formats have their EXIF data after the pixels
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION)) if upright else None
    except Exception:  # damaged EXIF data raises many types
        turn = None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        check_grey(image)
    image = image.convert("RGB")
    image.info.clear()  # a second call must not turn it again
    return image if turn is None else image.transpose(turn)


def open_image(path, upright=True):
    """The picture at `path`, fully read, RGB, turned as its camera says if `upright`.

    ValueError (one line) if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = rgb(image, upright)
        image.filename = str(path)  # `convert` drops the name; errors show it
        return image
    except Unscaled as error:
        raise ValueError(f"{path}: {error}") from None
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

    ValueError for a mode other than `pad` and `square`, for a picture so narrow that padding or
    enlarging it would take gigabytes, and for one that `rgb` refuses.
    """
    if mode not in MODES:
        raise ValueError(f"image mode {mode!r} is unknown; choose from {', '.join(MODES)}")
    name = getattr(image, "filename", "") or "a picture"
    image = rgb(image)
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if (long if mode == "pad" else size * size / short) * long > MAX_PIXELS:
        raise ValueError(f"{name}: {width}x{height} is too narrow for mode {mode}; crop it")
    if mode == "pad" and width != height:
        canvas = Image.new("RGB", (long, long), PAD_COLOR)
        canvas.paste(image, ((long - width) // 2, (long - height) // 2))
        image = canvas
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        # The width first, as in the original; Pillow 13 begins with the height of a tall picture.
        image = image.resize((width, image.height), Image.BICUBIC)
        image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def preprocess(image, size, mode="pad"):
    """PIL image -> tensor [3, size, size], float32. ValueError as in `squared`."""
    x = (np.asarray(squared(image, size, mode)).astype(np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy(((x - MEAN) / STD).transpose(2, 0, 1).copy())
