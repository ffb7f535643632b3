"""The emoji world: pictures, captions and questions generated from a seed, without a download.

A scene has a plain background and is one of three kinds, each in a file of its own: *things*
(data/things.py), *words* (data/signs.py; some with things too) and *charts* (data/charts.py):

    "on a blue background: a cat at the top left, a bus at the bottom right."
    "Is there a dog?"  "no"      "Read the sign."  "MILK"      "How high is the red bar?"  "three"

Sample `i` depends on `(seed, split, task, i)` alone, so a data set needs no files. The splits, one
for training and three for the evaluation:

    train   drawings of seven styles; four of these lack some concepts
    new     new scenes of the same kind
    pairs   what training holds out: two concepts that never meet, words, heights of bars
    style   Fluent 3D drawings, slanted letters on dark signs, bars with stripes

Samples have the form of LLaVA's, `{"id", "images", "conversations": [{"from": "human", "value":
...}, ...]}`, with PIL images instead of paths, and the `types` of the questions.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from data import charts, signs, things
from data.chat import IMAGE_TAG
from data.drawings import CATEGORIES, COLORS, CONCEPTS, SIDE, SPLITS, STYLES, pick  # noqa: F401
from data.flags import READ, Parser, run
from data.things import HELD_OUT, MIDDLE, PARTNERS, PLACES, Object, a, join, plural  # noqa: F401

ORDINALS = ("first", "second", "third")
SEVERAL = 0.5  # share of conversations about 2 or 3 pictures
# type of question -> its function: (scene, rng) -> (question, answer), or None if it does not fit
ASK = things.ASK | signs.ASK | charts.ASK
KINDS = {  # kind of picture -> types of the questions about it
    "things": tuple(things.ASK),
    "words": tuple(signs.ASK),
    "charts": tuple(charts.ASK),
}
SHARES = (0.5, 0.35, 0.15)  # how often training shows each kind
QUESTION_TYPES = tuple(ASK)
# In training the harder types are asked more often; of things next to a sign, few.
ASKED = {
    "things": (*KINDS["things"], "existence", "existence", "kind", "list"),
    "words": ("read", "read", "read", "existence", "what", "where", "background"),
    "charts": (*KINDS["charts"], "height", "existence", "background"),
}


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple  # each an Object, in reading order
    style: str
    signs: tuple = ()  # each a Sign, from top to bottom
    chart: charts.Chart | None = None

    @property
    def kind(self):
        return "charts" if self.chart else "words" if self.signs else "things"


# ------------------------------------------------------------------------------------- scenes


def sample_scene(rng, split, kind=None):
    """A random scene of `split`, of one of KINDS (None: any). ValueError for an unknown one."""
    for name, one, known in (("split", split, SPLITS), ("kind", kind, (None, *KINDS))):
        if one not in known:
            names = ", ".join(filter(None, known))
            raise ValueError(f"{name} {one!r} is unknown; the emoji world has {names}")
    kind = kind or str(rng.choice(tuple(KINDS), p=SHARES))
    if kind == "things":
        return sample_things(rng, split)
    background, style = pick(rng, *COLORS), pick(rng, *STYLES[split])
    if kind == "charts":
        return Scene(background, (), style, chart=charts.sample_chart(rng, split, background))
    top, bottom = "at the top", "at the bottom"
    rows = pick(rng, (MIDDLE,), (top,), (bottom,), (top, bottom))
    scene = Scene(background, (), style)
    if rows in ((top,), (bottom,)):  # one or two things in the other half
        n = int(rng.integers(2 if split == "pairs" else 1, 3))
        scene = sample_things(rng, split, n, (2, 3) if rows == (top,) else (0, 1))
    drawn = tuple(signs.sample_sign(rng, split, row, scene.background) for row in rows)
    return replace(scene, signs=drawn)


def sample_one(rng, split):
    """A scene of stage 1, to learn names: one thing, or a sign with one to three random letters."""
    if rng.random() < 0.4:
        return sample_things(rng, split, 1)
    background, text = pick(rng, *COLORS), signs.random_letters(rng, pick(rng, 1, 1, 1, 2, 3))
    sign = signs.sample_sign(rng, split, pick(rng, *signs.ROWS), background, text, largest=16)
    return Scene(background, (), pick(rng, *STYLES[split]), (sign,))


def sample_things(rng, split, n_objects=None, cells=(0, 1, 2, 3)):
    """A scene of things alone, as data/things.py samples them."""
    return Scene(*things.sample_things(rng, split, n_objects, cells))


def draw(scene, rng=None, scale=1):
    """The picture of a scene, RGB, 64 pixels wide and high, times `scale`. With `rng`, the colors
    and shapes of what it shows are changed (augmentation)."""
    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), COLORS[scene.background])
    if scene.chart:
        charts.draw_chart(canvas, scene.chart, scene.style, scale, rng)
    for sign in scene.signs:
        signs.draw_sign(canvas, sign, scene.style, scale, rng)
    for thing in scene.objects:
        things.draw_thing(canvas, thing, scene.style, scale, rng)
    return canvas


def caption(scene):
    """What stage 2 learns: `on a blue background: a sign at the top that says MILK, a cat ...`"""
    parts = [part for kind in (signs, charts, things) for part in kind.captions(scene)]
    return f"on a {scene.background} background: {', '.join(parts)}."


def short_caption(scene):
    """What stage 1 learns: `a cat.` or `MI.`"""
    return join([a(o.name) for o in scene.objects] + [sign.text for sign in scene.signs]) + "."


# ------------------------------------------------------------------------------------- questions


DESCRIBE = "Describe the picture."


def questions(scene, rng, n, types=None):
    """At most `n` different questions about a scene, of random types (None: as in training, or
    {kind: types}): [(type, question, answer)]."""
    asked, types = [], (types or ASKED)[scene.kind]
    tries = 0
    while not asked or len(asked) < n and tries < 8 * n:  # a sign allows few different questions
        tries += 1
        of_type = types[rng.integers(len(types))]
        pair = ASK[of_type](scene, rng)
        if pair and pair[0] not in [q for _, q, _ in asked]:
            asked.append((of_type, *pair))
    return asked


# ---------------------------------------------------------------------------- several pictures


def sample_scenes(rng, split, n, kind=None):
    """`n` scenes of one conversation. In training no two of them share a held-out pair."""
    while True:
        scenes = [sample_scene(rng, split, kind) for _ in range(n)]
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


def of_picture(k, of_type, question, rng):
    """A question about the only picture, asked about picture `k` of several."""
    picture = f"in the {ORDINALS[k]} picture"
    if of_type == "list" or question == "What is this?":
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
    of_type, question, answer = questions(scenes[k], rng, 1)[0]
    return of_type, of_picture(k, of_type, question, rng), answer


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
        of_type, question, answer = asked[0]
        tags = f"{IMAGE_TAG}\n" * (shown if together else 1)
        turns += [(of_type, tags + question, answer), *asked[1:]]
    return turns


def descriptions(scenes, rng):
    """Every scene described: all shown in the first question, or one at a time."""
    if len(scenes) == 1 or rng.random() < 0.4:
        return [("describe", f"{IMAGE_TAG}\n{DESCRIBE}", caption(scene)) for scene in scenes]
    turns = [("describe", f"Describe the {ORDINALS[k]} picture.", caption(scenes[k]))
             for k in rng.permutation(len(scenes))]  # fmt: skip
    of_type, question, answer = turns[0]
    return [(of_type, f"{IMAGE_TAG}\n" * len(scenes) + question, answer), *turns[1:]]


def records(turns):
    """[(type, question, answer)] as the turns of a LLaVA record."""
    return [{"from": who, "value": text} for _, *pair in turns
            for who, text in zip(("human", "gpt"), pair)]  # fmt: skip


# ------------------------------------------------------------------------------------- data sets


class World:
    """`size` samples of a split. `task`: "name" (stage 1), "describe" (stage 2) or "ask" (stage 3).
    `augment` recolors the drawings."""

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
        else:
            scenes = [(sample_one if self.task == "name" else sample_scene)(rng, self.split)]
        if self.task == "name":
            turns = [("name", f"{IMAGE_TAG}\n{DESCRIBE}", short_caption(scenes[0]))]
        elif self.task == "describe" or (train and not several and rng.random() < 0.1):
            turns = descriptions(scenes, rng)
        else:
            turns = conversation(scenes, rng, int(rng.integers(3, 9 if several else 6)))
        return {"id": self.name(i),
                "images": [draw(scene, rng if self.augment else None) for scene in scenes],
                "conversations": records(turns),
                "types": [of_type for of_type, *_ in turns]}  # fmt: skip

    def name(self, i):
        return f"{self.split}-{self.task}-{self.seed}-{i}"


def main():
    parser = Parser(description="Draw a scene and print questions about it.", allow_abbrev=False)
    parser.add_argument("--seed", type=READ["seed"], default=0, help="another seed, another scene")
    parser.add_argument("--split", default="new", help=f"one of {', '.join(SPLITS)}")
    parser.add_argument("--kind", help=f"one of {', '.join(KINDS)}; not given: any")
    parser.add_argument("--out", default="scene.png", help="the picture to write")
    args = parser.parse_args()
    rng = np.random.default_rng((args.seed, 21))
    scene = sample_scene(rng, args.split, args.kind)
    try:
        draw(scene, scale=4).save(args.out)
    except (OSError, ValueError) as error:  # no such folder, no such kind of picture
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--out {args.out}: {reason}; name a picture, as in scene.png") from None
    print(f"{args.out}: {caption(scene)}")
    for _, question, answer in questions(scene, rng, 6):
        print(f"{question:48}{answer}")


if __name__ == "__main__":
    run(main)
