"""The language model: a Mistral-style decoder, dense or (Mixtral) with sparse experts.

A decoder makes T predictions from T tokens, each from one token and those before it. Every layer
adds two terms to the residual stream x [B, T, D]: attention reads earlier positions, then an MLP
transforms each position. Llama, Mistral and Mixtral weights all fit:

    tokens -> embed -.-> RMSNorm -> attention -> + -.-> RMSNorm -> SwiGLU -> + -> RMSNorm -> head
                     |---------- x --------------'  '---------- x -----------'|
                     '-------------------- n_layers times --------------------'

    RMSNorm   x / rms(x) * weight: LayerNorm without the mean and without the bias.
    RoPE      rotates pairs of features of q and k by an angle proportional to the position, so
              that q . k depends only on the distance between two tokens. Nothing is learned.
    GQA       H query heads share G key/value heads: the cache shrinks by H / G.
    SwiGLU    down(silu(gate(x)) * up(x)); or several of them behind a router (mlp_moe.py).

Training packs several conversations into a row. `segments` [B, T] numbers them (0 is
padding). A token sees only its own conversation, whose positions start at 0, so packing changes no
logit. A sliding window limits how far back a layer looks; L layers look L times as far. None of
this is new in CuMo: the decoder sees an image as a run of tokens (cumo.py).
Mistral: arXiv 2310.06825. Mixtral: 2401.04088. RoPE: 2104.09864. GQA: 2305.13245.

Letters: B rows, T tokens, U keys that the queries look at, N tokens flattened, D features, H query
heads, G key/value heads, A head size, V vocabulary, L layers, E experts, K experts per token.
"""

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from clip_moe import attend
from data import configs, weights
from data.chat import IGNORE
from data.flags import check_options
from data.hub import local_folder
from mlp_moe import Aux, SparseMoE, checkpointed


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
    rope_theta: float = 1e4  # RoPE's base: the slowest pair turns once in about 2 pi theta tokens
    rope_scaling: dict | None = None  # for longer contexts (Llama 3.1), see data/configs.py
    max_positions: int = 32768  # longest context of a chat; RoPE itself has no limit
    sliding_window: int | None = None  # tokens seen, the query's own included; None: all
    tie_embeddings: bool = False  # the head is the embedding, transposed
    num_experts: int = 0  # E in every layer; 0: dense
    top_k: int = 2  # experts per token
    bos_token_id: int | None = 1  # this and the next: for other programs; we ask the tokenizer
    eos_token_id: int | list | None = 2

    def __post_init__(self):
        configs.check_fields(self)
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
        return configs.make(cls, configs.llm_fields(config))

    def to_hf(self) -> dict:
        """A config.json with which transformers, too, loads the weights."""
        return configs.to_public_llm(asdict(self))


def positions(segments_BT):
    """Place of each token in its own document: [0, 1, 1, 1, 2, 2] -> [0, 0, 1, 2, 0, 1]."""
    column_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    starts_BT = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
    return column_T - torch.where(starts_BT, column_T, 0).cummax(1).values


def sees(q_pos, k_pos, q_seg, k_seg, window):
    """A query sees the past of its document, within the window. Padding (0) sees padding."""
    seen = (q_seg == k_seg) & (k_pos <= q_pos)
    return seen if window is None else seen & (q_pos - k_pos < window)


compiled = functools.cache(torch.compile)  # each function is wrapped only once


def attention_mask(q_B2T, k_B2U, window, dtype=None):
    """`sees` for every query and key, each given as (position, segment): a mask of 0 and -inf to
    add to the scores. Without a dtype: FlexAttention's BlockMask instead."""
    if dtype is None:
        (q_pos, q_seg), (k_pos, k_seg) = q_B2T.unbind(1), k_B2U.unbind(1)
        see = lambda b, _, q, k: sees(q_pos[b, q], k_pos[b, k], q_seg[b, q], k_seg[b, k], window)
        sizes = len(q_B2T), None, q_B2T.shape[2], k_B2U.shape[2]
        return compiled(create_block_mask)(see, *sizes, device=q_B2T.device)
    (q_pos, q_seg), (k_pos, k_seg) = q_B2T[..., None].unbind(1), k_B2U[:, :, None].unbind(1)
    seen_BTU = sees(q_pos, k_pos, q_seg, k_seg, window)
    return torch.where(seen_BTU, 0.0, -torch.inf).to(dtype)[:, None]


def flex_attend(q_BHTA: Tensor, k_BGUA: Tensor, v_BGUA: Tensor, mask: BlockMask) -> Tensor:
    """`attend` on a GPU; blocks in which nothing is seen are skipped."""
    flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
    options = {"BACKEND": "TRITON"}  # the default does not compile for some short rows
    return flex(q_BHTA, k_BGUA, v_BGUA, block_mask=mask, enable_gqa=True, kernel_options=options)


def rope_tables(pos_BT, cfg):
    """cos and sin [B, 1, T, A / 2] of the angles at these positions, in float32."""
    pair = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=pos_BT.device)
    turn = 1 / cfg.rope_theta ** (pair / cfg.head_dim)
    turn = configs.rescaled(turn, cfg.rope_scaling) if cfg.rope_scaling else turn
    angle = pos_BT[:, None, :, None] * turn
    return angle.cos(), angle.sin()


def rotate(x_BHTA, rope):
    """RoPE. Feature i is paired with feature i + A / 2, as in all weights in HF's layout."""
    cos, sin = rope
    a, b = x_BHTA.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTA.dtype)


class Cache:
    """Keys, values, positions and segments of the tokens so far, one document a row.

    There are slots for `size` tokens or for one window, whichever is less. A window's slots are a
    ring buffer: token n goes to slot n % window. Attention does not need them in order, because
    `sees` compares positions. An empty slot has segment 0: no real token sees it.
    """

    def __init__(self, cfg, rows, size, dtype=torch.float32, device="cpu"):
        self.ring = cfg.sliding_window is not None and cfg.sliding_window < size
        self.size, self.seen = cfg.sliding_window if self.ring else size, 0
        shape = (cfg.n_layers, rows, cfg.n_kv_heads, self.size, cfg.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.places = torch.zeros(rows, 2, self.size, dtype=torch.int64, device=device)
        self.next = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # position of the next

    def reserve(self, pos_BT):
        """Prepare for T more tokens; return their positions, which follow those of the tokens so
        far. ValueError if there is no room."""
        start, end = self.seen, self.seen + pos_BT.shape[1]
        if end > self.size and not self.ring:
            raise ValueError(f"{end} tokens, but the cache has room for {self.size}")
        self.start, self.seen = start, end
        self.slots_T = torch.arange(start, end, device=pos_BT.device)[-self.size :] % self.size
        # A single query sees the slots in use; their number is rounded up, so few sizes occur.
        self.view = min(256 << (start // 256).bit_length(), self.size)
        pos_BT = pos_BT + self.next
        self.next = pos_BT[:, -1:] + 1
        return pos_BT

    def extend(self, slots, new):
        """Store new [B, *, T, ...]; return everything that its T queries may look at."""
        one = new.shape[2] == 1  # then the write below goes to `visible` too
        visible = slots if one else torch.cat((slots[:, :, : self.start], new), dim=2)
        slots.index_copy_(2, self.slots_T, new[:, :, -self.size :].to(slots.dtype))
        return visible[:, :, : self.view] if one else visible


class Attention(nn.Module):
    def __init__(self, cfg: LLMConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.dim, bias=False)

    def forward(self, x, rope, mask, cache=None, keys=None, values=None):
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projections)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(keys, k), cache.extend(values, v)
        y_BHTA = (flex_attend if isinstance(mask, BlockMask) else attend)(q, k, v, mask)
        return self.o_proj(y_BHTA.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.dim, cfg.hidden_dim, bias=False)
        self.up_proj = nn.Linear(cfg.dim, cfg.hidden_dim, bias=False)
        self.down_proj = nn.Linear(cfg.hidden_dim, cfg.dim, bias=False)

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
        # As in CuMo's code, the balance loss treats the whole batch as one sample.
        y, aux = self.block_sparse_moe(h.flatten(0, 1)[None], real_BT.flatten()[None])
        return x + y.view_as(x), aux


LOGITS_AT_ONCE = 2**25  # entries of the largest [N, V] block: 128 MiB in float32


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of x [N, D] times the head W [V, D], LOGITS_AT_ONCE at a time.

    For Mistral-7B the logits of 4,096 tokens take 500 MiB, and so do their softmax and gradient.
    The forward pass already computes both gradients, so that no logits are kept or recomputed:

        d loss / d logits = softmax(logits) - one_hot(target) = error
        d loss / d x = error W                        d loss / d W = error^T x
    """

    @staticmethod
    def forward(ctx, x, head, targets):
        grad_x, grad_head = (torch.zeros_like(y) if need else None
                             for y, need in zip((x, head), ctx.needs_input_grad))  # fmt: skip
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        size = max(1, LOGITS_AT_ONCE // len(head))
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            logits_NV, target_N1 = F.linear(x[rows], head), targets[rows, None]
            logs_NV = logits_NV.to(total.dtype).log_softmax(-1)
            total -= logs_NV.gather(1, target_N1).sum()
            error_NV = logs_NV.exp_()  # in place
            error_NV.scatter_add_(1, target_N1, -torch.ones_like(error_NV[:, :1]))
            error_NV = error_NV.to(logits_NV.dtype)
            if grad_x is not None:
                grad_x[rows] = error_NV @ head
            if grad_head is not None:
                grad_head += error_NV.T @ x[rows]
        ctx.save_for_backward(grad_x, grad_head)
        return total

    @staticmethod
    def backward(ctx, g):
        return *(grad if grad is None else g * grad for grad in ctx.saved_tensors), None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product of x with weights, under autocast or not."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def choose(logits_BV, temperature, top_p=1.0, top_k=None, generator=None, greatest=None):
    """The next token of each row [B], see `LLM.generate`; `greatest`: logits.max(-1), if known."""
    if not greatest and not math.isfinite(logits_BV.sum()):
        raise ValueError("a logit is not a finite number: the weights are damaged, or float16 or "
                         "bfloat16 is too small for this model; try --dtype float32")  # fmt: skip
    high_B, token_B = greatest or logits_BV.max(-1)
    if temperature < 1e-6:  # 0, or so small that only one token is left
        return token_B
    logits_BV = logits_BV - high_B[:, None]  # at most 0, so the quotient is never +inf
    logits_BV, token_BV = (logits_BV / temperature).sort(dim=-1, descending=True)
    probs_BV = logits_BV[:, :top_k].softmax(-1)
    better_BV = probs_BV.cumsum(-1) - probs_BV  # total probability of all more probable tokens
    drawn_B1 = torch.multinomial(probs_BV * (better_BV < max(top_p, 1e-6)), 1, generator=generator)
    return token_BV.gather(1, drawn_B1)[:, 0]


class LLM(nn.Module):
    def __init__(self, cfg: LLMConfig):
        super().__init__()
        self.cfg = cfg
        self.recompute = 0  # gradient checkpointing of the first N blocks
        self.parity = False  # True: padding is routed and counted, as in CuMo's code
        self.model = nn.Module()  # every name as in the public weights
        self.model.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.model.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.model.norm = nn.RMSNorm(cfg.dim, cfg.rms_norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        return self.logits(self.hidden(self.embed(tokens), segments)[0])

    def embed(self, tokens):
        return self.model.embed_tokens(tokens)

    @property
    def head(self):
        return self.model.embed_tokens if self.cfg.tie_embeddings else self.lm_head

    def logits(self, x):
        return F.linear(x, self.head.weight)

    def loss(self, x, labels):
        """Mean cross-entropy of predicting labels[:, t + 1] from x[:, t], x as from `hidden`.

        IGNORE labels do not count. If all labels are IGNORE, the loss is 0 (CuMo's code: NaN). The
        first label of a packed document must be IGNORE: the x before it is another document's.
        """
        x, targets, head = x[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), self.head.weight
        if not torch.is_grad_enabled():  # without detach, ChunkedLoss would compute gradients
            x, head = x.detach(), head.detach()
        kept = (targets != IGNORE).nonzero()[:, 0]  # without images, questions and padding
        return ChunkedLoss.apply(x.index_select(0, kept), head, targets[kept]) / max(1, len(kept))

    def hidden(self, x, segments=None, cache=None, run=Block.__call__):
        """Embeddings [B, T, D] -> x after the final norm, and the routers' Aux (None when dense).

        segments [B, T]: 0 is padding, 1..n number the documents of a row; None: one document a row.
        In the Aux (mlp_moe.py) losses are means over the layers; the rest has one row a layer, such
        as load [L, E], choice [L, B, T, K]. `run` calls a block; engine/decode.py compiles it.
        """
        assert segments is None or cache is None or cache.seen == 0, (
            "pass segments only while the cache is empty"
        )
        segments = x.new_ones(x.shape[:2], dtype=torch.int64) if segments is None else segments
        # In parity mode padding on the right sees the text, and nothing sees padding.
        asking = segments.clamp(min=1) if self.parity else segments
        pos = positions(asking) if cache is None else cache.reserve(positions(asking))
        q_B2T, k_B2U = torch.stack((pos, asking), dim=1), torch.stack((pos, segments), dim=1)
        k_B2U = k_B2U if cache is None else cache.extend(cache.places, k_B2U)
        flex = x.is_cuda and cache is None and self.cfg.head_dim >= 16  # its kernel's minimum
        mask_dtype = None if flex else product_dtype(x)
        mask = attention_mask(q_B2T, k_B2U, self.cfg.sliding_window, mask_dtype)
        rope, real_BT, auxes = rope_tables(pos, self.cfg), asking > 0, []
        for layer, block in enumerate(self.model.layers):
            memory = () if cache is None else (cache, cache.keys[layer], cache.values[layer])
            call = checkpointed if self.training and layer < self.recompute else run
            x, aux = call(block, x, rope, mask, real_BT, *memory)
            auxes.append(aux)
        x = self.model.norm(x)
        if not self.cfg.num_experts:
            return x, None
        balance, z, load, choice, *rest = (torch.stack(values) for values in zip(*auxes))
        choice = choice.view(len(auxes), *x.shape[:2], -1)
        return x, Aux(balance.mean(), z.mean(), load, choice, *rest)

    def step(self, x, segments, cache):
        """Tokens [B, T] or embeddings [B, T, D] -> (logits [B, V] of the next token, None). A
        faster step may return logits.max(-1) in place of None."""
        x = x if x.is_floating_point() else self.embed(x)
        x, _ = self.hidden(x, segments, cache)
        return self.logits(x[:, -1:])[:, 0].float(), None

    @torch.no_grad()
    def generate(self, tokens=None, embeds=None, segments=None, *, max_new_tokens, temperature=0.0,
                 top_p=1.0, top_k=None, seed=None, eos_token_id=None, stream=None, cache=None,
                 step=None):  # fmt: skip
        """Continue tokens [B, T] or embeds [B, T, D]; return the new ids [B, <= max_new_tokens].

        Prompts of unequal length are padded on the left, with segments 0 there and 1 elsewhere.
        temperature 0 takes the most probable token. Otherwise the next one is drawn from the
        `top_k` most probable, and of these from the fewest that reach probability `top_p`.
        A finished row repeats the (first) `eos_token_id`. `stream` gets the ids [B] of
        each step; generation ends when it returns True. `cache` holds what came before the prompt.
        `step(llm, cache)` makes a faster `LLM.step`, such as engine/decode.py's.
        """
        if (tokens is None) == (embeds is None):
            raise ValueError("generate continues either tokens or embeds: give exactly one of them")
        x = self.embed(tokens) if embeds is None else embeds
        if not x.shape[1]:
            raise ValueError("the prompt is empty; it needs at least one token")
        check_options("{}={}", max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                      top_k=top_k)  # fmt: skip
        if segments is not None and ((segments.diff() < 0).any() or (segments[:, -1] != 1).any()):
            raise ValueError("segments of prompts are zeros (padding on the left), then ones")
        multiple = 64 if x.is_cuda else 1  # aligned rows of scores; few sizes to compile
        size = -(-(x.shape[1] + max_new_tokens) // multiple) * multiple
        cache = cache or Cache(self.cfg, len(x), size, product_dtype(x), x.device)
        step = step(self, cache) if step else functools.partial(self.step, cache=cache)
        if not isinstance(seed, torch.Generator | None):
            seed = torch.Generator(x.device).manual_seed(seed)
        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
        end_tokens = torch.tensor(ends, dtype=torch.int64, device=x.device)
        done_B, out = torch.zeros(len(x), dtype=torch.bool, device=x.device), []
        for _ in range(max_new_tokens):
            logits_BV, greatest = step(x, segments)
            ids_B = choose(logits_BV, temperature, top_p, top_k, seed, greatest)
            if ends:
                ids_B = torch.where(done_B, ends[0], ids_B)
                done_B = torch.isin(ids_B, end_tokens)
            out.append(ids_B)
            if stream and stream(ids_B) or ends and done_B.all():
                break
            x, segments = ids_B[:, None], None
        return torch.stack(out, dim=1)

    def public_state_dict(self, keep_vars=False) -> dict[str, Tensor]:
        """Views of all weights under Mistral's or Mixtral's names (`keep_vars`: see CLIPVision)."""
        views = self.state_dict(keep_vars=keep_vars)
        for name, module in self.named_modules():
            if isinstance(module, SparseMoE):
                views = {k: view for k, view in views.items() if not k.startswith(f"{name}.")}
                views |= module.public_state_dict(("w1", "w2", "w3"), f"{name}.")
        return views

    def is_unused(self, name):
        """Old files also store RoPE's frequencies; some store a tied head twice."""
        tied = ("lm_head.weight",) if self.cfg.tie_embeddings else ()
        return name.endswith(("rotary_emb.inv_freq", *tied))

    def load_original(self, tensors):
        """Copy public weights in; ValueError names those that do not fit."""
        weights.load_into(self.public_state_dict(), tensors, self.is_unused)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None) -> "LLM":
        """From a folder in Hugging Face's layout or a name on the hub; default: float32, CPU."""
        path = local_folder(path)
        with weights.on_meta():
            llm = cls(LLMConfig.from_hf(weights.read_config(path))).to(dtype or torch.float32)
        read = functools.partial(weights.read_tensors, path)
        return weights.fill(llm, read, device, llm.is_unused, str(path))

    def save_pretrained(self, path):
        """Write a directory that `from_pretrained`, and transformers, can read."""
        weights.write_tensors(path, self.public_state_dict())
        weights.write_json(Path(path) / "config.json", self.cfg.to_hf())


if __name__ == "__main__":  # a worked example: the miniature continues 1, 30, 40
    llm, tokens = LLM.from_pretrained("data/mini/llm"), torch.tensor([[1, 30, 40]])
    print(f"tokens {[*tokens.shape]} -> logits {[*llm(tokens).shape]}")
    print(f"next: {llm.generate(tokens, max_new_tokens=5).tolist()}")
