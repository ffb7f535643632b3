"""Numbers that go wrong, and batches at the edge: stopped and named, or the right result."""

import json

import pytest
import torch
from tiny import question, tiny_cumo

import train
from cumo import IGNORE
from mlp_moe import Router, SparseMoE

STAGES = {"dense": 2, "sparse": 3}


@pytest.fixture(scope="module")
def first_stages(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for stage in (1, 2):
        cfg = train.resolve(weights | dict(out=str(out), samples=8), stage)
        assert train.train_stage(cfg)
    return out


def trainer_of(weights, first_stages, out, stage, **options):
    init = first_stages / f"stage{stage - 1}"
    cfg = train.resolve(weights | dict(out=str(out), init=str(init)) | options, stage)
    train.choose_precision(cfg)
    trainer = train.Trainer(cfg)
    trainer.model.train()
    return trainer


# ------------------------------------------------------------------------- NaN and infinity


def spoil_pixels(trainer, batch, value):
    batch["images"][-1][0, 3, 3] = value


def spoil_router(trainer, batch, value):
    trainer.model.connector.moe.gate.weight.data[1, 2] = value


def spoil_weight(trainer, batch, value):
    trainer.model.llm.model.layers[0].self_attn.q_proj.weight.data[0, 0] = value


def spoil_gradient(trainer, batch, value):
    trainer.model.connector.moe.gate.weight.register_hook(lambda grad: grad * value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("spoil", [spoil_pixels, spoil_router, spoil_weight, spoil_gradient])
def test_a_number_that_is_none_stops_with_the_samples_of_its_batch(
    spoil, value, weights, first_stages, tmp_path
):
    trainer = trainer_of(weights, first_stages, tmp_path, 3)
    batch = next(trainer.batches())
    spoil(trainer, batch, value)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError) as caught:
        trainer.train_step([batch])
    names = ", ".join(trainer.data.name(i) for i in trainer.order[: batch["samples"]].tolist())
    message = str(caught.value)
    assert f"not finite in the step of samples {names}; correct" in message and "\n" not in message
    assert trainer.step == 0  # and no weight has taken the step
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name


# ------------------------------------------------------------------------- batches at the edge


def test_all_tokens_of_one_expert_are_computed_by_it_alone():
    torch.manual_seed(0)
    moe = SparseMoE(8, 12, num_experts=4, top_k=1)
    moe.gate.weight.data.zero_()
    moe.gate.weight.data[2] = 1
    x = torch.rand(2, 5, 8)
    y, aux = moe(x)
    alone = SparseMoE(8, 12, num_experts=1, top_k=1)
    for p, q in zip(alone.experts.parameters(), moe.experts.parameters()):
        p.data = q.data[2:3].clone()
    assert aux.load.tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(y, alone(x)[0])


@pytest.mark.parametrize("experts", [0, 4])
def test_one_token_in_all_gives_the_logits_it_has_in_a_longer_batch(experts):
    model = tiny_cumo(experts=experts, llm_experts=experts).eval()
    one = model(torch.tensor([[5]]))
    more = model(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(one.logits[0, 0], more.logits[0, 0], rtol=1e-4, atol=1e-5)
    alone = model(torch.tensor([[5]]), labels=torch.tensor([[5]]))
    assert alone.lm_loss == 0  # nothing before it predicts it


@pytest.mark.parametrize("experts", [0, 4])
def test_a_batch_of_padding_teaches_nothing_and_is_finite(experts):
    model = tiny_cumo(experts=experts, llm_experts=experts).train()
    nothing = torch.zeros(2, 6, dtype=torch.long)
    out = model(nothing, labels=nothing + IGNORE, segments=nothing)
    assert out.lm_loss == 0 and out.loss.isfinite()
    out.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or not p.grad.any(), name


@pytest.mark.parametrize("experts", [0, 4])
def test_a_batch_without_pictures_learns_from_its_text_alone(experts):
    model = tiny_cumo(experts=experts).train()
    tokens = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 2]])
    out = model(tokens, labels=tokens)
    assert out.aux["clip"] is None and out.aux["mlp"] is None
    torch.testing.assert_close(out.loss, model.llm.loss(model.llm.hidden(
        model.llm.embed(tokens), None)[0], tokens))  # fmt: skip
    out.loss.backward()
    assert all(p.grad is None for p in model.vision.parameters())
    assert all(p.grad.isfinite().all() for p in model.llm.parameters())


def test_stage_1_goes_on_past_batches_without_a_picture(weights, tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}] * 8))
    options = dict(data=str(tmp_path / "a.json"), out=str(tmp_path), template="mistral_instruct")
    assert train.train_stage(train.resolve(weights | options, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ties_are_broken_the_same_way_on_every_run(dtype):
    torch.manual_seed(0)
    router = Router(8, 6, 3).to(dtype)
    router.weight.data[3:] = router.weight.data[:3]  # every expert has a twin
    x = torch.randn(4, 50, 8, dtype=dtype)
    weights, aux = router(x)
    for _ in range(5):
        again, same = router(x.clone())
        assert torch.equal(again, weights) and torch.equal(same.choice, aux.choice)
    shuffled = torch.randperm(50)
    assert torch.equal(router(x[:, shuffled])[1].choice, aux.choice[:, shuffled])
    first, twin = aux.choice[..., 0], aux.choice[..., 1]
    assert torch.equal(twin, first + 3)  # the lower one first


# ------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "sparse"])
def test_every_precision_learns(experts, dtype):
    model = tiny_cumo(experts=experts, llm_experts=experts).to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tokens = torch.tensor([question(1, "i", 5, 6, 7, 2), question(1, "i", 8, 9, 10, 2)])
    images, losses = torch.randn(2, 3, 24, 24).to(dtype), []
    for _ in range(6):
        out = model(tokens, images, labels=tokens.where(tokens > 4, IGNORE))
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.isfinite()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.lm_loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_miniature_trains_in_every_precision(dtype, tmp_path):
    sizes = dict(samples=24, rows=1, row_tokens=280, bf16=False, out=str(tmp_path))
    cfg = train.resolve(sizes, 1)
    train.choose_precision(cfg)
    trainer = train.Trainer(cfg)
    trainer.model.to(dtype).train()
    trainer.optimizer = torch.optim.SGD(trainer.model.connector.parameters(), lr=0.05)
    losses = []
    for batch in list(trainer.batches())[:4]:
        images = batch["images"].to(dtype)
        out = trainer.model(batch["tokens"], images, batch["labels"], batch["segments"])
        out.loss.backward()
        assert torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0).isfinite()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        losses.append(out.lm_loss.item())
    assert len(losses) == 4 and losses[-1] < losses[0]
