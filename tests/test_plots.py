"""Expert maps show each patch where it lies, in the color of the expert its router chose first."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from tiny import tiny_cumo

import plots
from cumo import CuMo
from plots import COLORS, draw_experts, expert_map, routing

RGB = np.array([ImageColor.getrgb(color) for color in COLORS])
PLAIN = Image.new("RGB", (48, 48), (200, 90, 30))


@pytest.fixture
def drawn(monkeypatch, tmp_path, capsys):
    """draw_experts -> (its figure, the pixels it wrote)."""
    pytest.importorskip("matplotlib")
    plt = plots.pyplot()
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(picture, choices, load):
        draw_experts(picture, choices, load, tmp_path / "map.png")
        assert capsys.readouterr().out == f"wrote {tmp_path / 'map.png'}\n"
        return plt.gcf(), np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))

    yield draw
    close("all")


def random_choices(names, side, experts):
    rng = np.random.default_rng(0)
    choices = {name: rng.integers(experts, size=(side, side)) for name in names}
    counts = {name: np.bincount(c.ravel(), minlength=experts) for name, c in choices.items()}
    return choices, {name: (n / n.sum()).tolist() for name, n in counts.items()}


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


def test_patches_lie_where_they_are_drawn_top_row_first(drawn):
    choices, load = random_choices(["CLIP layer 0", "connector"], 4, 8)
    figure, pixels = drawn(PLAIN, choices, load)
    for axis, choice in zip(figure.axes[1:], choices.values()):
        numbers = {text.get_position(): int(text.get_text()) for text in axis.texts}
        for (row, column), e in np.ndenumerate(choice):
            assert numbers[column, row] == e
            # beside the number; a figure counts from the bottom, an image's rows from the top
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
    assert labels == [f"expert {e}" for e in range(experts)]


def test_routing_gives_each_patch_the_choice_that_it_gets_alone():
    model = tiny_cumo(experts=4)
    with torch.no_grad():  # patches that see neither each other nor where they are
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


def test_missing_matplotlib_is_told_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plots.pyplot.cache_clear()
    try:
        draw_experts(PLAIN, *random_choices(["connector"], 3, 4), tmp_path / "map.png")
    finally:
        plots.pyplot.cache_clear()
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["no pictures without matplotlib: pip install matplotlib"]
    assert not (tmp_path / "map.png").exists()
