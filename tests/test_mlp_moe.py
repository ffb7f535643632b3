"""The router, the experts and the connector, against a token-by-token reference and by law."""

import copy
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from mlp_moe import ACTIVATIONS, Connector, Experts, Router, SparseMoE, checkpointed

NAMES = {False: ("fc1", "fc2"), True: ("w1", "w2", "w3")}


def build(dim, hidden, num_experts, top_k, seed=0, **kwargs):
    torch.manual_seed(seed)
    return SparseMoE(dim, hidden, num_experts, top_k, **kwargs)


def gradients(moe, names):
    """The gradients of the stacked parameters, under the public names of each expert's."""
    twin = copy.deepcopy(moe)
    for p, q in zip(twin.parameters(), moe.parameters()):
        p.data = q.grad
    return twin.public_state_dict(names)


def objective(y, balance, z):
    return y.square().sum() + 0.1 * balance + 0.01 * z


CASES = {
    "aligned": dict(shape=(2, 5, 8), hidden=12, experts=4, top_k=2),
    "odd sizes": dict(shape=(3, 7, 5), hidden=9, experts=4, top_k=2),
    "batch of one": dict(shape=(1, 6, 8), hidden=8, experts=4, top_k=2),
    "one token": dict(shape=(1, 1, 8), hidden=8, experts=4, top_k=2),
    "eight experts": dict(shape=(2, 4, 8), hidden=8, experts=8, top_k=2),
    "three experts, top 1": dict(shape=(2, 6, 6), hidden=10, experts=3, top_k=1),
    "every expert": dict(shape=(2, 4, 8), hidden=8, experts=3, top_k=3),
    "one expert": dict(shape=(2, 4, 8), hidden=8, experts=1, top_k=1),
    "another width": dict(shape=(2, 4, 8), hidden=12, experts=4, top_k=2, out_dim=20),
    "quick_gelu": dict(shape=(2, 4, 8), hidden=8, experts=4, top_k=2, act="quick_gelu"),
    "SwiGLU": dict(shape=(2, 5, 8), hidden=12, experts=4, top_k=2, act="silu", gated=True),
    "SwiGLU, odd": dict(shape=(2, 5, 7), hidden=11, experts=8, top_k=2, act="silu", gated=True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_sparse_block_equals_token_by_token_reference(case, masked, dtype):
    kwargs = dict(CASES[case])
    (B, T, D), hidden, E, K = (kwargs.pop(key) for key in ("shape", "hidden", "experts", "top_k"))
    moe = build(D, hidden, E, K, **kwargs).to(dtype)
    names = NAMES[kwargs.get("gated", False)]
    x = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    mask = torch.arange(T).expand(B, T) >= torch.arange(B)[:, None] % T if masked else None
    y, aux = moe(x, mask)
    objective(y, aux.balance, aux.z).backward()

    weights = {
        name: view.clone().requires_grad_() for name, view in moe.public_state_dict(names).items()
    }
    x_ref = x.detach().clone().requires_grad_()
    y_ref, balance, z, load = reference.sparse_moe(
        x_ref, weights, K, names, kwargs.get("act", "gelu"), mask
    )
    objective(y_ref, balance, z).backward()
    torch.testing.assert_close(y, y_ref)
    torch.testing.assert_close((aux.balance, aux.z), (balance, z))
    torch.testing.assert_close(aux.load, load.to(dtype))
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-4, atol=1e-5)
    grads = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
    torch.testing.assert_close(gradients(moe, names), grads, rtol=1e-4, atol=1e-5)


def test_gradients_equal_finite_differences():
    moe = build(3, 5, 3, 2).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe(x)[0], x)


def test_identical_experts_equal_the_dense_mlp_for_any_gate():
    dense = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    x = torch.randn(3, 7, 8)
    for seed in range(3):
        moe = build(8, 12, 4, 2, seed)
        for name, view in moe.public_state_dict(("0", "2")).items():
            if name != "gate.weight":
                view.copy_(dense.state_dict()[name.split(".", 2)[2]])
        moe.gate.weight.data *= 10
        torch.testing.assert_close(moe(x)[0], dense(x), rtol=1e-5, atol=1e-6)


def test_uniform_router_has_balance_1():
    router = Router(4, 4, 2)
    router.weight.data = torch.eye(4)
    x = 1e-3 * torch.eye(4).repeat(2, 1, 1)  # token e prefers expert e, ever so slightly
    aux = router(x)[1]
    assert aux.balance.item() == pytest.approx(1, abs=1e-6)
    assert aux.load.sum().item() == pytest.approx(1)


def test_collapsed_router_has_balance_E():
    router = Router(4, 4, 1)
    router.weight.data = 50 * torch.eye(4)
    aux = router(torch.eye(4)[:1].expand(2, 9, 4))[1]
    assert aux.balance.item() == pytest.approx(4)
    assert aux.load.tolist() == [1, 0, 0, 0]


def test_balance_is_taken_per_sample():
    """Each sample using one expert is a collapse, though over the batch the experts are even."""
    router = Router(2, 2, 1)
    router.weight.data = 50 * torch.eye(2)
    x = torch.eye(2)[:, None].expand(2, 5, 2)
    assert router(x)[1].balance.item() == pytest.approx(2)
    assert router(x.flatten(0, 1))[1].balance.item() == pytest.approx(1)


def test_without_a_batch_axis_the_tokens_are_one_sample():
    moe, x = build(8, 12, 4, 2), torch.randn(9, 8)
    (y, aux), (y_batch, aux_batch) = moe(x), moe(x[None])
    torch.testing.assert_close(y, y_batch[0])
    torch.testing.assert_close(aux.balance, aux_batch.balance)
    assert aux.choice.shape == (9, 2)


def test_weights_sum_to_1_and_choices_come_best_first():
    router = Router(8, 4, 2)
    x = torch.randn(2, 9, 8)
    weights, aux = router(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    assert (weights[..., 0] >= weights[..., 1]).all()
    assert torch.equal(aux.choice, (x @ router.weight.T).topk(2).indices)


def test_ties_go_to_the_lower_expert():
    assert Router(8, 4, 2)(torch.zeros(1, 3, 8))[1].choice.tolist() == [[[0, 1]] * 3]


def test_top_1_gives_the_router_no_gradient_but_its_losses():
    moe, x = build(8, 12, 4, 1), torch.randn(2, 5, 8)
    moe(x)[0].sum().backward()
    assert moe.gate.weight.grad.abs().max() < 1e-6
    sum(moe(x)[1][:2]).backward()
    assert moe.gate.weight.grad.abs().max() > 1e-3


def test_entropy_says_how_sure_the_router_is():
    router = Router(6, 4, 2)
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        router.weight.zero_()
    assert router(x)[1].entropy == pytest.approx(math.log(4))
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, 6) * 100)
    sure = torch.eye(4, 6)[None]
    assert router(sure)[1].entropy < 1e-6
    mask = torch.tensor([[True, True, False, False]])
    router.reset_parameters()
    both, cut = router(sure[:, :2])[1].entropy, router(sure, mask)[1].entropy
    torch.testing.assert_close(both, cut)
    assert not both.requires_grad


def test_load_has_no_gradient():
    assert not build(8, 12, 4, 2)(torch.randn(1, 5, 8))[1].load.requires_grad


def test_router_is_float32_under_autocast():
    router, x = Router(64, 4, 2), torch.randn(4, 50, 64)
    weights, aux = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        weights_16, aux_16 = router(x)
    assert weights_16.dtype == torch.float32
    assert torch.equal(weights, weights_16) and torch.equal(aux.choice, aux_16.choice)
    for name, value in aux._asdict().items():
        assert torch.equal(value, getattr(aux_16, name)), name


def test_router_starts_like_a_linear_layer():
    torch.manual_seed(0)
    weight = Router(256, 8, 2).weight * 256**0.5
    assert 0.95 < weight.abs().max() <= 1 and weight.mean().abs() < 0.05


@pytest.mark.parametrize("dim", [8, 5])
def test_starved_expert_gets_zero_not_none_grad(dim):
    moe = build(dim, 16, 4, 1)
    moe.gate.weight.data.zero_()
    moe.gate.weight.data[2] = 1  # positive tokens all go to expert 2
    y, aux = moe(torch.rand(2, 6, dim))
    assert aux.load.tolist() == [0, 0, 1, 0]
    y.sum().backward()
    for p in moe.experts.parameters():
        assert p.grad[2].abs().max() > 0
        assert torch.equal(p.grad[[0, 1, 3]], torch.zeros_like(p.grad[[0, 1, 3]]))


@pytest.mark.parametrize("padding", [1e4, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_changes_nothing_and_comes_out_zero(padding, dtype):
    moe = build(8, 16, 4, 2).to(dtype)
    real = torch.randn(2, 6, 8, dtype=dtype)
    mask = torch.arange(9) < 6
    padded = torch.full((2, 9, 8), padding, dtype=dtype)
    padded[:, :6] = real

    def run(x, mask):
        x = x.clone().requires_grad_()
        moe.zero_grad()
        y, aux = moe(x, mask)
        objective(y.float(), aux.balance, aux.z).backward()
        return y, aux, x.grad, [p.grad.clone() for p in moe.parameters()]

    y, aux, grad_x, grads = run(real, None)
    y_pad, aux_pad, grad_x_pad, grads_pad = run(padded, mask.expand(2, 9))
    assert torch.equal(y_pad[:, :6], y) and not y_pad[:, 6:].any()
    assert torch.equal(grad_x_pad[:, 6:], torch.zeros(2, 3, 8, dtype=dtype))
    torch.testing.assert_close(grad_x_pad[:, :6], grad_x)
    torch.testing.assert_close(grads_pad, grads)
    torch.testing.assert_close(aux_pad[:3], aux[:3])
    assert torch.equal(aux_pad.choice[:, :6], aux.choice) and (aux_pad.choice[:, 6:] == 4).all()


def test_a_sample_of_padding_only_is_not_counted():
    moe, x = build(8, 12, 4, 2), torch.randn(2, 5, 8)
    mask = torch.tensor([True, False])[:, None].expand(2, 5)
    torch.testing.assert_close(moe(x, mask)[1][:3], moe(x[:1])[1][:3])


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_tokens_at_all_is_fine(shape):
    moe = build(8, 12, 4, 2)
    y, aux = moe(torch.randn(shape))
    (y.sum() + aux.balance + aux.z).backward()
    assert y.shape == shape and aux.balance == 0 and aux.z == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in moe.parameters())


def test_bfloat16_autocast_is_close_to_float32_and_returns_what_a_linear_would():
    moe, x = build(64, 128, 4, 2), torch.randn(4, 50, 64)
    y, aux = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        y_16, aux_16 = moe(x)
        assert y_16.dtype == nn.Linear(64, 64)(x).dtype == torch.bfloat16
    assert torch.equal(aux.choice, aux_16.choice)
    assert (y - y_16).abs().max() < 0.02 * y.abs().max()


def compiled(moe, backend):
    torch._dynamo.reset()
    return torch.compile(moe, fullgraph=True, backend=backend)


def test_compiles_whole_and_once_for_all_routings():
    moe = build(16, 32, 4, 2)
    fast = compiled(moe, "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.autocast("cpu", torch.bfloat16):
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(2, 10, 16) + seed * moe.gate.weight.detach()[seed]  # other routings
            (y, aux), (y_eager, aux_eager) = fast(x), moe(x)
            y.float().sum().backward()
            assert torch.equal(aux.choice, aux_eager.choice)
            torch.testing.assert_close(y, y_eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiles_in_other_precisions_too(dtype):
    moe, x = build(16, 32, 4, 2).to(dtype), torch.randn(2, 10, 16, dtype=dtype)
    torch.testing.assert_close(compiled(moe, "aot_eager")(x)[0], moe(x)[0])


@pytest.mark.slow
def test_compiles_with_inductor():
    moe, x = build(16, 32, 4, 2).bfloat16(), torch.randn(2, 10, 16, dtype=torch.bfloat16)
    y, aux = compiled(moe, "inductor")(x)
    y.float().sum().backward()
    torch.testing.assert_close(y, moe(x)[0], rtol=2e-2, atol=2e-2)


def test_recomputing_keeps_routing_and_gradients():
    moe, x = build(8, 12, 4, 2), torch.randn(2, 5, 8, requires_grad=True)
    sorts = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            sorts.append(func) if func is torch.ops.aten.sort.stable else None
            return func(*args, **kwargs or {})

    y, aux = moe(x)
    expected = torch.autograd.grad(objective(y, aux.balance, aux.z), [x, *moe.parameters()])
    with Count():
        y, aux = checkpointed(moe, x)
        actual = torch.autograd.grad(objective(y, aux.balance, aux.z), [x, *moe.parameters()])
    torch.testing.assert_close(actual, expected)
    assert len(sorts) == 2  # the forward's; none in the backward pass


def test_views_write_through_and_round_trip():
    for names, kwargs in ((("fc1", "fc2"), {}), (("w1", "w2", "w3"), {"gated": True})):
        a, b = build(8, 12, 3, 2, 0, **kwargs), build(8, 12, 3, 2, 1, **kwargs)
        x = torch.randn(4, 8)
        source, target = a.public_state_dict(names), b.public_state_dict(names)
        assert source[f"experts.2.{names[0]}.weight"].shape == (12, 8)
        assert source.keys() == target.keys() and len(source) == 1 + 3 * (3 if kwargs else 4)
        for name, view in target.items():
            view.copy_(source[name])
        assert torch.equal(a(x)[0], b(x)[0])


def test_experts_stay_sorted_by_name_beyond_ten():
    moe = build(8, 4, 12, 2)
    moe.public_state_dict(("fc1", "fc2"))["experts.11.fc1.bias"].fill_(7)
    assert (moe.experts.b1[11] == 7).all() and not (moe.experts.b1[:11] == 7).any()


@pytest.mark.parametrize("num_experts", [0, 4])
def test_connector_round_trips_through_public_names(num_experts):
    a, b, x = Connector(6, 10, num_experts), Connector(6, 10, num_experts), torch.randn(2, 5, 6)
    b.load_original({name: tensor.clone() for name, tensor in a.public_state_dict().items()})
    assert torch.equal(a(x)[0], b(x)[0]) and a(x)[0].shape == (2, 5, 10)
    assert (a(x)[1] is None) == (num_experts == 0)
    first = "experts.0.0.weight" if num_experts else "0.weight"
    assert a.public_state_dict()[first].shape == (10, 6)


def test_connector_names_what_does_not_fit():
    state = Connector(6, 10, 2).public_state_dict()
    state["experts.1.2.surplus"] = state.pop("experts.1.2.bias")
    state["gate.weight"] = torch.zeros(3, 6)
    with pytest.raises(
        ValueError,
        match=r"missing: experts.1.2.bias.*unexpected: "
        r"experts.1.2.surplus.*shape: gate.weight is \[3, 6\]",
    ):
        Connector(6, 10, 2).load_original(state)


def test_sparse_connector_refuses_dense_weights_and_names_upcycle():
    with pytest.raises(ValueError, match="upcycle"):
        Connector(6, 10, 4).load_original(Connector(6, 10).public_state_dict())


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k}.*from 1 to 4"):
        SparseMoE(8, 8, 4, top_k)


def test_unknown_activation_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'relu'.*quick_gelu"):
        Experts(2, 4, 4, 4, act="relu")


def test_activations_are_the_named_ones():
    x = torch.linspace(-4, 4, 50)
    torch.testing.assert_close(ACTIVATIONS["quick_gelu"](x), reference.ACTIVATIONS["quick_gelu"](x))
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), reference.ACTIVATIONS["gelu"](x))
    torch.testing.assert_close(ACTIVATIONS["gelu_pytorch_tanh"](x), F.gelu(x, approximate="tanh"))
