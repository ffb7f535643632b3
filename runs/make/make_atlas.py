"""Rebuild the emoji atlases: one 64-pixel picture of every concept, in eight drawing styles.

The pictures come from eight npm packages; three have vector drawings:

    pip install resvg_py                           # draws them
    python runs/make/make_atlas.py                 # download them and rebuild data/emoji/*.webp
    python runs/make/make_atlas.py --packages DIR  # the same from .tgz files in DIR

An atlas is a lossless WebP, 12 glyphs a row, in the order of `concepts.json`. Four styles lack some
concepts, or draw another thing under that name: these cells stay empty. `icon_names.json` has the
names of two packages that do not use codepoints. The authors and licences are in
data/emoji/ATTRIBUTION.md. cat.jpg, dog.jpg and owl.jpg are also drawn here.
"""

import argparse
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile

from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "data" / "emoji"
GLYPH, COLUMNS = 64, 12
PACKAGES = {  # style -> (npm package, path of one glyph inside it)
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/{}.png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{}.png"),
    "openmoji": ("openmoji@17.0.0", "package/color/svg/{}.svg"),
    "emojione": ("emojione@2.2.7", "package/assets/png_128x128/{}.png"),
    "oldnoto": ("emoji-datasource-google@3.0.0", "package/img/google/64/{}.png"),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", "package/icons.json"),
    "streamline": ("@iconify-json/streamline-emojis@1.2.4", "package/icons.json"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{}.webp"),
}
COMPLETE = ("noto", "twemoji", "openmoji", "fluent")  # the others lack some
LEFT_OUT = {("emojione", "tent"), ("oldnoto", "laptop")}  # a night landscape; a desktop computer


def archive_name(package):
    """npm's file name for a packed package: `@a/b@1.0` becomes `a-b-1.0.tgz`."""
    name, version = package.rsplit("@", 1)
    return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def rasterise(svg):
    """The RGBA picture of a vector drawing, cut to a square with a margin as narrow as Noto's."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg.decode(), width=8 * GLYPH, height=8 * GLYPH)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    left, top, right, bottom = picture.getbbox()
    half = max(right - left, bottom - top) / 2 * GLYPH / (GLYPH - 4)  # 2 pixels at each edge
    x, y = (left + right) / 2, (top + bottom) / 2
    return picture.crop([round(n) for n in (x - half, y - half, x + half, y + half)])


def read_icon(tar, path, name):
    """The RGBA picture of one icon of an Iconify package, 64x64; None if `name` is None."""
    if name:
        icons = json.load(tar.extractfile(path))
        icon = {key: icons[key] for key in ("width", "height")} | icons["icons"][name]
        box = f"0 0 {icon['width']} {icon['height']}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        return rasterise(svg.encode()).resize((GLYPH, GLYPH), Image.LANCZOS)


def read_glyph(tar, pattern, codepoint):
    """The RGBA picture of one codepoint, 64x64, under any of its names; None if it has none."""
    bare = codepoint.removesuffix("-fe0f")
    names = (codepoint, bare, bare + "-fe0f")
    for name in (*names, *(name.upper() for name in names)):
        try:
            raw = tar.extractfile(pattern.format(name)).read()
        except KeyError:
            continue
        vector = pattern.endswith(".svg")
        glyph = rasterise(raw) if vector else Image.open(io.BytesIO(raw)).convert("RGBA")
        return glyph.resize((GLYPH, GLYPH), Image.LANCZOS)


PICTURES = {  # to try, at the root: background, style, [(concept, place, box)], sign and bars
    "cat": ("blue", "noto", [("tree", "at the top right", (34, 2, 29)),
                             ("cat", "at the bottom left", (2, 34, 29)),
                             ("book", "at the bottom right", (34, 34, 29))]),
    "dog": ("yellow", "twemoji", [("dog", "at the top left", (2, 2, 29)),
                                  ("bicycle", "at the bottom right", (34, 34, 29))]),
    "owl": ("green", "noto", [("owl", "at the top left", (3, 2, 28)),
                              ("guitar", "at the top right", (34, 3, 28)),
                              ("pizza", "at the bottom left", (2, 34, 29)),
                              ("umbrella", "at the bottom right", (35, 34, 28))]),
    "open": ("blue", "noto", [("cake", "at the bottom left", (2, 34, 29)),
                              ("doughnut", "at the bottom right", (34, 34, 29))],
             ("OPEN", "at the top", (9, 6, 46, 20), "white", "red")),
    "price": ("green", "twemoji", [("apple", "at the top left", (2, 2, 29)),
                                   ("banana", "at the top right", (33, 2, 29))],
              ("250", "at the bottom", (12, 38, 42, 22), "yellow", "black")),
    "chart": ("white", "noto", [], None, (("red", 2), ("blue", 3), ("green", 5))),
}  # fmt: skip


def draw_pictures():
    """cat.jpg and the others, at 4 times the model's resolution."""
    sys.path.insert(0, str(ROOT))
    from data.charts import Chart
    from data.signs import Sign
    from data.world import Object, Scene, draw

    for name, (background, style, objects, *more) in PICTURES.items():
        objects = tuple(Object(*each, 0.0, False) for each in objects)
        sign, bars = (*more, None, None)[:2]
        signs, chart = (Sign(*sign),) if sign else (), Chart(bars) if bars else None
        picture = draw(Scene(background, objects, style, signs, chart), scale=4)
        picture.save(ROOT / f"{name}.jpg", quality=92)


def main():
    parser = argparse.ArgumentParser(description="rebuild data/emoji/*.webp", allow_abbrev=False)
    parser.add_argument("--packages", help="folder with the .tgz files (default: npm pack)")
    args = parser.parse_args()
    concepts = json.loads((HERE / "concepts.json").read_text())
    icon_names = json.loads((HERE / "icon_names.json").read_text())
    with tempfile.TemporaryDirectory() as fetched:
        for style, (package, pattern) in PACKAGES.items():
            if args.packages is None:
                subprocess.run(["npm", "pack", "--silent", package], cwd=fetched, check=True)
            path = pathlib.Path(args.packages or fetched) / archive_name(package)
            rows = -(-len(concepts) // COLUMNS)
            atlas = Image.new("RGBA", (COLUMNS * GLYPH, rows * GLYPH))
            lacking = []
            with tarfile.open(path) as tar:
                for i, (name, concept) in enumerate(concepts.items()):
                    if pattern.endswith(".json"):
                        glyph = read_icon(tar, pattern, icon_names[style].get(name))
                    else:
                        glyph = read_glyph(tar, pattern, concept["codepoint"])
                    if glyph is None or (style, name) in LEFT_OUT:
                        lacking.append(name)
                    else:
                        atlas.paste(glyph, (i % COLUMNS * GLYPH, i // COLUMNS * GLYPH))
            if lacking and style in COMPLETE:
                raise ValueError(f"{path} lacks {', '.join(lacking)}; edit concepts.json")
            atlas.save(HERE / f"{style}.webp", lossless=True, quality=100, method=6)
            size = (HERE / f"{style}.webp").stat().st_size
            without = f" (lacks {', '.join(lacking)})" if lacking else ""
            print(f"{style}: {len(concepts) - len(lacking)} glyphs, {size:,} bytes{without}")
    draw_pictures()


if __name__ == "__main__":
    main()
