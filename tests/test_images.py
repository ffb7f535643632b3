"""Image preprocessing: the original's, bit for bit; one clear line for a file that is no image."""

import io
import json
import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import MEAN, PAD_COLOR, STD, open_image, preprocess
from engine.memory import peak_memory

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
    """The colours 0..255 of a preprocessed image [3, S, S]."""
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
        [(61, 29), (23, 70), (1, 1), (33, 33), (100, 99), (7, 300)]
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


# ----------------------------------------------------------------------------------- shape, colour


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


def test_sixteen_bit_png_is_cut_off_at_255_as_in_the_original(tmp_path):
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png")).max() == 255


def test_transparency_is_dropped_not_blended(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (10, 20, 30)


def test_camera_rotation_is_not_applied_as_in_the_original(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    Image.new("RGB", (30, 10)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(tmp_path / "photo.jpg").size == (30, 10)


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
