"""Things, the first kind of picture: one object in the middle or up to four in a 2x2 grid.

    +--------+     "a cat at the top left, a bus at the bottom right"
    | cat .  |     "Is there a dog?"            "no"
    |  .  bus|     "What is at the top left?"   "a cat"
    +--------+     "Is the bus left or right of the cat?"   "right"

Each object is an emoji, slightly shifted, rotated and mirrored. A tenth of all pairs of concepts
never occur together in training; in the split `pairs`, every scene of things has such a pair.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.drawings import (
    CATEGORIES,
    CONCEPTS,
    NUMBERS,
    SIDE,
    STYLES,
    atlas,
    backgrounds,
    between_styles,
    pick,
    recolor,
    warp,
)

PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
MIDDLE = "in the middle"
PAIRS = [(c, d) for i, c in enumerate(CONCEPTS) for d in CONCEPTS[:i]]
HELD_OUT = frozenset(  # a tenth of all unordered pairs; no training scene contains one
    frozenset(PAIRS[k])
    for k in np.random.default_rng(2405).permutation(len(PAIRS))[: len(PAIRS) // 10]
)
PARTNERS = {  # concept -> the concepts it meets only in the split `pairs`
    c: sorted(d for d in CONCEPTS if frozenset((c, d)) in HELD_OUT) for c in CONCEPTS
}


@dataclass(frozen=True)
class Object:
    name: str
    place: str  # MIDDLE or one of PLACES
    box: tuple  # x, y, size in pixels
    angle: float  # degrees
    mirrored: bool


# ------------------------------------------------------------------------------------- words


def a(name):
    """The name with its article: `an owl`, `a cat`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name):
    irregular = {"mouse": "mice", "sheep": "sheep", "fish": "fish"}
    if name in irregular:
        return irregular[name]
    if name.endswith(("s", "sh", "ch", "x", "tomato")):
        return name + "es"
    return name[:-1] + "ies" if name[-1] == "y" and name[-2] not in "aeiou" else name + "s"


def join(names):
    """`a cat`; `a cat and a dog`; `a cat, a dog and a bus`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def captions(scene):
    """The parts of a caption about things."""
    return [f"{a(o.name)} {o.place}" for o in scene.objects]


# ------------------------------------------------------------------------------------- pictures


def pick_names(rng, split, n):
    """`n` concepts for one scene: with a held-out pair in the split `pairs`, else without."""
    while True:
        names = [CONCEPTS[i] for i in rng.integers(len(CONCEPTS), size=n)]
        if split == "pairs" and n > 1:
            names[1] = PARTNERS[names[0]][rng.integers(len(PARTNERS[names[0]]))]
        elif n > 1 and rng.random() < 0.15:
            names[1] = names[0]  # two of a kind, for questions that count
        unordered = [frozenset((x, y)) for i, x in enumerate(names) for y in names[:i]]
        if split == "pairs" or not any(pair in HELD_OUT for pair in unordered):
            return [names[i] for i in rng.permutation(n)]


def sample_things(rng, split, n_objects=None, cells=(0, 1, 2, 3)):
    """-> (background, objects, style): 1 to 4 things in `cells` of a 2x2 grid; at least 2 in
    `pairs`. One thing alone is in the middle, unless there are fewer cells."""
    assert n_objects in (None, 1, 2, 3, 4), "one object in each cell of a 2x2 grid"
    looks = []  # (style, background) in which all objects exist and are clearly seen
    while not looks:
        n = n_objects or int(rng.choice(4, p=(0.25, 0.3, 0.3, 0.15))) + 1
        names = pick_names(rng, split, max(n, 2) if split == "pairs" else n)
        clear = {style: [backgrounds(style)[name] for name in names] for style in STYLES[split]}
        looks = [(style, sorted(colors)) for style, sets in clear.items()
                 if (colors := set.intersection(*sets))]  # fmt: skip
    style, colors = pick(rng, *looks)
    color = pick(rng, *colors)
    middle = len(names) == 1 and len(cells) == 4
    cells = sorted(rng.permutation(cells)[: len(names)])
    objects = []
    for name, cell in zip(names, cells):
        size = int(rng.integers(38, 59) if middle else rng.integers(24, 32))
        room = SIDE - size if middle else SIDE // 2 - size
        dx, dy = (room // 2, room // 2) if middle else rng.integers(0, room + 1, size=2)
        x0, y0 = (0, 0) if middle else (cell % 2 * SIDE // 2, cell // 2 * SIDE // 2)
        place = MIDDLE if middle else PLACES[cell]
        box = (int(x0 + dx), int(y0 + dy), size)
        angle, mirrored = float(rng.uniform(-12, 12)), bool(rng.random() < 0.5)
        objects.append(Object(name, place, box, angle, mirrored))
    return color, tuple(objects), style


def draw_thing(canvas, thing, style, scale, rng=None):
    """Draw an object. With `rng`, its glyph is mixed with that of another style, recolored and
    warped."""
    k = CONCEPTS.index(thing.name)
    glyph = recolor(between_styles(style, k, rng), rng) if rng else atlas(style)[k]
    glyph = Image.fromarray(glyph)
    if thing.mirrored:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x, y, size = (scale * n for n in thing.box)
    glyph = warp(glyph, thing.angle, rng) if rng else glyph.rotate(thing.angle, Image.BICUBIC)
    glyph = glyph.resize((size, size), Image.BILINEAR, reducing_gap=2)
    canvas.paste(glyph, (x, y), glyph)


# ------------------------------------------------------------------------------------- questions


def ask_what(scene, rng):
    if not scene.objects:
        return None
    if scene.objects[0].place == MIDDLE:
        q = pick(rng, "What is in the picture?", "What is this?", "What do you see?")
        return q, a(scene.objects[0].name)
    taken = {o.place: a(o.name) for o in scene.objects}
    free = [p for p in PLACES if p not in taken and not scene.signs]
    place = pick(rng, *free) if free and rng.random() < 0.1 else pick(rng, *taken)
    q = pick(rng, f"What is {place}?", f"What do you see {place}?")
    return q, taken.get(place, "nothing")


def ask_existence(scene, rng):
    present = sorted({o.name for o in scene.objects})
    if present and rng.random() < 0.5:
        name, answer = pick(rng, *present), "yes"
    else:
        # never ask about a held-out partner: training would teach that such pairs do not occur
        partners = {p for name in present for p in PARTNERS[name]}
        absent = [c for c in CONCEPTS if c not in present and c not in partners]
        if present and rng.random() < 0.5:  # in the category of a thing, if any is absent
            kinds = {CATEGORIES[name] for name in present}
            absent = [c for c in absent if CATEGORIES[c] in kinds] or absent
        name, answer = pick(rng, *absent), "no"
    return pick(rng, f"Is there {a(name)}?", f"Do you see {a(name)}?"), answer


def ask_count(scene, rng):
    names = [o.name for o in scene.objects]
    if rng.random() < 0.5:
        q = pick(rng, "How many things are there?", "How many objects do you see?")
        return q, NUMBERS[len(names)]
    twice = [n for n in names if names.count(n) > 1]
    name = pick(rng, *(twice or names))
    return f"How many {plural(name)} are there?", NUMBERS[names.count(name)]


def ask_where(scene, rng):
    names = [o.name for o in scene.objects]
    once = [o for o in scene.objects if names.count(o.name) == 1]
    if once:
        o = pick(rng, *once)
        return pick(rng, f"Where is the {o.name}?", f"Where do you see the {o.name}?"), o.place


def only_ones(scene):
    """[(category, object)]: the only object of each category. With a duck and a cat there is no
    only animal, and "object" and "sky" are not asked for."""
    kinds = [CATEGORIES[o.name] for o in scene.objects]
    wider = {"animal": ("animal", "bird"), "food": ("food", "fruit", "vegetable")}
    return [(kind, o) for o, kind in zip(scene.objects, kinds) if kind not in ("object", "sky")
            and sum(k in wider.get(kind, (kind,)) for k in kinds) == 1]  # fmt: skip


def ask_kind(scene, rng):
    if asked := only_ones(scene):
        kind, o = pick(rng, *asked)
        kind = "garment" if kind == "clothing" else kind
        q = pick(rng, f"Which {kind} is in the picture?", f"Which {kind} do you see?")
        return q, a(o.name)


def ask_background(scene, rng):
    asked = ["What color is the background?"]
    if scene.objects:
        asked.append("Which color is behind the objects?")
    return pick(rng, *asked), scene.background


def ask_side(scene, rng):
    names = [o.name for o in scene.objects]
    pairs = [(o, p) for o in scene.objects for p in scene.objects
             if o.name != p.name and names.count(o.name) == names.count(p.name) == 1
             and o.place.split()[-1] != p.place.split()[-1]]  # fmt: skip
    if pairs:
        o, p = pairs[rng.integers(len(pairs))]
        return f"Is the {o.name} left or right of the {p.name}?", o.place.split()[-1]


def ask_list(scene, rng):
    q = pick(rng, "List all objects.", "Which objects are in the picture?")
    return q, join([a(o.name) for o in scene.objects])


ASK = {"what": ask_what, "existence": ask_existence, "count": ask_count, "where": ask_where,
       "kind": ask_kind, "background": ask_background, "side": ask_side,
       "list": ask_list}  # fmt: skip
