"""int8 weights: a language model in half the memory of bfloat16, for inference only.

To make one token, every weight is read once, so memory bandwidth limits the speed. A weight matrix
W [F, D] is kept as integers Q in [-127, 127] and one float32 scale for each of its F outputs:

    scale_f = max_d |W_fd| / 127        Q_fd = round(W_fd / scale_f)        W x ~ scale * (Q x)

The error of a weight is at most half a scale. Since a row has one scale, the scale is applied after
the product. Activations are not quantized ("weight-only"), so no calibration is needed.
bench/quant.py measures the effect on answers and memory.

The matrices of the language model are quantized: attention, MLPs or experts, embedding and head.
Norms and routers, a thousandth of the weights, stay as they are. So do CLIP and the connector:
they run once a picture, and each of their weights, once read, serves hundreds of tokens.

    llm = quantize(LLM.from_pretrained(folder, torch.bfloat16))       python sample.py --quant int8

Letters: F outputs, D inputs, E experts, M assignments of a token to an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm import LLM
from mlp_moe import ACTIVATIONS, Experts, grouped_matmul

FEW = 8  # rows for which each weight, or only the chosen experts' weights, is read once


def to_int8(weight: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Weights -> (int8 of the same shape, float32 scales without the dimension `dim`, the one that
    the product sums over)."""
    scale = weight.abs().amax(dim, keepdim=True).float() / 127
    scale = scale.masked_fill(scale == 0, 1)
    if not scale.isfinite().all():
        raise ValueError("a weight is not finite: the checkpoint is damaged, download it again")
    rounded = (weight.float() / scale).round().clamp(-127, 127)
    return rounded.to(torch.int8), scale.squeeze(dim)


def row_by_row(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear(x, weight) in float32, a sum for each row. Compiled for a GPU it is one kernel that
    reads the int8 weights once; F.linear needs them written out in bfloat16 first."""
    rows = [(row.float() * weight).sum(-1) for row in x.flatten(0, -2)]
    return torch.stack(rows).view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        weight, scale = to_int8(weight)
        self.register_buffer("weight", weight)  # [F, D]
        self.register_buffer("scale", scale)  # [F]

    def product(self, x: Tensor) -> Tensor:
        fuse = x.is_cuda and torch.compiler.is_compiling() and x.shape[:-1].numel() <= FEW
        y = row_by_row(x, self.weight) if fuse else F.linear(x, self.weight.to(x.dtype))
        return (y * self.scale).to(x.dtype)

    forward = product


class Int8Embedding(Int8Linear):
    """An embedding whose `product` is the head, if that is tied. Rows have their original dtype."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.dtype = weight.dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.weight[tokens] * self.scale[tokens, None]).to(self.dtype)


class Int8Experts(nn.Module):
    """SwiGLU experts of a Mixtral, see mlp_moe.Experts: x [M, D] is sorted by expert."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.act = experts.act
        for name in ("w1", "w2", "w3"):
            weight, scale = to_int8(getattr(experts, name).detach(), dim=1)
            self.register_buffer(name, weight)  # [E, D, F]
            self.register_buffer(f"scale_{name}", scale)  # [E, F]

    def forward(self, x_MD: Tensor, ends_E: Tensor) -> Tensor:
        row_M = torch.arange(len(x_MD), device=x_MD.device)
        expert_M = torch.searchsorted(ends_E, row_M, right=True)
        onehot_ME = expert_M[:, None] == torch.arange(len(ends_E), device=x_MD.device)

        def linear(x: Tensor, name: str) -> Tensor:
            w_EDF, scale_EF = getattr(self, name), getattr(self, f"scale_{name}")
            if len(x) <= FEW:
                y = torch.einsum("md,mdf->mf", x, w_EDF[expert_M].to(x.dtype))
            else:
                y = grouped_matmul(x, w_EDF.to(x.dtype), ends_E, onehot_ME.to(x.dtype))
            return (y * scale_EF[expert_M]).to(x.dtype)

        hidden_MF = ACTIVATIONS[self.act](linear(x_MD, "w1")) * linear(x_MD, "w3")
        return linear(hidden_MF, "w2")


class Int8LLM(LLM):
    """What `quantize` turns an LLM into."""

    def logits(self, x: Tensor) -> Tensor:
        return self.head.product(x)

    def public_state_dict(self, keep_vars: bool = False) -> dict[str, Tensor]:
        raise ValueError("int8 weights cannot be saved; save the checkpoint they were made from")


@torch.no_grad()
def quantize(llm: LLM) -> LLM:
    """Replace the matrices of `llm`, one at a time and in place; afterwards it can only answer."""
    for module in list(llm.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, Int8Embedding(child.weight))
            elif isinstance(child, Experts):
                setattr(module, name, Int8Experts(child))
    llm.__class__ = Int8LLM
    return llm.requires_grad_(False)
