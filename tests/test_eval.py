"""The exam is fair: balanced, seeded, scored by exact answers; blind guessing scores little."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageStat
from refused import refusal
from tiny import TOKENIZER, tiny_cumo

import eval as evaluation
from data import world
from data.tokenizer import Tokenizer
from extras import plots


@pytest.mark.parametrize("split", evaluation.SPLITS)
def test_exam_asks_every_type_equally_often_and_is_seeded(split):
    asked = evaluation.exam(split, 120, seed=1)
    counts = collections.Counter(kind for kind, *_ in asked)
    assert counts == {name: 40 // len(types) for types in world.KINDS.values() for name in types}
    again, other = (evaluation.exam(split, 120, seed) for seed in (1, 2))
    assert [a[:3] for a in asked] == [a[:3] for a in again] != [a[:3] for a in other]


@pytest.mark.parametrize("flags, line", [
    (["--n", "23"], "error: --n 23 must be 24 or more"),
    (["--batch", "0"], "error: --batch 0 must be 1 or more"),
    (["--n", "0", "--data", "mine.json"], "error: --n 0 must be 1 or more"),
])  # fmt: skip
def test_a_wrong_number_is_named_alone(flags, line, monkeypatch, capsys):
    assert refusal(evaluation.main, flags, monkeypatch, capsys) == line


def test_the_smallest_exam_asks_every_type_of_every_kind():
    asked = evaluation.exam("new", evaluation.LEAST, seed=1)
    assert {kind for kind, *_ in asked} == {*world.QUESTION_TYPES}
    rates = evaluation.accuracy(lambda questions, _: [""] * len(questions), asked, 50)
    assert [*rates] == [*world.QUESTION_TYPES, *world.KINDS, "all"]


def test_exam_scenes_are_not_training_scenes():
    """Except for some charts: charts of two bars are few, so a new one may be an old one."""
    asked = {(q, a) for _, q, a, _ in evaluation.exam("pairs", 60, seed=1)}
    assert len(asked) > 45
    pictures = [np.asarray(p).tobytes() for *_, p in evaluation.exam("new", 300, seed=1)]
    data = world.World("train", "ask", 400)
    trained = {np.asarray(p).tobytes() for i in range(400) for p in data[i]["images"]}
    met = [picture in trained for picture in pictures]
    assert not any(met[0::3] + met[1::3]) and sum(met[2::3]) < 8


def test_right_answers_score_one_and_others_nothing():
    asked = evaluation.exam("new", 80, seed=1)
    truth = {(q, p.tobytes()): a for _, q, a, p in asked}
    ask = lambda qs, ps: [truth[q, p.tobytes()] for q, p in zip(qs, ps)]
    assert set(evaluation.accuracy(ask, asked, 25).values()) == {1.0}
    truth.update({key: answer + " " for key, answer in truth.items()})
    assert set(evaluation.accuracy(ask, asked, 25).values()) == {0.0}, "exact means exact"


def test_blank_pictures_are_blank_and_leave_the_exam_alone(monkeypatch):
    """For each split, `ask` gets the 80 questions with their pictures, then with blank ones."""
    monkeypatch.setattr(evaluation, "fixed_answers", dict)
    seen = []

    def ask(questions, pictures):
        seen.extend(pictures)
        return [""] * len(questions)

    results = evaluation.evaluate_scenes(ask, evaluation.EvalConfig(n=80))
    assert list(results) == list(evaluation.SPLITS)
    assert all(list(rows) == ["model", "blank", "fixed"] for rows in results.values())
    rows = [seen[k : k + 80] for k in range(0, len(seen), 80)]
    for split, drawn, blank in zip(results, rows[::2], rows[1::2], strict=True):
        assert all(ImageStat.Stat(picture).stddev == [0, 0, 0] for picture in blank)
        assert all(ImageStat.Stat(picture).mean == [128, 128, 128] for picture in blank)
        fresh = [picture for *_, picture in evaluation.exam(split, 80, seed=1)]
        assert [p.tobytes() for p in drawn] == [p.tobytes() for p in fresh]
        assert [p.size for p in blank] == [p.size for p in fresh]


def test_fixed_answers_know_no_more_than_the_question():
    fixed = evaluation.fixed_answers(600)
    guess = lambda questions, _: [fixed.get(evaluation.question_form(q)) for q in questions]
    rates = evaluation.accuracy(guess, evaluation.exam("new", 800, seed=1), 50)
    assert 0.3 < rates["existence"] < 0.7 and rates["background"] < 0.3 and rates["what"] < 0.15
    assert rates["list"] < 0.05 and rates["read"] < 0.02
    assert max(rates["height"], rates["tallest"]) < 0.4 and 0.3 < rates["compare"] < 0.7


def test_all_weighs_every_kind_alike_and_a_kind_its_questions():
    asked = evaluation.exam("new", 120, seed=1)
    truth = {(q, p.tobytes()): a for kind, q, a, p in asked if kind in ("read", "height")}
    ask = lambda qs, ps: [truth.get((q, p.tobytes()), "?") for q, p in zip(qs, ps)]
    rates = evaluation.accuracy(ask, asked, 25)
    assert [rates[kind] for kind in world.KINDS] == [0, 1, 0.25]
    assert rates["all"] == pytest.approx(1.25 / 3, abs=1e-4)


def test_question_form_hides_every_name():
    forms = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        asked = world.questions(world.sample_scene(rng, "new"), rng, 2)
        forms |= {evaluation.question_form(question) for _, question, _ in asked}
    assert len(forms) < 45
    hidden = {*world.CONCEPTS, *world.COLORS}
    assert not any(name in form.strip("?").split() for form in forms for name in hidden)


def test_answers_in_a_batch_equal_answers_alone():
    model = tiny_cumo(experts=4, vocab=1024).eval()
    tokenizer = Tokenizer.from_pretrained(TOKENIZER.parent)
    _, questions, _, pictures = zip(*evaluation.exam("new", 6, seed=3))
    together = evaluation.answer_batch(model, tokenizer, questions, pictures, max_new_tokens=6)
    alone = [evaluation.answer_batch(model, tokenizer, [q], [p], 6)[0]
             for q, p in zip(questions, pictures)]  # fmt: skip
    assert together == alone


def test_expert_load_is_a_share_and_counts_every_sparse_block():
    model = tiny_cumo(experts=4).eval()
    pictures = [picture for *_, picture in evaluation.exam("new", 8, seed=1)]
    load = plots.expert_load(model, pictures, batch=3)
    assert list(load) == ["vision.layers.0.moe", "vision.layers.1.moe", "connector.moe"]
    assert all(sum(shares) == pytest.approx(1) and len(shares) == 4 for shares in load.values())


def test_a_torchvision_of_another_torch_is_one_line(tmp_path):
    """`pip install ".[eval]"` takes one for CUDA, also next to a torch for the CPU."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")\n'
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "extras" / "lmms_eval.py"), "--tasks", "pope"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)},
                           capture_output=True, text=True)  # fmt: skip
    (line,) = ended.stderr.strip().splitlines()
    assert ended.returncode == 1 and line.startswith("error: torchvision does not fit torch 2.")
    assert "torchvision::nms does not exist" in line and "install both together" in line
