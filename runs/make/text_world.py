"""Scenes of the emoji world as text, to pretrain the language model without pictures.

A scene is written as its caption or as a *text picture*: 64 words, one for each 8x8 patch of the
image, "blue blue cat cat blue ...". A letter on a sign and a bar of a chart fill patches too:
"white M I L K white", "black red black blue". The text picture teaches what large language models
already know: the first patches of a sequence are at the top of the image, and how to look up a name
by its place or a place by its name. The text is put where the image will be. A sample of the
training data is one of three:

    telegrams   blue blue cat cat ...  cat? yes  owl? no  cat: top left  top left: cat
    dialogue    blue blue cat cat ...  Where is the cat? [/INST] at the top left</s>[INST] Is ...
    caption     blue blue cat cat ...  a cat.

An encoder is never sure of a patch. So most text pictures have noise (`text_picture`, `blur`): the
language model must let all patches of an object vote, where otherwise it would copy one of them.
"""

import functools
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from data import world
from data.charts import ask_bars, ask_compare, ask_tallest, bar_boxes
from data.chat import IGNORE, IMAGE_TAG, IMAGE_TOKEN, render
from data.drawings import NUMBERS
from data.packing import assemble
from data.signs import LETTERS, letter_middles, random_letters
from data.things import only_ones

PATCH, GRID = 8, 8
ROWS, LENGTH = 6, 400  # rows of a batch, tokens of a row
FOUND = ("nothing", *world.PLACES, world.MIDDLE, "several")  # results of looking up a name
# Questions that a small model learns last are asked more often.
ASKED = world.KINDS | {
    "things": (*world.KINDS["things"], "existence", "where", "kind", "side", "count", "list"),
    "words": world.ASKED["words"],
}


# ------------------------------------------------------------------------------ text pictures


def letter_patches(sign, x, y):
    """[(letter, distance [...])] of a sign: a patch with its middle at (x, y) shows the letter if
    its distance is at most 0. Each letter is in one column of patches, that of its middle (on a
    border, the right one): AA is never taken for a wide A. A letter that is high, or stands between
    two rows, is in several rows."""
    half, high = PATCH / 2, max(5.5, 0.35 * sign.box[3] - 2)
    return [(letter, np.maximum(np.abs(x - at_x - 1e-3) - half, np.abs(y - at_y) - high))
            for letter, (at_x, at_y) in zip(sign.text, letter_middles(sign))]  # fmt: skip


def write_sign(words, sign, x, y, rng=None):
    """Write a sign into `words` [GRID, GRID]: its plate, then each letter in its patches. With
    `rng`, the letters are shifted a little."""
    left, top, width, height = sign.box
    words[(x >= left) & (x < left + width) & (y >= top) & (y < top + height)] = sign.plate
    dx, dy = rng.uniform(-1, 1, 2) if rng else (0, 0)
    for letter, distance in letter_patches(sign, x - dx, y - dy):
        words[distance <= 0] = letter


def write_thing(words, thing, background, x, y, rng=None):
    """Write an object into `words` [GRID, GRID]. With `rng`, its edge is fuzzy, and up to half of
    its patches get another word, mostly one of three names with which it is confused."""
    left, top, size = thing.box
    reach = size * (rng.uniform(0.4, 0.6) if rng else 0.5)
    inside = np.hypot(x - left - size / 2, y - top - size / 2) < reach
    words[inside] = thing.name
    if rng:
        wrong = inside & (rng.random((GRID, GRID)) < rng.uniform(0, 0.5))
        mistaken = [world.CONCEPTS[i] for i in rng.integers(len(world.CONCEPTS), size=3)]
        others = (mistaken[0], mistaken[0], *mistaken, background)
        words[wrong] = [others[i] for i in rng.integers(len(others), size=wrong.sum())]


def text_picture(scene, rng, noise=1.0):
    """64 words, one for each 8x8 patch in reading order: its object, letter or color. `noise`, from
    0 to 1: how often signs and objects are written with noise."""
    words = np.full((GRID, GRID), scene.background, dtype=object)
    y, x = np.mgrid[:GRID, :GRID] * PATCH + PATCH / 2
    if scene.chart:
        for (left, top, width, _), (color, _) in zip(bar_boxes(scene.chart), scene.chart.bars):
            words[(x >= left - 2) & (x < left + width + 2) & (y >= top)] = color
    for sign in scene.signs:
        write_sign(words, sign, x, y, rng if rng.random() < noise else None)
    noisy = rng.random() < 0.75 * noise
    for thing in scene.objects:
        write_thing(words, thing, scene.background, x, y, rng if noisy else None)
    return list(words.ravel())


def blur(x, place, noise=1.0):
    """Embeddings x [B, T, D] with noise on the patches of text pictures, as if an encoder had made
    them: each mixes with a neighbour and gets Gaussian noise, with its own strength in each row."""
    patch = (place != IGNORE)[..., None]
    shift = (-GRID, -1, 1, GRID)[torch.randint(4, ()).item()]
    mixed = torch.rand(len(x), x.shape[1], 1) * torch.rand(len(x), 1, 1) * 0.7 * noise
    mixed = mixed * (patch & patch.roll(shift, 1))
    spread = 0.3 * noise * torch.rand(len(x), 1, 1) * patch
    return torch.lerp(x, x.roll(shift, 1), mixed) + spread * torch.randn_like(x)


# ------------------------------------------------------------------------------ telegrams


@functools.cache
def name_ids(tokenizer):
    """concept -> the id of its single token."""
    return {name: tokenizer.encode(" " + name)[0] for name in world.CONCEPTS}


def look_ups(scene, tokenizer):
    """id of a name -> index into FOUND: its place in the scene."""
    names = [o.name for o in scene.objects]
    answers = dict.fromkeys(name_ids(tokenizer).values(), 0)
    for o in scene.objects:
        answer = "several" if names.count(o.name) > 1 else o.place
        answers[name_ids(tokenizer)[o.name]] = FOUND.index(answer)
    return answers


def telegrams_of_things(scene, rng):
    names = [o.name for o in scene.objects]
    place = {o: o.place.split(" ", 2)[2] for o in scene.objects}  # "top left", "middle"
    asked = [(f"{name}?", "yes") for name in dict.fromkeys(names)]
    known = {*names, *(partner for name in names for partner in world.PARTNERS[name])}
    others = [world.CONCEPTS[i] for i in rng.permutation(len(world.CONCEPTS))[: len(names)]]
    asked += [(f"{name}?", "no") for name in others if name not in known]
    asked += [(f"{kind}:", o.name) for kind, o in only_ones(scene)]
    for o in scene.objects:
        asked.append((f"{place[o]}:", o.name))
        if names.count(o.name) > 1:
            continue
        asked.append((f"{o.name}:", place[o]))
        for p in scene.objects:
            side, other = o.place.split()[-1], p.place.split()[-1]
            if names.count(p.name) == 1 and side != other:
                asked.append((f"{o.name} {p.name}?", side))
    return asked


def telegrams(scene, rng):
    """The look-ups that a scene allows, in telegraph style: [(question, answer)], shuffled.

        cat? yes   owl? no   cat: top left   top left: cat   cat bus? left   animal: cat
        sign at the top: MILK       red: three   which bar is the tallest? red

    They take a quarter of the tokens of full questions. Each is asked only once, because a repeated
    question could be answered by copying.
    """
    if scene.kind == "charts":
        asked = [(f"{color}:", NUMBERS[height]) for color, height in scene.chart.bars]
        pairs = [ask(scene, rng) for ask in (ask_tallest, ask_compare, ask_bars)]
        asked += [(q.lower(), answer) for q, answer in filter(None, pairs)]
    elif scene.kind == "words":  # its things have telegrams in scenes of their own
        asked = [(f"sign {sign.place}:", sign.text) for sign in scene.signs]
    else:
        asked = telegrams_of_things(scene, rng)
    return [asked[i] for i in rng.permutation(len(asked))]


# ------------------------------------------------------------------------------ samples

# A sample is (ids, labels, types, place, found): its tokens; the types of its questions; the place
# of each patch in its text picture; and for each name after a scene the result of looking it up
# there, an index into FOUND. IGNORE elsewhere.


def with_other_texts(scene, rng):
    """The scene with random letters and digits on its signs: they must be read, not guessed."""
    texts = [random_letters(rng, len(sign.text)) for sign in scene.signs]
    signs = tuple(replace(sign, text=text) for sign, text in zip(scene.signs, texts))
    return replace(scene, signs=signs)


def written(scene, rng, noise):
    """A scene as a text picture (64 words) or a caption, at random."""
    return text_picture(scene, rng, noise) if rng.random() < 0.8 else " " + world.caption(scene)


def encode_written(text, tokenizer):
    """The ids of a caption or, one each, of the words of a text picture."""
    if isinstance(text, str):
        return tokenizer.encode(text)
    return [tokenizer.encode(word if len(word) == 1 else f" {word}")[0] for word in text]


def place_of(ids):
    """The place of each patch in its text picture; IGNORE for the tokens of a caption, which is
    always shorter."""
    return list(range(GRID * GRID)) if len(ids) == GRID * GRID else [IGNORE] * len(ids)


def render_text(turns, tokenizer, texts, template="mistral_instruct"):
    """(ids, labels, place) of [(type, question, answer)], with texts in the place of images."""
    tags = sum(question.count(IMAGE_TAG) for _, question, _ in turns)
    ids, labels = render(world.records(turns), tokenizer, template, 1, tags)
    place = [IGNORE] * len(ids)
    for text in texts[:tags]:
        words, at = encode_written(text, tokenizer), ids.index(IMAGE_TOKEN)
        ids[at : at + 1] = words
        labels[at : at + 1] = [IGNORE] * len(words)
        place[at : at + 1] = place_of(words)
    return ids, labels, place


def telegraph_scene(rng):
    """A scene of things, signs or a chart. Half of the scenes of one sign are drawn again, because
    a sign has only one telegram."""
    if rng.random() < 0.3:
        return world.sample_things(rng, "train", int(rng.integers(2, 5)))
    kind = world.pick(rng, "words", "words", "words", "charts")
    scene = world.sample_scene(rng, "train", kind)
    if len(scene.signs) == 1 and rng.random() < 0.5:
        scene = world.sample_scene(rng, "train", kind)
    return with_other_texts(scene, rng)


def telegraph_sample(tokenizer, rng, noise):
    """One scene or, with noise, sometimes two, each followed by its telegrams."""
    ids, labels, place, found = [tokenizer.bos] * 2, [IGNORE] * 2, [IGNORE] * 2, [IGNORE] * 2
    start = tokenizer.encode("[INST] ")
    for k in range(1 + (rng.random() < 0.4 * noise)):
        scene = telegraph_scene(rng)
        words = encode_written(written(scene, rng, noise), tokenizer)
        ids += [tokenizer.eos] * k + start
        place += [IGNORE] * (len(ids) - len(place)) + place_of(words)
        ids += words
        labels += [IGNORE] * (len(ids) - len(labels))
        found += [IGNORE] * (len(ids) - len(found))
        for asked, answer in telegrams(scene, rng):
            asked, answer = tokenizer.encode(" " + asked), tokenizer.encode(" " + answer)
            ids += asked + answer
            labels += [IGNORE] * len(asked) + answer
        results = look_ups(scene, tokenizer)
        found += [results.get(token, IGNORE) for token in ids[len(found) :]]
    place += [IGNORE] * (len(ids) - len(place))
    return ids, labels, [], place, found


def dialogue_sample(tokenizer, rng, split, noise):
    """A conversation about one scene, or about two or three, of at most LENGTH tokens."""
    several = rng.random() < 0.75
    if several:
        scenes = world.sample_scenes(rng, split, world.pick(rng, 2, 3, 3))
    else:
        scenes = [world.sample_scene(rng, split)]
    if split == "train":
        scenes = [with_other_texts(scene, rng) for scene in scenes]
    if several:
        turns = world.conversation(scenes, rng, int(rng.integers(3, 10)))
        texts = [text_picture(scene, rng, noise) for scene in scenes]
    else:
        types, n = ASKED if split == "train" else world.KINDS, int(rng.integers(2, 10))
        turns = world.questions(scenes[0], rng, n, types)
        described = ("describe", world.DESCRIBE, world.caption(scenes[0]))
        turns.insert(int(rng.integers(len(turns) + 1)), described)
        (of_type, question, answer), *rest = turns
        turns = [(of_type, f"{IMAGE_TAG}\n{question}", answer), *rest]
        texts = [written(scenes[0], rng, noise)]
    while len((sample := render_text(turns, tokenizer, texts))[0]) > LENGTH:
        turns = turns[:-1]
    ids, labels, place = sample
    found = [IGNORE] * len(ids)
    if not several:
        begin = place.index(GRID * GRID - 1) + 1 if max(place) >= 0 else 70  # captions end earlier
        results = look_ups(scenes[0], tokenizer)
        found[begin:] = [results.get(token, IGNORE) for token in ids[begin:]]
    return ids, labels, [of_type for of_type, *_ in turns], place, found


def caption_sample(tokenizer, rng, noise):
    """A text picture and its short caption, as in stage 1."""
    scene = world.sample_one(rng, "train")
    if rng.random() < 0.5:
        scene = with_other_texts(world.sample_scene(rng, "train", "words"), rng)
    turns = [("name", f"{IMAGE_TAG}\n{world.DESCRIBE}", world.short_caption(scene))]
    text = text_picture(scene, rng, noise)
    ids, labels, place = render_text(turns, tokenizer, [text], "plain")
    return ids, labels, [], place, [IGNORE] * len(ids)


# ------------------------------------------------------------------------------ batches


def letter_places(tokens, labels, place, letters):
    """For each token [T] of a row that comes before a letter of an answer: the place of that letter
    in its text picture, in the last row that shows it. IGNORE for all other tokens.

    `letters`: the ids of all letters. An answer and a line of a text picture belong together if
    their letters are the same.
    """
    lines, answers, picture = {}, [], 0
    for i, (token, at) in enumerate(zip(tokens.tolist(), place.tolist())):
        picture += at == 0
        if token in letters and at != IGNORE:
            lines.setdefault((picture, at // GRID), []).append((token, at))
        elif token in letters and labels[i] != IGNORE:
            if not answers or answers[-1][-1] != i - 1:
                answers.append([])
            answers[-1].append(i)
    places = {tuple(t for t, _ in line): [at for _, at in line] for line in lines.values()}
    target = torch.full_like(tokens, IGNORE)
    for answer in answers:
        for i, at in zip(answer, places.get(tuple(tokens[answer].tolist()), ())):
            target[i - 1] = at
    return target


def text_batch(tokenizer, split, seed, step, short=0.0, noise=1.0):
    """ROWS rows of samples -> (batch, types of the questions of each row). `short`: the share of
    samples that are telegrams or captions, else dialogues.

    The batch is that of data/packing.py and, for the probes of pretrain_llm.py, [ROWS, LENGTH]
    each: "place" and "found" of the samples, and "spelled" of `letter_places`.
    """
    rows, types = [], []
    extra = {name: torch.full((ROWS, LENGTH), IGNORE) for name in ("place", "found")}
    for i in range(ROWS):
        rng = np.random.default_rng((seed, world.SPLITS.index(split), step, i))
        sample = partial(dialogue_sample, tokenizer, rng, split, noise)
        if rng.random() < short:
            one = caption_sample if rng.random() < 0.3 else telegraph_sample
            sample = partial(one, tokenizer, rng, noise)
        rows.append([])
        types.append([])
        at = 0
        for _ in range(6):  # a sample that does not fit into the rest of the row is left out
            ids, labels, asked, *targets = sample()
            if at + len(ids) <= LENGTH:
                rows[-1].append((ids, labels, []))
                types[-1] += asked
                for target, values in zip(extra.values(), targets):
                    target[i, at : at + len(ids)] = torch.tensor(values)
                at += len(ids)
    batch = assemble(rows, LENGTH) | extra
    letters = {tokenizer.encode(letter)[0] for letter in LETTERS}
    columns = batch["tokens"], batch["labels"], batch["place"]
    batch["spelled"] = torch.stack([letter_places(*row, letters) for row in zip(*columns)])
    return batch, types
