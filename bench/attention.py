"""Attention as the models compute it, compared with PyTorch's fused one: forward and backward.

    python bench/attention.py

Prints the milliseconds of two plain matrix products, of fused attention and of our choice between
them (`attend` in clip_moe.py). Writes bench/attention.json.
"""

import argparse
import json
import pathlib
import platform
import sys
import time

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from clip_moe import attend
from engine.rate import has_fast_bf16

SHAPES = {  # rows, query heads, key/value heads, tokens, head size
    "mini CLIP": (32, 3, 3, 65, 64),
    "CLIP-L/14-336": (2, 16, 16, 577, 64),
    "mini LLM": (8, 8, 4, 256, 32),
    "SmolLM2-135M": (4, 9, 3, 512, 64),
    "SmolLM2-135M, one query": (1, 9, 3, 1024, 64),
}


def plain(q, k, v, mask):
    (B, H, T, A), G = q.shape, k.shape[1]
    scores = (q.reshape(B, G, -1, A) * A**-0.5 @ k.mT).view(B, H, T, -1)
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1).to(v.dtype).view(B, G, -1, k.shape[2]) @ v).view(B, H, T, A)


def fused(q, k, v, mask):
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def milliseconds(ways, q, k, v, mask, repeat=20):
    """{name: the fastest of `repeat` passes}; the ways take turns, so that other jobs disturb all.
    A single query, as in generation, has no backward pass."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeat):
        for name, way in ways.items():
            start = time.perf_counter()
            out = way(q, k, v, mask)
            if q.shape[2] > 1:
                out.sum().backward()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False).parse_args()
    rows = []
    print(f"{'':24} {'dtype':9} {'plain':>8} {'fused':>8} {'ours':>8}  ms")
    # emulated bf16 is not worth measuring
    dtypes = [torch.float32] + [torch.bfloat16] * has_fast_bf16("cpu")
    for name, (B, H, G, U, A) in SHAPES.items():
        for dtype in dtypes:
            T = 1 if "one query" in name else U
            q, k, v = (torch.randn(B, h, t, A, dtype=dtype, requires_grad=True)
                       for h, t in ((H, T), (G, U), (G, U)))  # fmt: skip
            seen = torch.ones(T, U, dtype=torch.bool)
            seen = seen.tril(U - T) if G < H else seen
            mask = torch.zeros(B, 1, T, U, dtype=dtype).masked_fill(~seen, -torch.inf)
            mask = mask if G < H else None  # CLIP: every patch sees every patch
            ways = {"plain": plain, "fused": fused, "ours": attend}
            row = milliseconds(ways, q, k, v, mask)
            rows.append({"shape": name, "dtype": str(dtype)[6:]} | row)
            print(f"{name:24} {str(dtype)[6:]:9} " + " ".join(f"{t:8.2f}" for t in row.values()))
    content = {"command": "python bench/attention.py", "torch": torch.__version__,
               "machine": platform.processor() or platform.machine(),
               "cpu": torch.backends.cpu.get_cpu_capability(),
               "threads": torch.get_num_threads(), "rows": rows}  # fmt: skip
    (ROOT / "bench" / "attention.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
