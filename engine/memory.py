"""The memory and arithmetic that a training needs, estimated before anything is loaded.

    python train.py --preset mistral-7b --stage 3 --estimate

Three of the four parts follow from the number of parameters alone (engine/optim.py):

    weights      every parameter, 4 bytes in float32 or 2 in bf16
    gradients    every parameter that learns, in the precision of the weights
    optimizer    two moments for each of these, 4 or 2 bytes each, and 4 for a master copy
    activations  what the forward pass keeps for the backward pass; grows with the tokens of a batch

For each token, a block of the language model keeps the inputs of its products:

    x, norm(x) | q k v | attention output | x, norm(x) | gate, up, silu(gate), their product

about 20 D numbers, or 82 GB for the 32 blocks of Mistral-7B and 4 rows of 4,096 tokens. Under
gradient checkpointing (`recompute`) a block keeps only its input and computes the rest again in the
backward pass. Then only one block's activations and their gradients exist at a time, for a third
more arithmetic. CLIP needs as much as the language model: at scales 1,3 it reads 5,770 tokens an
image.

Fragmentation and library buffers come on top, so an estimate may fill only 90 % of a card.
tests/test_memory.py compares the activations of small models with what autograd really keeps.
Letters as in mlp_moe.py and llm.py. Sizes are bytes; a GB is 2^30 bytes, as cards are sold.
"""

import contextlib
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
from data.hub import fetched, local_folder
from data.packing import check_positions
from data.weights import read_config
from engine import fsdp, resume
from engine.optim import WEIGHTS, bytes_per_parameter
from llm import LOGITS_AT_ONCE, LLMConfig
from upcycle import sparse_config

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

GB = 2**30
CARDS = (24, 48, 80, 141)  # GB: RTX 4090, L40S, A100 or H100, H200
FREE = 0.9  # share of a card that an estimate may fill

# (weights, moments) from the most exact to the smallest
LADDER = (("fp32", "fp32"), ("bf16-master", "fp32"), ("bf16-master", "bf16"), ("bf16-sr", "bf16"))

MISTRAL = dict(vocab_size=32000, dim=4096, hidden_dim=14336, n_layers=32, n_heads=32, n_kv_heads=8,
               rope_theta=1e6)  # fmt: skip
KNOWN = {  # models of the presets, so that an estimate needs no download
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
    """Everything about a training that decides how much memory it needs."""

    model: CuMoConfig
    stage: int
    parameters: int  # all of them
    learning: int  # those that this stage trains
    tokens: int  # in a batch of one rank, padding included
    weights: str = "fp32"
    moments: str = "fp32"
    recompute: bool = False
    bf16: bool = True  # products in bf16, so activations take 2 bytes
    processes: int = 1  # ranks that weights, gradients and moments are sharded over
    n_images: int | None = None  # in a batch; None: as many as fit into the tokens

    @property
    def images(self) -> int:
        vision = self.model.vision
        patches = (vision.image_size // vision.patch_size) ** 2
        return self.tokens // patches if self.n_images is None else self.n_images


def mlp_numbers(dim: int, hidden_dim: int, gated: bool, experts: int, top_k: int) -> int:
    """Numbers that an MLP, or the chosen experts of a sparse block, keeps for a token."""
    hidden = hidden_dim * (4 if gated else 2)  # before and after the activation; gated: up, product
    if not experts:
        return dim + hidden
    # each of K experts keeps its input and its output, which the weighted sum needs
    return dim + top_k * (dim + hidden + dim) + 4 * experts


def clip_numbers(cfg) -> int:
    """Numbers that one layer of CLIP keeps for a token."""
    attention = 2 * cfg.dim + 3 * cfg.dim + cfg.dim  # x, norm(x); q, k, v; output
    mlp = mlp_numbers(cfg.dim, cfg.hidden_dim, False, cfg.num_experts, cfg.top_k)
    return attention + cfg.dim + mlp


def llm_numbers(cfg, learns: bool) -> int:
    """Numbers that one block of the language model keeps for a token. A frozen block does not keep
    the inputs of its products, because only the gradients of its weights need them."""
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    attention = 2 * cfg.dim + q + 2 * kv + q  # x, norm(x); q, k, v; output
    mlp = mlp_numbers(cfg.dim, cfg.hidden_dim, True, cfg.num_experts, cfg.top_k)
    return attention + cfg.dim + mlp - (0 if learns else 2 * cfg.dim + cfg.hidden_dim)


def clip_tokens(cfg: CuMoConfig, images: int) -> list[int]:
    """Tokens that CLIP reads at each scale for so many images."""
    side = cfg.vision.image_size // cfg.vision.patch_size
    tiles = [scale**2 if i else 1 for i, scale in enumerate(cfg.vision.scales)]
    return [images * n * (1 + side**2) for n in tiles]


def activations(plan: Plan) -> int:
    """Bytes that the forward pass of one batch keeps for the backward pass."""
    cfg, n_tokens = plan.model, plan.tokens
    vision, llm = cfg.vision, cfg.llm
    blocks = [(llm.n_layers, n_tokens, llm.dim, llm_numbers(llm, plan.stage > 1))]
    if plan.stage > 1:  # stage 1 has no backward pass through CLIP
        for n in clip_tokens(cfg, plan.images):
            blocks.append((vision.n_layers - 1, n, vision.dim, clip_numbers(vision)))
    patches = plan.images * (vision.image_size // vision.patch_size) ** 2
    features = vision.dim * len(vision.scales)
    kept = patches * (
        features + mlp_numbers(llm.dim, llm.dim, False, cfg.mlp_experts, cfg.mlp_top_k)
    )
    if plan.recompute:
        kept += sum(layers * n * dim for layers, n, dim, _ in blocks)
        kept += max(2 * n * numbers for _, n, _, numbers in blocks)  # one block, and its gradients
    else:
        kept += sum(layers * n * numbers for layers, n, _, numbers in blocks)
    logits = min(LOGITS_AT_ONCE, n_tokens * llm.vocab_size)
    size = 2 if plan.bf16 else WEIGHTS[plan.weights].itemsize
    return kept * size + 3 * logits * 4  # a chunk of logits, their softmax and their gradient


def make_plan(
    cfg: CuMoConfig, stage: int, tokens: int, learning: list[str] | None = None, **choices
) -> Plan:
    """The plan of a stage that trains the submodules `learning` (None: as the paper does)."""
    with torch.device("meta"):
        model = CuMo(cfg)
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    if learning is None:
        learning = ["connector"] if stage == 1 else list(sizes)
    return Plan(cfg, stage, sum(sizes.values()), sum(map(sizes.get, learning)), tokens, **choices)


def stage_model(cfg) -> CuMoConfig:
    """The configuration of the model that a stage will train, without loading its weights.

    cfg: a train.TrainConfig.
    """
    before = resume.stage_dir(cfg, cfg.stage - 1)
    state = resume.read_state(before)
    ours = state and state["finished"] and not resume.differences(cfg.shared, state)
    if cfg.init or ours:
        folder = local_folder(cfg.init or before, "config")
        model = CuMoConfig.from_original(read_config(folder), folder)
    else:
        if cfg.llm.startswith("weights/SmolLM2") and not fetched(cfg.llm, "config"):
            raise ValueError(f"--llm: {cfg.llm!r} is missing; runs/smollm2.sh makes it")
        vision, llm = (
            KNOWN.get(name) or kind.from_hf(read_config(local_folder(name, "config")))
            for name, kind in ((cfg.clip, CLIPVisionConfig), (cfg.llm, LLMConfig))
        )
        model = CuMoConfig(replace(vision, scales=cfg.scales), llm)
    if cfg.stage == 3 and cfg.upcycle != "none":
        model = sparse_config(model, cfg.upcycle.split(","), cfg.num_experts, cfg.top_k)
    return model


def plan_stage(cfg, learning: list[str]) -> Plan:
    """The plan of a stage (cfg: a train.TrainConfig) that trains the submodules `learning`."""
    processes = fsdp.world()[1]
    tokens, model = cfg.rows * cfg.row_tokens // processes, stage_model(cfg)
    check_positions(cfg.row_tokens, model.llm.max_positions, model.llm.sliding_window)
    return make_plan(model, cfg.stage, tokens, learning, bf16=cfg.bf16,
                     processes=processes)  # fmt: skip


def chosen(cfg) -> dict:
    """What the flags of a training say about precision and memory."""
    given = {name: getattr(cfg, name) for name in ("weights", "moments", "recompute")}
    return {name: value for name, value in given.items() if value not in ("", None)}


def estimate(plan: Plan) -> dict[str, int]:
    """{part: bytes} of one rank."""
    size = WEIGHTS[plan.weights].itemsize
    more = bytes_per_parameter(plan.weights, plan.moments) - 2 * size
    parameters, learning = (n // plan.processes for n in (plan.parameters, plan.learning))
    return {"weights": parameters * size, "gradients": learning * size,
            "optimizer": learning * more, "activations": activations(plan)}  # fmt: skip


def total(plan: Plan) -> int:
    return sum(estimate(plan).values())


def first_that_fits(plan: Plan, available: int, **fixed) -> Plan:
    """The most exact plan within `available` bytes, or else the smallest. Recomputes only if the
    same precision would not fit otherwise. `fixed`: settings to keep, such as weights="fp32"."""
    ways = [{"weights": w, "moments": m, "recompute": r} for w, m in LADDER for r in (False, True)]
    ways = [replace(plan, **way | fixed) for way in ways]
    return next((p for p in ways if total(p) <= FREE * available), min(ways, key=total))


def best_plan(plan: Plan, device: str, fixed: dict) -> Plan:
    """The most exact plan that fits `device`, with the settings in `fixed`. ValueError if even the
    smallest needs more than twice the memory: that is beyond the estimate's error."""
    there = available_memory(device)
    best = first_that_fits(plan, there, **fixed)
    if total(best) > 2 * there:
        raise ValueError(
            f"stage {plan.stage} takes about {total(best) / GB:.0f} GB, and this machine has "
            f"{there / GB:.0f}: lower --rows or --row-tokens, or take a smaller --preset "
            "(--estimate shows the parts)"
        )
    return best


def operations(cfg: CuMoConfig, stage: int, tokens: int, images: int, row_tokens: int) -> float:
    """Floating-point operations of a training step, forward and backward, as MFU counts them:
    without recomputation and without the scores that attention masks out.

    For each token, a weight costs 2 in the forward pass, 2 for the gradient of its input and 2 for
    its own gradient. In stage 1, CLIP has no backward pass and the language model does not learn.
    """
    vision, llm = cfg.vision, cfg.llm
    clip, text = {1: (2, 4), 2: (6, 6), 3: (6, 6)}[stage]
    n_clip = sum(clip_tokens(cfg, images))
    side = vision.image_size // vision.patch_size
    active = vision.top_k if vision.num_experts else 1
    per_token = (4 + 2 * active * vision.hidden_dim / vision.dim) * vision.dim**2
    seen = 2 * (1 + side**2) * vision.dim  # q k and probs v, for each key seen
    work = clip * n_clip * (vision.n_layers - 1) * (per_token + seen)
    features = vision.dim * len(vision.scales)
    active = cfg.mlp_top_k if cfg.mlp_experts else 1
    work += 6 * images * side**2 * active * (features + llm.dim) * llm.dim
    q, kv = llm.n_heads * llm.head_dim, llm.n_kv_heads * llm.head_dim
    active = llm.top_k if llm.num_experts else 1
    per_token = 2 * llm.dim * (q + kv) + 3 * active * llm.dim * llm.hidden_dim
    seen = 2 * min(row_tokens / 2, llm.sliding_window or row_tokens) * q
    return work + text * tokens * (llm.n_layers * (per_token + seen) + llm.vocab_size * llm.dim)


def has_fast_bf16(device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware. A CPU without the instructions emulates
    them, 70 times slower than float32 (2 cores of an AMD EPYC with AVX2)."""
    if not str(device).startswith("cpu"):
        return True
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # x86, ARM


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, measured now."""
    n = 4096 if str(device).startswith("cuda") else 1024
    x, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(5):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(device: str) -> int:
    """Peak bytes of this process, on the card or in main memory; 0 on systems that do not say."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = pathlib.Path("/proc/self/status")  # Linux: getrusage may be the parent's
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


def breakdown(plan: Plan) -> str:
    """`61.2 GB: weights 15.4, gradients 15.4, ...`"""
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in estimate(plan).items())
    return f"{total(plan) / GB:.1f} GB: {parts}"


def to_flags(plan: Plan) -> str:
    """The plan as command-line flags."""
    recompute = "--recompute" if plan.recompute else "--no-recompute"
    return f"--weights {plan.weights} --moments {plan.moments} {recompute}"


def table(plan: Plan, **fixed) -> str:
    """The most exact plan for each card, one line a card."""
    lines = []
    for card in CARDS:
        best = first_that_fits(plan, card * GB, **fixed)
        fits = total(best) <= FREE * card * GB
        shown = to_flags(best) if fits else "too small even with " + to_flags(best)
        lines.append(f"{card:4} GB  {shown:55}  {breakdown(best)}")
    return "\n".join(lines)


def report(cfg, plan: Plan) -> str:
    """What --estimate prints of a stage; cfg: its train.TrainConfig."""
    batch = f"{cfg.rows} rows of {cfg.row_tokens} tokens a batch"
    return f"stage {cfg.stage} of {cfg.preset}, {batch}:\n{table(plan, **chosen(cfg))}"


def remedies(plan: Plan) -> list[str]:
    """Changes that save memory, the largest first: `--moments bf16 saves 12.1 GB`."""
    changes = {"--recompute": {"recompute": True}, "--weights bf16-sr": {"weights": "bf16-sr"},
               "--moments bf16": {"moments": "bf16"},
               "half the --rows, twice the --accumulate": {"tokens": plan.tokens // 2}}  # fmt: skip
    saved = {name: total(plan) - total(replace(plan, **change)) for name, change in changes.items()}
    ranked = sorted(saved.items(), key=lambda item: -item[1])
    return [f"{name} saves {size / GB:.1f} GB" for name, size in ranked if size > 0.05 * GB]


def is_out_of_memory(error) -> bool:
    """Also inside the compiler, which wraps the error in its own."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate" in str(error):
        return True
    inner = getattr(error, "inner_exception", None) or error.__cause__
    return inner is not None and is_out_of_memory(inner)


@contextlib.contextmanager
def advice(plan: Plan, device: str):
    """Turn an out-of-memory error into a ValueError that names the flags that help."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        saving = "; ".join(remedies(plan)) or "a smaller model"
        raise ValueError(f"out of memory on {device}; the estimate was {breakdown(plan)}. "
                         f"What would help: {saving}") from None  # fmt: skip
