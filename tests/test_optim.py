"""AdamW in less memory: equal to torch's in float32, unbiased in bf16, resumable."""

import copy
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import rounding
from engine import optim
from engine.optim import MOMENTS, WEIGHTS, AdamW

SHAPES = [(1,), (7,), (3, 5), (2, 3, 4, 5), (), (300,), (32, 16), (2, 8, 33)]
ALL = list(itertools.product(WEIGHTS, MOMENTS))


def parameters(weights="fp32", shapes=SHAPES, scale=0.1):
    generator = torch.Generator().manual_seed(1)
    drawn = (scale * torch.randn(shape, generator=generator) for shape in shapes)
    return [nn.Parameter(x.to(WEIGHTS[weights])) for x in drawn]


def give_gradients(params, step):
    """Random gradients of all sizes, the same ones for the same step."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        p.grad = (10.0**-i * torch.randn(p.shape, generator=generator)).to(p.dtype)


def groups(params):
    return [{"params": params[::2], "weight_decay": 0.3}, {"params": params[1::2]}]


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + step % 3)
        give_gradients(params, step)
        optimizer.step()


def bits_of(n, key, start=0):
    """The noise, one element at a time, in Python's integers, which never overflow."""

    def mix(x, shift, factor):
        return (x ^ x >> shift) * factor % 2**32

    key, out = key % 2**32, []
    for place in range(start, start + n):
        x = mix(place % 2**32 ^ key, 16, 0x7FEB352D) ^ key
        x = mix(x, 15, 0x846CA68B)
        out.append(x ^ x >> 16)
    return torch.tensor([x - 2**32 if x >= 2**31 else x for x in out], dtype=torch.int32)


def noise(n, seed=0, step=1, index=0, start=0):
    key = optim.noise_keys(seed, step, index)[0]
    return optim.noise(torch.empty(n), key, torch.tensor(start).to(torch.int32))


# ------------------------------------------------------------------------------ the arithmetic


def test_float32_equals_torch_adamw_over_50_steps():
    ours, theirs = parameters(), parameters()
    run(AdamW(groups(ours), lr=1e-3, betas=(0.8, 0.99)), ours, 50)
    run(torch.optim.AdamW(groups(theirs), 1e-3, (0.8, 0.99), weight_decay=0), theirs, 50)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_master_copy_equals_a_float32_run_and_the_weight_is_its_rounding():
    ours = parameters("bf16-master")
    plain = [nn.Parameter(p.detach().float()) for p in ours]
    for params, weights in ((ours, "bf16-master"), (plain, "fp32")):
        optimizer = AdamW(groups(params), lr=1e-3, weights=weights)
        for step in range(20):
            give_gradients(ours, step)
            for p, q in zip(params, ours):
                p.grad = q.grad.to(p.dtype)
            optimizer.step()
        if weights == "bf16-master":
            masters = [optimizer.state[p]["master"] for p in ours]
    for p, master, q in zip(ours, masters, plain):
        assert torch.equal(master, q) and torch.equal(p, q.bfloat16())


def test_parameters_without_gradient_stay_and_have_no_state():
    params = parameters("bf16-sr")
    before = copy.deepcopy(params)
    optimizer = AdamW(params, lr=1e-2, weights="bf16-sr")
    give_gradients(params, 0)
    params[2].grad = None
    optimizer.step()
    changed = [not torch.equal(p, q) for p, q in zip(params, before)]
    assert not changed[2] and all(changed[:2] + changed[5:]) and params[2] not in optimizer.state


def test_a_group_added_later_is_stepped_with_its_own_weight_decay():
    p, q = parameters(shapes=[(5,), (5,)])
    optimizer = AdamW([p], lr=0.1)
    optimizer.add_param_group({"params": [q], "weight_decay": 0.5})
    before = q.detach().clone()
    p.grad, q.grad = torch.zeros(5), torch.zeros(5)
    optimizer.step()
    torch.testing.assert_close(q.detach(), before * 0.95)


def test_refusals_name_the_way_out():
    for option in ("weights", "moments"):
        with pytest.raises(ValueError, match=f"{option} 'fp8' is unknown; choose from fp32, bf16"):
            AdamW(parameters(), lr=1, **{option: "fp8"})
        with pytest.raises(ValueError, match=f"{option} 'fp8' is unknown"):
            optim.bytes_per_parameter(**({"weights": "fp32", "moments": "fp32"} | {option: "fp8"}))
    with pytest.raises(ValueError, match="'fp32' takes parameters of torch.float32"):
        AdamW(parameters("bf16-sr"), lr=1)
    optimizer = AdamW(parameters("bf16-sr"), lr=1, weights="bf16-sr")
    with pytest.raises(ValueError, match="'bf16-sr' takes parameters of torch.bfloat16"):
        optimizer.add_param_group({"params": parameters()})
    assert len(optimizer.param_groups) == 1


# ------------------------------------------------------------------------------ noise, rounding


def test_noise_is_the_hash_written_out_in_whole_numbers():
    for key in (0, 1, -1, 123456789, -(2**31)):
        for start in (0, 1000, 2**31 - 5, 2**32 - 3):
            first = torch.tensor(start).to(torch.int32)
            ours = optim.noise(torch.empty(37), torch.tensor(key, dtype=torch.int32), first)
            assert torch.equal(ours, bits_of(37, key, start))


def test_noise_differs_by_seed_step_parameter_and_element_and_touches_no_generator():
    state = torch.get_rng_state()
    draws = [noise(50_000, *which) for which in itertools.product((0, 1), (1, 2), (0, 1))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noise(100, start=40), noise(140)[40:])
    for i, x in enumerate(draws):
        bits = (x[:, None] >> torch.arange(32) & 1).double()
        assert (bits.mean(0) - 0.5).abs().max() < 0.5 * 5 / 50_000**0.5  # five standard errors
        neighbours = torch.corrcoef(torch.stack([x[:-1].double(), x[1:].double()]))[0, 1]
        others = [torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1] for y in draws[:i]]
        assert max(map(abs, [neighbours, *others])) < 5 / 50_000**0.5


def neighbours(x):
    """The two bfloat16 neighbours of each float32 x, towards 0 and away from it."""
    down = (x.view(torch.int32) & -65536).view(torch.float32)
    return down, ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)


def test_every_number_goes_to_one_of_its_two_neighbours():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).int().view(torch.float32)
    rounded = optim.stochastic_round(x, noise(len(x)))
    down, up = neighbours(x)
    finite = x.isfinite()
    assert ((rounded == down) | (rounded == up))[finite].all() and finite.sum() > 190_000
    assert torch.equal(rounded.bfloat16().float()[finite], rounded[finite])
    assert torch.equal(rounded.isnan(), x.isnan())
    assert 0.45 < (rounded == up)[finite].float().mean() < 0.55


def test_what_bf16_holds_already_is_not_changed_nor_are_inf_and_nan():
    specials = torch.tensor([0.0, -0.0, 1.0, -1.0, 2**-133, 3e38, float("inf"), -float("inf")])
    x = specials.bfloat16().float().repeat(1000)
    assert torch.equal(optim.stochastic_round(x, noise(len(x))).view(torch.int32),
                       x.view(torch.int32))  # fmt: skip
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -(2**23) + 1], dtype=torch.int32).repeat(999)
    assert (
        optim.stochastic_round(nans.view(torch.float32), noise(len(nans))).bfloat16().isnan().all()
    )


@pytest.mark.parametrize("value", [0.03 + 4e-6, -0.03 - 4e-6, 1 - 2**-12, -1.0 - 2**-10, 3e-39])
def test_the_mean_of_many_roundings_is_the_number(value):
    n = 400_000
    x = torch.full((n,), value)
    down, up = (y[0].double() for y in neighbours(x))
    rounded = optim.stochastic_round(x, noise(n)).double()
    share = ((x[0] - down) / (up - down)).item()
    error = 5 * (share * (1 - share) / n) ** 0.5  # five standard errors
    assert 0 < share < 1 and abs((rounded == up).double().mean().item() - share) < error
    assert ((rounded == up) | (rounded == down)).all()


def test_steps_far_below_the_spacing_move_a_bf16_weight_at_the_right_pace():
    p = nn.Parameter(torch.full((20_000,), 0.03).bfloat16())
    nearest, before = p.detach().clone(), p.detach().float()
    optimizer = AdamW([p], lr=4e-6, weights="bf16-sr")
    for _ in range(100):
        p.grad = torch.ones_like(p)  # so that each step is lr
        nearest -= 4e-6
        optimizer.step()
    moved = (before - p.detach().float()).mean().item()
    spacing = 2.0**-6 / 128
    assert moved == pytest.approx(4e-4, abs=5 * (100 * 4e-6 * spacing / 20_000) ** 0.5)
    assert torch.equal(nearest.float(), before)


# ------------------------------------------------------------------------------ moments


def decayed(moments, steps):
    """Mean second moment of values whose gradient is 1 in the first step and 0 afterwards."""
    p = nn.Parameter(torch.zeros(8, 256))
    optimizer = AdamW([p], lr=0, moments=moments)
    for step in range(steps):
        p.grad = torch.full_like(p, float(step == 0))
        optimizer.step()
    return optimizer.state[p]["v"].float().mean().item()


@pytest.mark.parametrize("moments", MOMENTS)
def test_second_moment_decays_which_bf16_rounded_to_nearest_does_not(moments):
    # 2,048 values in bf16, each off by about 5 %, have a standard error of 0.1 %
    assert decayed(moments, 700) == pytest.approx(1e-3 * 0.999**699, rel=0.01)
    nearest = torch.tensor(1e-3).bfloat16()
    for _ in range(699):
        nearest = nearest * 0.999
    assert nearest == torch.tensor(1e-3).bfloat16()


def test_no_step_is_much_larger_than_in_float32():
    few, many = parameters(shapes=[(4, 300)]), parameters(shapes=[(4, 300)])
    sizes = 10.0 ** -torch.linspace(0, 6, 300)
    ours, exact = AdamW(few, lr=1e-3, moments="bf16"), AdamW(many, lr=1e-3)
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        g = torch.randn(4, 300, generator=generator) * sizes
        before = few[0].detach().clone()
        few[0].grad, many[0].grad = g, g.clone()
        ours.step()
        exact.step()
        assert (few[0] - before).abs().max() < 2e-3
    assert (few[0] - many[0]).abs().mean() < 1e-3  # each weight moved by up to 60e-3


# ------------------------------------------------------------------------------ resume, memory


@pytest.mark.parametrize("weights, moments", ALL)
def test_resume_is_bit_exact(weights, moments):
    params = parameters(weights)
    optimizer = AdamW(groups(params), lr=1e-3, weights=weights, moments=moments, seed=5)
    run(optimizer, params, 4)
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    run(optimizer, params, 4, first=4)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p.detach()) for p in saved["params"]]
    torch.randn(99)
    again = AdamW(groups(resumed), lr=9, weights=weights, moments=moments)
    again.load_state_dict(saved["optimizer"])
    run(again, resumed, 4, first=4)
    for p, q in zip(params, resumed):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            other = again.state[q][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other))
            assert torch.as_tensor(value).dtype == torch.as_tensor(other).dtype, name


def test_another_precision_cannot_go_on():
    params = parameters()
    saved = AdamW(params, lr=1, moments="bf16").state_dict()
    with pytest.raises(ValueError, match="saved with moments='bf16' and cannot go on with 'fp32'"):
        AdamW(params, lr=1).load_state_dict(saved)


@pytest.mark.parametrize("weights, moments", ALL)
def test_bytes_per_parameter_are_those_of_the_state(weights, moments):
    params = parameters(weights, [(32, 256), (512,)])
    optimizer = AdamW(params, lr=1e-3, weights=weights, moments=moments)
    run(optimizer, params, 1)
    size = sum(p.nbytes + p.grad.nbytes for p in params)
    size += sum(x.nbytes for p in params for x in optimizer.state[p].values() if torch.is_tensor(x))
    n = sum(p.numel() for p in params)
    assert size == n * optim.bytes_per_parameter(weights, moments)


# ------------------------------------------------------------------------------ shards, compiler


@pytest.fixture
def process(monkeypatch):
    """process(rank): make this process that rank out of four; the other three do not exist."""
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        return init_device_mesh("cpu", (4,))

    yield become
    dist.destroy_process_group()


@pytest.mark.parametrize("weights, moments", [("bf16-sr", "bf16"), ("bf16-master", "fp32")])
def test_four_shards_make_the_weights_of_one_process(weights, moments, process):
    from torch.distributed.tensor import DTensor, Shard

    shapes = [(8, 3), (7, 2, 5), (2, 9), (5,)]  # rows that do not divide by four
    whole = parameters(weights, shapes)
    run(AdamW(whole, lr=1e-3, weights=weights, moments=moments), whole, 3)
    parts = []
    for rank in range(4):
        mesh = process(rank)

        def cut(x, mesh=mesh, rank=rank):
            rows = -(-len(x) // 4)
            mine = x.detach()[rank * rows : (rank + 1) * rows].clone()
            return DTensor.from_local(mine, mesh, [Shard(0)], shape=x.shape, stride=x.stride())

        full = parameters(weights, shapes)
        params = [nn.Parameter(cut(p)) for p in full]
        optimizer = AdamW(params, lr=1e-3, weights=weights, moments=moments)
        for step in range(3):
            give_gradients(full, step)
            for p, q in zip(params, full):
                p.grad = cut(q.grad)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + step % 3)
            optimizer.step()
        parts.append([p.to_local().detach() for p in params])
        assert all(isinstance(optimizer.state[p]["m"], DTensor) for p in params)
    for p, *pieces in zip(whole, *parts):
        assert torch.equal(torch.cat(pieces), p)


@pytest.mark.parametrize("weights, moments", [("fp32", "fp32"), ("bf16-sr", "bf16")])
def test_a_hundred_shapes_and_new_rates_compile_a_handful_of_graphs(weights, moments, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    step = torch.compile(optim.adamw, backend=counter, dynamic=True, fullgraph=True)
    monkeypatch.setattr(optim, "compiled_adamw", lambda: step)
    shapes = [*SHAPES, *((3 + i, 7, 13) for i in range(9))]
    params, plain = (parameters(weights, shapes) for _ in range(2))
    options = dict(lr=1e-3, weights=weights, moments=moments)
    run(AdamW(groups(params), compile=True, **options), params, 2)
    run(AdamW(groups(plain), **options), plain, 2)
    assert counter.frame_count <= 5, counter.frame_count
    assert all(torch.equal(p, q) for p, q in zip(params, plain))


@pytest.mark.slow
@pytest.mark.parametrize("weights, moments", [("fp32", "fp32"), ("bf16-sr", "bf16")])
def test_the_compiled_step_equals_the_eager_one(weights, moments):
    params, plain = (parameters(weights) for _ in range(2))
    options = dict(lr=1e-3, weights=weights, moments=moments)
    run(AdamW(groups(params), compile=True, **options), params, 5)
    run(AdamW(groups(plain), **options), plain, 5)
    for p, q in zip(params, plain):  # the compiler fuses a * b + c, so the last bit may differ
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1 / 128 if p.dtype != torch.float32 else 0)


# ------------------------------------------------------------------------------ what it is for


def test_1000_steps_at_4e_6_follow_float32_with_stochastic_rounding_only():
    """bench/rounding.py on a smaller scale: only the hidden layer learns."""
    start, text = rounding.pretrained(96, 300, 32, 300), rounding.read("ask", 500, 1)
    losses = {}
    for name in ("fp32", "nearest", "sr"):
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        embed, w1, w2 = (w.to(dtype, copy=True) for w in start)
        w1 = nn.Parameter(w1)
        if name == "sr":
            optimizer = AdamW([w1], lr=4e-6, weights="bf16-sr")
        else:
            optimizer = torch.optim.AdamW([w1], lr=4e-6, weight_decay=0)
        losses[name] = rounding.train([embed, w1, w2], optimizer, text, 1000, 32)
    most, end = rounding.deviations(losses["sr"], losses["fp32"])
    assert most < 0.002 and abs(end) < 0.001
    most, end = rounding.deviations(losses["nearest"], losses["fp32"])
    assert most > 0.015 and end > 0.015


def test_the_recorded_experiment_says_so_too():
    bench = json.loads((Path(rounding.__file__).parent / "rounding.json").read_text())
    rows = {(row["weights"], row["moments"]): row for row in bench["rows"]}
    assert bench["lr"] == 4e-6 and bench["steps"] == 1000 and set(rows) == set(rounding.RUNS)
    nearest = rows.pop(rounding.NEAREST)
    assert nearest["largest_deviation"] > 0.05 and nearest["final_deviation"] > 0.05
    for (weights, moments), row in rows.items():
        assert row["largest_deviation"] < 0.01
        expected = optim.bytes_per_parameter(weights, moments)
        assert row["bytes_per_parameter"] == pytest.approx(expected, abs=1e-3)
