"""The verdicts of the ablations: intervals as wide as they must be, words that follow from them."""

import random

import numpy as np
import pytest

from data.exam import exam
from data.world import KINDS
from runs import verdicts

T = {3: 4.303, 5: 2.776}  # Student's t, 97.5 %, with one degree of freedom less


def answers_with(differences):
    """(ours, reference) for `compare` whose losses have the differences [seeds, splits, n]."""
    x = np.asarray(differences, float)
    return (x > 2, x), (np.zeros(x.shape, bool), np.zeros(x.shape))


def found_for(differences, kind="all"):
    return verdicts.compare(*answers_with(differences))[kind]["loss"]


@pytest.mark.parametrize("seeds", T)
def test_if_only_seeds_differ_the_interval_is_students(seeds):
    of_seed = np.random.default_rng(seeds).normal(0.3, 1, seeds)
    mean, low, high = found_for(np.tile(of_seed[:, None, None], (1, 3, 30)))
    half = T[seeds] * of_seed.std(ddof=1) / seeds**0.5
    assert mean == pytest.approx(of_seed.mean(), abs=1e-6)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert (high + low) / 2 == pytest.approx(mean, abs=0.2 * half)


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_if_only_questions_differ_the_interval_is_that_of_a_mean(kind):
    of_question = np.random.default_rng(1).normal(0, 1, (3, 300))
    of_question += 5 * verdicts.kinds_of(300)  # between kinds: not by chance
    mean, low, high = found_for(np.tile(of_question, (5, 1, 1)), kind)
    parts = [of_question[:, k::3] for k in range(3) if kind in ("all", list(KINDS)[k])]
    error = sum(part.var() / part.size for part in parts) ** 0.5 / len(parts)
    assert mean == pytest.approx(np.mean(parts), abs=1e-5)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_interval_equals_that_of_a_slow_loop():
    rng, dice = np.random.default_rng(2), random.Random(2)
    x = rng.normal(0, 0.3, (4, 1, 1)) + rng.normal(0, 1, (3, 24)) + rng.normal(0, 1, (4, 3, 24))
    drawn = []
    for _ in range(4000):
        seeds = [dice.randrange(4) for _ in range(4)]
        questions = []  # (split, question), as many of each kind as there are
        for kind in range(3):
            every = [(split, q) for split in range(3) for q in range(kind, 24, 3)]
            questions += [dice.choice(every) for _ in every]
        of_questions = sum(x[s, split, q] for s in range(4) for split, q in questions) / 4 / 72
        of_seeds = sum(x[s].mean() for s in seeds) / 4
        wider = (4 / sum(dice.gauss(0, 1) ** 2 for _ in range(3))) ** 0.5
        drawn.append(of_questions + wider * (of_seeds - x.mean()))
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert found_for(x)[1:] == pytest.approx((low, high), abs=0.06 * (high - low))


def test_an_interval_of_95_percent_contains_the_truth_in_95_percent_of_exams():
    rng, hits = np.random.default_rng(3), {3: 0, 5: 0}
    for seeds in hits:
        for _ in range(200):
            x = rng.normal(0, 0.2, (seeds, 1, 1)) + rng.normal(0, 1, (seeds, 3, 15))
            x += rng.normal(0, 0.5, (3, 15))
            _, low, high = found_for(x)
            hits[seeds] += low <= 0 <= high
    assert all(0.92 <= count / 200 <= 0.99 for count in hits.values()), hits


def test_right_answers_are_compared_in_percent_and_by_kind_of_picture():
    ours, reference = np.zeros((2, 2, 3, 6), bool)  # 2 seeds, 3 splits, 6 questions
    ours[:, :, 1::3] = True  # all words right, nothing else
    reference[0, :, 0] = True  # of the things one of two, with one seed
    found = verdicts.compare((ours, ours), (reference, reference))
    mean = {kind: some["right"][0] for kind, some in found.items()}
    assert mean == pytest.approx({"things": -25, "words": 100, "charts": 0, "all": 25})
    assert found["words"]["right"] == pytest.approx((100, 100, 100)), (
        "no question and no seed differs"
    )
    assert found["charts"]["right"] == (0, 0, 0)


def test_losses_in_training_are_compared_over_the_last_third_of_the_steps():
    rng = np.random.default_rng(4)
    reference = np.tile(np.linspace(3, 1, 300), (5, 1))
    ours = reference + rng.normal(0, 0.1, (5, 300)) + 0.4 * (np.arange(300) < 200)
    longer = [[*first, *x] for first, x in zip(([], [9], [], [9, 9], []), reference)]
    ours_too = [[*first, *x] for first, x in zip(([], [1], [], [1, 1], []), ours)]
    mean, low, high = verdicts.compare_training(ours_too, longer)
    late = 100 * (ours - reference)[:, 200:] / reference[:, 200:].mean()
    assert mean == pytest.approx(late.mean(), abs=1e-3) and low < mean < high
    at_least = 1.96 * late.std() / late.size**0.5  # if seeds do not differ, steps do
    assert at_least < (high - low) / 2 < 3 * at_least


def test_kinds_of_questions_are_those_of_the_exam():
    types = [kind for kind, *_ in exam("new", 12, 1)]
    kinds = [list(KINDS)[k] for k in verdicts.kinds_of(12)]
    assert all(kind in KINDS[of] for kind, of in zip(types, kinds))


@pytest.mark.parametrize(
    "expected, low, high, word",
    [(1.6, 0.1, 2, "confirmed"), (-1, -2, -0.1, "confirmed"), (1.6, -2, -0.1, "contradicted"),
     (-1, 0.1, 2, "contradicted"), (1.6, -0.1, 2, "undecided"), (1.6, 0, 2, "undecided"),
     (1, 0, 0, "undecided"), (None, 0.1, 2, "better"), (None, -2, -0.1, "worse"),
     (None, -1, 1, "undecided"), (0.0, 0.1, 2, "better")])  # fmt: skip
def test_verdict_follows_from_the_interval_and_the_papers_sign(expected, low, high, word):
    assert verdicts.verdict(expected, ((low + high) / 2, low, high)) == word


def test_a_loss_that_is_not_finite_is_no_answer():
    with pytest.raises(ValueError, match="not finite"):
        verdicts.pack(np.ones(2, bool), np.array([0.1, np.nan]), [1])


def test_what_the_paper_says_is_counted_from_the_row_compared_with():
    first, row = {"paper": (71, 59, 34, 69)}, {"paper": (72, 62, 36, 70)}
    assert verdicts.paper_of(row, first) == {"paper": 1.75, "text_vqa": 3, "remark": ""}
    for pair in ((first, {"paper": "not in the paper"}), ({"paper": "not in the paper"}, first)):
        told = verdicts.paper_of(*pair)
        assert told["remark"] == "not in the paper" and told["paper"] is None
    assert not any(verdicts.paper_of(row, None).values())


def test_packed_answers_are_those_of_the_run(tmp_path):
    rng = np.random.default_rng(0)
    right, loss = rng.random((3, 17)) < 0.5, rng.exponential(2, (3, 17)).astype(np.float32)
    loss[0, :3] = 0, 1e-6, 300
    packed = verdicts.pack(right, loss, training=[2, 1])
    verdicts.write_answers(tmp_path / "new" / "exam.npz", {"b-8-0": packed})
    kept = verdicts.read_answers(tmp_path / "new" / "exam.npz")
    assert list(kept) == ["b-8-0"] and verdicts.read_answers(tmp_path / "exam.npz") == {}
    found = verdicts.unpack(kept["b-8-0"], (3, 17))
    assert (found[0] == right).all() and found[0].dtype == bool
    assert found[1] == pytest.approx(loss, rel=0.05, abs=0.00005) and found[1][0, 0] == 0


@pytest.mark.parametrize("x, digits, text", [
    (-0.03, 1, "-0.03"), (0.04, 1, "+0.04"), (0.06, 1, "+0.1"), (0.0, 1, "+0.0"),
    (-1e-9, 1, "+0.00"), (0.0004, 3, "+0.0004"), (-2.345, 1, "-2.3"),
])  # fmt: skip
def test_rounding_does_not_hide_on_which_side_of_0_a_difference_is(x, digits, text):
    assert verdicts.signed(x, digits) == text
