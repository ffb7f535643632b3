"""int8 weights: a language model in half the memory of bfloat16, for answering.

To make one token, every weight is read once, so what limits the speed is bytes. A weight matrix
W [F, D] is kept as whole numbers Q in [-127, 127] and one float32 scale for each of its F outputs:

    scale_f = max_d |W_fd| / 127        Q_fd = round(W_fd / scale_f)        W x ~ scale * (Q x)

The error is at most half a scale a weight, and the scale leaves the product, since it is the same
for a whole row. Activations stay as they are ("weight-only"), so nothing is calibrated. What this
does to answers and to memory is measured by bench/quant.py.

Quantized are the matrices of the language model: attention, MLPs or experts, embedding and head.
Norms and routers, a thousandth of the weights, are left alone, and so are CLIP and the connector:
they run once a picture, with hundreds of tokens for each weight that is read.

    llm = quantize(LLM.from_pretrained(folder, torch.bfloat16))       python sample.py --quant int8

Letters: F outputs, D inputs, E experts, M assignments of a token to an expert.
"""

import torch
from torch import Tensor, nn

from llm import LLM, Linear, product
from mlp_moe import ACTIVATIONS, Experts, grouped_matmul

FEW = 8  # so many rows take only their own experts' weights from memory


def to_int8(weight: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Weights -> (int8 of the same shape, float32 scales, without the dimension `dim`, over which
    the product sums)."""
    scale = weight.abs().amax(dim, keepdim=True).float() / 127
    scale = scale.masked_fill(scale == 0, 1)
    if not scale.isfinite().all():
        raise ValueError("a weight is not finite; int8 has no number for it")
    whole = (weight.float() / scale).round().clamp(-127, 127)
    return whole.to(torch.int8), scale.squeeze(dim)


class Int8Linear(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        weight, scale = to_int8(weight)
        self.register_buffer("weight", weight)  # [F, D]
        self.register_buffer("scale", scale)  # [F]

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.scale)


class Int8Embedding(Int8Linear):
    """Also the head, if that is tied (`LLM.logits`). Rows come out in the dtype they had."""

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
        rows_ME = expert_M[:, None] == torch.arange(len(ends_E), device=x_MD.device)

        def linear(x: Tensor, name: str) -> Tensor:
            w_EDF, scale_EF = getattr(self, name), getattr(self, f"scale_{name}")
            if len(x) <= FEW:
                y = torch.einsum("md,mdf->mf", x, w_EDF[expert_M].to(x.dtype))
            else:
                y = grouped_matmul(x, w_EDF.to(x.dtype), ends_E, rows_ME.to(x.dtype))
            return (y * scale_EF[expert_M]).to(x.dtype)

        hidden_MF = ACTIVATIONS[self.act](linear(x_MD, "w1")) * linear(x_MD, "w3")
        return linear(hidden_MF, "w2")


def unsaved(keep_vars: bool = False) -> dict[str, Tensor]:
    raise ValueError("int8 weights are for answering; save the checkpoint they were made from")


@torch.no_grad()
def quantize(llm: LLM) -> LLM:
    """Replace the matrices of `llm`, one at a time and in place; it can then only answer."""
    for module in list(llm.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, Int8Linear(child.weight))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, Int8Embedding(child.weight))
            elif isinstance(child, Experts):
                setattr(module, name, Int8Experts(child))
    llm.public_state_dict = unsaved
    return llm.requires_grad_(False)
