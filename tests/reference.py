"""Slow references, written like the paper's formulas: one token, one expert, one tile at a time."""

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def expert(x, weights, e, names, act):
    """One token [D] through expert e; `weights` has the public names, w [out, in]."""

    def linear(name, x):
        w, b = (weights.get(f"experts.{e}.{name}.{kind}") for kind in ("weight", "bias"))
        return w @ x if b is None else w @ x + b

    if len(names) == 3:  # SwiGLU
        return linear(names[1], ACTIVATIONS[act](linear(names[0], x)) * linear(names[2], x))
    return linear(names[1], ACTIVATIONS[act](linear(names[0], x)))


def sparse_moe(x, weights, top_k, names=("fc1", "fc2"), act="gelu", mask=None):
    """x [B, T, D] -> (y, balance, z, load), token by token, as the original defines them."""
    gate = weights["gate.weight"]
    num_experts = len(gate)
    outputs, balances, squares, assigned = [], [], [], [0] * num_experts
    for b, sample in enumerate(x):
        probs, firsts = [], []
        for t, token in enumerate(sample):
            if mask is not None and not mask[b, t]:
                outputs.append(None)
                continue
            logits = torch.stack([gate[e] @ token for e in range(num_experts)])
            exp = torch.exp(logits - logits.max())
            p = exp / exp.sum()
            best = sorted(range(num_experts), key=lambda e: (-p[e].item(), e))[:top_k]
            total = sum(p[e] for e in best)
            outputs.append(sum(p[e] / total * expert(token, weights, e, names, act) for e in best))
            squares.append((torch.log(exp.sum()) + logits.max()) ** 2)
            probs.append(p)
            firsts.append(best[0])
            for e in best:
                assigned[e] += 1
        mean = sum(probs) / len(probs)
        share = [firsts.count(e) / len(firsts) for e in range(num_experts)]
        balances.append(sum(mean[e] * share[e] for e in range(num_experts)) / num_experts)
    width = next(y for y in outputs if y is not None)
    y = torch.stack([torch.zeros_like(width) if y is None else y for y in outputs])
    balance = sum(balances) / len(balances) * num_experts**2
    load = torch.tensor(assigned) / sum(assigned)
    return y.view(*x.shape[:2], -1), balance, sum(squares) / len(squares), load


def multi_scale(passes, images, scales):
    """S2 (arXiv 2403.13043): `passes` maps images [1, 3, S, S] to patches [1, P, D]."""
    size, samples = images.shape[-1], []
    for image in images.split(1):
        features = []
        for i, scale in enumerate(scales):
            n = scale if i else 1
            big = image if n == 1 else F.interpolate(image, size=n * size, mode="bicubic")
            rows = []
            for r in range(n):
                row = []
                for c in range(n):
                    tile = big[:, :, r * size : (r + 1) * size, c * size : (c + 1) * size]
                    patches = passes(tile)
                    grid = math.isqrt(patches.shape[1])
                    row.append(patches.transpose(1, 2).view(1, -1, grid, grid))
                rows.append(torch.cat(row, dim=3))
            pooled = F.interpolate(torch.cat(rows, dim=2), size=(grid, grid), mode="area")
            features.append(pooled.flatten(2).transpose(1, 2))
        samples.append(torch.cat(features, dim=2))
    return torch.cat(samples)
