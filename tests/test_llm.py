"""The language model against transformers, the original's outputs, and its own invariants."""

import functools
import json
import os
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import tiny_cumo

import llm as module
from data import configs
from data.chat import IGNORE
from engine.decode import fast_step
from llm import LLM, Cache, LLMConfig, choose, positions, sees

GOLDEN = Path(os.environ.get("CUMO_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
V = 61
SMALL = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    initializer_range=0.15,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {  # transformers' class, and the fields that differ from SMALL
    "mistral, window 7": ("Mistral", dict(sliding_window=7)),
    "mistral, no window": ("Mistral", dict(sliding_window=None, rope_theta=1e6)),
    "llama, tied head": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=6)),
    "llama 3.1": ("Llama", dict(rope_parameters=LLAMA3, head_dim=16)),
    "llama, linear": (
        "Llama",
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    ),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "mixtral, window 5, top 1": (
        "Mixtral",
        dict(
            num_local_experts=3, num_experts_per_tok=1, sliding_window=5, tie_word_embeddings=True
        ),
    ),
    "odd heads": (
        "Mistral",
        dict(
            hidden_size=40,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=None,
            rms_norm_eps=0.5,
        ),
    ),
}


def same(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def peer(family, folder=None, **options):
    """A random transformers model in evaluation mode, or the one in `folder`."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, f"{family}ForCausalLM")
    if folder:
        return cls.from_pretrained(folder, attn_implementation="eager").eval()
    torch.manual_seed(0)
    config = peer_config(family, **options)
    config._attn_implementation = "eager"
    return cls(config).eval()


def peer_config(family, **options):
    return getattr(pytest.importorskip("transformers"), f"{family}Config")(**SMALL | options)


def build(seed=0, scale=5.0, **options):
    """A small LLM of ours, with weights large enough for uneven attention."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, dim=48, hidden_dim=72, n_layers=3, n_heads=6, n_kv_heads=2)
    llm = LLM(LLMConfig(**sizes | options)).eval()
    for p in llm.parameters():
        if p.dim() > 1:
            p.data *= scale
    return llm


def text(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "dense": {},
    "window": dict(sliding_window=6),
    "sparse": dict(num_experts=4),
    "sparse, window": dict(num_experts=4, sliding_window=6),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# ------------------------------------------------------------------------ the same as transformers


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family, options -> (transformers' model, ours with the weights it saved)."""

    @functools.cache
    def make(name):
        family, options = CASES[name]
        folder = tmp_path_factory.mktemp("peer")
        theirs = peer(family, **options)
        theirs.save_pretrained(folder)
        return theirs, LLM.from_pretrained(folder).eval()

    return make


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_transformers(pairs, name):
    theirs, ours = pairs(name)
    tokens = text(2, 20)
    same(ours(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_saved_model_loads_in_transformers(pairs, name, tmp_path):
    _, ours = pairs(name)
    ours.save_pretrained(tmp_path)
    tokens = text(2, 20)
    theirs = peer("Mixtral" if ours.cfg.num_experts else "Mistral", tmp_path)
    same(theirs(tokens).logits, ours(tokens))
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != ours.cfg.tie_embeddings
    again = LLM.from_pretrained(tmp_path)
    assert again.cfg == ours.cfg and torch.equal(again(tokens), ours(tokens))


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_transformers(pairs, name):
    theirs, ours = pairs(name)
    prompt = text(1, 9, seed=3)
    wanted = theirs.generate(
        prompt,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert ours.generate(prompt, max_new_tokens=12).tolist() == wanted[:, 9:].tolist()


def test_loss_equals_transformers(pairs):
    theirs, ours = pairs("mistral, window 7")
    tokens, labels = text(2, 20), text(2, 20)
    labels[:, :6] = IGNORE
    wanted = theirs(tokens, labels=labels).loss
    x, _ = ours.hidden(ours.embed(tokens))
    assert ours.loss(x, labels).item() == pytest.approx(wanted.item(), rel=1e-5)
    ours.loss(x, labels).backward()
    wanted.backward()
    theirs = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        same(p.grad, theirs[name].grad, 1e-4)


# ------------------------------------------------------------------------ the same as the original


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data in {GOLDEN}")
@pytest.mark.parametrize("case", ["pair", "with_text_only", "truncated"])
@pytest.mark.parametrize("name", ["mistral_dense", "mistral_moe", "mixtral_moe"])
@torch.no_grad()
def test_logits_loss_and_router_losses_equal_the_original(name, case):
    io = load_file(GOLDEN / f"cumo_{name}_io.safetensors")
    kind = json.loads((GOLDEN / f"cumo_{name}_io.json").read_text())
    ours = LLM(LLMConfig.from_hf({"model_type": "llava_" + kind["kind"]} | kind["llm_config"]))
    weights = load_file(GOLDEN / f"cumo_{name}_weights.safetensors")
    ours.load_original(
        (k, w) for k, w in weights.items() if "vision_tower" not in k and "mm_projector" not in k
    )
    ours.parity = True
    real = io[f"{case}.spliced_attention_mask"].bool()
    x, aux = ours.hidden(io[f"{case}.inputs_embeds"], real.long())
    same(ours.logits(x)[real], io[f"{case}.logits"][real], 2e-5)
    loss = ours.loss(x, io[f"{case}.spliced_labels"])
    assert loss.item() == pytest.approx(io[f"{case}.lm_loss"].item(), rel=1e-5)
    if aux:
        assert aux.balance.item() == pytest.approx(io[f"{case}.llm_balance_loss"].item(), rel=1e-5)
        assert aux.z.item() == pytest.approx(io[f"{case}.llm_z_loss"].item(), rel=1e-5)
    ours.parity = False  # changes only the routing of padding
    same(
        ours.logits(ours.hidden(io[f"{case}.inputs_embeds"], real.long())[0])[real],
        io[f"{case}.logits"][real],
        2e-5,
    )


# ----------------------------------------------------------------------------------- who sees whom


def test_positions_restart_in_each_document():
    segments = torch.tensor([[0, 1, 1, 1, 2, 2], [1, 1, 2, 3, 0, 0]])
    assert positions(segments).tolist() == [[0, 0, 1, 2, 0, 1], [0, 1, 0, 0, 0, 1]]


def test_a_window_of_three_sees_oneself_and_two_more():
    at = torch.arange(5)
    assert sees(at[:, None], at, torch.tensor(1), torch.tensor(1), 3).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@every_kind
@torch.no_grad()
def test_packed_equals_unpacked(kind):
    llm, lengths = build(**kind), (9, 4, 8)
    documents = [text(1, n, seed=n) for n in lengths]
    segments = torch.tensor([[d + 1 for d, n in enumerate(lengths) for _ in range(n)] + [0] * 3])
    packed = llm(torch.cat([*documents, torch.zeros(1, 3, dtype=torch.int64)], dim=1), segments)
    assert packed.isfinite().all()
    same(packed[:, :21], torch.cat([llm(document) for document in documents], dim=1))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@every_kind
@torch.no_grad()
def test_flex_attention_equals_plain_attention(kind, monkeypatch):
    """The GPU's code, with FlexAttention's uncompiled reference in place of its kernel."""
    monkeypatch.setattr(module, "compiled", lambda function: function)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 150, 16), torch.randn(2, 2, 150, 16), torch.randn(2, 2, 150, 16)
    segments = torch.arange(150).div(37, rounding_mode="floor").expand(2, -1).clone()
    segments[1] = 1
    places = torch.stack((positions(segments), segments), dim=1)
    block, plain = (
        module.attention_mask(places, places, kind.get("sliding_window"), dtype)
        for dtype in (None, torch.float32)
    )
    same(module.flex_attend(q, k, v, block), module.attend(q, k, v, plain))


def test_padding_is_neither_routed_nor_counted():
    llm = build(num_experts=4)
    tokens, segments = text(2, 10), torch.ones(2, 10, dtype=torch.int64)
    segments[1, 6:] = 0
    x = llm.embed(tokens)
    _, aux = llm.hidden(x, segments)
    _, other = llm.hidden(torch.where(segments[..., None] > 0, x, 7.0), segments)
    assert aux.load.shape == (3, 4) and aux.choice.shape == (3, 2, 10, 2)
    assert torch.equal(aux.load, other.load) and torch.equal(aux.balance, other.balance)
    assert torch.equal(aux.z, other.z)


def test_router_losses_take_the_whole_batch_as_one_sample():
    llm = build(num_experts=4, n_layers=2)
    inputs, losses, names = [], [], ("w1", "w2", "w3")
    for block in llm.model.layers:
        block.post_attention_layernorm.register_forward_hook(lambda m, x, y: inputs.append(y))
    _, aux = llm.hidden(llm.embed(text(2, 5)))
    for block, x in zip(llm.model.layers, inputs):
        weights = block.block_sparse_moe.public_state_dict(names)
        _, *two, _ = reference.sparse_moe(x.flatten(0, 1)[None], weights, 2, names, "silu")
        losses.append(two)
    balance, z = (sum(values) / 2 for values in zip(*losses))
    assert aux.balance.item() == pytest.approx(balance.item(), rel=1e-5)
    assert aux.z.item() == pytest.approx(z.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------- the loss


def test_chunked_loss_equals_whole_loss(monkeypatch):
    llm, tokens, labels = build(), text(3, 20), text(3, 20, seed=2)
    labels[:, ::3] = IGNORE

    def loss_and_grads():
        llm.zero_grad()
        x, _ = llm.hidden(llm.embed(tokens))
        loss = llm.loss(x, labels)
        loss.backward()
        return loss.detach(), [p.grad for p in llm.parameters()]

    whole, whole_grads = loss_and_grads()
    x, _ = llm.hidden(llm.embed(tokens))
    plain = F.cross_entropy(llm.logits(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    same(whole, plain.detach())
    rows, linear = [], F.linear

    def counted(x, weight, bias=None):
        rows.extend([len(x)] * (len(weight) == V))
        return linear(x, weight)

    monkeypatch.setattr(F, "linear", counted)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * V)
    chunked, chunked_grads = loss_and_grads()
    assert max(rows) == 7 and sum(rows) == (labels[:, 1:] != IGNORE).sum()  # none twice
    same(chunked, whole)
    for chunked_grad, whole_grad in zip(chunked_grads, whole_grads):
        same(chunked_grad, whole_grad)


def test_nothing_to_learn_costs_nothing():
    llm, tokens = build(), text(2, 6)
    x, _ = llm.hidden(llm.embed(tokens))
    loss = llm.loss(x, torch.full_like(tokens, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in llm.parameters())


def test_recomputing_blocks_changes_no_gradient():
    llm, tokens = build(num_experts=4).train(), text(2, 12)
    grads = []
    for llm.recompute in (0, 1, 9):
        llm.zero_grad()
        x, aux = llm.hidden(llm.embed(tokens))
        (llm.loss(x, tokens) + aux.balance + aux.z).backward()
        grads.append([p.grad for p in llm.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads))


# --------------------------------------------------------------------------- the cache, generation


@every_kind
@pytest.mark.parametrize("steps", [[1] * 20, [9] + [1] * 11, [3, 1, 7, 1, 8], [20]], ids=str)
@torch.no_grad()
def test_cache_equals_no_cache(kind, steps):
    llm, tokens = build(**kind), text(2, 20)
    cache = Cache(llm.cfg, 2, 20)
    parts = [llm.hidden(llm.embed(part), cache=cache)[0] for part in tokens.split(steps, dim=1)]
    same(torch.cat(parts, dim=1), llm.hidden(llm.embed(tokens))[0])


def test_ring_has_a_windows_slots():
    cfg = build(sliding_window=6).cfg
    assert Cache(cfg, 2, 1000).keys.shape == (3, 2, 2, 6, 8)
    assert Cache(cfg, 2, 4).keys.shape == (3, 2, 2, 4, 8)


def test_a_full_cache_says_so():
    llm = build()
    with pytest.raises(ValueError, match="room for 4"):
        llm.hidden(llm.embed(text(1, 5)), cache=Cache(llm.cfg, 1, 4))


@every_kind
def test_generation_equals_no_cache(kind):
    llm, tokens = build(**kind), text(1, 9)
    written = llm.generate(tokens, max_new_tokens=14)
    for _ in range(14):
        tokens = torch.cat((tokens, llm(tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(written, tokens[:, 9:])


@every_kind
def test_batch_equals_one_by_one(kind):
    llm, prompts = build(**kind), [text(1, n, seed=n) for n in (3, 11, 8)]
    batch, segments = (
        torch.cat([F.pad(row, (11 - row.shape[1], 0)) for row in rows])
        for rows in (prompts, [torch.ones_like(p) for p in prompts])
    )
    written = llm.generate(batch, segments=segments, max_new_tokens=10)
    assert torch.equal(written, torch.cat([llm.generate(p, max_new_tokens=10) for p in prompts]))
    embeds = llm.embed(batch)
    assert torch.equal(written, llm.generate(embeds=embeds, segments=segments, max_new_tokens=10))


def test_a_row_stops_at_its_end_token_and_the_others_go_on():
    llm, prompts, streamed = build(), text(3, 5), []
    free = llm.generate(prompts, max_new_tokens=12)
    stops = [free[0, 3].item(), free[1, 1].item()]
    written = llm.generate(prompts, max_new_tokens=12, eos_token_id=stops, stream=streamed.append)
    ends = [next((t for t, i in enumerate(row) if i in stops), 12) for row in free.tolist()]
    assert written.shape[1] == min(12, max(ends) + 1)
    assert torch.equal(torch.stack(streamed, 1), written)
    for row, (ours, theirs) in zip(ends, zip(written.tolist(), free.tolist())):
        assert ours[: row + 1] == theirs[: row + 1] and set(ours[row + 1 :]) <= {stops[0]}
    assert llm.generate(prompts[:1], max_new_tokens=12, eos_token_id=stops[0]).shape[1] <= 4


def test_a_seed_fixes_what_is_drawn():
    llm, prompt = build(), text(2, 5)
    a, b, c = (llm.generate(prompt, max_new_tokens=20, temperature=1.5, seed=s) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_tiny_temperature_is_greedy_and_a_nan_is_named():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert choose(logits, 1e-40)[0] == choose(logits, 1e-7)[0] == 1
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits[0, 2] = bad
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match="not a finite number"):
                choose(logits, temperature)


def test_sampling_follows_temperature_top_p_and_top_k():
    probs = torch.tensor([0.05, 0.5, 0.3, 0.15])
    logits = probs.log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature=1.0, top_p=1.0, top_k=None):
        ids = choose(logits, temperature, top_p, top_k, generator)
        return ids.bincount(minlength=4) / len(ids)

    def close(ours, theirs):
        return torch.allclose(ours, theirs, atol=0.02) and torch.equal(ours == 0, theirs == 0)

    assert close(drawn(), probs)
    assert close(drawn(temperature=0.5), probs**2 / (probs**2).sum())
    assert close(drawn(top_p=0.79), torch.tensor([0, 5 / 8, 3 / 8, 0]))
    assert close(drawn(top_p=0.81), torch.tensor([0, 0.5, 0.3, 0.15]) / 0.95)
    for tiny in (1e-9, 1e-46):  # float32 has no number as small as the second
        assert close(drawn(top_p=tiny), torch.tensor([0, 1.0, 0, 0]))
    assert close(drawn(top_k=2), torch.tensor([0, 5 / 8, 3 / 8, 0]))
    assert close(drawn(top_k=9), probs)
    assert drawn(temperature=0.0)[1] == 1


@pytest.mark.parametrize(
    "wrong",
    [dict(max_new_tokens=0), dict(temperature=-1), dict(top_p=0), dict(top_p=1.1), dict(top_k=0)],
    ids=str,
)
def test_silly_options_are_refused_by_name(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        build().generate(text(1, 3), **{"max_new_tokens": 2} | wrong)


def test_a_prompt_may_be_one_token_but_not_none():
    llm, one = build(), text(1, 1)
    written = llm.generate(one, max_new_tokens=3)
    assert torch.equal(written, llm.generate(one, segments=torch.ones_like(one), max_new_tokens=3))
    with pytest.raises(ValueError, match="the prompt is empty; it needs at least one token"):
        llm.generate(one[:, :0], max_new_tokens=3)
    with pytest.raises(ValueError, match="either tokens or embeds"):
        llm.generate(max_new_tokens=3)


def test_prompts_padded_on_the_right_are_refused():
    with pytest.raises(ValueError, match="on the left"):
        build().generate(text(1, 3), segments=torch.tensor([[1, 1, 0]]), max_new_tokens=2)


# ------------------------------------------------------------------------------- configs and files

MISTRAL = build(sliding_window=6).cfg.to_hf()
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize("kind, written", [
    ("mistral", dict(layer_types=["full_attention"] * 3)),
    ("mistral", dict(sliding_window=None, layer_types=["full_attention"] * 3)),
    ("llama", dict()),
    ("llama", dict(layer_types=MIXED)),
])  # fmt: skip
def test_a_window_that_no_layer_has_is_none(kind, written):
    config = MISTRAL | {"model_type": kind} | written
    assert LLMConfig.from_hf(config).sliding_window is None
    every = MISTRAL | {"layer_types": ["sliding_attention"] * 3}
    assert LLMConfig.from_hf(every).sliding_window == 6


def test_rescaled_frequencies_are_those_of_transformers_at_llama_3_2s_sizes():
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    written = MISTRAL | {"model_type": "llama", "head_dim": 64, "rope_scaling": rope}
    config = peer_config("Llama", head_dim=64, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    cfg = LLMConfig.from_hf(written)
    pair = torch.arange(0, 64, 2, dtype=torch.float32)
    torch.testing.assert_close(
        configs.rescaled(1 / cfg.rope_theta ** (pair / 64), cfg.rope_scaling), wanted
    )
    again = LLMConfig.from_hf(json.loads(json.dumps(cfg.to_hf())))
    assert again == cfg


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(model_type="gpt2"), "'gpt2' is not one of llama, mistral, mixtral"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported, only 'silu'"),
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type='dynamic'.*'llama3'"),
        (
            dict(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_parameters=PLAIN),
            "rope_type='dynamic'",
        ),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        (dict(rope_parameters=PLAIN | {"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
        (dict(rope_scaling={"type": "linear"}), "'linear' needs a positive factor, not None"),
        (dict(rope_scaling=LLAMA3 | {"factor": "8"}), "'llama3' needs a positive factor, not '8'"),
        (dict(layer_types=MIXED), "layer_types has full_attention and sliding_attention; supp"),
        (dict(layer_types=["chunked_attention"]), "layer_types has chunked_attention; supported"),
        (dict(quantization_config={"quant_method": "awq"}), "are quantised .*awq.*--quant int8"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type='yarn'"),
        (dict(num_attention_heads=5), "n_heads=5 is not a multiple of"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_we_cannot_run_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        LLMConfig.from_hf(MISTRAL | change)


def test_an_incomplete_config_is_refused_by_name():
    with pytest.raises(ValueError, match="hidden_dim"):
        LLMConfig.from_hf({k: v for k, v in MISTRAL.items() if k != "intermediate_size"})


def test_configs_survive_the_round_trip_and_both_ways_of_writing_rope_theta():
    scaled = dict(rope_scaling={"rope_type": "linear", "factor": 2.0})
    for options in (*KINDS.values(), scaled):
        cfg = build(rope_theta=5e5, **options).cfg
        assert LLMConfig.from_hf(cfg.to_hf()) == cfg
    new = MISTRAL | {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}
    assert LLMConfig.from_hf(new).rope_theta == 7e5


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
def test_a_silent_config_means_what_transformers_takes_it_for(family):
    needed = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    written = {"model_type": family} | {name: MISTRAL[name] for name in needed}
    written |= {"hidden_size": 64, "num_attention_heads": 8}
    cfg = LLMConfig.from_hf(written)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**written)
    for ours, name in configs.LLM_NAMES.items():
        if name in ("rope_theta", "rope_scaling", "head_dim", "max_position_embeddings"):
            continue
        wanted = getattr(theirs, name, LLMConfig.__dataclass_fields__[ours].default)
        assert getattr(cfg, ours) == wanted, name
    assert cfg.rope_theta == theirs.rope_parameters["rope_theta"]


def test_loading_lists_all_that_does_not_fit():
    llm = build()
    weights = dict(llm.public_state_dict())
    del weights["model.norm.weight"]
    weights["lm_head.weight"] = torch.zeros(3, 3)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)  # old files have it
    with pytest.raises(ValueError) as error:
        build().load_original(weights.items())
    for words in (
        "missing: model.norm.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias;",
        "lm_head.weight is [3, 3] instead of [61, 48]",
    ):
        assert words in str(error.value)


def test_a_tied_head_stored_twice_is_no_error(tmp_path):
    llm = build(tie_embeddings=True)
    llm.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    half = LLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.norm.weight, llm.model.norm.weight.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("experts, window, rope", [(0, None, None), (4, 5, None), (0, 5, LLAMA3)])
def test_compiled_steps_say_the_same(experts, window, rope):
    llm = tiny_cumo(llm_experts=experts, window=window).llm.double().eval()
    llm.cfg.rope_scaling = rope
    tokens, how = torch.randint(97, (2, 7)), dict(max_new_tokens=300)
    assert torch.equal(llm.generate(tokens, **how, step=fast_step), llm.generate(tokens, **how))
    alone = llm.generate(tokens[:1], **how, step=fast_step)
    assert torch.equal(alone, llm.generate(tokens[:1], **how))


def test_generation_goes_on_from_a_cache():
    for window in (None, 5):
        llm = tiny_cumo(window=window).llm.eval()
        tokens, cache = torch.randint(97, (1, 7)), Cache(llm.cfg, 1, 40)
        first = llm.generate(tokens, max_new_tokens=4, cache=cache)
        assert cache.seen == 10  # the last token of the answer was not read
        more = torch.cat((first[:, -1:], torch.randint(97, (1, 6))), dim=1)
        whole = torch.cat((tokens, first[:, :-1], more), dim=1)
        again = llm.generate(more, max_new_tokens=20, cache=cache)
        assert torch.equal(again, llm.generate(whole, max_new_tokens=20))


def test_stream_can_end_the_answer():
    llm, seen = tiny_cumo().llm.eval(), []
    ids = llm.generate(torch.randint(97, (1, 3)), max_new_tokens=9,
                       stream=lambda i: seen.append(i) or len(seen) == 4)  # fmt: skip
    assert ids.shape == (1, 4)
