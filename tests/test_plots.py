"""Expert maps show each patch at its place, in the color of the expert its router chose first."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from tiny import ROOT, tiny_cumo

from cumo import CuMo
from data import world
from data.exam import SPLITS
from extras import plots
from extras.plots import COLORS, draw_experts, expert_map, routing
from runs import pictures, results

RGB = np.array([ImageColor.getrgb(color) for color in COLORS])
PLAIN = Image.new("RGB", (48, 48), (200, 90, 30))


@pytest.fixture
def drawn(monkeypatch, tmp_path, capsys):
    """draw_experts -> (its figure, the pixels it wrote)."""
    pytest.importorskip("matplotlib")
    plt = plots.pyplot()
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(picture, choices, load, **how):
        draw_experts(picture, choices, load, tmp_path / "map.png", **how)
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", f"wrote {tmp_path / 'map.png'}\n")
        return plt.gcf(), np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))

    yield draw
    close("all")


def random_choices(names, side, experts):
    rng = np.random.default_rng(0)
    choices = {name: rng.integers(experts, size=(side, side)) for name in names}
    counts = {name: np.bincount(c.ravel(), minlength=experts) for name, c in choices.items()}
    return choices, {name: (n / n.sum()).tolist() for name, n in counts.items()}


@pytest.mark.parametrize("names", [["connector"], [f"CLIP layer {k}" for k in range(6)]])
def test_a_map_for_a_phone_is_as_wide_as_the_phone_and_all_of_it_is_inside(drawn, names):
    _, pixels = drawn(PLAIN, *random_choices(names, 8, 4), width=3.9)
    assert abs(pixels.shape[1] - 3.9 * 140) <= 1 and pixels.shape[0] > pixels.shape[1] / 2
    edges = pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]
    assert all((edge == 255).all() for edge in edges), "nothing is cut off"


@pytest.mark.parametrize("side", [3, 5, 16])  # 48 pixels are not divisible by 5
def test_every_pixel_has_the_color_of_its_patchs_expert(side):
    choice = np.random.default_rng(1).integers(8, size=(side, side))
    colors = expert_map(PLAIN, choice) * 255
    for y in range(48):
        for x in range(48):
            assert np.allclose(colors[y, x], RGB[choice[y * side // 48, x * side // 48]])


def test_outlines_of_the_picture_show_on_every_color_and_leave_the_rest_pure():
    picture = PLAIN.copy()
    picture.paste((30, 90, 200), (0, 0, 24, 48))  # an edge down the middle
    for e in range(8):
        change = np.abs(expert_map(picture, np.full((4, 4), e)) * 255 - RGB[e]).max(-1)
        columns = np.flatnonzero(change.max(0))
        assert columns.tolist() == [23] and change[:, 23].min() > 60, COLORS[e]


def test_patches_are_drawn_at_their_places_top_row_first(drawn):
    choices, load = random_choices(["CLIP layer 0", "connector"], 4, 8)
    figure, pixels = drawn(PLAIN, choices, load)
    for axis, choice in zip(figure.axes[1:], choices.values()):
        numbers = {text.get_position(): int(text.get_text()) for text in axis.texts}
        for (row, column), e in np.ndenumerate(choice):
            assert numbers[column, row] == e
            # next to the number; a figure counts from the bottom, an image's rows from the top
            at = axis.transData.transform((column + 0.3, row + 0.3))
            x, y = figure.transFigure.inverted().transform(at)
            height, width, _ = pixels.shape
            assert np.abs(pixels[int((1 - y) * height), int(x * width)] - RGB[e]).max() < 2


def test_bars_are_the_load_and_sum_to_one(drawn):
    choices, load = random_choices([f"CLIP layer {i}" for i in range(3)], 6, 4)
    figure, _ = drawn(PLAIN, choices, load)
    for axis, shares in zip(figure.axes[1:], load.values()):
        widths = [bar.get_width() for bar in axis.child_axes[0].patches]
        assert widths == pytest.approx(shares) and sum(widths) == pytest.approx(1)
        assert axis.child_axes[0].get_xlim()[1] >= max(widths)


@pytest.mark.parametrize("blocks, experts", [(1, 8), (6, 4), (24, 8)])
def test_every_block_has_a_map_and_every_expert_a_place_in_the_legend(drawn, blocks, experts):
    choices, load = random_choices([f"block {i}" for i in range(blocks)], 24, experts)
    figure, _ = drawn(PLAIN, choices, load)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["the picture", *choices]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [*(f"expert {e}" for e in range(experts)), "an even share"]
    bars = [axis.child_axes[0] for axis in figure.axes if axis.child_axes]
    texts = [*figure.legends[0].get_texts(), *(text for bar in bars for text in bar.texts)]
    figure.canvas.draw()  # saving was at another resolution
    boxes = [text.get_window_extent() for text in texts]
    assert 0 <= min(box.x0 for box in boxes) and max(box.x1 for box in boxes) <= figure.bbox.x1


def test_routing_gives_each_patch_the_choice_that_it_gets_alone():
    model = tiny_cumo(experts=4)
    with torch.no_grad():  # without attention and positions, each patch is on its own
        model.vision.embeddings.position_embedding.weight.zero_()
        for layer in model.vision.layers:
            layer.self_attn.out_proj.weight.zero_()
    torch.manual_seed(0)
    pixels = torch.randn(3, 24, 24)
    choices, load = routing(model, pixels)
    assert list(choices) == list(load) == ["CLIP layer 0", "CLIP layer 1", "connector"]
    assert any((c != c.T).any() for c in choices.values()), "orientation shows"
    for row, column in np.ndindex(3, 3):
        patch = pixels[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        alone, _ = routing(model, patch.repeat(1, 3, 3))
        for name, choice in choices.items():
            assert (alone[name] == choice[row, column]).all(), (name, row, column)


def test_routing_is_the_likeliest_expert_of_every_router():
    model, pixels, seen = tiny_cumo(experts=4), torch.randn(3, 24, 24), []
    for block in (model.vision.layers[0], model.vision.layers[1], model.connector):
        block.moe.gate.register_forward_pre_hook(lambda gate, x: seen.append(x[0] @ gate.weight.T))
    for choice, logits in zip(routing(model, pixels)[0].values(), seen):
        patches = logits[0, -9:]  # in CLIP the class token comes first
        assert choice.ravel().tolist() == patches.argmax(-1).tolist()
    assert len(seen) == 3


def test_routings_load_counts_every_choice():
    model, pixels = tiny_cumo(experts=4), torch.randn(3, 24, 24)
    _, load = routing(model, pixels)
    _, aux = model.encode_images(pixels[None], with_aux=True)
    counted = aux["mlp"].choice.flatten().bincount(minlength=4) / (9 * 2)
    assert load["connector"] == pytest.approx(counted.tolist())
    assert all(sum(shares) == pytest.approx(1) for shares in load.values())


def test_at_several_scales_the_clip_maps_show_the_whole_image():
    pixels = torch.randn(3, 24, 24)
    one, _ = routing(tiny_cumo(experts=4), pixels)
    two, load = routing(tiny_cumo(experts=4, scales=(1, 3)), pixels)
    assert all((one[name] == two[name]).all() for name in ("CLIP layer 0", "CLIP layer 1"))
    assert two["connector"].shape == (3, 3)
    assert all(sum(shares) == pytest.approx(1) for shares in load.values())


def test_routing_knows_only_the_sparse_parts():
    cfg, pixels = tiny_cumo(experts=4).cfg, torch.randn(3, 24, 24)
    clip = CuMo(replace(cfg, mlp_experts=0))
    connector = CuMo(replace(cfg, vision=replace(cfg.vision, num_experts=0)))
    assert list(routing(clip, pixels)[0]) == ["CLIP layer 0", "CLIP layer 1"]
    assert list(routing(connector, pixels)[0]) == ["connector"]
    assert routing(tiny_cumo(), pixels) == ({}, {})


def test_missing_matplotlib_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plots.pyplot.cache_clear()
    try:
        draw_experts(PLAIN, *random_choices(["connector"], 3, 4), tmp_path / "map.png")
    finally:
        plots.pyplot.cache_clear()
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["no pictures without matplotlib: pip install matplotlib"]
    assert not (tmp_path / "map.png").exists()


def test_bars_have_a_scale_on_which_the_even_share_is_marked(drawn):
    choices, load = random_choices(["CLIP layer 0", "connector"], 6, 4)
    figure, _ = drawn(PLAIN, choices, load)
    for axis, shares in zip(figure.axes[1:], load.values()):
        (bars,) = axis.child_axes
        assert [text.get_text() for text in bars.get_xticklabels()] == ["25 %"]
        assert {*bars.get_xticks()} == {0.25} == {*bars.lines[0].get_xdata()}
        assert bars.get_xlim()[0] == 0
        assert [text.get_text() for text in bars.texts] == [f"{share:.0%}" for share in shares]


def test_note_on_scales_is_drawn_only_for_several(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plt, notes = plots.pyplot(), []
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, *_, **__: notes.append(figure._supxlabel)
    )
    for scales in ((1,), (1, 3)):
        plots.draw_routing(tiny_cumo(experts=4, scales=scales), PLAIN, tmp_path / "map.png")
    one, two = (text.get_text() for text in notes)
    plt.close("all")
    assert two.startswith(one) and "scales" in two and "scale" not in one


def test_running_mean_keeps_a_constant_and_is_the_mean_of_the_neighbours():
    assert plots.running_mean([3.0] * 50) == pytest.approx(3)
    assert plots.running_mean([5.0]) == pytest.approx([5])
    values = np.random.default_rng(0).normal(size=60)  # a window of 7
    expected = [values[max(0, i - 3) : i + 4].mean() for i in range(60)]
    assert plots.running_mean(values) == pytest.approx(expected)


def test_losses_of_every_stage_are_drawn_and_balance_with_its_line_at_1(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    dense = [{"samples": 8 * k, "lm_loss": 5 / k} for k in range(1, 41)]
    sparse = [row | {"clip_balance": 1.2, "mlp_balance": 1.1, "clip_z": 2.0} for row in dense]
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, file: kept.append(figure))
    plots.draw_losses({1: dense, 3: sparse}, tmp_path / "loss.png")
    axes = {axis.get_title(): axis for axis in kept[0].axes if axis.get_title()}
    plots.pyplot().close("all")
    assert list(axes) == ["stage 1: connector pre-training", "stage 3: instruction tuning",
                          "stage 3: balance loss", "stage 3: router z-loss"]  # fmt: skip
    assert all(axis.get_xlabel() == "samples" and axis.get_ylabel() for axis in axes.values())
    raw, mean = axes["stage 1: connector pre-training"].lines
    assert raw.get_ydata().tolist() == [row["lm_loss"] for row in dense]
    assert mean.get_linewidth() > 2 * raw.get_linewidth()
    legend = axes["stage 3: balance loss"].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["CLIP-MoE", "MLP-MoE", "1: even"]
    assert set(axes["stage 3: balance loss"].lines[-1].get_ydata()) == {1}


def test_examples_show_every_split_and_kind_and_give_away_no_answer():
    seen = []

    def ask(questions, pictures):
        seen.extend(zip(questions, pictures))
        return ["?"] * len(questions)

    cells = plots.example_answers(ask)
    kinds = [(kind, split) for split in SPLITS for kind in world.KINDS]
    assert [title for title, *_ in cells] == [", ".join(pair) for pair in kinds]
    for (kind, _), (_, picture, asked) in zip(kinds, cells, strict=True):
        assert picture.size == (256, 256) and 2 < len(asked) <= 4
        assert kind != "words" or any("sign" in question for question, *_ in asked)
        assert len({question for question, *_ in asked}) == len(asked)
    assert [question for question, _ in seen] == [q for *_, asked in cells for q, *_ in asked]
    assert {picture.size for _, picture in seen} == {(64, 64)}, "as the model sees them"


def test_an_answer_is_marked_right_or_wrong_and_no_two_lines_overlap(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, file: kept.append(figure))
    asked = [("Is it?", "no", "no"), ("List all.", "a dog " * 9, "a cat " * 9), ("Why?", "1", "2")]
    plots.draw_answers([("new", PLAIN, asked)], tmp_path / "answers.png")
    figure = kept[0]
    texts = [text for text in figure.texts if text.get_position()[0] < 0.4]
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in texts]
    plots.pyplot().close("all")
    assert all(above.y0 > below.y1 - 1 for above, below in zip(boxes, boxes[1:]))
    written = " ".join(text.get_text() for text in texts)
    assert "\u2713 no" in written and "\u2717 2 (truth: 1)" in written


def test_a_section_measured_again_keeps_the_conditions_of_the_others(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # speed.py replaces the first entry
    from bench import speed

    here = {"machine": "m", "precision": "p", "commit": "old"}
    content = speed.replace_section({}, "moe", [{"section": "moe", "case": 1}], here)
    content = speed.replace_section(content, "llm", [{"section": "llm", "case": 2}], here)
    again = speed.replace_section(
        content, "llm", [{"section": "llm", "case": 3}], here | {"commit": "new"}
    )
    assert again["sections"] == {"moe": {"commit": "old"}, "llm": {"commit": "new"}}
    assert [row["case"] for row in again["rows"]] == [1, 3] and again["machine"] == "m"


def test_the_table_and_the_picture_of_ratios_have_the_same_rows(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    run = json.loads((ROOT / "bench" / "amd-epyc-bfloat16.json").read_text())
    kept = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, file: kept.append(figure))
    pictures.draw_ratios(run, tmp_path / "ratios.png")
    (axis,) = kept[0].axes
    names = [text.get_text().replace("\n", " ") for text in axis.get_yticklabels()]
    plots.pyplot().close("all")
    table = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in results.performance_block().splitlines()[2:] if "|" in line]  # fmt: skip
    assert len(names) == len(table) and "decode: first token, int8" in names
    for y, (name, (section, case, ours, others)) in enumerate(zip(names, table)):
        what = f"{section}: {case}"
        assert name.startswith(what) and ours.endswith(name.removeprefix(what))
        dots = [line.get_xdata() for line in axis.lines if [*line.get_ydata()] == [y]]
        ratios = re.findall(r" (\d+\.\d\d)(?:,|$)", others)
        assert sorted(ratios) == sorted(f"{x:.2f}" for (x,) in dots)


def test_every_peer_has_a_color_and_a_marker_of_its_own(monkeypatch, tmp_path):
    colors, markers, labels = zip(*pictures.PEERS.values())
    assert len({*colors}) == len({*markers}) == len({*labels}) == len(labels)
    names = ["transformers", "llama.cpp Q8_0", "loop", "dense, same work", "ours, eager", "full"]
    assert [pictures.peer(name)[1] for name in names] == ["s", "^", "D", "v", "o", "o"]
    assert not pictures.shown([{"section": "start", "case": "x", "ratios": {"ours": 1}}])
    alone = {"section": "llm", "case": "one", "ratios": {"ours": 1}}
    beside = {"section": "llm", "case": "two", "ratios": {"ours": 1, "transformers": 2}}
    assert pictures.shown([alone, beside]) == [beside], "the other has no peer"


@pytest.mark.parametrize("steps", [1, 2, 60])
def test_a_single_step_is_drawn_as_a_point(steps, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    rows = [{"samples": 8 * k, "lm_loss": 2.0 + k} for k in range(1, steps + 1)]
    rows[-1]["val_loss"] = 1.5
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plots.draw_losses({3: rows}, tmp_path / "loss.png")
    (axis, *_) = [axis for axis in plt.gcf().axes if axis.lines]
    _, thick, _, held = axis.lines
    assert thick.get_marker() == ("o" if steps < 20 else "None") and held.get_marker() == "o"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["training", "held out"]
