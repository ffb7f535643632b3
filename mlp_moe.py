"""Sparse mixture of experts: the router, the experts, and the connector built from them.

A transformer's MLP sends every token through the same weights. A sparse block has E such MLPs, the
experts, and a router that sends each token through K of them: E times the parameters for K times
the arithmetic. CuMo (arXiv 2405.05949, section 3.2) uses such blocks in CLIP and in the connector.

    x [N, D] --> router --> probs [N, E] --> the K best experts of each token, and their weights
       |                                                |
       |      t0 t1 t2 t3        sort by expert         v          un-sort, weighted sum
       +----> 1  0  1  2   -->  [ t1 | t0 t2 | t3 ] --> experts --> y [N, D]
     (drawn for K = 1)            e0    e1     e2

    probs = softmax(x W)                        one logit per expert, in float32
    y_t   = sum over the top K of  w_te * expert_e(x_t),   w = the top K probs, scaled to sum to 1

Left alone, a router may send most tokens to a few experts; `routing_losses` works against it.

All experts of a block are stacked: w1 [E, D, F], w2 [E, F, D] and their biases. Tokens are
sorted by expert. Then each of the two layers is one grouped matrix product over all experts, so no
token is dropped and shapes do not depend on the routing: `torch.compile` needs only one graph. On
disk each expert has the original's names and orientation: in CLIP `experts.3.fc1.weight` [F, D].

Letters: B rows or samples, T tokens, D features, F hidden features, E experts, K experts per token,
N tokens flattened (B*T), M = N*K assignments of a token to an expert.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from data.weights import load_into


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# keyed by the names that public configs use
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu, "silu": F.silu,
               "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}  # fmt: skip

# checkpointed(block, x) recomputes the block in the backward pass instead of keeping activations.
# Recomputed probabilities may differ in the last bit, but a token must meet the same experts again.
# So the result of each sort is kept. (Compiled GPU code just sorts again and gets the same bits.)
checkpointed = partial(
    checkpoint,
    use_reentrant=False,
    context_fn=partial(create_selective_checkpoint_contexts, [torch.ops.aten.sort.stable]),
)


class Aux(NamedTuple):
    """The losses and statistics of a router's decisions about one batch."""

    balance: Tensor  # scalar: about 1 for even use, E if one expert has probability 1 everywhere
    z: Tensor  # scalar
    load: Tensor  # [E] share of the assignments that went to each expert; sums to 1, no gradient
    choice: Tensor  # [B, T, K] chosen experts, best first; E (no expert) where padded
    prob: Tensor | None = None  # [B, E] mean probability of each expert
    share: Tensor | None = None  # [B, E] share of tokens that chose the expert first, no gradient
    entropy: Tensor | None = None  # scalar, nats: 0 (certain) to log E (uniform)


class Router(nn.Module):
    """Chooses K of E experts for each token: x [B, T, D] -> (weights [B, T, K], Aux).

    x [T, D], without a batch axis, is one sample. `mask` [B, T] is True for real tokens;
    padding is neither routed (weight 0, choice E) nor counted.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} of num_experts={num_experts} is impossible: "
                             f"choose top_k from 1 to {num_experts}")  # fmt: skip
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.weight.shape[1] ** -0.5  # nn.Linear's default
        nn.init.uniform_(self.weight, -bound, bound)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [..., D] -> weights and choice [..., K], logits and probs [..., E]."""
        logits = F.linear(x, self.weight.to(x.dtype))
        probs = logits.softmax(-1)
        # a stable sort, not topk: ties go to the lower expert on every device
        best, order = probs.sort(dim=-1, descending=True, stable=True)
        weights, choice = best[..., : self.top_k], order[..., : self.top_k]
        # The paper writes Softmax(TopK(logits)): the same weights. With K = 1 every weight is 1,
        # so the router learns only from its two losses.
        return weights / weights.sum(-1, keepdim=True), choice, logits, probs

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Aux]:
        # In float32 under any autocast: bf16 would flip the choice between near-equal experts.
        # Unlike the original, which takes logits and z in the surrounding precision.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            weights_BTK, choice_BTK, logits_BTE, probs_BTE = self.route(x)
            real_BT = torch.ones_like(probs_BTE[..., 0])
            if mask is not None:
                real_BT = mask.to(x.dtype)
                weights_BTK = weights_BTK * real_BT[..., None]
                choice_BTK = choice_BTK.masked_fill(~mask[..., None], len(self.weight))
            return weights_BTK, routing_losses(logits_BTE, probs_BTE, choice_BTK, real_BT)


def routing_losses(logits_BTE: Tensor, probs_BTE: Tensor, choice_BTK: Tensor, real_BT: Tensor):
    """The two auxiliary losses (paper section 3.3), and statistics for the log -> Aux.

    balance = E * mean over samples of sum_e prob_e * share_e, where prob_e is the mean probability
              of expert e and share_e the share of tokens whose first choice it is. Only prob
              has a gradient; it lowers the probability of busy experts. Only first choices
              count, as in GShard and the original; they have the largest weights.
    z       = mean of logsumexp(logits)^2, which keeps the logits small.
    """
    E, K = logits_BTE.shape[-1], choice_BTK.shape[-1]
    chosen_BTKE = choice_BTK[..., None] == torch.arange(E, device=choice_BTK.device)
    chosen_BTKE = chosen_BTKE.to(probs_BTE.dtype)
    tokens_B = real_BT.sum(-1)
    mean_BT = real_BT / tokens_B[..., None].clamp(min=1)  # weights of the mean over a sample
    prob_BE = torch.einsum("...t,...te->...e", mean_BT, probs_BTE)
    share_BE = torch.einsum("...t,...te->...e", mean_BT, chosen_BTKE[..., 0, :])
    balance = E * (prob_BE * share_BE).sum() / (tokens_B > 0).sum().clamp(min=1)
    count = tokens_B.sum().clamp(min=1)
    z = (real_BT * logits_BTE.logsumexp(-1) ** 2).sum() / count
    load_E = chosen_BTKE.flatten(0, -2).sum(0) / (count * K)
    entropy_BT = -(probs_BTE * logits_BTE.log_softmax(-1)).detach().sum(-1)
    entropy = (real_BT * entropy_BT).sum() / count
    return Aux(balance, z, load_E, choice_BTK, prob_BE, share_BE, entropy)


def grouped_matmul(x_MD: Tensor, w_EDF: Tensor, ends_E: Tensor, onehot_ME: Tensor) -> Tensor:
    """Rows ends[e-1] to ends[e] of x, times w[e], for all experts e at once.

    PyTorch's grouped product takes rows aligned to 16 bytes, in bfloat16 (on a CPU, uncompiled, in
    float32 or float16 too). In all other cases each row becomes E*D wide: its D numbers in its
    expert's columns, zeros elsewhere. One product with the weights as [E*D, F] is then right, at E
    times the arithmetic.
    """
    aligned = all(size * x_MD.element_size() % 16 == 0 for size in w_EDF.shape[1:])
    eager_cpu = x_MD.device.type == "cpu" and not torch.compiler.is_compiling()
    more = (torch.float32, torch.float16) if eager_cpu else ()
    if aligned and x_MD.dtype in (torch.bfloat16, *more):
        return F.grouped_mm(x_MD, w_EDF, offs=ends_E)
    return (onehot_ME[:, :, None] * x_MD[:, None, :]).flatten(1) @ w_EDF.flatten(0, 1)


class Experts(nn.Module):
    """E two-layer MLPs as stacked parameters; `gated` makes them SwiGLU: (act(x w1) * (x w3)) w2.

    x [M, in] is sorted by expert; ends [E] says where the rows of each expert end. An expert
    without rows gets a gradient of zeros.
    """

    def __init__(self, num_experts: int, in_dim: int, hidden_dim: int, out_dim: int,
                 act: str = "gelu", gated: bool = False, bias: bool = True):  # fmt: skip
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"unknown activation {act!r}: choose one of {', '.join(ACTIVATIONS)}")
        self.act = act

        def stack(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape))

        self.w1 = stack(in_dim, hidden_dim)
        self.w2 = stack(hidden_dim, out_dim)
        self.w3 = stack(in_dim, hidden_dim) if gated else None
        self.b1 = stack(hidden_dim) if bias and not gated else None
        self.b2 = stack(out_dim) if bias and not gated else None
        self.reset_parameters()

    def reset_parameters(self):
        fan_in = {"w2": self.w2.shape[1], "b2": self.w2.shape[1]}
        for name, weight in self.named_parameters():  # uniform, as nn.Linear's default
            bound = fan_in.get(name, self.w1.shape[1]) ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x_MD: Tensor, ends_E: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x_MD.device.type):  # autocast does not cast grouped products
            x_MD = x_MD.to(torch.get_autocast_dtype(x_MD.device.type))
        experts_E = torch.arange(len(ends_E), device=x_MD.device)
        row_M = torch.arange(len(x_MD), device=x_MD.device)
        expert_M = torch.searchsorted(ends_E, row_M, right=True)
        onehot_ME = (expert_M[:, None] == experts_E).to(x_MD.dtype)

        def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            y = grouped_matmul(x, w.to(x.dtype), ends_E, onehot_ME)
            return y if b is None else y + Bias.apply(b.to(x.dtype), expert_M, onehot_ME)

        hidden_MF = ACTIVATIONS[self.act](linear(x_MD, self.w1, self.b1))
        if self.w3 is not None:
            hidden_MF = hidden_MF * linear(x_MD, self.w3, None)
        return linear(hidden_MF, self.w2, self.b2)

    def public_state_dict(self, names: tuple[str, ...], prefix: str = "") -> dict[str, Tensor]:
        """Views of each expert's weights under public names, e.g. names=("fc1", "fc2").

        Saving reads the views and loading writes through them: no weight is stored twice.
        """
        layers = [(self.w1, self.b1), (self.w2, self.b2), (self.w3, None)]
        views = {}
        for e in range(len(self.w1)):
            for name, (w_EDF, b_EF) in zip(names, layers):
                views[f"{prefix}{e}.{name}.weight"] = w_EDF.detach()[e].T
                if b_EF is not None:
                    views[f"{prefix}{e}.{name}.bias"] = b_EF.detach()[e]
        return views


class Bias(torch.autograd.Function):
    """b [E, F] -> the bias of each row's expert [M, F]. Its gradient is one matrix product
    instead of an addition per row."""

    @staticmethod
    def forward(ctx, b_EF, expert_M, onehot_ME):
        ctx.save_for_backward(onehot_ME)
        return b_EF.index_select(0, expert_M)

    @staticmethod
    def backward(ctx, g_MF):
        return ctx.saved_tensors[0].T @ g_MF, None, None


class Permuted(torch.autograd.Function):
    """x[order] for a permutation: its gradient is g[inverse], five times as fast as the general
    gradient of an index, which adds row by row."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, g):
        order, inverse = ctx.saved_tensors
        return Permuted.apply(g, inverse, order), None, None


class SparseMoE(nn.Module):
    """x [B, T, D] -> (y [B, T, out], Aux): each token through its K best experts, none dropped."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, top_k: int,
                 out_dim: int | None = None, act: str = "gelu", gated: bool = False,
                 bias: bool = True):  # fmt: skip
        super().__init__()
        self.gate = Router(dim, num_experts, top_k)
        self.experts = Experts(num_experts, dim, hidden_dim, out_dim or dim, act, gated, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Aux]:
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        # 1) route
        weights_BTK, aux = self.gate(x, mask)
        num_experts, K = len(self.gate.weight), self.gate.top_k
        # 2) sort the assignments by expert; padding (choice E) comes last: to keep shapes fixed,
        #    the last expert computes it, with weight 0
        key_M = aux.choice.flatten().to(torch.int16)  # two bytes: fewer passes of a radix sort
        sorted_M, order_M = key_M.sort(stable=True)
        experts_E = torch.arange(num_experts, dtype=key_M.dtype, device=x.device)
        ends_E = torch.searchsorted(sorted_M, experts_E, right=True, out_int32=True)
        ends_E[-1:] = len(sorted_M)
        inverse_M = torch.empty_like(order_M)
        inverse_M[order_M] = torch.arange(len(order_M), device=x.device)
        # 3) run all experts
        x_MD = x.flatten(0, -2).repeat_interleave(K, 0)  # K rows per token
        y_MD = self.experts(Permuted.apply(x_MD, order_M, inverse_M), ends_E)
        # 4) un-sort and combine
        y_BTKD = Permuted.apply(y_MD, inverse_M, order_M)
        y_BTKD = y_BTKD.view(*weights_BTK.shape, y_MD.shape[-1])
        return (weights_BTK[..., None] * y_BTKD).sum(-2).to(y_MD.dtype), aux

    def public_state_dict(self, names: tuple[str, ...], prefix: str = "") -> dict[str, Tensor]:
        """Views of all weights under public names: gate.weight, experts.0.<name>.weight, ..."""
        views = {f"{prefix}gate.weight": self.gate.weight.detach()}
        return views | self.experts.public_state_dict(names, f"{prefix}experts.")


class Connector(nn.Module):
    """From CLIP's features to the language model's: x -> (y, aux); aux is None when dense.

    A two-layer MLP with exact GELU, in_dim -> out_dim -> out_dim, as in LLaVA; with num_experts > 0
    a sparse mixture of such MLPs (paper section 3.2, "MLP-MoE"). No residual, no norm.
    """

    def __init__(self, in_dim: int, out_dim: int, num_experts: int = 0, top_k: int = 2):
        super().__init__()
        if num_experts:
            self.moe = SparseMoE(in_dim, out_dim, num_experts, top_k, out_dim)
        else:
            self.mlp = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(),
                                     nn.Linear(out_dim, out_dim))  # fmt: skip
        self.sparse = num_experts > 0

    def forward(self, x: Tensor) -> tuple[Tensor, Aux | None]:
        return self.moe(x) if self.sparse else (self.mlp(x), None)

    def public_state_dict(self) -> dict[str, Tensor]:
        """Views under the public names: {0,2}.{weight,bias} or gate.weight, experts.e.{0,2}.*"""
        return self.moe.public_state_dict(("0", "2")) if self.sparse else self.mlp.state_dict()

    def load_original(self, state_dict: dict[str, Tensor]) -> None:
        if self.sparse and "0.weight" in state_dict:
            raise ValueError("a dense connector's weights cannot fill a sparse one: "
                             "load a dense model and upcycle it (upcycle.py)")  # fmt: skip
        load_into(self.public_state_dict(), state_dict, source="the connector's state dict")


if __name__ == "__main__":  # a worked example: ten tokens, four experts, two for each token
    moe, x = SparseMoE(8, 32, num_experts=4, top_k=2), torch.randn(1, 10, 8)
    y, aux = moe(x)
    print(f"x {[*x.shape]} -> y {[*y.shape]}; experts of each token: {aux.choice[0].tolist()}")
    print(f"load {aux.load.tolist()}, balance {aux.balance:.2f} (1: even), z {aux.z:.2f}")
