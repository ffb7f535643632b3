"""Scenes as text: true answers, questions asked once, no held-out pairs."""

from pathlib import Path

import numpy as np

from data import world
from data.chat import IGNORE
from data.tokenizer import Tokenizer
from runs.make import text_world
from runs.make.text_world import FOUND, PLACES, telegrams, text_batch, text_picture

MINI = Path(__file__).resolve().parents[1] / "data" / "mini"
TOKENIZER = Tokenizer.from_pretrained(MINI / "llm")


def scenes(n):
    for i in range(n):
        rng = np.random.default_rng((5, i))
        yield world.sample_scene(rng, "train"), rng


def test_every_name_is_one_token_of_its_own():
    ids = [TOKENIZER.encode(" " + name) for name in world.CONCEPTS]
    assert {len(i) for i in ids} == {1} and len({i[0] for i in ids}) == len(world.CONCEPTS)


def test_text_picture_has_64_words_and_shows_every_object_where_it_stands():
    for scene, _ in scenes(50):
        words = np.array(text_picture(scene).split()).reshape(8, 8)
        assert set(words.ravel()) == {scene.background, *(o.name for o in scene.objects)}
        for o in scene.objects:
            if o.place != world.MIDDLE:
                rows = slice(0, 4) if "top" in o.place else slice(4, 8)
                columns = slice(0, 4) if "left" in o.place else slice(4, 8)
                assert (words[rows, columns] == o.name).any()


def test_telegrams_are_true_asked_once_and_silent_about_held_out_partners():
    for scene, rng in scenes(200):
        asked = telegrams(scene, rng)
        assert len({question for question, _ in asked}) == len(asked)
        places = {o.name: o.place for o in scene.objects}
        for question, answer in asked:
            if answer == "yes":
                assert question[:-1] in places
            elif answer == "no":
                assert question[:-1] not in places
                for name in places:
                    assert frozenset((name, question[:-1])) not in world.HELD_OUT
            elif question[:-1] in places:
                assert places[question[:-1]].endswith(answer)
            elif answer in ("left", "right"):
                first, second = question[:-1].split()
                assert places[first].endswith(answer) and not places[second].endswith(answer)
            else:
                assert answer in places


def test_found_says_where_each_name_behind_a_scene_stands():
    batch, _ = text_batch(TOKENIZER, "seen", 0, 0)
    names = {i: name for name, i in text_world.name_ids(TOKENIZER).items()}
    assert (batch["found"][:, :PLACES] == IGNORE).all()
    for row, tokens in enumerate(batch["tokens"].tolist()):
        rng = np.random.default_rng((0, 1, 0, row))
        rng.random()  # the draw that chooses telegrams or a conversation
        scene = world.sample_scene(rng, "seen")
        standing = [o.name for o in scene.objects]
        for column in range(PLACES, len(tokens)):
            found, name = int(batch["found"][row, column]), names.get(tokens[column])
            assert (found == IGNORE) == (name is None)
            if name and standing.count(name) == 1:
                assert scene.objects[standing.index(name)].place == FOUND[found]
            elif name:
                assert FOUND[found] == ("several" if name in standing else "nothing")


def test_no_row_is_empty():
    for step, short in ((0, 1.0), (1, 0.0), (2, 0.25)):
        batch, _ = text_batch(TOKENIZER, "train", 0, step, short)
        assert (batch["segments"].amax(1) > 0).all() and (batch["labels"] != IGNORE).any(1).all()
