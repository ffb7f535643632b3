"""How fast a device multiplies, and what share of that a training step reaches (MFU).

    mfu       operations of a step / its seconds / the rate of large matrix products, measured now
    mfu_peak  the same with the rate on the card's data sheet, for the cards in `PEAKS`

A card reaches 60 to 80 % of its data sheet in products of this size, because its power is limited;
so mfu is the larger number. Published results are compared by mfu_peak.
"""

import math
import re
import time

import torch

from cumo import CuMoConfig
from engine.memory import clip_tokens

# regular expression of a whole device name -> dense bf16 TFLOP/s of its data sheet; sparse: twice
PEAKS = {
    r"NVIDIA B200": 2250,
    r"NVIDIA (H100 80GB HBM3|H200|GH200 480GB)": 989,
    r"NVIDIA H[12]00 NVL": 835,
    r"NVIDIA H100 PCIe": 756,
    r"(NVIDIA )?A100-.*": 312,
    r"NVIDIA L40S": 362,
    r"NVIDIA L4": 121,
    r"NVIDIA GeForce RTX 4090": 165,
    r"NVIDIA GeForce RTX 3090": 71,
}


def operations(cfg: CuMoConfig, stage: int, row_tokens: int) -> tuple[float, float]:
    """Floating-point operations of a training step for (a token of the text, an image), forward and
    backward, as MFU counts them: without recomputation and without the scores that attention masks
    out.

    For each token, a weight costs 2 in the forward pass, 2 for the gradient of its input and 2 for
    its own gradient. In stage 1, CLIP has no backward pass and the language model does not learn.
    """
    vision, llm = cfg.vision, cfg.llm
    clip, text = {1: (2, 4), 2: (6, 6), 3: (6, 6)}[stage]
    n_clip = sum(clip_tokens(cfg, 1))
    side = vision.image_size // vision.patch_size
    active = vision.top_k if vision.num_experts else 1
    per_token = (4 + 2 * active * vision.hidden_dim / vision.dim) * vision.dim**2
    seen = 2 * (1 + side**2) * vision.dim  # q k and probs v, for each key seen
    image = clip * n_clip * (vision.n_layers - 1) * (per_token + seen)
    features = vision.dim * len(vision.scales)
    active = cfg.mlp_top_k if cfg.mlp_experts else 1
    image += 6 * side**2 * active * (features + llm.dim) * llm.dim
    q, kv = llm.n_heads * llm.head_dim, llm.n_kv_heads * llm.head_dim
    active = llm.top_k if llm.num_experts else 1
    per_token = 2 * llm.dim * (q + kv) + 3 * active * llm.dim * llm.hidden_dim
    seen = 2 * min(row_tokens / 2, llm.sliding_window or row_tokens) * q
    return text * (llm.n_layers * (per_token + seen) + llm.vocab_size * llm.dim), image


def has_fast_bf16(device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware: a GPU from compute capability 8.0 (A100)
    on. V100 and T4 emulate it, and so does a CPU without the instructions, 70 times slower than
    float32 (2 cores of an AMD EPYC with AVX2)."""
    if str(device).startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not str(device).startswith("cpu"):
        return True
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # x86, ARM


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrix products, measured now. On a card: ten
    between two events, so that launching them does not count."""
    if str(device).startswith("cuda"):
        n, times = 8192, 10
        x, begin, end = torch.randn(n, n, device=device, dtype=dtype), *cuda_events(2)
        y = x @ x  # the first product loads the library
        begin.record()
        for _ in range(times):
            torch.mm(x, x, out=y)
        end.record()
        end.synchronize()
        return times * 2 * n**3 / (begin.elapsed_time(end) / 1e3)
    n, best = 1024, math.inf
    x = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(5):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def cuda_events(n: int) -> list:
    return [torch.cuda.Event(enable_timing=True) for _ in range(n)]


def peak_rate(name: str, dtype: torch.dtype) -> float | None:
    """The bf16 rate on the data sheet of the card `name`; None if it or the dtype is unknown."""
    if dtype != torch.bfloat16:
        return None
    return next((1e12 * x for card, x in PEAKS.items() if re.fullmatch(card, name)), None)


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """{metric: operations a second that it is a share of}: `mfu`, and `mfu_peak` if known."""
    found = {"mfu": product_rate(device, dtype)}
    card = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else ""
    peak = peak_rate(card, dtype)
    return found | ({"mfu_peak": peak} if peak else {})
