"""The exam on the emoji world: questions about new scenes, and a baseline that only guesses.

    asked = exam("pairs", n=240, seed=1)        # [(type, question, answer, picture), ...]
    guess = fixed_answers()                     # {"Is there _?": "yes", ...}

The splits are those of data/world.py that are not trained on. A fixed answer is the most frequent
answer in the training data to questions of the same form. A model that sees no picture, but
reads the whole question, gains little over it: see `blank` in eval.py.
"""

import collections
import re

import numpy as np

from data import world

SPLITS = ("new", "pairs", "style")
LEAST = len(world.KINDS) * max(map(len, world.KINDS.values()))  # for a question of every type


def exam(split, n, seed):
    """`n` questions of a split, the kinds of pictures in turn, and within a kind its types of
    questions in turn: [(type, question, answer, picture)]."""
    asked, i = [], 0
    while len(asked) < n:
        rng = np.random.default_rng((seed, world.SPLITS.index(split), 99, i))
        turn, k = divmod(len(asked), len(world.KINDS))
        kind, types = [*world.KINDS.items()][k]
        of_type = types[turn % len(types)]
        scene, i = world.sample_scene(rng, split, kind), i + 1
        if pair := world.ASK[of_type](scene, rng):  # else the same question about the next scene
            asked.append((of_type, *pair, world.draw(scene)))
    return asked


def question_form(question):
    """The question with every concept, category and color replaced by `_`."""
    names = {*world.CONCEPTS, *map(world.plural, world.CONCEPTS), *world.CATEGORIES.values()}
    words = "|".join(sorted(names | {*world.COLORS}, key=len, reverse=True))
    return re.sub(rf"\b(an? )?({words})\b", "_", question)


def fixed_answers(n=4000):
    """question form -> its most frequent answer in the training data."""
    counts = collections.defaultdict(collections.Counter)
    for i in range(n):
        rng = np.random.default_rng((3, 99, i))
        for _, question, answer in world.questions(world.sample_scene(rng, "train"), rng, 2):
            counts[question_form(question)][answer] += 1
    return {form: answers.most_common(1)[0][0] for form, answers in counts.items()}
