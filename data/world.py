"""The emoji world: pictures, captions and questions generated from a seed, without a download.

A scene is a plain background with one object in the middle, or two to four objects in the cells of
a 2x2 grid. Each object is an emoji from `data/emoji/`, slightly shifted, rotated and mirrored:

    +--------+     "on a blue background: a cat at the top left, a bus at the bottom right."
    | cat .  |     "Is there a dog?"            "no"
    |  .  bus|     "What is at the top left?"   "a cat"
    +--------+     "Is the bus left or right of the cat?"   "right"

Sample `i` depends on `(seed, split, task, i)` alone, so a data set needs no files. The splits, one
for training and three for the evaluation:

    train   drawings of seven styles; four of these lack some concepts
    new     new scenes of the same kind
    pairs   every scene has two concepts that never occur together in training
    style   Fluent 3D drawings, a style never trained on

Samples have the form of LLaVA's, `{"id", "images", "conversations": [{"from": "human", "value":
...}, ...]}`, with PIL images instead of paths, and the `types` of the questions.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from data.chat import IMAGE_TAG
from data.drawings import (
    CATEGORIES,
    COLORS,
    CONCEPTS,
    SIDE,
    TRAIN_STYLES,
    atlas,
    backgrounds,
    between_styles,
    pick,
    recolor,
    warp,
)
from data.flags import READ, Parser, run
from data.signs import (
    NUMBERS,
    Chart,
    ask_bars,
    ask_compare,
    ask_height,
    ask_read,
    ask_tallest,
    draw_chart,
    draw_sign,
    sample_chart,
    sample_sign,
)
from data.signs import caption as caption_of_signs

SPLITS = ("train", "new", "pairs", "style")
STYLES = dict.fromkeys(SPLITS, TRAIN_STYLES) | {"style": ("fluent",)}
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
MIDDLE = "in the middle"
ORDINALS = ("first", "second", "third")
PAIRS = [(c, d) for i, c in enumerate(CONCEPTS) for d in CONCEPTS[:i]]
HELD_OUT = frozenset(  # a tenth of all unordered pairs; no training scene contains one
    frozenset(PAIRS[k])
    for k in np.random.default_rng(2405).permutation(len(PAIRS))[: len(PAIRS) // 10]
)
PARTNERS = {  # concept -> the concepts it meets only in the split `pairs`
    c: sorted(d for d in CONCEPTS if frozenset((c, d)) in HELD_OUT) for c in CONCEPTS
}
SEVERAL = 0.5  # share of conversations about 2 or 3 pictures
KINDS = {  # of pictures -> the types of questions about them
    "things": ("what", "existence", "count", "where", "kind", "background", "side", "list"),
    "words": ("read",),
    "charts": ("tallest", "height", "bars", "compare"),
}
SHARES = (0.5, 0.3, 0.2)  # of the kinds in training
QUESTION_TYPES = sum(KINDS.values(), ())
# In training the harder types are asked more often.
ASKED = {
    "things": (*KINDS["things"], "existence", "existence", "kind", "list"),
    "words": ("read", "read", "read", "existence", "what", "where", "background"),
    "charts": (*KINDS["charts"], "height", "existence", "background"),
}


@dataclass(frozen=True)
class Object:
    name: str
    place: str  # MIDDLE or one of PLACES
    box: tuple  # x, y, size in pixels
    angle: float  # degrees
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple  # tuple of Object, in reading order
    style: str
    signs: tuple = ()  # tuple of Sign, from top to bottom
    chart: Chart | None = None

    @property
    def kind(self):
        return "charts" if self.chart else "words" if self.signs else "things"


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


def short_caption(scene):
    signs = [f"a sign that says {sign.text}" for sign in scene.signs]
    return join(signs + [a(o.name) for o in scene.objects]) + "."


def caption(scene):
    objects = [f"{a(o.name)} {o.place}" for o in scene.objects]
    return f"on a {scene.background} background: {', '.join(caption_of_signs(scene) + objects)}."


# ------------------------------------------------------------------------------------- scenes


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


def sample_scene(rng, split, kind=None):
    """A random scene of `split`, of one of KINDS (None: any). ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; the emoji world has {', '.join(SPLITS)}")
    kind = kind or str(rng.choice(tuple(KINDS), p=SHARES))
    if kind == "things":
        return sample_things(rng, split)
    background, style = pick(rng, *COLORS), pick(rng, *STYLES[split])
    if kind == "charts":
        return Scene(background, (), style, chart=sample_chart(rng, split, background))
    where = pick(
        rng, (MIDDLE,), ("at the top",), ("at the bottom",), ("at the top", "at the bottom")
    )
    if where[0] == MIDDLE or len(where) == 2:
        signs = tuple(sample_sign(rng, split, place, background) for place in where)
        return Scene(background, (), style, signs)
    half = 2 if where[0] == "at the top" else 0  # the things stand in the other half
    scene = sample_things(
        rng, split, int(rng.integers(2 if split == "pairs" else 1, 3)), (half, half + 1)
    )
    return replace(scene, signs=(sample_sign(rng, split, where[0], scene.background),))


def sample_things(rng, split, n_objects=None, cells=(0, 1, 2, 3)):
    """A scene of 1 to 4 things in `cells` of a 2x2 grid; at least 2 in `pairs`. One thing alone is
    in the middle, unless there are fewer cells."""
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
    return Scene(color, tuple(objects), style)


def draw(scene, rng=None, scale=1):
    """The picture of a scene, RGB, 64 pixels wide and high, times `scale`. With `rng`, each glyph
    is mixed with another style, recoloured and warped (augmentation)."""
    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), COLORS[scene.background])
    if scene.chart:
        draw_chart(canvas, scene.chart, scene.style, scale, rng)
    for sign in scene.signs:
        draw_sign(canvas, sign, scene.style, scale, rng)
    for o in scene.objects:
        k = CONCEPTS.index(o.name)
        glyph = recolor(between_styles(scene.style, k, rng), rng) if rng else atlas(scene.style)[k]
        glyph = Image.fromarray(glyph)
        if o.mirrored:
            glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x, y, size = (scale * n for n in o.box)
        glyph = warp(glyph, o.angle, rng) if rng else glyph.rotate(o.angle, Image.BICUBIC)
        glyph = glyph.resize((size, size), Image.BILINEAR, reducing_gap=2)
        canvas.paste(glyph, (x, y), glyph)
    return canvas


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
        kinds = (
            {CATEGORIES[n] for n in present}
            if present and rng.random() < 0.5
            else set(CATEGORIES.values())
        )
        # never ask about a held-out partner: training would teach that such pairs do not occur
        partner = {p for name in present for p in PARTNERS[name]}
        absent = [c for c in CONCEPTS if c not in present and c not in partner]
        alike = [
            c for c in absent if CATEGORIES[c] in kinds
        ]  # empty if all of a category is present
        name, answer = pick(rng, *(alike or absent)), "no"
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


def ask_kind(scene, rng):
    """None if two answers would be right: with a duck and a cat, "which animal?" is ambiguous."""
    kinds = [CATEGORIES[o.name] for o in scene.objects]
    asked = []
    for o in scene.objects:
        kind = CATEGORIES[o.name]
        alike = {"animal": ("animal", "bird"), "food": ("food", "fruit", "vegetable")}.get(
            kind, (kind,)
        )
        if kind not in ("object", "sky") and sum(k in alike for k in kinds) == 1:
            asked.append((kind, o))
    if asked:
        kind, o = pick(rng, *asked)
        kind = "garment" if kind == "clothing" else kind
        q = pick(rng, f"Which {kind} is in the picture?", f"Which {kind} do you see?")
        return q, a(o.name)


def ask_background(scene, rng):
    q = pick(rng, "What color is the background?", "Which color is behind the objects?")
    return q, scene.background


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


ASK = {"what": ask_what, "existence": ask_existence, "count": ask_count,
       "where": ask_where, "kind": ask_kind, "background": ask_background,
       "side": ask_side, "list": ask_list, "read": ask_read, "tallest": ask_tallest,
       "height": ask_height, "bars": ask_bars, "compare": ask_compare}  # fmt: skip
DESCRIBE = "Describe the picture."


def questions(scene, rng, n, types=None):
    """At most `n` different questions about a scene, of random types (None: as in training, or
    {kind: types}): [(type, question, answer)]."""
    asked, types = [], (types or ASKED)[scene.kind]
    tries = 0
    while not asked or len(asked) < n and tries < 8 * n:  # a sign allows only a few
        tries += 1
        kind = types[rng.integers(len(types))]
        pair = ASK[kind](scene, rng)
        if pair and pair[0] not in [q for _, q, _ in asked]:
            asked.append((kind, *pair))
    return asked


# ---------------------------------------------------------------------------- several pictures


def sample_scenes(rng, split, n):
    """`n` scenes of one conversation. In training no two of them share a held-out pair."""
    while True:
        scenes = [sample_scene(rng, split) for _ in range(n)]
        names = {o.name for scene in scenes for o in scene.objects}
        if split != "train" or names.isdisjoint(p for name in names for p in PARTNERS[name]):
            return scenes


def ask_which(scenes, rng):
    shown = [o.name for scene in scenes for o in {o.name: o for o in scene.objects}.values()]
    once = [(o.name, k) for k, scene in enumerate(scenes) for o in scene.objects
            if shown.count(o.name) == 1]  # fmt: skip
    if once:
        name, k = once[rng.integers(len(once))]
        q = pick(rng, f"Which picture has the {name}?", f"In which picture is the {name}?")
        return q, f"the {ORDINALS[k]}"


def of_picture(k, kind, question, rng):
    """A question about the only picture, asked about picture `k` of several."""
    picture = f"in the {ORDINALS[k]} picture"
    if kind == "list" or question == "What is this?":
        return pick(rng, f"What is {picture}?", f"List all objects {picture}.")
    if "in the picture" in question:
        return question.replace("in the picture", picture)
    ahead = f"In the {ORDINALS[k]} picture, {question[0].lower()}{question[1:]}"
    return pick(rng, ahead, f"{question[:-1]} {picture}{question[-1]}")


def ask_ordinal(scenes, rng):
    """(type, question, answer) about the first, second or third of several pictures."""
    k = int(rng.integers(len(scenes)))
    if rng.random() < 0.1:
        return "describe", f"Describe the {ORDINALS[k]} picture.", caption(scenes[k])
    kind, question, answer = questions(scenes[k], rng, 1)[0]
    return kind, of_picture(k, kind, question, rng), answer


def conversation(scenes, rng, n):
    """About `n` questions about one scene or several: [(type, question, answer)].

    `<image>` stands where a picture is shown: all in the first question, or one at a time. A
    question means the last picture shown so far, unless it names another.
    """
    together, turns = rng.random() < 0.6, []
    groups = [len(scenes)] if together else range(1, len(scenes) + 1)
    for shown in groups:  # this many pictures have been shown
        asked = questions(scenes[shown - 1], rng, max(1, n // len(groups)))
        for k in range(len(asked)) if shown > 1 else ():
            if rng.random() < 0.85:
                pair = ask_which(scenes[:shown], rng) if rng.random() < 0.35 else None
                asked[k] = ("which", *pair) if pair else ask_ordinal(scenes[:shown], rng)
        asked = list({turn[1]: turn for turn in asked}.values())  # no question twice
        # "Is there a cat?" comes first: a question that names the cat gives the answer away.
        asked.sort(key=lambda turn: turn[0] != "existence")
        kind, question, answer = asked[0]
        tags = f"{IMAGE_TAG}\n" * (shown if together else 1)
        turns += [(kind, tags + question, answer), *asked[1:]]
    return turns


def descriptions(scenes, rng):
    """Every scene described: all shown in the first question, or one at a time."""
    if len(scenes) == 1 or rng.random() < 0.4:
        return [("describe", f"{IMAGE_TAG}\n{DESCRIBE}", caption(scene)) for scene in scenes]
    turns = [("describe", f"Describe the {ORDINALS[k]} picture.", caption(scenes[k]))
             for k in rng.permutation(len(scenes))]  # fmt: skip
    kind, question, answer = turns[0]
    return [(kind, f"{IMAGE_TAG}\n" * len(scenes) + question, answer), *turns[1:]]


def records(turns):
    """[(type, question, answer)] as the turns of a LLaVA record."""
    return [{"from": who, "value": text} for _, *pair in turns
            for who, text in zip(("human", "gpt"), pair)]  # fmt: skip


# ------------------------------------------------------------------------------------- data sets


class World:
    """`size` samples of a split. `task`: "name" (stage 1), "describe" (stage 2) or "ask" (stage 3).
    `augment` recolours the drawings."""

    tasks = ("name", "describe", "ask")

    def __init__(self, split, task, size, seed=0, augment=False):
        if task not in self.tasks:
            raise ValueError(f"task {task!r} is unknown; choose from {', '.join(self.tasks)}")
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; choose from {', '.join(SPLITS)}")
        self.split, self.task, self.size, self.seed, self.augment = split, task, size, seed, augment

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if not 0 <= i < self.size:
            raise IndexError(f"sample {i} of {self.size}")
        key = (self.seed, SPLITS.index(self.split), self.tasks.index(self.task), i)
        rng = np.random.default_rng(key)
        train = self.split == "train"
        several = train and self.task != "name" and rng.random() < SEVERAL
        if several:
            scenes = sample_scenes(rng, self.split, int(rng.integers(2, 4)))
        elif self.task == "name" and rng.random() < 0.5:
            scenes = [sample_things(rng, self.split, 1)]
        else:
            scenes = [sample_scene(rng, self.split, "words" if self.task == "name" else None)]
        if self.task == "name":
            turns = [("name", f"{IMAGE_TAG}\n{DESCRIBE}", short_caption(scenes[0]))]
        elif self.task == "describe" or (train and not several and rng.random() < 0.1):
            turns = descriptions(scenes, rng)
        else:
            turns = conversation(scenes, rng, int(rng.integers(3, 9 if several else 6)))
        return {"id": self.name(i),
                "images": [draw(scene, rng if self.augment else None) for scene in scenes],
                "conversations": records(turns),
                "types": [kind for kind, *_ in turns]}  # fmt: skip

    def name(self, i):
        return f"{self.split}-{self.task}-{self.seed}-{i}"


def main():
    parser = Parser(description="Draw a scene and print questions about it.", allow_abbrev=False)
    parser.add_argument("--seed", type=READ["seed"], default=0, help="another seed, another scene")
    parser.add_argument("--split", default="new", help=f"one of {', '.join(SPLITS)}")
    parser.add_argument("--out", default="scene.png", help="the picture to write")
    args = parser.parse_args()
    rng = np.random.default_rng((args.seed, 21))
    scene = sample_scene(rng, args.split)
    draw(scene, scale=4).save(args.out)
    print(f"{args.out}: {caption(scene)}")
    for _, question, answer in questions(scene, rng, 6):
        print(f"{question:48}{answer}")


if __name__ == "__main__":
    run(main)
