"""Bar charts: the bars in the picture, measured pixel by pixel, are those of the answers."""

import numpy as np
import pytest
from test_world import NUMBERS, scenes, true_answer

from data import charts, world


def measured(scene):
    """[(color, height)] of the bars from left to right, from the picture alone."""
    pixels = np.asarray(world.draw(scene)).astype(int)
    behind, found = np.array(world.COLORS[scene.background]), []
    for color, rgb in world.COLORS.items():
        if color == scene.background:
            continue
        rgb = np.array(rgb)
        full, pale = ((pixels == c).all(-1) for c in (rgb, (rgb + 255) // 2))
        rows, columns = np.nonzero((full | pale)[:61])  # above the axis
        if len(rows) and full.any():
            high, left, wide = 61 - rows.min(), columns.min(), np.ptp(columns) + 1
            if len(rows) == high * wide:  # a full rectangle that stands on the axis
                found.append((left, color, high / 11))
    assert (pixels[0] == behind).all(), "no bar reaches the top"
    return [(color, height) for _, color, height in sorted(found)]


@pytest.mark.parametrize("split", world.SPLITS)
def test_heights_in_the_picture_are_the_heights_of_the_answers(split):
    for scene, rng in scenes(split, 200, "charts"):
        bars = dict(measured(scene))
        assert tuple(bars.items()) == scene.chart.bars
        for kind, ask in charts.ASK.items():
            question, answer = ask(scene, rng) or ("", "")
            if kind == "height":
                (color,) = [color for color in bars if f"the {color} bar" in question]
                assert answer == NUMBERS[int(bars[color])]
            if question:
                assert answer == true_answer(question, scene), question


def test_heights_asked_in_pairs_are_those_that_training_never_showed():
    for scene, rng in scenes("pairs", 100, "charts"):
        question, answer = charts.ask_height(scene, rng)
        (color,) = [color for color, _ in scene.chart.bars if f"the {color} bar" in question]
        assert (color, NUMBERS.index(answer)) in charts.HELD_OUT_BARS


def test_a_tie_has_no_tallest_bar():
    scene = world.Scene("white", (), "noto", chart=charts.Chart((("red", 3), ("blue", 3))))
    rng = np.random.default_rng(0)
    assert not any(charts.ask_tallest(scene, rng) or charts.ask_compare(scene, rng)
                   for _ in range(20))  # fmt: skip


def test_only_the_split_style_has_stripes():
    for split in world.SPLITS:
        for scene, _ in scenes(split, 40, "charts"):
            left, top, width, height = charts.bar_boxes(scene.chart)[0]
            bar = np.asarray(world.draw(scene))[top : top + height, left : left + width]
            assert len(np.unique(bar.reshape(-1, 3), axis=0)) == (2 if split == "style" else 1)
