"""int8 weights: no more than the rounding error, and the same answers."""

import pytest
import torch

from engine.decode import fast_step
from engine.quant import Int8Experts, quantize, to_int8
from llm import LLM, LLMConfig
from mlp_moe import Experts
from tests.tiny import tiny_cumo


def tiny_llm(**more):
    torch.manual_seed(0)
    llm = LLM(LLMConfig(97, 32, 56, n_layers=2, n_heads=4, n_kv_heads=2, **more)).eval()
    for p in llm.parameters():
        p.data.mul_(5 if p.dim() > 1 else 1)
    return llm


def dequantized(llm):
    """The same model in float32, every matrix rounded to int8 and back."""
    for name, p in llm.named_parameters():
        if p.dim() > 1 and "gate.weight" not in name:
            q, scale = to_int8(p.data, dim=1 if p.dim() == 3 else -1)
            p.data.copy_(q.float() * scale.unsqueeze(1 if p.dim() == 3 else -1))
    return llm


def test_no_weight_is_off_by_more_than_half_a_scale():
    weight = torch.randn(7, 33) * torch.logspace(-6, 3, 7)[:, None]
    q, scale = to_int8(weight)
    assert q.dtype == torch.int8 and q.abs().max() == 127
    assert ((q * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def test_a_row_of_zeros_stays_zero_and_a_nan_is_refused():
    q, scale = to_int8(torch.zeros(2, 3))
    assert (q == 0).all() and scale.isfinite().all()
    with pytest.raises(ValueError, match="not finite"):
        to_int8(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("kind", [{}, {"tie_embeddings": True}, {"num_experts": 4, "top_k": 2},
                                  {"sliding_window": 5}])  # fmt: skip
def test_quantized_is_the_model_with_rounded_weights(kind):
    tokens = torch.randint(97, (2, 11))
    with torch.no_grad():
        expected = dequantized(tiny_llm(**kind))(tokens)
        got = quantize(tiny_llm(**kind))(tokens)
        plain = tiny_llm(**kind)(tokens)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().mean() < 0.05 * plain.abs().mean()


@pytest.mark.parametrize("kind", [{}, {"num_experts": 4, "top_k": 2}])
def test_quantized_answers_with_the_cache_as_without(kind):
    llm, tokens = quantize(tiny_llm(**kind)), torch.randint(97, (1, 9))
    said = llm.generate(tokens, max_new_tokens=6)
    for n in range(6):
        prefix = torch.cat((tokens, said[:, :n]), dim=1)
        assert llm(prefix)[0, -1].argmax() == said[0, n]


def test_few_rows_and_many_give_the_same():
    torch.manual_seed(0)
    experts = Experts(3, 16, 24, 16, "silu", gated=True, bias=False)
    x, ends = torch.randn(20, 16), torch.tensor([4, 4, 20], dtype=torch.int32)  # one is idle
    quantized = Int8Experts(experts)
    few = torch.cat([quantized(x[i : i + 1], (ends > i).int()) for i in range(20)])
    torch.testing.assert_close(few, quantized(x, ends))
    torch.testing.assert_close(few, experts(x, ends), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_odd_sizes_and_many_rows(dtype):
    torch.manual_seed(0)
    experts = Experts(3, 13, 23, 13, "silu", gated=True, bias=False).to(dtype)
    x, ends = torch.randn(20, 13, dtype=dtype), torch.tensor([4, 4, 20], dtype=torch.int32)
    torch.testing.assert_close(Int8Experts(experts)(x, ends), experts(x, ends), rtol=0.1, atol=0.02)


def test_only_matrices_of_the_language_model_are_touched():
    model = tiny_cumo(experts=2, llm_experts=4)
    quantize(model.llm)
    sizes = {name: t.element_size() for name, t in model.state_dict().items() if t.dim() > 1}
    one = {name for name, size in sizes.items() if size == 1}
    assert all(name.startswith("llm.") for name in one)
    four = {n for n, s in sizes.items() if s == 4 and n.startswith("llm.") and "scale" not in n}
    assert all(name.endswith("gate.weight") for name in four) and four
    assert sum(map("scale".__contains__, one)) == 0


def test_bfloat16_comes_out_as_bfloat16_and_compiled_as_eager():
    llm = quantize(tiny_llm(tie_embeddings=True).to(torch.bfloat16))
    tokens = torch.randint(97, (1, 9))
    assert llm(tokens).dtype == torch.bfloat16
    llm = quantize(tiny_llm(tie_embeddings=True))
    same = [llm.generate(tokens, max_new_tokens=8, step=s).tolist() for s in (None, fast_step)]
    assert same[0] == same[1]


def test_a_quantized_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="save the checkpoint they were made from"):
        quantize(tiny_llm()).save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="save the checkpoint"):
        model = tiny_cumo()
        quantize(model.llm)
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
