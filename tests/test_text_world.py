"""Scenes as text: true answers, questions asked once, no held-out pairs."""

from pathlib import Path

import numpy as np
import torch
from test_world import NUMBERS, true_answer

from data import world
from data.chat import IGNORE
from data.tokenizer import Tokenizer
from runs.make import text_world
from runs.make.text_world import FOUND, LETTERS, blur, telegrams, text_batch, text_picture

MINI = Path(__file__).resolve().parents[1] / "data" / "mini"
TOKENIZER = Tokenizer.from_pretrained(MINI / "llm")


def scenes(n, kind="things"):
    for i in range(n):
        rng = np.random.default_rng((5, i))
        yield world.sample_scene(rng, "train", kind), rng


def test_every_name_is_one_token_of_its_own():
    ids = [TOKENIZER.encode(" " + name) for name in world.CONCEPTS]
    assert {len(i) for i in ids} == {1} and len({i[0] for i in ids}) == len(world.CONCEPTS)


def test_text_picture_has_64_words_and_shows_every_object_where_it_stands():
    for scene, rng in scenes(50):
        words = np.array(text_picture(scene, rng, noise=0)).reshape(8, 8)
        assert set(words.ravel()) == {scene.background, *(o.name for o in scene.objects)}
        for o in scene.objects:
            if o.place != world.MIDDLE:
                rows = slice(0, 4) if "top" in o.place else slice(4, 8)
                columns = slice(0, 4) if "left" in o.place else slice(4, 8)
                assert (words[rows, columns] == o.name).any()


def test_text_picture_of_a_sign_has_its_letters_from_left_to_right_in_the_rows_that_they_cover():
    for scene, rng in scenes(100, "words"):
        words = np.array(text_picture(scene, rng, noise=0)).reshape(8, 8)
        lines = ["".join(word for word in row if word in LETTERS) for row in words]
        for row, line in enumerate(lines):
            covering = []
            for sign in scene.signs:
                _, top, _, height = sign.box
                away = abs(8 * row + 4 - top - height / 2)
                # One row, or two if the sign stands between them; tall letters cover more.
                if away <= 5.5 or away <= 0.35 * height - 2:
                    covering += sign.text
            assert line == "".join(covering)
        plates = {sign.plate for sign in scene.signs}
        names = {o.name for o in scene.objects}
        assert {*words.ravel()} - {*LETTERS} <= {scene.background} | plates | names


def test_text_picture_of_a_chart_has_each_bar_as_high_as_it_is_drawn():
    for scene, rng in scenes(100, "charts"):
        words = np.array(text_picture(scene, rng, noise=0)).reshape(8, 8)
        assert {*words.ravel()} == {scene.background, *(color for color, _ in scene.chart.bars)}
        for color, height in scene.chart.bars:
            assert abs(8 * (words == color).any(1).sum() - 11 * height - 3) <= 4, "half a patch"


def test_telegrams_of_signs_and_charts_are_true():
    for kind in ("words", "charts"):
        for scene, rng in scenes(100, kind):
            bars = dict(scene.chart.bars) if scene.chart else {}
            truths = {f"sign {sign.place}:": sign.text for sign in scene.signs}
            truths |= {f"{color}:": NUMBERS[height] for color, height in bars.items()}
            for question, answer in telegrams(scene, rng):
                right = truths.get(question) or true_answer(question.capitalize(), scene)
                assert answer == right is not None, question


def slow_places(tokens, labels, place, letters):
    """For each token: the place of the letter after it, if that is a letter of an answer that is
    one whole line of letters in a text picture."""
    texts, pictures, target = {}, 0, []
    for token, at in zip(tokens, place):
        pictures += at == 0
        if at >= 0 and token in letters:
            texts.setdefault((pictures, at // 8), []).append((token, at))
    answers = [t in letters and y != IGNORE for t, y in zip(tokens, labels)] + [False]
    for i in range(len(tokens)):
        target.append(IGNORE)
        if not answers[i + 1]:
            continue
        start = end = i + 1
        while start and answers[start - 1]:
            start -= 1
        while answers[end]:
            end += 1
        for line in texts.values():
            if [token for token, _ in line] == list(tokens[start:end]):
                target[i] = line[i + 1 - start][1]
    return target


def test_places_of_letters_are_those_of_a_slow_loop():
    letters = {TOKENIZER.encode(letter)[0] for letter in LETTERS}
    spelled = 0
    for step in range(8):
        batch, _ = text_batch(TOKENIZER, "train", 0, step, short=0.5)
        for row in zip(*(batch[k].tolist() for k in ("tokens", "labels", "place", "spelled"))):
            assert row[-1] == slow_places(*row[:3], letters)
            spelled += sum(at != IGNORE for at in row[-1])
    assert spelled > 200


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
            else:  # a place, or a category that one thing alone has
                kind, shown = question[:-1], [world.CATEGORIES[name] for name in places]
                alike = {"animal": "animal bird", "food": "food fruit vegetable"}.get(kind, kind)
                assert answer in places and kind not in ("object", "sky")
                assert kind not in shown or sum(k in alike.split() for k in shown) == 1


def test_noise_leaves_each_object_the_most_frequent_name_in_its_place():
    found, noisy = [], 0
    for scene, rng in scenes(400):
        words = np.array(text_picture(scene, rng)).reshape(8, 8)
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
    words = [TOKENIZER.decode([token]).strip() for token in tokens.tolist()]
    return [(at, words[at : at + 64]) for at in starts]


def test_places_and_found_names_are_those_of_the_picture_before_them():
    names = {i: name for name, i in text_world.name_ids(TOKENIZER).items()}
    checked = 0
    for step in range(20):
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
    words |= {TOKENIZER.encode(letter)[0] for letter in LETTERS}
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
