"""The language model: a Mistral-style decoder, dense or (Mixtral) with sparse experts.

A decoder makes T predictions from T tokens, each from the tokens before it. Every layer adds two
things to the residual stream x [B, T, D]: what attention fetched from earlier positions, and what
an MLP made of it. The recipe is today's usual one; Llama, Mistral and Mixtral weights all fit:

    tokens -> embed -> x -+- RMSNorm -> attention -+- RMSNorm -> SwiGLU -+-> RMSNorm -> head
                          '----------- + ----------'---------- + --------'
                           `--------------- n_layers times --------------'

    RMSNorm   x / rms(x) * weight: LayerNorm without the mean and without the bias.
    RoPE      rotates pairs of features of q and k by an angle proportional to the position, so
              that q . k depends on the distance of two tokens only. Nothing is learned.
    GQA       H query heads share G key/value heads: the cache shrinks by H / G.
    SwiGLU    down(silu(gate(x)) * up(x)); or several of them behind a router (mlp_moe.py).

Three questions decide how such a model trains and talks. Each is answered in one place:

Who sees whom? `sees`: the past, in the same document, within the window. Training packs several
conversations into a row; `segments` [B, T] numbers them (0 is padding) and positions restart in
each, so packing changes no logit. A sliding window (Mistral-7B-v0.1: 4096 tokens) limits how far
back one layer looks; L layers look L times as far.

What does the loss hold? The logits of 4,096 tokens are 500 MiB for Mistral-7B, their softmax and
gradient as much again. `loss.py` makes them a chunk at a time, and never twice.

What does generation remember? `Cache`: keys and values of the tokens so far. With a window it is
a ring, and a text of any length takes `sliding_window` slots.

None of this is new in CuMo: to the decoder an image is 576 more rows of x (cumo.py).
Mistral: arXiv 2310.06825. Mixtral: 2401.04088. RoPE: 2104.09864. GQA: 2305.13245.

Letters: B rows, T tokens, D features, H query heads, G key/value heads, A head size, V vocabulary,
L layers, E experts; in BHTK and B2K, K keys; elsewhere, as in mlp_moe.py, K experts a token.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from data.hub import local_folder
from data.weights import (
    check_fields,
    load_into,
    read_config,
    read_tensors,
    write_json,
    write_tensors,
)
from engine.decode import Step
from loss import mean_cross_entropy
from mlp_moe import Aux, SparseMoE, checkpointed

HF_NAMES = {  # our name of a field -> its name in a public config.json
    "vocab_size": "vocab_size", "dim": "hidden_size", "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "max_positions": "max_position_embeddings",
    "sliding_window": "sliding_window", "tie_embeddings": "tie_word_embeddings",
    "num_experts": "num_local_experts", "top_k": "num_experts_per_tok"}  # fmt: skip
HF_DEFAULTS = {  # model_type -> what transformers assumes where the file is silent, unlike us
    "llama": {"rms_norm_eps": 1e-6, "num_key_value_heads": None},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8},
}


@dataclass
class LLMConfig:
    vocab_size: int
    dim: int  # D, width of the residual stream
    hidden_dim: int  # width inside the MLP
    n_layers: int
    n_heads: int  # H, query heads
    n_kv_heads: int  # G, key/value heads, a divisor of n_heads
    head_dim: int | None = None  # A; None: dim // n_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4  # the slowest pair takes about 2 pi theta tokens a turn
    max_positions: int = 32768  # noted in config.json; RoPE has no table to run out of
    sliding_window: int | None = None  # tokens seen, oneself included; None: all
    tie_embeddings: bool = False  # the head is the embedding, transposed
    num_experts: int = 0  # E in every layer; 0: dense
    top_k: int = 2  # experts a token

    def __post_init__(self):
        check_fields(self)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads=} is not a multiple of {self.n_kv_heads=}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"{self.dim=} is not a multiple of {self.n_heads=}: set head_dim")
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} is odd, but RoPE rotates pairs of features")

    @classmethod
    def from_hf(cls, config: dict) -> "LLMConfig":
        """From the config.json of a Llama, Mistral or Mixtral; ValueError for any other kind."""
        family = str(config.get("model_type")).removeprefix("llava_")  # CuMo's own: llava_mistral
        if family not in HF_DEFAULTS:
            raise ValueError(f"model_type {family!r} is not one of {', '.join(HF_DEFAULTS)}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # new name, old
        if not isinstance(rope, dict):
            raise ValueError(f"rope_parameters={rope!r:.80} must be an object")
        for field, value, supported in (
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("attention_bias", config.get("attention_bias", False), False),
            ("mlp_bias", config.get("mlp_bias", False), False),
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ):
            if value != supported:
                raise ValueError(f"{field}={value!r} is not supported, only {supported!r}")
        config = HF_DEFAULTS[family] | config | rope  # which is where newer files have rope_theta
        given = {ours: config[theirs] for ours, theirs in HF_NAMES.items() if theirs in config}
        given["n_kv_heads"] = given["n_kv_heads"] or given.get("n_heads")
        try:
            return cls(**given)
        except TypeError as error:  # names the required fields that are not there
            raise ValueError(f"config.json is incomplete: {error}") from None

    def to_hf(self) -> dict:
        """A config.json with which transformers, too, loads the weights."""
        family = "Mixtral" if self.num_experts else "Mistral"
        kind = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
        dense = () if self.num_experts else ("num_experts", "top_k")  # which has no such fields
        fields = {HF_NAMES[k]: v for k, v in asdict(self).items() if k not in dense}
        return kind | {"hidden_act": "silu"} | fields


def positions(segments_BT: Tensor) -> Tensor:
    """Place of each token in its own document: [0, 1, 1, 1, 2, 2] -> [0, 0, 1, 2, 0, 1]."""
    column_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    starts_BT = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
    return column_T - torch.where(starts_BT, column_T, 0).cummax(1).values


def sees(q_pos, k_pos, q_seg, k_seg, window):
    """Who sees whom. Padding (segment 0) sees padding, so that no softmax runs over nothing."""
    seen = (q_seg == k_seg) & (k_pos <= q_pos)
    return seen if window is None else seen & (q_pos - k_pos < window)


def attention_mask(q_B2T: Tensor, k_B2K: Tensor, window: int | None, dtype=None):
    """`sees` for all pairs of places (position, segment): zeros and -infs to add to the scores, or,
    without a dtype, FlexAttention's list of the blocks that have anything to see."""
    if dtype is None:

        def see(b, head, q, k):
            return sees(q_B2T[b, 0, q], k_B2K[b, 0, k], q_B2T[b, 1, q], k_B2K[b, 1, k], window)

        B, T, K = len(q_B2T), q_B2T.shape[2], k_B2K.shape[2]
        return compiled(create_block_mask)(see, B, None, T, K, device=q_B2T.device)
    (q_pos, q_seg), (k_pos, k_seg) = q_B2T[..., None].unbind(1), k_B2K[:, :, None].unbind(1)
    seen_BTK = sees(q_pos, k_pos, q_seg, k_seg, window)
    mask_BTK = torch.zeros(seen_BTK.shape, dtype=dtype, device=seen_BTK.device)
    return mask_BTK.masked_fill(~seen_BTK, -torch.inf)[:, None]


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function)  # at the first use: asking for it costs seconds


def attend(q_BHTA: Tensor, k_BGKA: Tensor, v_BGKA: Tensor, mask: Tensor | BlockMask) -> Tensor:
    """softmax(q k / sqrt(A) + mask) v; each key/value head serves H / G query heads."""
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        return flex(q_BHTA, k_BGKA, v_BGKA, block_mask=mask, enable_gqa=True)
    (B, H, T, A), G = q_BHTA.shape, k_BGKA.shape[1]
    if T > 1 and not (v_BGKA.dtype == torch.bfloat16 and v_BGKA.device.type == "cpu"):
        k, v = (y.repeat_interleave(H // G, 1) for y in (k_BGKA, v_BGKA))
        return F.scaled_dot_product_attention(q_BHTA, k, v, attn_mask=mask)
    # for one query, and in bf16 on a CPU, two plain products are faster (bench/attention.py)
    q = (q_BHTA * A**-0.5).reshape(B, G, H // G * T, A)
    scores_BHTK = (q @ k_BGKA.mT).view(B, H, T, -1) + mask
    probs_BHTK = scores_BHTK.softmax(-1).to(v_BGKA.dtype)
    return (probs_BHTK.view(B, G, H // G * T, -1) @ v_BGKA).view(B, H, T, A)


def rope_tables(pos_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, A / 2] of the angles at these positions, in float32."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=pos_BT.device)
    angle = pos_BT[:, None, :, None] * (1 / theta ** (pair / head_dim))
    return angle.cos(), angle.sin()


def rotate(x_BHTA: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE. Feature i is paired with feature i + A / 2, as in all weights in HF's layout."""
    cos, sin = rope
    a, b = x_BHTA.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTA.dtype)


class Cache:
    """What generation remembers: keys, values and places of the tokens so far, one document a row.

    There are slots for `size` tokens or for one window, whichever is less. Beyond that the slots
    are a ring: token n goes to slot n % window. `sees` asks for positions, so order is no matter;
    an empty slot has segment 0, which nobody sees. Padding comes on the left of the first tokens,
    or not at all.
    """

    def __init__(self, cfg: LLMConfig, rows: int, size: int, dtype=torch.float32, device="cpu",
                 compile=False):  # fmt: skip
        self.compile = compile  # the step of one token
        self.ring = cfg.sliding_window is not None and cfg.sliding_window < size
        self.size, self.seen = cfg.sliding_window if self.ring else size, 0
        shape = (cfg.n_layers, rows, cfg.n_kv_heads, self.size, cfg.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.places = torch.zeros(rows, 2, self.size, dtype=torch.int64, device=device)
        self.next = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # position of the next

    def check(self, T: int) -> None:
        """ValueError if there is no room for T more tokens."""
        if self.seen + T > self.size and not self.ring:
            raise ValueError(f"{self.seen + T} tokens, but the cache has room for {self.size}")

    def expect(self, T: int) -> None:
        """Make ready for `extend` by T tokens. ValueError if there is no room."""
        self.check(T)
        self.slot = torch.full((1,), self.seen % self.size, device=self.keys.device)
        # one query looks at all slots on a GPU, where shapes must stay; elsewhere at those in use,
        # rounded up, so that a compiled step meets few shapes
        used = 256 << (self.seen // 256).bit_length()
        self.view = self.size if self.keys.is_cuda else min(used, self.size)

    def extend(self, slots: Tensor, new: Tensor) -> Tensor:
        """Store new [B, *, T, ...]; return it among all that its T queries may still look at."""
        if new.shape[2] == 1:  # takes the slot of the token that has just left its window
            slots.index_copy_(2, self.slot, new.to(slots.dtype))
            return slots[:, :, : self.view]
        joined = torch.cat((slots[:, :, : self.seen], new), dim=2)
        end = self.seen + new.shape[2]
        turn = torch.arange(self.seen, end, device=new.device)[-self.size :] % self.size
        slots[:, :, turn] = new[:, :, -self.size :].to(slots.dtype)
        return joined


def product(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [B, T, D] times weight [F, D], transposed: F.linear. int8 weights have a scale [F]."""
    if scale is None:
        return F.linear(x, weight)
    return (F.linear(x, weight.to(x.dtype)) * scale).to(x.dtype)


class Linear(nn.Linear):
    """Without a bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return product(x, self.weight)


class Attention(nn.Module):
    def __init__(self, cfg: LLMConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = Linear(cfg.dim, cfg.n_heads * cfg.head_dim)
        self.k_proj = Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim)
        self.v_proj = Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim)
        self.o_proj = Linear(cfg.n_heads * cfg.head_dim, cfg.dim)

    def forward(self, x, rope, mask, cache=None, keys=None, values=None):
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projections)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(keys, k), cache.extend(values, v)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg: LLMConfig):
        super().__init__()
        self.gate_proj = Linear(cfg.dim, cfg.hidden_dim)
        self.up_proj = Linear(cfg.dim, cfg.hidden_dim)
        self.down_proj = Linear(cfg.hidden_dim, cfg.dim)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: LLMConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.dim, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.dim, cfg.rms_norm_eps)
        self.sparse = cfg.num_experts > 0
        if self.sparse:
            sizes = cfg.dim, cfg.hidden_dim, cfg.num_experts, cfg.top_k
            self.block_sparse_moe = SparseMoE(*sizes, act="silu", gated=True, bias=False)
        else:
            self.mlp = MLP(cfg)

    def forward(self, x, rope, mask, real_BT, *memory):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, *memory)
        h = self.post_attention_layernorm(x)
        if not self.sparse:
            return x + self.mlp(h), None
        # CuMo: in the LLM, unlike in CLIP, the balance loss takes the whole batch as one sample.
        y, aux = self.block_sparse_moe(h.flatten(0, 1)[None], real_BT.flatten()[None])
        return x + y.view_as(x), aux


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x with weights come out."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def choose(logits_BV: Tensor, temperature: float, top_p=1.0, top_k=None, generator=None,
           greatest=None) -> Tensor:  # fmt: skip
    """The next token of each row, see `LLM.generate`; `greatest` as of `decode.Step`, if known."""
    if not greatest and not math.isfinite(logits_BV.sum()):
        raise ValueError("a logit is not a finite number: the weights are damaged, or float16 or "
                         "bfloat16 is too small for this model; try --dtype float32")  # fmt: skip
    high_B, token_B = greatest or logits_BV.max(-1)
    if temperature < 1e-6:  # below it float32 can overflow
        return token_B.clone()
    logits_BV = logits_BV - high_B[:, None]  # however small the temperature
    logits_BV, token_BV = (logits_BV / temperature).sort(dim=-1, descending=True)
    probs_BV = logits_BV[:, :top_k].softmax(-1)
    better_BV = probs_BV.cumsum(-1) - probs_BV  # probability of all tokens before this one
    drawn_B1 = torch.multinomial(probs_BV * (better_BV < top_p), 1, generator=generator)
    return token_BV.gather(1, drawn_B1)[:, 0]


OPTIONS = {  # of `LLM.generate`: whether a value is good, and which are
    "max_new_tokens": (lambda n: n > 0, "1 or more"),
    "temperature": (lambda t: 0 <= t < float("inf"), "0 or more, and finite"),
    "top_p": (lambda p: 0 < p <= 1, "above 0 and up to 1"),
    "top_k": (lambda k: k is None or k > 0, "1 or more"),
}


class LLM(nn.Module):
    def __init__(self, cfg: LLMConfig):
        super().__init__()
        self.cfg = cfg
        self.checkpoint = False  # True: store one x a block, compute the rest again going back
        self.parity = False  # True: padding is routed and counted, as in the original
        self.model = nn.Module()  # every name as in the public weights
        self.model.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.model.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.model.norm = nn.RMSNorm(cfg.dim, cfg.rms_norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = Linear(cfg.dim, cfg.vocab_size)
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:  # there it would only take time
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        return self.logits(self.hidden(self.embed(tokens), segments)[0])

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.embed_tokens(tokens)

    def logits(self, x: Tensor) -> Tensor:
        head = self.model.embed_tokens if self.cfg.tie_embeddings else self.lm_head
        return product(x, head.weight, getattr(head, "scale", None))  # int8: engine/quant.py

    def hidden(self, x: Tensor, segments: Tensor | None = None,
               cache: Cache | None = None) -> tuple[Tensor, Aux | None]:  # fmt: skip
        """Embeddings [B, T, D] -> x after the final norm, and the routers' Aux (None when dense).

        segments [B, T]: 0 is padding, 1..n number the documents of a row; None: one document a row.
        Aux has means over the layers for losses, and load [L, E], choice [L, B, T, K], prob and
        share [L, 1, E], entropy [L].
        """
        assert segments is None or cache is None or cache.seen == 0, "padding comes first"
        if segments is None:
            segments = x.new_ones(x.shape[:2], dtype=torch.int64)
        # CuMo: padding (parity: on the right) looks at the text, but is never looked at.
        asking = segments.clamp(min=1) if self.parity else segments
        pos = positions(asking)
        if cache is not None:
            cache.expect(x.shape[1])
            pos = pos + cache.next
            cache.next = pos[:, -1:] + 1
        q_B2T, k_B2K = torch.stack((pos, asking), dim=1), torch.stack((pos, segments), dim=1)
        k_B2K = k_B2K if cache is None else cache.extend(cache.places, k_B2K)
        flex = x.is_cuda and cache is None and self.cfg.head_dim >= 16  # its kernel's least
        dtype = None if flex else product_dtype(x)
        mask = attention_mask(q_B2T, k_B2K, self.cfg.sliding_window, dtype)
        rope = rope_tables(pos, self.cfg.head_dim, self.cfg.rope_theta)
        run, memory, auxes = Block.__call__, (), []
        if self.checkpoint and self.training:
            run = checkpointed
        elif cache is not None and cache.compile and x.shape[1] == 1:
            run = compiled(Block.forward)
        for layer, block in enumerate(self.model.layers):
            if cache is not None:
                memory = cache, cache.keys[layer], cache.values[layer]
            x, aux = run(block, x, rope, mask, asking > 0, *memory)
            auxes.append(aux)
        if cache is not None:
            cache.seen += x.shape[1]
        x = self.model.norm(x)
        if not self.cfg.num_experts:
            return x, None
        balance, z, load, choice, *rest = (torch.stack(values) for values in zip(*auxes))
        choice = choice.view(len(auxes), *x.shape[:2], -1)
        return x, Aux(balance.mean(), z.mean(), load, choice, *rest)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of predicting labels[:, t + 1] from x[:, t], x as from `hidden`.

        Labels that are IGNORE do not count. If nothing else is left the loss is 0 (CuMo: NaN) and
        so are its gradients. A packed document's first label must be IGNORE: what stands before it
        belongs to another one.
        """
        head = self.model.embed_tokens if self.cfg.tie_embeddings else self.lm_head
        return mean_cross_entropy(x[:, :-1].flatten(0, 1), head.weight, labels[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, tokens: Tensor | None = None, embeds: Tensor | None = None,
                 segments: Tensor | None = None, *, max_new_tokens: int, temperature: float = 0.0,
                 top_p: float = 1.0, top_k: int | None = None,
                 seed: int | torch.Generator | None = None,
                 eos_token_id: int | list[int] | None = None,
                 stream: Callable[[Tensor], bool | None] | None = None,
                 cache: Cache | None = None, compile: bool = False) -> Tensor:  # fmt: skip
        """Continue tokens [B, T] or embeds [B, T, D]; return the new ids [B, <= max_new_tokens].

        Prompts of unequal length are padded on the left, with segments 0 there and 1 elsewhere.
        temperature 0 takes the most probable token; otherwise the next one is drawn from the
        `top_k` most probable, and of these from the fewest that reach probability `top_p`.
        A `seed` that is a torch.Generator goes on from call to call.
        A row past its end token is filled up with it. `stream` gets the ids [B] of each step, and
        ends the answer if it returns True. A `cache` holds what came before the prompt, which is
        not computed again; the prompt and all of the answer but its last token are added to it.
        `compile` the steps: some seconds at first, then several times as fast (bench/speed.py).
        """
        if (tokens is None) == (embeds is None):
            raise ValueError("generate continues either tokens or embeds: give exactly one of them")
        x = self.embed(tokens) if embeds is None else embeds
        if not x.shape[1]:
            raise ValueError("a prompt of 0 tokens must be 1 or more")
        for name, value in zip(OPTIONS, (max_new_tokens, temperature, top_p, top_k)):
            good, wanted = OPTIONS[name]
            if not good(value):
                raise ValueError(f"{name}={value} must be {wanted}")
        if segments is not None and ((segments.diff() < 0).any() or (segments[:, -1] != 1).any()):
            raise ValueError("segments of prompts are zeros (padding on the left), then ones")
        if cache is None:
            room = x.shape[1] + max_new_tokens
            cache = Cache(self.cfg, len(x), room, product_dtype(x), x.device, compile)
        step = Step.of(self, cache) if cache.compile else None  # on a CPU: engine/decode.py
        logits = compiled(LLM.logits) if cache.compile and not step else LLM.logits
        going_on = isinstance(seed, torch.Generator | None)
        generator = seed if going_on else torch.Generator(x.device).manual_seed(seed)
        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
        end_tokens = torch.tensor(ends, dtype=torch.int64, device=x.device)
        done, out = torch.zeros(len(x), dtype=torch.bool, device=x.device), []
        for _ in range(max_new_tokens):
            if step and step.takes(x, segments):
                last, greatest = step(x), step.greatest
            else:
                x = x if x.is_floating_point() else self.embed(x)
                x, _ = self.hidden(x, segments, cache)
                last, greatest = logits(self, x[:, -1:])[:, 0].float(), None
            ids = choose(last, temperature, top_p, top_k, generator, greatest)
            if ends:
                ids = torch.where(done, ends[0], ids)
                done = torch.isin(ids, end_tokens)
            out.append(ids)
            if stream and stream(ids) or ends and done.all():
                break
            x, segments = ids.unsqueeze(1), None
        return torch.stack(out, dim=1)

    def public_state_dict(self, keep_vars=False) -> dict[str, Tensor]:
        """Views of all weights under their public names, those of Mistral or Mixtral; `keep_vars`
        as in `state_dict`: the parameters themselves, where they are whole."""
        views = self.state_dict(keep_vars=keep_vars)
        for i, block in enumerate(self.model.layers):
            if block.sparse:
                prefix = f"model.layers.{i}.block_sparse_moe."
                views = {name: w for name, w in views.items() if not name.startswith(prefix)}
                views |= block.block_sparse_moe.public_state_dict(("w1", "w2", "w3"), prefix)
        return views

    def load_original(self, tensors: Iterable[tuple[str, Tensor]], source="checkpoint",
                      mapped=False) -> None:  # fmt: skip
        """Copy public weights in, or map them (`load_into`); ValueError names all that are missing,
        unknown or misshapen."""
        # old files store the angles of RoPE, some a tied head a second time
        needless = "rotary_emb.inv_freq", *(["lm_head.weight"] if self.cfg.tie_embeddings else [])
        skip = lambda name: name.endswith(needless)
        load_into(self.public_state_dict(keep_vars=mapped), tensors, skip, source, mapped)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype=None, device=None) -> "LLM":
        """From a directory in Hugging Face's layout or its name on the hub, a tensor at a time;
        None: float32, CPU."""
        path = local_folder(path)
        with torch.device("meta"):
            llm = cls(LLMConfig.from_hf(read_config(path))).to(dtype or torch.float32)
        llm.load_original(read_tensors(path), str(path))  # a rehearsal: does everything fit?
        llm = llm.to_empty(device=device or "cpu")
        llm.load_original(read_tensors(path), str(path), mapped=True)
        return llm

    def save_pretrained(self, path: str | Path) -> None:
        """Write a directory that `from_pretrained`, and transformers, can read."""
        write_tensors(path, self.public_state_dict())
        write_json(Path(path) / "config.json", self.cfg.to_hf())


if __name__ == "__main__":  # a worked example: the miniature goes on with 1, 30, 40
    llm, tokens = LLM.from_pretrained("data/mini/llm"), torch.tensor([[1, 30, 40]])
    print(f"tokens {[*tokens.shape]} -> logits {[*llm(tokens).shape]}")
    print(f"next: {llm.generate(tokens, max_new_tokens=5).tolist()}")
