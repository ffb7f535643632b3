"""The original's own outputs on tiny random weights, reproduced: forward, losses, gradients."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clip_moe import CLIPVision, CLIPVisionConfig
from cumo import IGNORE, IMAGE_TOKEN, CuMo, CuMoConfig
from data.packing import assemble
from data.weights import load_into, read_tensors
from llm import LLMConfig
from mlp_moe import Connector
from upcycle import upcycle

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("CUMO_GOLDEN", ROOT.parent / "shared" / "golden"))
REASON = f"no golden data in {GOLDEN}; set CUMO_GOLDEN"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=REASON)


def golden(name):
    info = json.loads((GOLDEN / f"{name}.json").read_text())
    return load_file(GOLDEN / f"{name}.safetensors"), info


def part(data, prefix):
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def gradients(module):
    """The gradients under public names; zero where the original's would be None."""
    twin = copy.deepcopy(module)
    for p, q in zip(twin.parameters(), module.parameters()):
        p.data = torch.zeros_like(q) if q.grad is None else q.grad
    return twin.public_state_dict()


def assert_close(actual, expected, relative, floor=0.0, name=""):
    error, scale = (actual - expected).abs().max(), expected.abs().max()
    assert error <= max(relative * scale, floor), f"{name}: off by {error:.1e} of {scale:.1e}"


def assert_gradients(module, grad_input, grads):
    expected = grads.pop("input" if "input" in grads else "pixel_values")
    assert_close(grad_input, expected, 1e-3, 5e-5, "input")
    ours = gradients(module)
    for name, grad in grads.items():
        assert_close(ours.pop(name), grad, 1e-3, 5e-5, name)
    assert not any(grad.any() for grad in ours.values()), f"{list(ours)} have no gradient there"


@pytest.mark.parametrize("name", ["mlp2x_gelu", "mlp_moe"])
def test_connector_reproduces_the_original(name):
    data, info = golden(name)
    x = data["input"].requires_grad_()
    connector = Connector(
        x.shape[-1],
        data["output"].shape[-1],
        info.get("num_experts", 0),
        info.get("num_selected", 2),
    )
    connector.load_original(part(data, "weights."))
    y, aux = connector(x)
    loss = y.square().sum()
    if aux:
        assert torch.equal(aux.choice, data["router.selected_experts"])
        assert_close(aux.balance, data["balance_loss"], 1e-5)
        assert_close(aux.z, data["z_loss"], 1e-5)
        counts = torch.tensor(info["tokens_per_expert_per_sample"]).sum(0)
        torch.testing.assert_close(aux.load, counts / counts.sum())
        loss = loss + 0.1 * aux.balance + 0.01 * aux.z
    loss.backward()
    assert_close(y, data["output"], 2e-5)
    assert_close(loss, data["loss"], 1e-5)
    assert_gradients(connector, x.grad, part(data, "grad."))


@pytest.mark.parametrize("name", ["clip_dense_s1", "clip_dense_s13", "clip_moe_s1", "clip_moe_s13"])
def test_clip_reproduces_the_original(name):
    data, info = golden(name)
    sparse = info["clip_smoe"]
    cfg = CLIPVisionConfig.from_hf(
        info["clip_config"]
        | {
            "scales": info["scales"],
            "num_experts": info["num_experts"] if sparse else 0,
            "num_selected": info["num_selected"] if sparse else 2,
        }
    )
    vision = CLIPVision(cfg)
    vision.load_original(part(data, "weights."))
    vision.parity = True
    images = data["pixel_values"].requires_grad_()
    features, aux = vision(images)
    loss = features.square().sum()
    if sparse:
        assert_close(aux.balance, data["balance_loss"], 1e-5)
        assert_close(aux.z, data["z_loss"], 1e-5)
        loss = loss + 0.1 * aux.balance + 0.01 * aux.z
    loss.backward()
    assert_close(features, data["features"], 2e-5)
    assert_close(loss, data["loss"], 1e-5)
    assert_gradients(vision, images.grad, part(data, "grad."))
    # without the last layer, which no feature needs, the losses are the other layers' means
    vision.parity = False
    features, aux = vision(images)
    assert_close(features, data["features"], 2e-5)
    if sparse:
        assert_close(aux.balance, data["per_layer_balance_loss"][:, :-1].mean(), 1e-5)
        assert_close(aux.z, data["per_layer_z_loss"][:, :-1].mean(), 1e-5)
    hidden = data.get("scale1_hidden_with_cls")
    if hidden is not None:
        assert_close(vision.hidden(images)[0], hidden, 2e-5)


# ------------------------------------------------------------------------------- the whole model

WHOLE = ("cumo_mistral_dense", "cumo_mistral_moe", "cumo_mixtral_moe")


def whole(name):
    """(our model with the golden weights, golden tensors, golden json)."""
    about = json.loads((GOLDEN / f"{name}_io.json").read_text())
    vision = CLIPVisionConfig.from_hf(about["clip_config"])
    vision.scales = tuple(about["scales"])
    vision.num_experts = about["num_experts"] if about["clip_smoe"] else 0
    llm = LLMConfig.from_hf(about["llm_config"] | {"model_type": about["kind"]})
    experts = about["num_experts"] if about["mlp_smoe"] else 0
    model = CuMo(CuMoConfig(vision, llm, mlp_experts=experts))
    load_into(model.public_state_dict(), read_tensors(GOLDEN / f"{name}_weights.safetensors"))
    model.parity = True
    return model, load_file(GOLDEN / f"{name}_io.safetensors"), about


def spliced(model, gold, case):
    """The golden batch (one -200 an image, right-padded) as ours: runs of IMAGE_TOKENs."""
    rows = []
    for ids, labels, mask in zip(
        *(gold[f"{case}.{k}"].tolist() for k in ("input_ids", "labels", "attention_mask"))
    ):
        row = [(i, label) for i, label, real in zip(ids, labels, mask) if real]
        row = [
            [(i, IGNORE)] * model.image_tokens if i == IMAGE_TOKEN else [(i, label)]
            for i, label in row
        ]
        ids, labels = zip(*(pair for run in row for pair in run))
        rows.append([(list(ids), list(labels), [])])
    return assemble(rows, gold[f"{case}.spliced_labels"].shape[1])


@pytest.mark.parametrize("name", WHOLE)
def test_whole_model_matches_the_original(name):
    model, gold, about = whole(name)
    batch = spliced(model, gold, "pair")
    model.train()
    out = model(batch["tokens"], gold["pair.images"], batch["labels"], batch["segments"])
    assert_close(out.lm_loss, gold["pair.lm_loss"], 1e-5, name="lm_loss")
    for kind in ("clip", "mlp"):
        if out.aux[kind]:
            assert_close(out.aux[kind][0], gold[f"pair.{kind}_balance_loss"], 1e-5, name=kind)
            assert_close(out.aux[kind][1], gold[f"pair.{kind}_z_loss"], 1e-5, name=kind)
    real = batch["segments"] > 0
    if about["kind"] == "mistral":  # Mixtral counts padding; test_llm.py has its losses
        assert_close(out.loss, gold["pair.total_loss"], 1e-5, name="loss")
        out.loss.backward()
        ours = gradients(model)
        for key, grad in part(gold, "pair.grad.").items():
            assert_close(ours[key], grad, 1e-3, 5e-5, key)
    with torch.no_grad():
        logits = model.eval()(
            batch["tokens"], gold["pair.images"], segments=batch["segments"]
        ).logits
    assert_close(logits[real], gold["pair.logits"][real], 2e-5, name="logits")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("case", ["gen0", "gen1"])
def test_greedy_tokens_match_the_original(name, case):
    model, gold, _ = whole(name)
    ids = gold[f"{case}.input_ids"][0].tolist()
    ids = [t for i in ids for t in ([i] * model.image_tokens if i == IMAGE_TOKEN else [i])]
    new = model.eval().generate(torch.tensor([ids]), gold[f"{case}.images"], max_new_tokens=8)
    assert new[0].tolist() == gold[f"{case}.output_ids"][0, 1:].tolist()


def test_upcycled_weights_match_the_original():
    before, after = (
        load_file(GOLDEN / f"upcycle_mistral_{w}.safetensors") for w in ("before", "after")
    )
    about = json.loads((GOLDEN / "upcycle_mistral_after.json").read_text())
    vision = CLIPVisionConfig.from_hf(about["clip_config"])
    vision.scales = tuple(about["scales"])
    dense = CuMo(
        CuMoConfig(vision, LLMConfig.from_hf(about["llm_config"] | {"model_type": "mistral"}))
    )
    load_into(dense.public_state_dict(), before)
    sparse = upcycle(
        dense, ("clip", "mlp"), about["num_experts"], about["num_selected"]
    ).public_state_dict()
    assert sparse.keys() == after.keys()
    for name, tensor in sparse.items():
        if name.endswith("gate.weight"):  # fresh in both; nn.Linear's range
            assert tensor.shape == after[name].shape
            assert 0.8 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1
        else:
            assert torch.equal(tensor, after[name]), name
