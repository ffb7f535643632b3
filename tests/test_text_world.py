"""Scenes as text: true answers, questions asked once, no held-out pairs."""

from pathlib import Path

import numpy as np
import torch

from data import world
from data.chat import IGNORE
from data.tokenizer import Tokenizer
from runs.make import text_world
from runs.make.text_world import FOUND, blur, telegrams, text_batch, text_picture

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
    for scene, rng in scenes(50):
        words = np.array(text_picture(scene, rng, noise=0).split()).reshape(8, 8)
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


def test_noise_leaves_each_object_the_most_frequent_name_in_its_place():
    found, noisy = [], 0
    for scene, rng in scenes(400):
        words = np.array(text_picture(scene, rng).split()).reshape(8, 8)
        noisy += set(words.ravel()) != {scene.background, *(o.name for o in scene.objects)}
        for o in scene.objects:
            rows = slice(0, 4) if "top" in o.place else slice(4, 8)
            columns = slice(0, 4) if "left" in o.place else slice(4, 8)
            area = words if o.place == world.MIDDLE else words[rows, columns]
            names, counts = np.unique(area[area != scene.background], return_counts=True)
            found.append(len(names) > 0 and names[counts.argmax()] == o.name)
    assert np.mean(found) > 0.95 and 200 < noisy < 350


def test_blur_changes_patches_only_and_each_row_by_its_own_strength():
    torch.manual_seed(0)
    batch, _ = text_batch(TOKENIZER, "train", 0, 0)
    x = torch.randn(*batch["tokens"].shape, 16)
    change = (blur(x, batch["place"]) - x).norm(dim=-1)
    patch = batch["place"] != IGNORE
    assert not change[~patch].any() and (change[patch] > 0).all()
    means = torch.stack([row[own].mean() for row, own in zip(change, patch) if own.any()])
    assert means.max() > 1.5 * means.min()
    assert torch.equal(blur(x, batch["place"], noise=0), x)


def read_back(tokens, place):
    """The text pictures in a row: [(column of the first patch, its 64 words)]."""
    starts = (place == 0).nonzero()[:, 0].tolist()
    return [(at, TOKENIZER.decode(tokens[at : at + 64].tolist()).split()) for at in starts]


def test_places_and_found_names_are_those_of_the_picture_before_them():
    names = {i: name for name, i in text_world.name_ids(TOKENIZER).items()}
    checked = 0
    for step in range(6):
        batch, _ = text_batch(TOKENIZER, "train", 0, step, short=0.5, noise=0.01)
        for tokens, place, found, own in zip(
            *(batch[k] for k in ("tokens", "place", "found", "segments"))
        ):
            pictures = read_back(tokens, place)
            for at, _ in pictures:
                assert place[at : at + 64].tolist() == list(range(64))
            for column in (found != IGNORE).nonzero()[:, 0].tolist():
                before = [p for p in pictures if p[0] < column and own[p[0]] == own[column]]
                if before and before[-1][0] + 64 <= column:  # else its scene is a caption
                    words = np.array(before[-1][1]).reshape(8, 8)
                    name, answer = names[int(tokens[column])], FOUND[int(found[column])]
                    at = np.argwhere(words == name)
                    assert (len(at) == 0) == (answer == "nothing"), (name, answer)
                    if answer in world.PLACES:
                        assert ((at < 4).all(0) == ["top" in answer, "left" in answer]).all()
                    checked += 1
    assert checked > 500


def test_places_are_those_of_patches_in_every_scene_of_a_row_of_telegrams():
    words = {TOKENIZER.encode(" " + name)[0] for name in (*world.CONCEPTS, *world.COLORS)}
    pictures = 0
    for step in range(3):  # with noise, 40 % of the samples have a second scene
        batch, _ = text_batch(TOKENIZER, "train", 1, step, short=1.0, noise=1.0)
        for tokens, place in zip(batch["tokens"].tolist(), batch["place"].tolist()):
            starts = [i for i, at in enumerate(place) if at == 0]
            for i in starts:
                assert place[i : i + 64] == list(range(64)) and {*tokens[i : i + 64]} <= words
            assert sum(at != IGNORE for at in place) == 64 * len(starts)
            pictures += len(starts)
    assert pictures > 40


def test_no_row_is_empty():
    for step, short in ((0, 1.0), (1, 0.0), (2, 0.25)):
        batch, _ = text_batch(TOKENIZER, "train", 0, step, short)
        assert (batch["segments"].amax(1) > 0).all() and (batch["labels"] != IGNORE).any(1).all()
