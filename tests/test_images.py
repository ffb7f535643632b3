"""Image preprocessing: the original's, bit for bit; one clear line for a file that is no image."""

import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import MEAN, PAD_COLOR, STD, open_image, preprocess, squared
from engine.memory import peak_memory

ROOT = pathlib.Path(__file__).parents[1]

GOLDEN = pathlib.Path(
    os.environ.get("CUMO_GOLDEN", pathlib.Path(__file__).parents[2] / "shared" / "golden")
)
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden data in {GOLDEN}; set CUMO_GOLDEN"
)


def noise(width, height, mode="RGB", seed=0):
    size = (height, width) if mode in ("L", "1") else (height, width, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    return Image.fromarray(pixels, mode)


def brightness(x):
    """The colors 0..255 of a preprocessed image [3, S, S]."""
    return x.numpy().transpose(1, 2, 0) * STD * 255 + MEAN * 255


# ---------------------------------------------------------------------------------------- golden


@needs_golden
@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_pixels_are_the_originals_to_the_bit(k, mode):
    from safetensors.torch import load_file

    expected = load_file(GOLDEN / "image_preproc.safetensors")[f"img{k}.{mode}"]
    size = json.loads((GOLDEN / "image_preproc.json").read_text())["size"]
    x = preprocess(open_image(GOLDEN / "images" / f"img{k}.png"), size, mode)
    assert x.dtype == torch.float32 and torch.equal(x, expected)


@pytest.mark.parametrize("size", [14, 32, 224])
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_pixels_equal_transformers_on_odd_sizes(mode, size):
    transformers = pytest.importorskip("transformers")  # slow to import

    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    for k, (width, height) in enumerate(
        [(61, 29), (70, 23), (1, 1), (33, 33), (100, 99), (300, 7)]
    ):
        image = noise(width, height, seed=k)
        if mode == "pad":
            side = max(width, height)
            square = Image.new("RGB", (side, side), PAD_COLOR)
            square.paste(image, ((side - width) // 2, (side - height) // 2))
        else:
            square = image
        expected = processor(square, return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(preprocess(image, size, mode), expected, atol=1e-6)


@pytest.mark.parametrize("seed, width, height, size, crc", [
    (0, 23, 70, 14, 0xA1AD98D3), (1, 114, 367, 64, 0xC8EB9EA2), (2, 91, 222, 224, 0x41B305CB),
])  # fmt: skip
def test_a_tall_picture_has_the_same_pixels_with_every_pillow(seed, width, height, size, crc):
    """The checksums are of Pillow 12.3, which resizes the width first, as all before it."""
    image = squared(noise(width, height, seed=seed), size, "square")
    assert zlib.crc32(image.tobytes()) == crc


# ----------------------------------------------------------------------------------- shape, color


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize(
    "width, height", [(1, 1), (1, 500), (500, 1), (2, 3), (336, 336), (337, 335)]
)
def test_any_shape_becomes_a_square(width, height, mode):
    x = preprocess(noise(width, height), 48, mode)
    assert x.shape == (3, 48, 48) and x.is_contiguous() and x.isfinite().all()


@pytest.mark.parametrize(
    "mode", ["RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "I;16", "I", "F", "HSV"]
)
def test_any_kind_of_pixels_is_read_as_pillows_rgb(mode, tmp_path):
    image = noise(20, 12).convert("L" if mode == "I;16" else mode if mode != "1" else "L")
    image = image.convert(mode) if mode in ("1", "I;16") else image
    assert image.mode == mode
    expected = np.asarray(image.convert("RGB"))
    assert torch.equal(preprocess(image, 12), preprocess(Image.fromarray(expected), 12))
    assert preprocess(image, 12).shape == (3, 12, 12)


DEEP = {  # values that 8 bits cannot hold
    "12 bits": (np.uint16, 0, 4095), "16 bits": (np.uint16, 0, 65535), "just too much": (
    np.uint16, 0, 256), "negative": (np.int32, -5, 200), "32 bits": (np.int32, 0, 100_000),
    "shares": (np.float32, 0, 1), "floats": (np.float32, 0, 900), "no number": (
    np.float32, 0, np.nan)}  # fmt: skip


@pytest.mark.parametrize("kind", DEEP)
def test_grey_values_that_do_not_fit_in_8_bits_are_refused_with_the_way_out(kind, tmp_path):
    """The original cuts them: four different pictures of 12 bits became one white picture."""
    dtype, low, high = DEEP[kind]
    values = np.random.default_rng(0).integers(2, 100, (6, 4)).astype(dtype)
    if kind == "shares":
        values /= 100
    values[0, 0], values[0, 1] = low, high
    image = Image.fromarray(values)
    file = tmp_path / ("deep.tif" if dtype != np.uint16 else "deep.png")
    image.save(file)
    with pytest.raises(
        ValueError, match=r"deep.*: its values x go from .*; scale them to 8 bits"
    ) as e:
        open_image(file)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="its values x go from"):
        preprocess(image, 12)
    if kind != "no number":  # the way out
        way = re.search(r"as (np.uint8.*) does$", str(e.value))[1]
        scaled = eval(way, {"np": np, "x": values})
        Image.fromarray(scaled).save(tmp_path / "scaled.png")
        assert np.ptp(np.asarray(open_image(tmp_path / "scaled.png"))) == 255


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_pixels_that_hold_8_bits_are_read_as_such(dtype, tmp_path):
    values = np.arange(24).reshape(4, 6) * 10
    Image.fromarray(values.astype(dtype)).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.tif"))[..., 0], values)


def test_transparency_is_dropped_not_blended(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (10, 20, 30)


SEEN = [[1, 2, 3], [4, 5, 6]]  # a picture of 3 x 2, upright
STORED = {  # EXIF orientation -> the pixels that a camera stores of it
    1: SEEN, 2: [[3, 2, 1], [6, 5, 4]], 3: [[6, 5, 4], [3, 2, 1]], 4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]], 6: [[3, 6], [2, 5], [1, 4]],
    7: [[6, 3], [5, 2], [4, 1]], 8: [[4, 1], [5, 2], [6, 3]]}  # fmt: skip


def photo(file, orientation, mode="L"):
    """Save the picture SEEN as a camera held in this orientation stores it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.array(STORED[orientation], np.uint8) * 40
    Image.fromarray(pixels).convert(mode).save(file, exif=exif, lossless=True)


@pytest.mark.parametrize("name", ["photo.png", "photo.webp", "photo.tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_photo_is_turned_as_its_camera_says(orientation, name, tmp_path):
    photo(tmp_path / name, orientation, "RGB")
    seen = open_image(tmp_path / name)
    assert (np.asarray(seen)[..., 0] == np.array(SEEN) * 40).all()
    with Image.open(tmp_path / name) as raw:
        assert torch.equal(preprocess(raw, 6), preprocess(seen, 6)), "asked with a PIL image"
    assert torch.equal(preprocess(seen, 6), preprocess(Image.fromarray(np.asarray(seen)), 6)), (
        "a second time it stays as it is"
    )


@pytest.mark.parametrize("orientation", STORED)
def test_photo_is_not_turned_for_parity_with_the_original(orientation, tmp_path):
    photo(tmp_path / "photo.png", orientation)
    stored = open_image(tmp_path / "photo.png", upright=False)
    assert (np.asarray(stored)[..., 0] == np.array(STORED[orientation]) * 40).all()
    assert torch.equal(preprocess(stored, 6), preprocess(Image.fromarray(np.asarray(stored)), 6))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"", b"Exif", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff",
                                  b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])  # fmt: skip
def test_damaged_camera_data_does_not_make_a_picture_unreadable(exif, tmp_path):
    noise(9, 6).save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(tmp_path / "photo.jpg").size == (9, 6)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientation_that_does_not_exist_turns_nothing(value, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = value
    noise(9, 6).save(tmp_path / "photo.png", exif=exif)
    assert open_image(tmp_path / "photo.png").size == (9, 6)


def test_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_pad_shows_the_whole_picture_and_square_its_middle():
    image = Image.new("RGB", (90, 30), "black")
    image.paste("white", (0, 0, 30, 30))
    padded = brightness(preprocess(image, 30, "pad"))
    assert PAD_COLOR == (122, 116, 104)
    assert np.abs(padded[[0, 7, 22, 29]] - PAD_COLOR).max() < 0.01  # one third is picture
    assert padded[15, 4].min() > 250 and padded[15, 20].max() < 5
    assert brightness(preprocess(image, 30, "square")).max() < 1


def test_normalisation_is_clips():
    x = preprocess(Image.new("RGB", (8, 8), (255, 0, 128)), 8)
    expected = (torch.tensor([1.0, 0.0, 128 / 255]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(x[:, 3, 3], expected)


def test_unknown_mode_names_the_choices():
    with pytest.raises(ValueError, match="'anyres' is unknown; choose from pad, square"):
        preprocess(noise(4, 4), 4, "anyres")


@pytest.mark.parametrize("mode, shape", [("pad", (20_000, 1)), ("square", (1, 20_000))])
def test_picture_too_narrow_for_memory_is_refused_before_it_is_enlarged(mode, shape):
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]} is too narrow for mode {mode}"):
        preprocess(Image.new("RGB", shape), 336, mode)


def test_a_large_picture_is_taken_without_a_warning(tmp_path):
    Image.new("1", (9_500, 10_000)).save(tmp_path / "large.png")  # Pillow warns from 89 million on
    code = f"from data.images import open_image; open_image({str(tmp_path / 'large.png')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr


# ------------------------------------------------------------------------------------- bad files


def png(width, height, body=b""):
    """A PNG whose header claims any size."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body))
            + chunk(b"IEND", b""))  # fmt: skip


def jpeg():
    file = io.BytesIO()
    noise(64, 64).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("name, content, complaint", [
    ("text.jpg", b"this is no picture", "is no image Pillow can read"),
    ("empty.png", b"", "is no image Pillow can read"),
    ("half.jpg", jpeg()[:1000], "cannot be read as an image"),
    ("half.png", png(64, 64, bytes(64))[:-20], "cannot be read as an image"),
    ("short.png", png(64, 64, bytes(64)), "cannot be read as an image"),
    ("bomb.png", png(60_000, 60_000), "more than 178,956,970 pixels; scale it down"),
    ("large.png", png(50_000, 50_000), "more than 178,956,970 pixels; scale it down"),
])  # fmt: skip
def test_file_that_is_no_image_is_one_clear_line(name, content, complaint, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{complaint}") as caught:
        open_image(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_unpacks_to_100_megabytes_is_refused_or_not_unpacked(kind, tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    packed = zlib.compress(bytes(10**8))
    body = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind] + packed
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    whole = png(64, 64, bytes(64 * 193))
    (tmp_path / "x.png").write_bytes(whole[:33] + chunk + whole[33:])
    tracemalloc.start()
    try:
        assert open_image(tmp_path / "x.png").size == (64, 64)
    except ValueError as error:
        assert "x.png: cannot be read as an image" in str(error)
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 10_000_000


def test_pixels_beyond_the_picture_are_not_unpacked(tmp_path):
    """A picture of 64 x 64 whose data unpacks from 200 kB to 200 MB."""
    (tmp_path / "x.png").write_bytes(png(64, 64, bytes(2 * 10**8)))
    before = peak_memory("cpu")
    assert open_image(tmp_path / "x.png").size == (64, 64)
    assert peak_memory("cpu") - before < 50_000_000


def test_missing_file_folder_and_impossible_name_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="cat.jpg: no such image; check the path"):
        open_image(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match="is a folder; name an image file in it"):
        open_image(tmp_path)
    for name in ("nul\0byte.png", "x" * 5000, "sur\ud800rogate.png"):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            open_image(tmp_path / name)


def test_any_damage_to_an_image_is_a_value_error_or_no_damage(tmp_path):
    whole, rng = jpeg(), np.random.default_rng(0)
    for k in range(200):
        broken = bytearray(whole if k % 2 else png(64, 64, bytes(64 * 193)))
        for at in rng.integers(0, len(broken), 5):
            broken[at] = rng.integers(256)
        (tmp_path / "x").write_bytes(broken)
        try:
            image = open_image(tmp_path / "x")
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert image.mode == "RGB"
