"""The exam is fair: balanced, seeded, scored by exact answers, and blind guessing scores little."""

import collections

import numpy as np
import pytest
from PIL import ImageStat
from tiny import tiny_cumo

import eval as evaluation
from data import world
from data.tokenizer import Tokenizer


@pytest.mark.parametrize("split", evaluation.SPLITS)
def test_exam_asks_every_type_equally_often_and_is_seeded(split):
    asked = evaluation.exam(split, 80, seed=1)
    counts = collections.Counter(kind for kind, *_ in asked)
    assert set(counts.values()) == {10} and set(counts) == set(world.QUESTION_TYPES)
    again, other = (evaluation.exam(split, 80, seed) for seed in (1, 2))
    assert [a[:3] for a in asked] == [a[:3] for a in again] != [a[:3] for a in other]


def test_exam_scenes_are_not_training_scenes():
    asked = {(q, a) for _, q, a, _ in evaluation.exam("pairs", 40, seed=1)}
    assert len(asked) > 30
    pictures = [np.asarray(p).tobytes() for *_, p in evaluation.exam("seen", 200, seed=1)]
    data = world.World("train", "ask", 300)
    trained = {np.asarray(data[i]["images"][0]).tobytes() for i in range(300)}
    assert not trained & set(pictures)


def answers_of(monkeypatch, say):
    monkeypatch.setattr(evaluation, "answer", lambda model, tokenizer, qs, ps: say(qs, ps))
    asked = evaluation.exam("seen", 80, seed=1)
    return asked, lambda **options: evaluation.accuracy(None, None, asked, 25, **options)


def test_right_answers_score_one_and_others_nothing(monkeypatch):
    truth = {}
    asked, score = answers_of(
        monkeypatch, lambda qs, ps: [truth[q, p.tobytes()] for q, p in zip(qs, ps)]
    )
    truth.update({(q, p.tobytes()): a for _, q, a, p in asked})
    assert set(evaluation.means(score()).values()) == {1.0}
    truth.update({key: answer + " " for key, answer in truth.items()})
    assert set(evaluation.means(score()).values()) == {0.0}, "exact means exact"


def test_blank_pictures_are_blank_and_leave_the_exam_alone(monkeypatch):
    def say(questions, pictures):
        assert all(ImageStat.Stat(picture).stddev == [0, 0, 0] for picture in pictures)
        return [""] * len(questions)

    asked, score = answers_of(monkeypatch, say)
    score(blank=True)
    assert any(max(ImageStat.Stat(picture).stddev) > 0 for *_, picture in asked)


def test_fixed_answers_know_no_more_than_the_question():
    fixed = evaluation.fixed_answers(600)
    hits = collections.defaultdict(list)
    for kind, question, right, _ in evaluation.exam("seen", 800, seed=1):
        hits[kind].append(fixed.get(evaluation.question_form(question)) == right)
    rates = evaluation.means(hits)
    assert 0.3 < rates["existence"] < 0.7 and rates["background"] < 0.3 and rates["what"] < 0.15
    assert rates["list"] < 0.05


def test_question_form_hides_every_name():
    forms = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        asked = world.questions(world.sample_scene(rng, "seen"), rng, 2)
        forms |= {evaluation.question_form(question) for _, question, _ in asked}
    assert len(forms) < 40
    assert not any(name in form.strip("?").split() for form in forms for name in world.CONCEPTS)


def test_answers_in_a_batch_equal_answers_alone():
    model = tiny_cumo(experts=4, vocab=1024).eval()
    tokenizer = Tokenizer.from_pretrained("data/mini/llm")
    _, questions, _, pictures = zip(*evaluation.exam("seen", 6, seed=3))
    together = evaluation.answer(model, tokenizer, questions, pictures, max_new_tokens=6)
    alone = [
        evaluation.answer(model, tokenizer, [q], [p], 6)[0] for q, p in zip(questions, pictures)
    ]
    assert together == alone


def test_expert_load_is_a_share_and_counts_every_sparse_block():
    model = tiny_cumo(experts=4).eval()
    load = evaluation.expert_load(
        model, [p for *_, p in evaluation.exam("seen", 8, seed=1)], batch=3
    )
    assert list(load) == ["vision.layers.0.moe", "vision.layers.1.moe", "connector.moe"]
    assert all(sum(shares) == pytest.approx(1) and len(shares) == 4 for shares in load.values())
