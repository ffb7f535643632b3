"""bench/experts.py: mutual information of experts and of what patches show."""

import itertools
import json
import math
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import ROOT, tiny_cumo

from data import world
from data.images import preprocess
from extras import plots
from runs import pictures
from upcycle import upcycle


@pytest.fixture(scope="module")
def experts():
    path = [*sys.path]
    sys.path.insert(0, str(ROOT))  # a bench replaces the first entry
    from bench import experts

    sys.path[:] = path
    return experts


def scenes(n):
    return [world.sample_scene(np.random.default_rng((4, i)), "new", kind)
            for i, kind in zip(range(n), itertools.cycle(world.KINDS))]  # fmt: skip


def random_choices(rng, n, P, E, K):
    """[n, P, K]: K different experts a patch."""
    return rng.permuted(np.tile(np.arange(E), (n, P, 1)), axis=-1)[..., :K]


def slow_information(choice_nPK, label_nP):
    """H(expert) + H(label) - H(both), from loops over patches and choices."""
    pairs = [(int(label), int(e)) for choice_PK, label_P in zip(choice_nPK, label_nP)
             for choice_K, label in zip(choice_PK, label_P) if label >= 0
             for e in choice_K]  # fmt: skip

    def entropy(values):
        shares = [n / len(values) for n in Counter(values).values()]
        return -sum(p * math.log2(p) for p in shares)

    labels, chosen = zip(*pairs)
    return entropy(labels) + entropy(chosen) - entropy(pairs)


# ----------------------------------------------------------------------------- the estimator


@pytest.mark.parametrize("n, P, E, K, L", [(7, 5, 3, 1, 2), (3, 11, 5, 3, 4), (13, 9, 8, 2, 100)])
def test_mutual_information_is_that_of_a_loop_over_counts(experts, n, P, E, K, L):
    rng = np.random.default_rng(n)
    choice, label = random_choices(rng, n, P, E, K), rng.integers(-1, L, size=(n, P))
    choice[..., 0] = np.where(label % 3 == 0, 0, choice[..., 0])  # some dependence
    bits = experts.mutual_information(experts.count(choice, label))
    assert bits == pytest.approx(slow_information(choice, label)) and bits > 0.01
    assert experts.measure(choice, label)["bits"] == pytest.approx(bits, abs=1e-5)


def test_counts_are_of_every_choice_of_every_labelled_patch(experts):
    choice = np.array([[[0, 2], [1, 0], [2, 1]]])
    assert experts.count(choice, np.array([[1, -1, 0]])).tolist() == [[0, 1, 1], [1, 0, 1]]


def test_an_expert_that_equals_the_label_tells_all_of_its_entropy(experts):
    label = np.array([[0, 0, 0, 0, 1, 1, 2]] * 5)  # H = 4/7 log 7/4 + 2/7 log 7/2 + 1/7 log 7
    expected = 4 / 7 * math.log2(7 / 4) + 2 / 7 * math.log2(7 / 2) + math.log2(7) / 7
    bits = lambda choice: experts.mutual_information(experts.count(choice[..., None], label))
    assert bits(label) == pytest.approx(expected)
    assert bits(np.array([2, 0, 1])[label]) == pytest.approx(expected), "names do not matter"
    assert bits(np.zeros_like(label)) == 0


def test_with_k_choices_the_most_is_log2_of_e_over_k(experts):
    label = np.arange(6).reshape(2, 3) % 2
    choice = np.array([[0, 1], [2, 3]])[label]  # the label decides everything
    assert experts.mutual_information(experts.count(choice, label)) == pytest.approx(1)


def test_independent_choices_give_the_known_bias_and_so_do_permuted_labels(experts):
    rng, n, P, E, L = np.random.default_rng(0), 301, 63, 4, 13
    choice, label = rng.integers(E, size=(n, P, 1)), rng.integers(L, size=(n, P))
    row = experts.measure(choice, label)
    bias = (E - 1) * (L - 1) / (2 * n * P * math.log(2))  # that of the plug-in estimate
    for key in ("bits", "permuted_mean"):
        assert row[key] == pytest.approx(bias, rel=0.4) and row[key] < 0.003
    assert row["permuted_mean"] < row["permuted_max"]


def test_labels_are_permuted_between_pictures_since_patches_of_one_are_alike(experts):
    """Color and expert fill whole pictures, independently: no real dependence, few samples."""
    rng, n, P = np.random.default_rng(1), 41, 64
    choice, label = (np.repeat(rng.integers(m, size=(n, 1)), P, axis=1) for m in (4, 8))
    bits = lambda labels: experts.mutual_information(experts.count(choice[..., None], labels))
    row = experts.measure(choice[..., None], label)
    assert row["permuted_max"] > 0.7 * row["bits"] > 0.1
    by_token = bits(rng.permutation(label.ravel()).reshape(n, P))
    assert by_token < 0.1 * row["bits"], "it would call this a strong dependence"


def test_a_permutation_moves_whole_pictures_and_positions_within_each(experts):
    rng, label = np.random.default_rng(2), np.random.default_rng(3).integers(5, size=(9, 7))
    moved = experts.permuted(label, rng)
    assert sorted(moved.tolist()) == sorted(label.tolist()) and (moved != label).any()
    position = np.tile(np.arange(7), (9, 1))
    moved = experts.permuted(position, rng)
    assert (np.sort(moved) == position).all() and len({*map(tuple, moved)}) > 5


# ----------------------------------------------------------------------------- labels and choices


def test_labels_are_true_of_the_drawn_picture(experts):
    some = scenes(60)
    views = experts.labels_of(some)
    word = {view: np.array([*words, ""])[labels] for view, (words, labels) in views.items()}
    color = np.array([world.COLORS[scene.background] for scene in some])
    pixels = np.array([np.asarray(world.draw(scene)) for scene in some])
    tiles = pixels.reshape(-1, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(-1, 64, 64, 3)
    same = (tiles == color[:, None, None]).all(-1).mean(-1)  # share of the pixels of a patch
    pure = {part: same[word["part"] == part].mean() for part in views["part"][0]}
    assert pure["background"] > 0.9 and max(pure[p] for p in ("thing", "word", "bar")) < 0.5
    parts_of = {"things": {"thing"}, "words": {"thing", "word"}, "charts": {"bar"}}
    for i, scene in enumerate(some):
        assert {*word["kind"][i]} == {scene.kind}
        assert {*word["part"][i]} <= parts_of[scene.kind] | {"background", ""}
        for sign in scene.signs:
            (left, top, width, height), word_P = sign.box, word["part"][i] == "word"
            inside = [[left <= x < left + width and top <= y < top + height for x in range(64)]
                      for y in range(64)]  # fmt: skip
            share = np.reshape(inside, (8, 8, 8, 8)).swapaxes(1, 2).reshape(64, 64).mean(-1)
            assert (
                word_P[share > 0.5].all() and not (word["part"][i] == "background")[share > 0].any()
            )
            assert len(scene.signs) > 1 or (word_P == (share > 0.5)).all()
        if scene.chart:
            colors = {world.COLORS[name] for name, _ in scene.chart.bars}
            bar = [tuple(pixel) in colors for pixel in pixels[i].reshape(-1, 3).tolist()]
            share = np.reshape(bar, (8, 8, 8, 8)).swapaxes(1, 2).reshape(64, 64).mean(-1)
            assert ((word["part"][i] == "bar") == (share > 0.5)).all()
            assert ((word["part"][i] == "background") == (share == 0)).all()
        shown = {*word["object"][i]} - {""}
        assert shown == {o.name for o in scene.objects}
        assert ((word["part"][i] == "thing") == (word["object"][i] != "")).all()
        kinds = [world.CATEGORIES.get(name, "") for name in word["object"][i]]
        assert kinds == word["category"][i].tolist()
        for o in scene.objects:
            x, y, size = o.box
            middle = (y + size // 2) // 8 * 8 + (x + size // 2) // 8
            assert word["object"][i, middle] == o.name
        behind = word["part"][i] == "background"
        assert (word["background"][i] == np.where(behind, scene.background, "")).all()
    assert (views["position"][1] == np.arange(64)).all()
    assert {*pictures.CONTENT} == {*views}


def test_choices_are_those_of_the_map_of_one_picture(experts):
    model, drawn = tiny_cumo(experts=4), [world.draw(scene) for scene in scenes(5)]
    found = experts.choices_of(model, drawn, batch=2)
    for i, picture in enumerate(drawn):
        expected, load = plots.routing(model, preprocess(picture, 24))
        assert [*expected] == [*found]
        for block, choice in expected.items():
            assert found[block].shape == (5, 9, 2)
            assert (found[block][i, :, 0] == choice.ravel()).all()
            share = np.bincount(found[block][i].ravel(), minlength=4) / 18
            if block == "connector":  # CLIP's load counts the class token too
                assert share == pytest.approx(load[block])


def test_before_is_upcycled_and_a_model_without_experts_is_refused(experts, tmp_path, monkeypatch):
    dense, names = tiny_cumo(), (tmp_path / "sparse", tmp_path / "dense")
    dense.save_pretrained(names[1])
    upcycle(dense, seed=5).save_pretrained(names[0])
    with pytest.raises(ValueError, match=r"and 9 patches; give a sparse miniature \(64 patches\)"):
        experts.open_models(*names, 5)
    monkeypatch.setattr(experts, "GRID", 3)
    models = experts.open_models(*names, 5)
    for name, tensor in models["after"].state_dict().items():
        assert torch.equal(models["before"].state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="dense has 0 experts in CLIP, 0 in the connector"):
        experts.open_models(names[1], names[1], 5)


def test_a_dense_stage_of_another_training_is_refused(experts, tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "GRID", 3)
    folders = {name: tmp_path / name for name in ("a/stage2", "a/stage3", "b/stage2", "c/stage2")}
    dense, other = tiny_cumo(), tiny_cumo()
    for name, model in (("a/stage2", dense), ("b/stage2", other), ("c/stage2", dense),
                        ("a/stage3", upcycle(dense))):  # fmt: skip
        model.save_pretrained(folders[name])
        config = {"preset": "mini", "clip": "x", "llm": "y" if name[0] != "c" else "z", "init": ""}
        state = {"config": config, "finished": True, "crc32": {"model.safetensors": name[0]}}
        (folders[name] / "train.json").write_text(json.dumps(state))
    experts.open_models(folders["a/stage3"], folders["a/stage2"], 0)
    with pytest.raises(ValueError, match="b/stage2 is of another training: .*whose weights differ"):
        experts.open_models(folders["a/stage3"], folders["b/stage2"], 0)
    with pytest.raises(ValueError, match="c/stage2 is of another training: its llm is z, that of"):
        experts.open_models(folders["a/stage3"], folders["c/stage2"], 0)
    (folders["b/stage2"] / "train.json").unlink()
    experts.open_models(folders["a/stage3"], folders["b/stage2"], 0)  # nothing is known of it


# ----------------------------------------------------------------------------- the picture


def test_the_picture_has_a_bar_for_every_load_and_the_bits_of_every_view(
    experts, monkeypatch, tmp_path
):
    pytest.importorskip("matplotlib")
    some, rng, kept = scenes(9), np.random.default_rng(0), []
    choices = {when: {block: random_choices(rng, 9, 64, 4, 2)
                      for block in ("CLIP layer 0", "connector")}
               for when in ("before", "after")}  # fmt: skip
    views = experts.labels_of(some)
    rows, load = experts.compare(choices, views)
    words, labels = views["background"]
    for block, found in choices["after"].items():
        for k, word in enumerate(words):
            loads = [(found[labels == k] == e).mean() for e in range(4)]
            assert load[block]["background"][word] == pytest.approx(loads, abs=6e-4)
    assert len(rows) == 2 * len(views)
    monkeypatch.setattr(pictures, "save_figure", lambda figure, *_, **__: kept.append(figure))
    pictures.draw_content({"rows": rows, "load": load}, tmp_path / "experts.png")
    axes = kept[0].axes
    plots.pyplot().close("all")
    ticks = [label.get_text() for label in axes[2].get_yticklabels()]
    assert [text for text in ticks if text in pictures.CONTENT.values()] == [
        *pictures.CONTENT.values()
    ]
    for axis, (block, found) in zip(axes[2:], load.items()):
        bars = [shares for view, words in found.items() if view != "position"
                for shares in words.values()]  # fmt: skip
        assert [bar.get_width() for bar in axis.patches] == pytest.approx(sum(bars, []))
        said = [text.get_text() for text in axis.texts]
        for row in rows:
            if row["block"] == block:
                both = [f"{row[when]['bits']:.3f}"[1:] for when in ("before", "after")]
                chance = f"({row['after']['permuted_mean']:.4f})".replace("0.", ".")
                assert " \u2192 ".join(both) in said and chance in said
    assert kept[0].legends[0].get_texts()[-1].get_text() == "expert 3"


@pytest.mark.parametrize("flags, said", [
    (dict(pictures=99), "--pictures 99 must be 100 or more; fewer say nothing"),
    (dict(out="a.txt"), "--out a.txt must end in .json"),
    (dict(out="/no/a.json"), "--out /no/a.png cannot be written; name a file in a folder that "
                             "exists"),
    (dict(before="sparse"), "--before {sparse} is sparse; give the dense stage 2 that --model "
                            "{sparse} started from")])  # fmt: skip
def test_a_measurement_that_says_nothing_is_refused(flags, said, experts, tmp_path, monkeypatch):
    sparse = tmp_path / "sparse"
    tiny_cumo(8).save_pretrained(sparse)
    flags = {"model": str(sparse)} | {
        k: str(sparse) if v == "sparse" else v for k, v in flags.items()
    }
    words = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    monkeypatch.setattr("sys.argv", ["experts.py", *words])
    with pytest.raises(ValueError, match=re.escape(said.format(sparse=sparse))):
        experts.main()
