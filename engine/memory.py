"""What a training takes, told before anything is loaded: gigabytes by part, operations by token.

    python train.py --preset mistral-7b --stage 3 --estimate

Four things fill a card. Three of them follow from the number of parameters alone:

    weights     every parameter, 4 bytes in float32, 2 in bf16 (a master copy: 4 more)
    gradients   every parameter that learns, in the weights' own precision
    moments     AdamW's two averages for each of these, 4, 2 or 1 bytes each

and activations, what the forward pass keeps for the backward pass, from the tokens of a batch too.
A block of the language model keeps, for every token, what goes into each of its products:

    x, norm(x) | q k v | attention's output | x, norm(x) | gate, up, silu(gate), their product

some 20 D numbers; 32 such blocks of Mistral-7B, 82 GB for 4 rows of 4,096 tokens. With `recompute`
a block keeps its input alone, and computes the rest again when its turn comes on the way back: one
block's activations (and their gradients) at a time instead of all, for a third more arithmetic.

CLIP counts as much as the language model here: at scales 1,3 it runs over 10 x 577 tokens an image.

The numbers are estimates: fragments and what libraries take for themselves come on top, so a
tenth of a card is left free. tests/test_budget.py holds the activations of small models against
what autograd really keeps.

Letters as in mlp_moe.py and llm.py. Sizes are bytes; GB are 2^30 of them, as cards are sold.
"""

import math
import os
import pathlib
import re
import sys
import time
from dataclasses import dataclass, replace

import torch

from clip_moe import CLIPVisionConfig
from cumo import CuMo, CuMoConfig
from engine.optim import WEIGHTS, bytes_per_parameter
from llm import LOGITS_AT_ONCE, LLMConfig

try:
    import resource
except ImportError:  # Windows does not tell how much memory a process took
    resource = None

GB = 2**30
CARDS = (24, 48, 80, 141)  # GB: RTX 4090, L40S, A100 or H100, H200
FREE = 0.9  # share of a card that an estimate may fill

LADDER = (("fp32", "fp32"), ("bf16-master", "fp32"), ("bf16-master", "bf16"), ("bf16-sr", "bf16"),
          ("bf16-sr", "int8"))  # from the most exact to the smallest  # fmt: skip

MISTRAL = dict(vocab_size=32000, dim=4096, hidden_dim=14336, n_layers=32, n_heads=32, n_kv_heads=8,
               rope_theta=1e6)  # fmt: skip
KNOWN = {  # the models of the presets, so that an estimate needs no file
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(),
    "openai/clip-vit-base-patch16": CLIPVisionConfig(
        image_size=224, patch_size=16, dim=768, hidden_dim=3072, n_layers=12, n_heads=12
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": LLMConfig(**MISTRAL),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": LLMConfig(**MISTRAL, num_experts=8),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LLMConfig(
        49152, 576, 1536, 30, 9, 3, rope_theta=1e5, tie_embeddings=True
    ),
}


@dataclass(frozen=True)
class Plan:
    """One way to train a stage: what decides how much memory it takes."""

    model: CuMoConfig
    stage: int
    parameters: int
    learning: int  # parameters that this stage trains
    tokens: int  # a batch, over the rows of a process
    weights: str = "fp32"
    moments: str = "fp32"
    recompute: bool = False
    bf16: bool = True  # products in bf16, so that activations take 2 bytes
    processes: int = 1  # that share weights, gradients and moments (engine/fsdp.py)
    n_images: int | None = None  # in a batch; None: as many as there is room for

    @property
    def images(self) -> int:
        vision = self.model.vision
        patches = (vision.image_size // vision.patch_size) ** 2
        return self.tokens // patches if self.n_images is None else self.n_images


def mlp_numbers(dim: int, hidden_dim: int, gated: bool, experts: int, top_k: int) -> int:
    """Numbers an MLP, or the chosen experts of a sparse block, keeps for a token."""
    hidden = hidden_dim * (4 if gated else 2)  # before and after the activation; gated: up, product
    if not experts:
        return dim + hidden
    # the tokens sorted by expert, and each expert's answer for the weighted sum
    return dim + top_k * (dim + hidden + dim) + 4 * experts


def clip_numbers(cfg) -> int:
    """Numbers one layer of CLIP keeps for a token."""
    attention = 2 * cfg.dim + 3 * cfg.dim + cfg.dim  # x, norm(x); q, k, v; their mixture
    mlp = mlp_numbers(cfg.dim, cfg.hidden_dim, False, cfg.num_experts, cfg.top_k)
    return attention + cfg.dim + mlp


def llm_numbers(cfg, learns: bool) -> int:
    """Numbers one block of the language model keeps for a token. A frozen product does not keep
    what goes into it: that is only for the gradient of its weights."""
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    attention = 2 * cfg.dim + q + 2 * kv + q  # x, norm(x); q, k, v; their mixture
    mlp = mlp_numbers(cfg.dim, cfg.hidden_dim, True, cfg.num_experts, cfg.top_k)
    return attention + cfg.dim + mlp - (0 if learns else 2 * cfg.dim + cfg.hidden_dim)


def clip_tokens(cfg: CuMoConfig, images: int) -> list[int]:
    """Tokens that pass CLIP at each scale for so many images."""
    side = cfg.vision.image_size // cfg.vision.patch_size
    tiles = [scale**2 if i else 1 for i, scale in enumerate(cfg.vision.scales)]
    return [images * n * (1 + side**2) for n in tiles]


def activations(plan: Plan) -> int:
    """Bytes that one batch keeps for the backward pass."""
    cfg, n_tokens = plan.model, plan.tokens
    vision, llm = cfg.vision, cfg.llm
    blocks = [(llm.n_layers, n_tokens, llm.dim, llm_numbers(llm, plan.stage > 1))]
    if plan.stage > 1:  # stage 1 does not go back through CLIP
        for n in clip_tokens(cfg, plan.images):
            blocks.append((vision.n_layers - 1, n, vision.dim, clip_numbers(vision)))
    patches = plan.images * (vision.image_size // vision.patch_size) ** 2
    features = vision.dim * len(vision.scales)
    kept = patches * (
        features + mlp_numbers(llm.dim, llm.dim, False, cfg.mlp_experts, cfg.mlp_top_k)
    )
    if plan.recompute:
        kept += sum(layers * n * dim for layers, n, dim, _ in blocks)
        kept += max(2 * n * numbers for _, n, _, numbers in blocks)  # one block and its gradients
    else:
        kept += sum(layers * n * numbers for layers, n, _, numbers in blocks)
    logits = min(LOGITS_AT_ONCE, n_tokens * llm.vocab_size)
    # logits, their softmax and gradient, a chunk at a time
    size = 2 if plan.bf16 else WEIGHTS[plan.weights].itemsize
    return kept * size + 3 * logits * 4


def plan_of(
    cfg: CuMoConfig, stage: int, tokens: int, learning: list[str] | None = None, **choices
) -> Plan:
    """The plan of a stage in which the submodules `learning` (None: the stage's) are trained."""
    with torch.device("meta"):
        model = CuMo(cfg)
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    if learning is None:
        learning = ["connector"] if stage == 1 else list(sizes)
    return Plan(cfg, stage, sum(sizes.values()), sum(map(sizes.get, learning)), tokens, **choices)


def estimate(plan: Plan) -> dict[str, int]:
    """Bytes of one process, by what they are for."""
    size = WEIGHTS[plan.weights].itemsize
    more = bytes_per_parameter(plan.weights, plan.moments) - 2 * size
    parameters, learning = (n // plan.processes for n in (plan.parameters, plan.learning))
    return {"weights": parameters * size, "gradients": learning * size,
            "optimizer": round(learning * more),
            "activations": activations(plan)}  # fmt: skip


def total(plan: Plan) -> int:
    return sum(estimate(plan).values())


def first_that_fits(plan: Plan, available: int, **fixed) -> Plan:
    """The most exact plan within `available` bytes, or the smallest there is; what is `fixed`, such
    as weights="fp32", stays. Of two alike the one that recomputes nothing."""
    ladder = [pair for pair in LADDER if plan.processes == 1 or "int8" not in pair]  # train.py
    ways = [{"weights": w, "moments": m, "recompute": r} for w, m in ladder for r in (False, True)]
    ways = [replace(plan, **way | fixed) for way in ways]
    return next((p for p in ways if total(p) <= FREE * available), min(ways, key=total))


def operations(cfg: CuMoConfig, stage: int, tokens: int, images: int, row_tokens: int) -> float:
    """Multiplications and additions of a training step over so many tokens and images, forward and
    back, as the field counts them: recomputation is not work, nor is what attention masks out.

    A weight of a product costs 2 a token going forward, 2 going back to its input, and 2 for its
    own gradient. In stage 1 CLIP only goes forward, and the language model learns nothing.
    """
    vision, llm = cfg.vision, cfg.llm
    clip, text = {1: (2, 4), 2: (6, 6), 3: (6, 6)}[stage]
    n_clip = sum(clip_tokens(cfg, images))
    side = vision.image_size // vision.patch_size
    active = vision.top_k if vision.num_experts else 1
    per_token = (4 + 2 * active * vision.hidden_dim / vision.dim) * vision.dim**2
    seen = 2 * (1 + side**2) * vision.dim  # q k and probs v, once for each token that is looked at
    work = clip * n_clip * (vision.n_layers - 1) * (per_token + seen)
    features = vision.dim * len(vision.scales)
    active = cfg.mlp_top_k if cfg.mlp_experts else 1
    work += 6 * images * side**2 * active * (features + llm.dim) * llm.dim
    q, kv = llm.n_heads * llm.head_dim, llm.n_kv_heads * llm.head_dim
    active = llm.top_k if llm.num_experts else 1
    per_token = 2 * llm.dim * (q + kv) + 3 * active * llm.dim * llm.hidden_dim
    seen = 2 * min(row_tokens / 2, llm.sliding_window or row_tokens) * q
    return work + text * tokens * (llm.n_layers * (per_token + seen) + llm.vocab_size * llm.dim)


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a large matrix product, here and now."""
    n = 4096 if str(device).startswith("cuda") else 1024
    x, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(5):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(device: str) -> int:
    """Bytes that this process has held at most, on the card or in the machine's memory; 0 where the
    system does not tell."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = pathlib.Path("/proc/self/status")  # Linux; getrusage's may be that of the parent
    if status.is_file():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: str) -> int:
    """Bytes of the card, or of the machine."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe(plan: Plan) -> str:
    """`61.2 GB: weights 15.4, gradients 15.4, ...`"""
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in estimate(plan).items())
    return f"{total(plan) / GB:.1f} GB: {parts}"


def flags(plan: Plan) -> str:
    """The plan as one would type it."""
    recompute = "--recompute" if plan.recompute else "--no-recompute"
    return f"--weights {plan.weights} --moments {plan.moments} {recompute}"


def table(plan: Plan, **fixed) -> str:
    """What each card could do: a line a card."""
    lines = []
    for card in CARDS:
        best = first_that_fits(plan, card * GB, **fixed)
        fits = total(best) <= FREE * card * GB
        shown = flags(best) if fits else "too small even with " + flags(best)
        lines.append(f"{card:4} GB  {shown:55}  {describe(best)}")
    return "\n".join(lines)


def remedies(plan: Plan) -> list[str]:
    """What would save memory, the most first: `--moments int8 saves 12.1 GB`."""
    changes = {"--recompute": {"recompute": True}, "--weights bf16-sr": {"weights": "bf16-sr"},
               "--moments bf16": {"moments": "bf16"}, "--moments int8": {"moments": "int8"},
               "half of --rows, twice --accumulate": {"tokens": plan.tokens // 2}}  # fmt: skip
    if plan.processes > 1:
        del changes["--moments int8"]
    saved = {name: total(plan) - total(replace(plan, **change)) for name, change in changes.items()}
    ranked = sorted(saved.items(), key=lambda item: -item[1])
    return [f"{name} saves {size / GB:.1f} GB" for name, size in ranked if size > 0.05 * GB]
