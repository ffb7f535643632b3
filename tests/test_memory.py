"""Estimates of memory and operations, compared with what autograd keeps and PyTorch counts."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from refused import refusal
from torch.utils.flop_counter import FlopCounterMode

import train
from clip_moe import CLIPVisionConfig
from cumo import IMAGE_TOKEN, CuMo, CuMoConfig
from data.packing import check_positions
from data.weights import write_json
from engine import memory, rate
from llm import LLMConfig

ROOT, GB = Path(__file__).resolve().parents[1], memory.GB


def small(clip_experts=0, mlp_experts=0, llm_experts=0, scales=(1,), **llm):
    vision = CLIPVisionConfig(image_size=32, patch_size=8, dim=96, hidden_dim=256, n_layers=5,
                              n_heads=4, num_experts=clip_experts, scales=scales)  # fmt: skip
    sizes = dict(vocab_size=300, dim=128, hidden_dim=320, n_layers=6, n_heads=4, n_kv_heads=2)
    return CuMoConfig(vision, LLMConfig(**sizes | llm, num_experts=llm_experts), mlp_experts)


def a_batch(model, rows=2, length=96):
    """Rows with two pictures and text each, as training packs them."""
    row = [1, *[IMAGE_TOKEN] * model.image_tokens] * 2
    row += [5] * (length - len(row))
    tokens = torch.tensor([row] * rows)
    size = model.cfg.vision.image_size
    return tokens, torch.randn(2 * rows, 3, size, size), tokens.clamp(min=0)


def kept(model, batch):
    """Bytes that autograd really keeps for the backward pass, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(*batch).loss
    loss.backward()
    return sum(sizes.values())


MODELS = {
    "dense": small(),
    "clip and mlp sparse": small(4, 4),
    "llm sparse too": small(4, 4, 4),
    "two scales": small(4, 4, scales=(1, 2)),
    "wide mlp": small(hidden_dim=1000),
}


def plan_of(model, batch, stage, **choices):
    rows, length = batch[0].shape
    return memory.make_plan(model.cfg, stage, rows * length, row_tokens=length, cpu=True,
                            n_images=len(batch[1]), **choices)  # fmt: skip


@pytest.mark.parametrize("name", [file.stem for file in (ROOT / "bench").glob("mini*.json")])
def test_the_estimate_of_the_demo_on_a_cpu_is_within_a_fifth_of_its_peak(name, tmp_path):
    run = json.loads((ROOT / "bench" / f"{name}.json").read_text())
    for stage, peak in run["peak_memory_gb"].items():
        given = dict(preset="mini", device="cpu", bf16=run["precision"] == "bf16")
        given |= dict(weights="fp32", moments="fp32", out=str(tmp_path))
        plan = train.stage_plan(train.resolve(given, int(stage)))
        needs = sum(memory.estimate(plan).values()) / memory.GB
        assert needs == pytest.approx(peak, rel=0.2), f"stage {stage}"


PRECISIONS = {"float32": ("fp32", False), "autocast": ("fp32", True), "bf16": ("bf16-sr", True)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_what_autograd_keeps(name, precision):
    torch.manual_seed(0)
    weights, bf16 = PRECISIONS[precision]
    model = CuMo(MODELS[name]).train().to(memory.WEIGHTS[weights])
    batch = a_batch(model)
    plan = plan_of(model, batch, 3, weights=weights, bf16=bf16)
    with torch.autocast("cpu", torch.bfloat16, precision == "autocast"):
        really = kept(model, batch)
    assert sum(memory.kept(plan)) == pytest.approx(really, rel=0.2)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_stage_1_keeps_nothing_of_clip(bf16):
    model = CuMo(small()).train().requires_grad_(False)
    model.connector.requires_grad_(True)
    batch = a_batch(model)
    with torch.autocast("cpu", torch.bfloat16, bf16):
        really = kept(model, batch)
    assert sum(memory.kept(plan_of(model, batch, 1, bf16=bf16))) == pytest.approx(really, rel=0.25)


def test_each_recomputed_layer_keeps_less():
    plan = memory.make_plan(small(4, 4), 3, 192, bf16=False)
    sizes = [sum(memory.kept(replace(plan, recompute=n))) for n in range(4 + 6 + 1)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.4 * sizes[0]


def on_the_card(stage, rows, row_tokens, images, recompute, **choices):
    """A plan of CuMo-7B, as in bench/mock_card.json."""
    plan = cumo_7b(stage, tokens=rows * row_tokens, row_tokens=row_tokens, n_images=images)
    layers = sum(memory.recomputed(plan.model, recompute))
    return replace(plan, recompute=layers, **choices)


MOCK = json.loads((ROOT / "bench" / "mock_card.json").read_text())


@pytest.mark.parametrize("row", MOCK["rows"], ids=lambda row: f"{row['weights']} {row['stage']}")
def test_estimates_are_at_most_5_percent_above_the_allocator_of_a_card(row):
    row = dict(row)
    reserved = row.pop("reserved") * GB
    assert reserved <= memory.total(on_the_card(**row)) <= 1.05 * reserved


def test_a_layer_keeps_what_the_allocator_of_a_card_says():
    plan, layers = on_the_card(3, 1, 4096, 7, "none", weights="bf16-sr"), MOCK["layers"]
    for name, size in (("clip", memory.clip_bytes(plan)), ("llm", memory.llm_bytes(plan))):
        assert size * layers[f"{name}_tokens"] / 2**20 == pytest.approx(layers[name], rel=0.02)


def test_as_few_layers_are_recomputed_as_the_memory_needs():
    plan = cumo_7b(3)
    best = memory.first_that_fits(plan, 78 * GB)
    clip, llm = memory.recomputed(plan.model, best.recompute)
    assert (best.weights, clip) == ("bf16-sr", 23) and 0 < llm < 32
    one_less = replace(best, recompute=best.recompute - 1)
    assert memory.total(best) <= memory.FREE * 78 * GB < memory.total(one_less)
    fast = memory.first_that_fits(plan, 139 * GB, weights="bf16-sr", moments="bf16")
    assert fast.recompute == 0


@pytest.mark.parametrize("choice, clip, llm", [
    ("none", 0, 0), ("auto", 0, 0), ("3", 3, 0), (30, 23, 7), ("all", 23, 32)])  # fmt: skip
def test_layers_of_clip_are_recomputed_first(choice, clip, llm):
    assert memory.recomputed(cumo_7b(3).model, choice) == (clip, llm)


@pytest.mark.parametrize("value, said", [
    ("12", "--recompute 12: the model has 10 layers to recompute, 5 of CLIP and 5 of the language "
           "model; give at most 10, or all"),
    ("some", "--recompute 'some' is unknown; give a number of layers, or all, none or auto (as few "
             "as the memory needs)"),
    ("-1", "--recompute '-1' is unknown; give a number of layers, or all, none or auto (as few as "
           "the memory needs)")])  # fmt: skip
def test_an_impossible_recompute_is_refused(value, said, tmp_path, monkeypatch, capsys):
    flags = ["--stage", "1", "--out", tmp_path / "out", f"--recompute={value}"]
    assert refusal(train.main, flags, monkeypatch, capsys) == f"error: {said}"
    assert not (tmp_path / "out").exists()


def test_memory_that_others_use_on_the_card_is_not_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GB)
    assert memory.available_memory("cuda") == 34 * GB


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", (1, 3))
def test_operations_are_those_that_pytorch_counts(name, stage):
    model = CuMo(MODELS[name]).train()
    model.requires_grad_(stage > 1)
    model.connector.requires_grad_(True)
    tokens, images, labels = a_batch(model)
    # PyTorch does not count grouped products: 2 N D F for [N, D] times [E, D, F]
    grouped = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        model(tokens, images, labels).loss.backward()
    per_token, per_image = rate.operations(model.cfg, stage, tokens.shape[1])
    work = tokens.numel() * per_token + len(images) * per_image
    # ours leaves out masked scores (half of a causal row), biases and the patch embedding
    assert work == pytest.approx(counter.get_total_flops(), rel=0.12)


def cumo_7b(stage, **choices):
    cfg = train.resolve(dict(preset="mistral-7b", bf16=True, estimate=True), stage)
    return replace(train.stage_plan(cfg), **choices)


def test_cumo_7b_takes_8_or_12_bytes_a_parameter():
    plan = cumo_7b(3, weights="bf16-sr", moments="bf16")
    assert plan.parameters == plan.learning == 8_250_388_480
    sizes = memory.estimate(plan)
    fixed = sum(sizes.values()) - sizes["activations"]
    assert fixed == 8 * plan.parameters and 61 < fixed / GB < 62
    sizes = memory.estimate(replace(plan, weights="bf16-master"))
    assert sum(sizes.values()) - sizes["activations"] == 12 * plan.parameters


def test_stages_of_another_model_do_not_enter_the_estimate(tmp_path):
    expected = cumo_7b(3)
    other = train.resolve({"out": str(tmp_path)}, 2)
    config = CuMo(small()).cfg.to_original()
    write_json(tmp_path / "stage2" / "config.json", config)
    write_json(tmp_path / "stage2" / "train.json", {"finished": True, "config": asdict(other)})
    found = train.stage_plan(train.resolve(dict(preset="mistral-7b", out=str(tmp_path)), 3))
    assert found.parameters == expected.parameters
    mini = train.stage_plan(train.resolve({"out": str(tmp_path)}, 3))
    assert mini.parameters == memory.make_plan(small(4, 4), 3, 1).parameters


@pytest.mark.parametrize("flags", [["--stage", "1"], ["--stage", "1", "--estimate"]])
def test_a_row_longer_than_the_models_positions_is_refused(tmp_path, flags, monkeypatch, capsys):
    flags += ["--out", tmp_path / "out", "--row-tokens", 2049]  # the miniature has 2,048
    assert refusal(train.main, flags, monkeypatch, capsys) == (
        "error: --row-tokens 2049 is longer than the 2048 positions of the language model; take "
        "2048 or less"
    )
    assert not (tmp_path / "out").exists()
    check_positions(2048, 2048)
    check_positions(9999, 2048, window=64)


def test_stage_1_trains_the_connector_alone():
    plan = cumo_7b(1)
    assert plan.learning == 2 * 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert memory.estimate(plan)["optimizer"] == 8 * plan.learning


def test_more_memory_buys_more_exact_training():
    plan = cumo_7b(3)
    chosen = [memory.first_that_fits(plan, gb * GB) for gb in (80, 141, 400, 4000)]
    assert [(p.weights, p.moments) for p in chosen][1:] == [
        ("bf16-master", "fp32"), ("fp32", "fp32"), ("fp32", "fp32")]  # fmt: skip
    assert chosen[0].weights == "bf16-sr" and not chosen[3].recompute
    for gb, best in zip((141, 400, 4000), chosen[1:]):
        assert memory.total(best) <= memory.FREE * gb * GB


def test_what_the_flags_say_stays():
    best = memory.first_that_fits(cumo_7b(3), 24 * GB, weights="bf16-master", recompute=0)
    assert best.weights == "bf16-master" and best.recompute == 0 and best.moments == "bf16"


def test_estimate_prints_a_line_for_each_card(monkeypatch, capsys):
    flags = "--preset mistral-7b --stage 3 --estimate"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["24", "48", "80", "141", "faster"]
    assert "too small" in lines[1] and "--weights bf16-master" in lines[4]
    assert "--weights bf16-sr --moments bf16 --recompute none" in lines[5]


def wrapped(kind):
    """An out-of-memory error as it arrives: bare, from the compiler, or with a cause."""
    error = torch.OutOfMemoryError("CUDA out of memory")
    if kind == "compiler":

        def backend(graph, inputs):
            raise error

        with pytest.raises(RuntimeError) as caught:
            torch.compile(torch.sin, backend=backend)(torch.ones(2))
        return caught.value
    if kind == "cause":
        other = RuntimeError("a product failed")
        other.__cause__ = error
        return other
    return error if kind == "bare" else RuntimeError("can't allocate memory: 9 bytes")


@pytest.mark.parametrize("kind", ("bare", "compiler", "cause", "cpu"))
def test_out_of_memory_names_the_flags_that_help(kind, monkeypatch, tmp_path):
    def full(self, wandb):
        raise wrapped(kind)

    monkeypatch.setattr(train.Trainer, "loop", full)
    cfg = train.resolve(dict(out=str(tmp_path), rows=64), 3)
    cfg.init = ""
    cfg.stage = 1
    with pytest.raises(ValueError, match=r"out of memory on cpu.*--rows.* saves \d"):
        train.train_stage(cfg)
