"""Scenes of the emoji world as text, to pretrain the language model without pictures.

A scene is written as its caption or as a *text picture*: 64 words for the 8x8 patches of an image,
"blue blue cat cat blue ...". The text picture teaches what large language models already know: the
first patches of a sequence are at the top of the image, and how to look up a name by its place or a
place by its name. The text is put where the image will be. Questions about it are written in
telegraph style or as the conversations of stage 3:

    [INST] blue blue cat cat ...  cat? yes  owl? no  cat: top left  top left: cat  cat bus? left
    [INST] blue blue cat cat ...  Where is the cat? [/INST] at the top left</s>[INST] Is there ...

An encoder is never sure of a patch. So most text pictures have noise (`text_picture`, `blur`): the
language model must let all patches of an object vote, where otherwise it would copy one of them.
"""

import functools
from functools import partial

import numpy as np
import torch

from data import world
from data.chat import IGNORE, IMAGE_TOKEN, render
from data.packing import assemble

PATCH, GRID = 8, 8
ROWS, LENGTH = 6, 400  # rows of a batch, tokens of a row
FOUND = ("nothing", *world.PLACES, world.MIDDLE, "several")  # results of looking up a name


def text_picture(scene, rng, noise=1.0):
    """64 words, one for each 8x8 patch in reading order: its object or the background colour.

    With noise (0 to 1: how often) an object has fuzzy edges, and up to half of its patches have
    another word, mostly one of a few names with which this object is confused.
    """
    words = np.full((GRID, GRID), scene.background, dtype=object)
    y, x = np.mgrid[:GRID, :GRID] * PATCH + PATCH / 2
    noisy = rng.random() < 0.75 * noise
    for o in scene.objects:
        left, top, size = o.box
        reach = size * (rng.uniform(0.4, 0.6) if noisy else 0.5)
        inside = np.hypot(x - left - size / 2, y - top - size / 2) < reach
        words[inside] = o.name
        if noisy:
            wrong = inside & (rng.random((GRID, GRID)) < rng.uniform(0, 0.5))
            mistaken = [world.CONCEPTS[i] for i in rng.integers(len(world.CONCEPTS), size=3)]
            others = (mistaken[0], mistaken[0], *mistaken, scene.background)
            words[wrong] = [others[i] for i in rng.integers(len(others), size=wrong.sum())]
    return " " + " ".join(words.ravel())


def blur(x, place, noise=1.0):
    """Noise for embeddings x [B, T, D] of text pictures, as an encoder's features have it: patches
    mix with a neighbour and get Gaussian noise; how much differs from row to row."""
    patch = (place != IGNORE)[..., None]
    shift = (-GRID, -1, 1, GRID)[torch.randint(4, ()).item()]
    mixed = torch.rand(len(x), x.shape[1], 1) * torch.rand(len(x), 1, 1) * 0.7 * noise
    mixed = mixed * (patch & patch.roll(shift, 1))
    spread = 0.1 * noise * torch.rand(len(x), 1, 1) * patch
    return torch.lerp(x, x.roll(shift, 1), mixed) + spread * torch.randn_like(x)


def telegrams(scene, rng):
    """All look-ups that a scene allows, in telegraph style: [(question, answer)], shuffled.

        cat? yes   owl? no   cat: top left   top left: cat   cat bus? left   animal: cat

    They take a quarter of the tokens of full questions. Each is asked only once, because a repeated
    question could be answered by copying.
    """
    names = [o.name for o in scene.objects]
    kinds = [world.CATEGORIES[name] for name in names]
    place = {o: o.place.split(" ", 2)[2] for o in scene.objects}  # "top left", "middle"
    asked = [(f"{name}?", "yes") for name in dict.fromkeys(names)]
    known = {*names, *(partner for name in names for partner in world.PARTNERS[name])}
    others = [world.CONCEPTS[i] for i in rng.permutation(len(world.CONCEPTS))[: len(names)]]
    asked += [(f"{name}?", "no") for name in others if name not in known]
    for o, kind in zip(scene.objects, kinds):
        asked.append((f"{place[o]}:", o.name))
        if names.count(o.name) > 1:
            continue
        asked.append((f"{o.name}:", place[o]))
        if kinds.count(kind) == 1:
            asked.append((f"{kind}:", o.name))
        for p in scene.objects:
            side, other = o.place.split()[-1], p.place.split()[-1]
            if names.count(p.name) == 1 and side != other:
                asked.append((f"{o.name} {p.name}?", side))
    return [asked[i] for i in rng.permutation(len(asked))]


def written(scene, rng, noise):
    """A scene as a text picture or a caption, at random."""
    return text_picture(scene, rng, noise) if rng.random() < 0.8 else " " + world.caption(scene)


def telegraph_sample(tokenizer, rng, noise):
    """(ids, labels, types, place, found): one scene or, with noise, two, and short questions about
    each."""
    ids, labels, place, found = [tokenizer.bos] * 2, [IGNORE] * 2, [IGNORE] * 2, [IGNORE] * 2
    start = tokenizer.encode("[INST] ")
    for k in range(1 + (rng.random() < 0.4 * noise)):
        scene = world.sample_scene(rng, "train", n_objects=int(rng.integers(2, 5)))
        words = tokenizer.encode(written(scene, rng, noise))
        ids += [tokenizer.eos] * k + start
        place += [IGNORE] * (len(ids) - len(place)) + place_of(words)
        ids += words
        labels += [IGNORE] * (len(ids) - len(labels))
        found += [IGNORE] * (len(ids) - len(found))
        answers = look_ups(scene, tokenizer)
        for asked, answer in telegrams(scene, rng):
            asked, answer = tokenizer.encode(" " + asked), tokenizer.encode(" " + answer)
            ids += asked + answer
            labels += [IGNORE] * len(asked) + answer
        found += [answers.get(token, IGNORE) for token in ids[len(found) :]]
    place += [IGNORE] * (len(ids) - len(place))
    return ids, labels, [], place, found


# The questions that a small model learns last are asked more often.
HARD = world.QUESTION_TYPES + ("existence", "where", "kind", "side", "count", "list")


def dialogue_sample(tokenizer, rng, split, noise):
    """(ids, labels, types, place, found): a conversation about one scene, or about two or three, of
    at most LENGTH tokens."""
    if rng.random() < 0.75:
        scenes = world.sample_scenes(rng, split, world.pick(rng, 2, 3, 3))
        turns = world.conversation(scenes, rng, int(rng.integers(3, 10)))
        texts = [text_picture(scene, rng, noise) for scene in scenes]
    else:
        scenes = [world.sample_scene(rng, split)]
        kinds, n = HARD if split == "train" else world.QUESTION_TYPES, int(rng.integers(2, 10))
        turns = world.questions(scenes[0], rng, n, kinds)
        described = ("describe", world.DESCRIBE, world.caption(scenes[0]))
        turns.insert(int(rng.integers(len(turns) + 1)), described)
        (kind, question, answer), *rest = turns
        turns = [(kind, f"{world.IMAGE_TAG}\n{question}", answer), *rest]
        texts = [written(scenes[0], rng, noise)]
    while len((sample := render_text(turns, tokenizer, texts))[0]) > LENGTH:
        turns = turns[:-1]
    ids, labels, place = sample
    found = [IGNORE] * len(ids)
    if len(scenes) == 1:
        begin = max(k for k, at in enumerate(place) if at != IGNORE) + 1 if max(place) >= 0 else 70
        answers = look_ups(scenes[0], tokenizer)
        found[begin:] = [answers.get(token, IGNORE) for token in ids[begin:]]
    return ids, labels, [kind for kind, *_ in turns], place, found


def place_of(words):
    """The place of each patch in its text picture; IGNORE for the words of a caption."""
    return list(range(GRID * GRID)) if len(words) == GRID * GRID else [IGNORE] * len(words)


def render_text(turns, tokenizer, texts):
    """(ids, labels, place) of [(type, question, answer)], with texts in the place of images."""
    texts = [tokenizer.encode(text) for text in texts]
    tags = sum(question.count(world.IMAGE_TAG) for _, question, _ in turns)
    ids, labels = render(world.records(turns), tokenizer, image_tokens=1, n_images=tags)
    place, at = [IGNORE] * len(ids), 0
    for words in texts[:tags]:
        at = ids.index(IMAGE_TOKEN)
        ids[at : at + 1] = words
        labels[at : at + 1] = [IGNORE] * len(words)
        place[at : at + 1] = place_of(words)
    return ids, labels, place


def text_batch(tokenizer, split, seed, step, short=0.0, noise=1.0):
    """Rows about text scenes -> (batch, question types of each row). `short`: share of telegrams.

    batch["place"] [ROWS, LENGTH]: the place of each patch in its text picture. batch["found"]: for
    each name after a scene the result of looking it up there, an index into FOUND. IGNORE else.
    """
    rows, types = [], []
    extra = {name: torch.full((ROWS, LENGTH), IGNORE) for name in ("place", "found")}
    for i in range(ROWS):
        rng = np.random.default_rng((seed, world.SPLITS.index(split), step, i))
        sample = partial(dialogue_sample, tokenizer, rng, split, noise)
        if rng.random() < short:
            sample = partial(telegraph_sample, tokenizer, rng, noise)
        rows.append([])
        types.append([])
        at = 0
        for _ in range(6):  # tries; those that do not fit any more are left out
            ids, labels, kinds, *targets = sample()
            if at + len(ids) <= LENGTH:
                rows[-1].append((ids, labels, []))
                types[-1] += kinds
                for target, values in zip(extra.values(), targets):
                    target[i, at : at + len(ids)] = torch.tensor(values)
                at += len(ids)
    return assemble(rows, LENGTH) | extra, types


def look_ups(scene, tokenizer):
    """id of a name -> index into FOUND: its place in the scene."""
    names = [o.name for o in scene.objects]
    answers = dict.fromkeys(name_ids(tokenizer).values(), 0)
    for o in scene.objects:
        answer = "several" if names.count(o.name) > 1 else o.place
        answers[name_ids(tokenizer)[o.name]] = FOUND.index(answer)
    return answers


@functools.cache
def name_ids(tokenizer):
    """concept -> the id of its single token."""
    return {name: tokenizer.encode(" " + name)[0] for name in world.CONCEPTS}
