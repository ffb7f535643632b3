"""The C++ step gives PyTorch's logits: at odd sizes, in every type, with any number of rows."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import decode
from engine.decode import MOST_ROWS, OneToken, Step, fast_step
from engine.quant import quantize
from llm import LLM, Cache, LLMConfig

# 97 tokens; no size is a multiple of a register's width, and some are smaller
SIZES = {
    "odd": LLMConfig(97, 42, 59, 2, 3, 1, head_dim=14),
    "wide": LLMConfig(97, 200, 331, 2, 4, 2, head_dim=38, tie_embeddings=True),
    "tiny": LLMConfig(97, 6, 5, 1, 3, 3, head_dim=2),
    "many heads": LLMConfig(97, 42, 59, 2, 9, 1, head_dim=70),
    "window": LLMConfig(97, 42, 59, 2, 4, 2, head_dim=10, sliding_window=5),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    llm = LLM(SIZES[name])
    for parameter in llm.parameters():  # large weights, so that a mistake exceeds rounding errors
        parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 2)
    return llm.to(dtype).eval()


def prefilled(llm, B, T=7, dtype=torch.float32):
    """A cache with prompts of unequal lengths, and the next tokens."""
    tokens = torch.randint(97, (B, T))
    segments = (torch.arange(T) >= torch.arange(B)[:, None] % (T - 1)).long()
    cache = Cache(llm.cfg, B, T + 12, dtype)
    llm.hidden(llm.embed(tokens), segments, cache)
    return cache, torch.randint(97, (12, B, 1))


def steps_of(llm, cache, tokens):
    """Logits [steps, B, V] of the C++ and of PyTorch, from two copies of one cache."""
    step, other = Step.of(llm, cache), copy.deepcopy(cache)
    fast = []
    for ids in tokens:
        fast.append(step(llm.embed(ids)).clone())
        high, best = fast[-1].max(-1)
        assert all(map(torch.equal, step.greatest, (high, best)))
    slow = [llm.logits(llm.hidden(llm.embed(ids), cache=other)[0])[:, 0] for ids in tokens]
    assert cache.seen == other.seen and torch.equal(cache.next, other.next)
    assert torch.equal(cache.places, other.places)
    torch.testing.assert_close(cache.keys, other.keys, atol=2e-5, rtol=2e-2)
    return torch.stack(fast), torch.stack(slow)


@pytest.mark.parametrize("name, B", [*itertools.product(SIZES, (1, 3, 4, 9)), ("odd", 19),
                                     ("many heads", 19)])  # fmt: skip
def test_logits_are_those_of_pytorch(name, B):
    """Unequal prompts, odd sizes, grouped heads, a ring that wraps around twice, a tied head; 19
    rows are more than a register has lanes."""
    llm = made(name)
    fast, slow = steps_of(llm, *prefilled(llm, B))
    torch.testing.assert_close(fast, slow, atol=2e-5 * slow.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_more_rows_than_a_register_has_lanes_are_near_the_truth(name):
    """The truth is float64. The error is at most 2.5 times PyTorch's: sums have another order."""
    llm = made(name)
    cache, tokens = prefilled(llm, 19)
    exact, truth, other = copy.deepcopy(llm).double(), copy.deepcopy(cache), copy.deepcopy(cache)
    truth.keys, truth.values = truth.keys.double(), truth.values.double()
    step, errors = Step.of(llm, cache), []
    for ids in tokens:
        right = exact.logits(exact.hidden(exact.embed(ids), cache=truth)[0])[:, 0]
        slow = llm.logits(llm.hidden(llm.embed(ids), cache=other)[0])[:, 0]
        fast = step(llm.embed(ids))
        errors.append(torch.stack([(y - right).square().mean() for y in (fast, slow)]))
    ours, theirs = torch.stack(errors).mean(0).sqrt()
    assert 0 < ours < 2.5 * theirs


@pytest.mark.parametrize("C, T", [(1, 9), (1, 64), (3, 5)])
@pytest.mark.parametrize("name", ["odd", "wide", "tiny"])
def test_short_prompts_at_once(name, C, T):
    """The first turn and a second one: the last logits, and everything in the cache."""
    llm = made(name)
    cache = Cache(llm.cfg, C, 2 * T + 1)
    exact, other = copy.deepcopy(llm).double(), Cache(llm.cfg, C, 2 * T + 1, torch.float64)
    step = Step.of(llm, cache)
    for _ in range(2):
        ids = torch.randint(97, (C, T))
        assert step.takes(llm.embed(ids), None)
        slow = exact.logits(exact.hidden(exact.embed(ids), cache=other)[0])[:, -1]
        fast = step(llm.embed(ids))
        for ours, true in (fast, slow), (cache.keys, other.keys), (cache.values, other.values):
            torch.testing.assert_close(ours.double(), true, atol=2e-5 * true.abs().max(), rtol=0)
        assert torch.equal(cache.places, other.places) and torch.equal(cache.next, other.next)
    assert not step.takes(llm.embed(torch.randint(97, (C, 2))), None), "the cache is full"


@pytest.mark.parametrize("name", ["odd", "wide"])
def test_bfloat16_is_nearer_to_the_truth_than_pytorch(name):
    llm = made(name, torch.bfloat16)
    exact = copy.deepcopy(llm).float()
    torch.manual_seed(1)
    cache, tokens = prefilled(llm, 5, dtype=torch.bfloat16)
    torch.manual_seed(1)
    truth, _ = steps_of(exact, *prefilled(exact, 5))
    step, other, errors = Step.of(llm, cache), copy.deepcopy(cache), []
    for ids, right in zip(tokens, truth):
        fast = step(llm.embed(ids))
        slow = llm.logits(llm.hidden(llm.embed(ids), cache=other)[0])[:, 0].float()
        errors.append(torch.stack([(y - right).square().mean() for y in (fast, slow)]))
    ours, theirs = torch.stack(errors).mean(0)
    assert ours < theirs < 0.01 * truth.square().mean()


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("name", ["odd", "wide", "tiny"])
def test_int8_weights(name, B):
    llm = quantize(made(name))
    fast, slow = steps_of(llm, *prefilled(llm, B))
    torch.testing.assert_close(fast, slow, atol=2e-5 * slow.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["odd", "wide"])
@pytest.mark.parametrize("size", [0, 1e-20, 1, 1e4, 1e15])
def test_int8_weights_and_a_feature_far_above_the_others(name, size):
    """A single row is multiplied in integers, with 24 bits for its greatest feature."""
    llm = quantize(made(name))
    cache, _ = prefilled(llm, 1)
    exact, other = copy.deepcopy(llm).double(), copy.deepcopy(cache)
    other.keys, other.values = other.keys.double(), other.values.double()
    x = torch.randn(1, 1, llm.cfg.dim) * min(size, 1)
    x[..., 7] = size
    fast = Step.of(llm, cache)(x).double()
    true = exact.logits(exact.hidden(x.double(), cache=other)[0])[:, 0]
    torch.testing.assert_close(fast, true, atol=2e-5 * true.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("C, T", [(1, 1), (3, 1), (1, 5), (2, 4)])
def test_tokens_or_their_embeddings(dtype, C, T):
    llm = made("odd", torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    llm = quantize(llm) if dtype == torch.int8 else llm
    ids = torch.randint(97, (C, T))
    steps = [Step.of(llm, Cache(llm.cfg, C, 12, llm.model.norm.weight.dtype)) for _ in range(2)]
    assert torch.equal(steps[0](ids), steps[1](llm.embed(ids)))
    for bad in (-1, 97):
        with pytest.raises(ValueError, match=f"tokens .*{bad}.* must be 0 to 96"):
            steps[0](ids.clone().fill_(bad))
    assert steps[0].cache.seen == T, "refused tokens must not change the cache"


@pytest.mark.parametrize("name", ["wide", "odd", "many heads"])
def test_a_row_is_the_same_on_any_number_of_threads_and_nearly_so_alone(name):
    """Also where a thread has only some of the heads that share their keys."""
    llm = made(name)
    cache, tokens = prefilled(llm, 9)
    alone = Cache(llm.cfg, 1, cache.size)
    alone.keys, alone.values, alone.places, alone.next = (
        part.clone()
        for part in (cache.keys[:, 4:5], cache.values[:, 4:5], cache.places[4:5], cache.next[4:5])
    )
    alone.seen = cache.seen
    found = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            together = copy.deepcopy(cache)
            step = Step.of(llm, together)
            found.append(torch.stack([step(llm.embed(ids)).clone() for ids in tokens]))
    finally:
        torch.set_num_threads(1)
    step = Step.of(llm, alone)
    single = torch.stack([step(llm.embed(ids[4:5])).clone() for ids in tokens])
    assert all(torch.equal(found[0], other) for other in found[1:])
    torch.testing.assert_close(found[0][:, 4:5], single, atol=2e-4, rtol=0)


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("words, first", [([96, 50, 8], 8), ([96, 49], 49), ([0, 96], 0), ([], 0)])
def test_of_equal_logits_the_first_is_the_greatest(C, words, first):
    """On one thread and on three, each with a part of the vocabulary."""
    llm = made("odd")
    llm.lm_head.weight[:] = -1 if words else 0
    llm.lm_head.weight[words] = 1  # times x, whose features are all positive
    for block in llm.model.layers:
        block.self_attn.o_proj.weight[:] = block.mlp.down_proj.weight[:] = 0
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            step = Step.of(llm, Cache(llm.cfg, C, 4))
            logits = step(torch.ones(C, 1, 42))
            assert torch.equal(step.greatest[0], logits.max(-1).values)
            assert step.greatest[1].tolist() == [first] * C
    finally:
        torch.set_num_threads(1)


def test_generate_takes_it_and_goes_on_over_turns(monkeypatch):
    llm, calls = made("window"), []
    step = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, x: calls.append(len(x)) or step(self, x))
    answers = []
    for fast in (None, fast_step):
        cache = Cache(llm.cfg, 2, 40)
        torch.manual_seed(0)
        turns = [torch.randint(97, (2, n)) for n in (6, 1, 3)]
        answers.append([llm.generate(t, max_new_tokens=5, cache=cache, step=fast) for t in turns])
    assert all(torch.equal(a, b) for a, b in zip(*answers))
    assert calls == [2] * 13  # all but the turns of 6 and 3 tokens, where the ring wraps around


@pytest.mark.parametrize("name", ["odd", "wide"])
def test_weights_move_together_and_stay_the_same(name, tmp_path):
    """The packed model is saved, copied and trained as before, and is packed only once."""
    llm = made(name)
    before = {key: value.clone() for key, value in llm.state_dict().items()}
    step = lambda: Step.of(llm, Cache(llm.cfg, 1, 4))
    step()
    at = [p.data_ptr() for p in llm.parameters()]
    step()
    assert at == [p.data_ptr() for p in llm.parameters()]
    matrices = [p for p in llm.model.layers.parameters() if p.dim() > 1]
    assert len({p.untyped_storage().data_ptr() for p in matrices}) == 1
    assert all(p.data_ptr() % 64 == 0 for p in matrices)
    llm.save_pretrained(tmp_path)
    for found in (llm, copy.deepcopy(llm), LLM.from_pretrained(tmp_path)):
        for key, value in found.state_dict().items():
            assert torch.equal(value, before[key]), key
    with torch.enable_grad():
        llm(torch.tensor([[1, 2, 3]])).sum().backward()
        torch.optim.SGD(llm.parameters(), lr=0.1).step()
    changed = {
        key for key, value in llm.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == set(before)


@pytest.mark.parametrize("experts, dtype, rows", [(4, torch.float32, 1), (0, torch.float16, 1),
                                                  (0, torch.float32, MOST_ROWS + 1)])  # fmt: skip
def test_what_it_cannot_do_is_left_to_pytorch(experts, dtype, rows):
    llm = LLM(LLMConfig(97, 16, 24, 1, 2, 1, num_experts=experts, top_k=2)).to(dtype)
    assert Step.of(llm, Cache(llm.cfg, rows, 4, dtype)) is None


EAGER = {**SIZES, "experts": LLMConfig(97, 16, 24, 2, 4, 2, num_experts=3, top_k=2)}


@pytest.fixture
def eager(monkeypatch):
    """Blocks as they are: the compiler takes many seconds for each size."""
    monkeypatch.setattr(decode, "tuned", lambda function: function)


def one_token_equals_step(llm, cache, tokens, device="cpu"):
    one, other = OneToken(llm, cache), copy.deepcopy(cache)
    for ids in tokens:
        assert one.takes(ids, None)
        fast, (slow, _) = one(ids), llm.step(ids, None, other)
        torch.testing.assert_close(fast, slow, atol=2e-5 * slow.abs().max().item(), rtol=0)
        assert all(map(torch.equal, one.greatest, fast.max(-1)))
        assert cache.seen == other.seen and torch.equal(cache.next, other.next)
        assert torch.equal(cache.places, other.places)
        torch.testing.assert_close(cache.keys, other.keys, atol=2e-5, rtol=2e-2)
    return one


@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("name", EAGER)
def test_the_step_that_a_gpu_records_is_that_of_pytorch(name, C, quant, eager, monkeypatch):
    """On a CPU, where it is not recorded: unequal prompts, odd sizes, a ring that wraps around
    twice, and a cache that is full in the end."""
    monkeypatch.setitem(SIZES, "experts", EAGER["experts"])
    llm = quantize(made(name)) if quant else made(name)
    cache, tokens = prefilled(llm, C)
    one = one_token_equals_step(llm, cache, tokens)
    if not cache.ring:
        assert cache.seen == cache.size and not one.takes(tokens[0], None)
        with pytest.raises(ValueError, match="room for 19"):
            llm.step(tokens[0], None, cache)


def test_a_recorded_step_sees_nothing_but_its_tensors(eager):
    """The second step must not depend on a number of the first: replaying repeats its kernels. Here
    the first run's tensors stand in for them: none may be replaced, and none read on the host."""
    llm = made("odd")
    cache, tokens = prefilled(llm, 2)
    one = OneToken(llm, cache)
    one(tokens[0])
    kept = {name: x for name, x in vars(one.rolling).items() if isinstance(x, torch.Tensor)}
    at = {name: x.data_ptr() for name, x in kept.items()}
    with FakeTensorMode(allow_non_fake_inputs=True):  # a value read on the host raises here
        one.run()
    for ids in tokens[1:]:
        one(ids)
    now = {name: getattr(one.rolling, name).data_ptr() for name in kept}
    assert now == at and cache.next is one.rolling.next


def test_a_step_that_cannot_be_recorded_is_an_error_with_the_reason(monkeypatch):
    """Never silently slower. The end of a failed capture raises an error of its own."""
    replayed = []

    class Graph:
        def replay(self):
            replayed.append(self)

    @contextlib.contextmanager
    def graph(made, stream, capture_error_mode):
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error\nmore") from None

    fakes = dict(CUDAGraph=Graph, graph=graph, Stream=lambda device: None,
                 device=lambda device: contextlib.nullcontext())  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    out = torch.zeros(2)
    replay = decode.recorded(lambda: out, "a card")
    assert not replayed and replay() is out and len(replayed) == 1

    def reads():
        raise RuntimeError("operation not permitted when stream is capturing\nlong text")

    with pytest.raises(ValueError, match="cannot record.*not permitted when.*is capturing. With"):
        decode.recorded(reads, "a card")


def test_float32_weights_with_a_cache_in_bfloat16():
    """As under autocast: keys and values are rounded, nothing else is."""
    llm = made("wide")
    cache, tokens = prefilled(llm, 3)
    half, x = copy.deepcopy(cache), llm.embed(tokens[0])
    half.keys, half.values = half.keys.bfloat16(), half.values.bfloat16()
    rounded = copy.deepcopy(half)
    rounded.keys, rounded.values = rounded.keys.float(), rounded.values.float()
    found, right = Step.of(llm, half)(x), Step.of(llm, rounded)(x)
    assert (found - right).norm() < 1e-2 * right.norm()


def test_padded_prompts_are_left_to_pytorch():
    """A batch of unequal prompts gives the same answers as one prompt at a time."""
    llm = made("odd")
    tokens = torch.randint(97, (3, 6))
    segments = (torch.arange(6) >= torch.tensor([[0], [2], [5]])).long()
    answers = llm.generate(tokens, segments=segments, max_new_tokens=6, step=fast_step)
    for row, segment, answer in zip(tokens, segments, answers):
        alone = llm.generate(row[segment == 1][None], max_new_tokens=6)
        assert torch.equal(answer, alone[0])


@pytest.mark.parametrize(
    "shape", [(3, 1, 42), (1, 1, 42), (2, 1, 41), (2, 5), (2, 40, 42), (2, 0, 42)]
)
def test_rows_that_do_not_fit_are_refused(shape):
    llm = made("odd")
    step = Step.of(llm, Cache(llm.cfg, 2, 12))
    with pytest.raises(ValueError, match="does not fit a cache of 2 rows, 42 features"):
        step(torch.zeros(shape))


def test_weights_replaced_or_cast_meanwhile():
    """An answer keeps the weights it began with; the scales of int8 may be bfloat16."""
    llm = made("odd")
    cache, tokens = prefilled(llm, 1)
    other, x = copy.deepcopy(cache), llm.embed(tokens[0])
    step, right = Step.of(llm, cache), Step.of(llm, other)(x).clone()
    llm.to(torch.bfloat16)
    assert torch.equal(step(x), right)
    llm = quantize(made("odd")).to(torch.bfloat16)
    found = Step.of(llm, Cache(llm.cfg, 1, 4, torch.bfloat16))(llm.embed(tokens[0]))
    assert found.isfinite().all()


@pytest.mark.parametrize("known", [True, False])
def test_systems_without_huge_pages(monkeypatch, known):
    class Mapped(decode.mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(decode.mmap, "mmap", Mapped)
    if not known:
        monkeypatch.delattr(decode.mmap, "MADV_HUGEPAGE", raising=False)
    llm = made("odd")
    fast, slow = steps_of(llm, *prefilled(llm, 1))
    torch.testing.assert_close(fast, slow, atol=2e-5 * slow.abs().max().item(), rtol=0)


def test_a_model_asked_in_inference_mode_can_be_trained():
    llm = made("odd")
    with torch.inference_mode():
        llm.generate(torch.tensor([[1, 2]]), max_new_tokens=3, step=fast_step)
    with torch.enable_grad():
        llm(torch.tensor([[1, 2, 3]])).sum().backward()


def test_monstrous_sizes_are_left_to_pytorch():
    llm = LLM(LLMConfig(9, 8, 8, 1, 1, 1, head_dim=2**11))
    assert Step.of(llm, Cache(llm.cfg, 1, 4)) is None


def test_a_nan_is_named():
    llm = made("odd")
    llm.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    llm.model.layers[1].mlp.down_proj.weight[:3] = 0
    cache, tokens = prefilled(llm, 1)
    step = Step.of(llm, cache)
    assert step(llm.embed(tokens[0])).isnan().any() and step.greatest is None
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(1, 1, 42)
        x[..., 5] = bad
        step = Step.of(quantize(made("odd")), Cache(llm.cfg, 1, 4))
        assert not step(x).isfinite().any(), f"{bad} among int8 weights"
    with pytest.raises(ValueError, match="a logit is not a finite number"):
        llm.generate(torch.tensor([[1, 2]]), max_new_tokens=3, step=fast_step)


@pytest.mark.parametrize("compiler, said", [
    ("false", "false cannot compile decode.cpp: no reason given"),
    ("no-such-compiler", "no-such-compiler cannot make .*decode-.*No such file"),
])  # fmt: skip
def test_a_compiler_that_fails_is_named(compiler, said, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=said):
        decode.compile_step.__wrapped__("float", "float")
    assert not [*tmp_path.glob("nanocumo/*")], "no incomplete file may stay"


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="compile needs a C.. compiler .g.. or clang.*slower"):
        decode.compile_step.__wrapped__("float", "float")


def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decode.compile_step.__wrapped__("float", "float")
    (library,) = tmp_path.glob("nanocumo/*")
    monkeypatch.setattr(decode.subprocess, "run", None)
    decode.compile_step.__wrapped__("float", "float")
    assert [*tmp_path.glob("nanocumo/*")] == [library]


@pytest.mark.skipif(decode.platform.machine() != "x86_64", reason="names of another processor")
@pytest.mark.parametrize("kind", ["x86-64", "x86-64-v3", "native"])  # SSE2, AVX2, this one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_processors_without_avx512_get_the_same(kind, dtype, monkeypatch):
    flags = [flag.replace("native", kind) for flag in decode.FLAGS]
    monkeypatch.setattr(decode, "FLAGS", flags)
    monkeypatch.setattr(decode, "compile_step", decode.compile_step.__wrapped__)
    llm = made("wide", torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    llm = quantize(llm) if dtype == torch.int8 else llm
    exact, most = copy.deepcopy(llm).float(), 4e-2 if dtype == torch.bfloat16 else 1e-5
    for B in (1, 5):
        cache, tokens = prefilled(llm, B, dtype=llm.model.norm.weight.dtype)
        other = copy.deepcopy(cache)
        other.keys, other.values = other.keys.float(), other.values.float()
        fast = Step.of(llm, cache)(llm.embed(tokens[0]))
        right = exact.logits(exact.hidden(llm.embed(tokens[0]).float(), cache=other)[0])[:, 0]
        assert (fast - right).norm() < most * right.norm()
