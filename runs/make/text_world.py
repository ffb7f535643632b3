"""Scenes of the emoji world as text, to pretrain the language model without pictures.

A scene is written as its caption or as a *text picture*: 64 words for the 8x8 patches of an image,
"blue blue cat cat blue ...". The text picture teaches what large language models already know: the
first patches of a sequence are at the top of the image, and how to look up a name by its place or a
place by its name. The text is put where the image will be. Questions about it are written in
telegraph style or as the conversations of stage 3:

    [INST] blue blue cat cat ...  cat? yes  owl? no  cat: top left  top left: cat  cat bus? left
    [INST] blue blue cat cat ...  Where is the cat? [/INST] at the top left</s>[INST] Is there ...
"""

import functools

import numpy as np
import torch

from data import world
from data.chat import IGNORE, IMAGE_TOKEN, render
from data.packing import assemble

PATCH, GRID = 8, 8
ROWS, LENGTH = 9, 256  # rows of a batch, tokens of a row
PLACES = 70  # most tokens of a scene and the tokens before it
FOUND = ("nothing", *world.PLACES, world.MIDDLE, "several")  # results of looking up a name


def text_picture(scene):
    """64 words, one for each 8x8 patch in reading order: its object or the background colour."""
    words = np.full((GRID, GRID), scene.background, dtype=object)
    y, x = np.mgrid[:GRID, :GRID] * PATCH + PATCH / 2
    for o in scene.objects:
        left, top, size = o.box
        words[np.hypot(x - left - size / 2, y - top - size / 2) < size * 0.5] = o.name
    return " " + " ".join(words.ravel())


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


def written(scene, rng):
    """A scene as a text picture or a caption, at random."""
    return text_picture(scene) if rng.random() < 0.7 else " " + world.caption(scene)


def telegraph_sample(tokenizer, rng):
    """(ids, labels, types, scene): a scene and all short questions about it."""
    scene = world.sample_scene(rng, "train", n_objects=int(rng.integers(2, 5)))
    ids = [tokenizer.bos] * 2 + tokenizer.encode("[INST] ") + tokenizer.encode(written(scene, rng))
    labels = [IGNORE] * len(ids)
    for asked, answer in telegrams(scene, rng):
        asked, answer = tokenizer.encode(" " + asked), tokenizer.encode(" " + answer)
        ids += asked + answer
        labels += [IGNORE] * len(asked) + answer
    return ids, labels, [], scene


# The questions that a small model learns last are asked more often.
HARD = world.QUESTION_TYPES + ("existence", "where", "kind", "side")


def dialogue_sample(tokenizer, rng, split):
    """(ids, labels, types, scene): a conversation with as many turns as LENGTH tokens hold."""
    scene = world.sample_scene(rng, split)
    turns = world.questions(scene, rng, 9, HARD if split == "train" else world.QUESTION_TYPES)
    described = ("describe", world.DESCRIBE, world.caption(scene))
    turns.insert(int(rng.integers(len(turns) + 1)), described)
    text = written(scene, rng)
    while len((sample := render_text(turns, tokenizer, text))[0]) > LENGTH:
        turns = turns[:-1]
    return *sample, [kind for kind, *_ in turns], scene


def render_text(turns, tokenizer, text):
    """(ids, labels) of [(type, question, answer)], with a text in the place of the image."""
    conversation = []
    for k, (_, question, answer) in enumerate(turns):
        conversation += [{"from": "human", "value": ("" if k else "<image>\n") + question},
                         {"from": "gpt", "value": answer}]  # fmt: skip
    words = tokenizer.encode(text)
    ids, labels = render(conversation, tokenizer, image_tokens=len(words), n_images=1)
    at = ids.index(IMAGE_TOKEN)
    return ids[:at] + words + ids[at + len(words) :], labels


def text_batch(tokenizer, split, seed, step, short=0.0):
    """Rows about text scenes -> (batch, question types of each row). `short`: share of telegrams.

    batch["found"] [ROWS, LENGTH]: for each name after a scene the result of looking it up in the
    scene, an index into FOUND; IGNORE for all other tokens.
    """
    rows, types, found = [], [], torch.full((ROWS, LENGTH), IGNORE)
    for i in range(ROWS):
        rng = np.random.default_rng((seed, world.SPLITS.index(split), step, i))
        if rng.random() < short:
            samples = [telegraph_sample(tokenizer, rng) for _ in range(3)]
        else:
            samples = [dialogue_sample(tokenizer, rng, split)]
        rows.append([])
        types.append(samples[0][2])
        at = 0
        for ids, labels, _, scene in samples:
            ids, labels = ids[: LENGTH - at], labels[: LENGTH - at]
            if len(ids) > PLACES:  # else it holds no question
                rows[-1].append((ids, labels, []))
                answers = look_ups(scene, tokenizer)
                targets = [answers.get(token, IGNORE) for token in ids[PLACES:]]
                found[i, at + PLACES : at + len(ids)] = torch.tensor(targets)
                at += len(ids)
    return assemble(rows, LENGTH) | {"found": found}, types


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
