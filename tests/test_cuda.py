"""What only a GPU runs, against the same on a CPU: kernels, compiled blocks, recorded steps.

pytest tests/test_cuda.py                        # with a card: under two minutes
CUMO_DEVICE=cpu pytest tests/test_cuda.py        # checks the tests themselves, without one
"""

import copy
import gzip
import json
import os
import shutil
import types

import pytest
import torch
from test_optim import give_gradients, parameters
from tiny import TOKENIZER

import llm
import train
from engine import decode
from engine.decode import OneToken, fast_step
from engine.memory import LADDER
from engine.optim import AdamW, noise
from engine.profile import BEFORE, RECORDED, record
from engine.quant import quantize
from engine.rate import has_fast_bf16
from llm import LLM, Cache, LLMConfig, attend, attention_mask, flex_attend
from mlp_moe import Router, SparseMoE, grouped_matmul

DEVICE = os.environ.get("CUMO_DEVICE", "cuda")
CARD = DEVICE != "cpu"
pytestmark = pytest.mark.skipif(CARD and not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Each test compiles for itself: after eight variants of a function PyTorch runs it uncompiled.
    Without a card nothing is compiled: that takes minutes, and other files test it on a CPU."""
    if not CARD:
        for module, name in ((llm, "compiled"), (decode, "tuned")):
            monkeypatch.setattr(module, name, lambda function: function)
    yield
    if CARD:
        torch.compiler.reset()


def near(found, exact, share):
    """No entry is off by more than a share of the largest."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    assert (found - exact).abs().max() <= share * exact.abs().max()


# ------------------------------------------------------------------------------ sparse blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("D, F", [(64, 96), (33, 57)], ids=["aligned", "odd"])
def test_grouped_products_and_their_gradients(D, F, dtype):
    """Against one product an expert, in float64; the second expert has no rows."""
    torch.manual_seed(0)
    x, w = torch.randn(41, D).to(dtype), torch.randn(4, D, F).to(dtype)
    ends = torch.tensor([9, 9, 30, 41], dtype=torch.int32)
    expert = torch.searchsorted(ends, torch.arange(41), right=True)
    inputs = [t.clone().to(DEVICE).requires_grad_() for t in (x, w)]
    onehot = (expert[:, None] == torch.arange(4)).to(DEVICE, dtype)
    y = grouped_matmul(*inputs, ends.to(DEVICE), onehot)
    exact = [t.double().requires_grad_() for t in (x, w)]
    truth = torch.einsum("md,mdf->mf", exact[0], exact[1][expert])
    g = torch.randn(41, F).to(dtype)
    y.backward(g.to(DEVICE))
    truth.backward(g.double())
    share = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for found, right in [(y, truth), *((a.grad, b.grad) for a, b in zip(inputs, exact))]:
        near(found, right, share)
    assert not inputs[1].grad[1].any()


def test_the_router_chooses_as_on_a_cpu():
    torch.manual_seed(0)
    router, x = Router(64, 8, 2), torch.randn(3, 50, 64)
    mask = torch.arange(50) >= torch.tensor([[0], [7], [49]])
    weights, aux = router(x, mask)
    there = copy.deepcopy(router).to(DEVICE)
    found, found_aux = there(x.to(DEVICE), mask.to(DEVICE))
    assert torch.equal(found_aux.choice.cpu(), aux.choice)
    torch.testing.assert_close(found.cpu(), weights, rtol=1e-5, atol=1e-6)
    for name in ("balance", "z", "load", "entropy"):
        ours, theirs = getattr(found_aux, name).cpu(), getattr(aux, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ties = there(torch.zeros(1, 5, 64, device=DEVICE))[1].choice
    assert (ties == torch.tensor([0, 1], device=DEVICE)).all(), "ties go to the lower expert"


@pytest.mark.parametrize("act, gated", [("quick_gelu", False), ("silu", True)])
def test_a_compiled_sparse_block_and_its_gradients(act, gated):
    """In bfloat16, for several numbers of tokens; the reference has the same weights in float64."""
    torch.manual_seed(0)
    exact = SparseMoE(64, 96, 4, 2, act=act, gated=gated, bias=not gated).bfloat16().double()
    block = copy.deepcopy(exact).to(DEVICE, torch.bfloat16)
    if CARD:
        block.compile(dynamic=True)
    for rows in (3, 1, 5):
        x = torch.randn(rows, 37, 64).bfloat16()
        inputs = x.clone().to(DEVICE).requires_grad_(), x.double().requires_grad_()
        outputs = [module(x)[0] for module, x in zip((block, exact), inputs)]
        for y in outputs:
            y.square().sum().backward()
        near(*outputs, 2e-2)
        near(inputs[0].grad, inputs[1].grad, 3e-2)
    for found, right in zip(block.parameters(), exact.parameters()):
        near(found.grad, right.grad, 3e-2)


# ------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("T, window", [(40, None), (100, 30), (128, None), (300, 64)])
def test_flex_attention_is_attention_with_a_mask(T, window):
    """Packed documents, padding, four query heads for each key/value head."""
    torch.manual_seed(0)
    B, H, G, A = 2, 8, 2, 32
    segments = torch.stack((torch.arange(T) // 33 + 1, (torch.arange(T) < T - 5).long()))
    starts = torch.arange(T) % 33, torch.arange(T)
    places = torch.stack((torch.stack(starts), segments), dim=1)
    q, k, v = (torch.randn(B, heads, T, A).bfloat16() for heads in (H, G, G))
    g = torch.randn(B, H, T, A).bfloat16()
    here = [x.to(DEVICE).requires_grad_(CARD) for x in (q, k, v)]  # no gradient on a CPU
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    mask = attention_mask(places.to(DEVICE), places.to(DEVICE), window)
    y = flex_attend(*here, mask)
    truth = attend(*exact, attention_mask(places, places, window, torch.float64))
    near(y, truth, 1e-2)
    if CARD:
        y.backward(g.to(DEVICE))
        truth.backward(g.double())
        for found, right in zip(here, exact):
            near(found.grad, right.grad, 2e-2)


def made(**more):
    """A language model in float32 whose head size suits FlexAttention."""
    torch.manual_seed(0)
    model = LLM(LLMConfig(97, 64, 96, 2, 4, 2, **more)).eval()
    for p in model.parameters():
        p.data.mul_(5 if p.dim() > 1 else 1)
    return model


KINDS = {"dense": {}, "window": {"sliding_window": 9}, "experts": {"num_experts": 4}}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_equals_unpacked_and_both_equal_the_cpu(kind):
    model = made(**KINDS[kind])
    documents = [torch.randint(97, (1, n)) for n in (70, 5, 60)]
    tokens = torch.cat([*documents, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    segments = torch.tensor([[1] * 70 + [2] * 5 + [3] * 60 + [0] * 3])
    right = torch.cat([model(document) for document in documents], dim=1)
    model.to(DEVICE)
    packed = model(tokens.to(DEVICE), segments.to(DEVICE))
    assert packed.isfinite().all()
    apart = torch.cat([model(document.to(DEVICE)) for document in documents], dim=1)
    near(packed[:, :135], right, 1e-3)
    near(apart, right, 1e-3)


# ------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    "kind, rows, quant",
    [("dense", 1, True), ("window", 3, True), ("experts", 2, False)],
)
@torch.no_grad()
def test_recorded_steps_are_those_without_a_cache(kind, rows, quant):
    """Prompts padded on the left, a ring that wraps around, a cache that is full at the end."""
    model = made(**KINDS[kind]).to(DEVICE)
    model = quantize(model) if quant else model
    tokens = torch.randint(97, (rows, 7 + 12), device=DEVICE)
    segments = (torch.arange(19) >= torch.arange(rows)[:, None]).long().to(DEVICE)
    whole = model(tokens, segments)
    cache = Cache(model.cfg, rows, 19, device=DEVICE)
    model.step(tokens[:, :7], segments[:, :7], cache)
    one = OneToken(model, cache)
    for n in range(7, 19):
        assert one.takes(tokens[:, n : n + 1], None)
        logits = one(tokens[:, n : n + 1])
        near(logits, whole[:, n], 1e-3)
        assert torch.equal(one.greatest[0], logits.max(-1).values)
    assert (one.step != one.run) == CARD, "the steps after the first replay a CUDA graph"


@torch.no_grad()
def test_answers_compiled_equal_answers_eager():
    model = made().to(DEVICE)
    tokens = torch.randint(97, (2, 9), device=DEVICE)
    for prompt in (tokens, tokens[:1]):  # the second graph must not see the first one's tensors
        said = [model.generate(prompt, max_new_tokens=8, step=step) for step in (None, fast_step)]
        assert torch.equal(*said)


# ------------------------------------------------------------------------------ training


def test_rounding_noise_has_the_bits_of_a_cpu():
    key, offset = torch.tensor(-12345, dtype=torch.int32), torch.tensor(7, dtype=torch.int32)
    make = torch.compile(noise) if CARD else noise
    found = make(torch.zeros(1000, device=DEVICE), key, offset)
    assert torch.equal(found.cpu(), noise(torch.zeros(1000), key, offset))


@pytest.mark.parametrize("weights, moments", LADDER[1:])  # float32 is PyTorch's own
def test_the_optimizer_steps_as_on_a_cpu(weights, moments):
    """Rounding of a float32 may differ in its last bit, which seldom turns over a bf16 number."""
    lists = [parameters(weights, [(300,), (32, 16), (2, 8, 33)]) for _ in range(2)]
    there = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in lists[1]]
    make = lambda ps: AdamW(ps, lr=1e-3, weights=weights, moments=moments, weight_decay=0.1)
    optimizers = make(lists[0]), make(there)
    for step in range(4):
        give_gradients(lists[0], step)
        for mine, other in zip(there, lists[0]):
            mine.grad = other.grad.to(DEVICE)
        for optimizer in optimizers:
            optimizer.step()
    found, right = (torch.cat([p.detach().cpu().float().flatten() for p in ps])
                    for ps in (there, lists[0]))  # fmt: skip
    assert (found != right).float().mean() < 5e-3
    torch.testing.assert_close(found, right, rtol=2**-7, atol=1e-6)


def losses_of(device, init, out, compile):
    """Losses of three steps of stage 3 of the miniature."""
    given = dict(device=device, init=str(init), out=str(out), compile=compile, samples=64, rows=4,
                 accumulate=2, bf16=has_fast_bf16(device), workers=0)  # fmt: skip
    cfg = train.resolve(given, 3)
    train.choose_precision(cfg)
    trainer = train.Trainer(cfg)
    trainer.model.train()
    batches = trainer.batches()
    return [trainer.train_step([next(batches), next(batches)]) for _ in range(3)]


def test_three_steps_of_the_miniature_have_the_losses_of_a_cpu(tmp_path):
    cfg = train.resolve({"device": "cpu"}, 1)
    train.choose_precision(cfg)
    torch.manual_seed(0)
    train.build(cfg)[0].save_pretrained(tmp_path / "init")
    shutil.copy(TOKENIZER, tmp_path / "init")
    here = losses_of(DEVICE, tmp_path / "init", tmp_path / "a", CARD)
    right = losses_of("cpu", tmp_path / "init", tmp_path / "b", False)
    for mine, other in zip(here, right):
        for name in ("loss", "lm_loss", "clip_balance", "mlp_balance"):
            assert mine[name] == pytest.approx(other[name], rel=0.02), (name, mine, other)


@pytest.mark.skipif(not CARD, reason="tests/test_profile.py has the profile of a CPU")
def test_a_profile_lists_the_kernels_of_the_card(tmp_path, capsys):
    trainer = types.SimpleNamespace(
        cfg=types.SimpleNamespace(profile=True, device=DEVICE), folder=tmp_path
    )
    with record(trainer) as step:
        for _ in range(BEFORE + RECORDED):
            torch.randn(256, 256, device=DEVICE) @ torch.randn(256, 256, device=DEVICE)
            step()
    assert "kernel" in capsys.readouterr().out
    events = json.loads(gzip.decompress((tmp_path / "profile.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("cat") == "kernel" for event in events) >= 3 * RECORDED
