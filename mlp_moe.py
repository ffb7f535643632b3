"""Sparse mixture of experts: the router, the experts, and the connector built from them.

A transformer's MLP sends every token through the same weights. A sparse block owns E such MLPs,
the experts, and a router that sends each token through only K of them: E times the parameters for
K times the arithmetic. CuMo (arXiv 2405.05949, section 3.1) puts such blocks into CLIP and into
the connector between CLIP and the language model.

    x [N, D] --> router --> probs [N, E] --> the K best experts of each token, and their weights
       |                                                |
       |      t0 t1 t2 t3        sort by expert         v          un-sort, weighted sum
       +----> 1  0  1  2   -->  [ t1 | t0 t2 | t3 ] --> experts --> y [N, D]
                                  e0    e1     e2

    probs = softmax(x W)                        one logit per expert, in float32
    y_t   = sum over the top K of  w_te * expert_e(x_t),   w = probs of the chosen, made to sum to 1

Left alone a router falls in love with one expert, so two losses are returned beside y:

    balance = E^2 * mean over samples and experts of (mean prob of e) * (share of tokens whose
              first choice is e): 1 when all experts are used alike, E when one takes everything.
              The share has no gradient; the probabilities have, and flow away from busy experts.
              Only first choices count, as in GShard and the original: the first has the largest
              weight, and of all K together the share is even by itself when K comes near E.
    z       = mean of logsumexp(logits)^2: keeps the logits small.

Experts are not a list of modules but stacked parameters, w1 [E, D, F] and w2 [E, F, D]. After
sorting the tokens by expert, one grouped matrix product does the work of all experts: no loop, no
token is dropped, no question to the GPU ("how many tokens did expert 3 get?") that would make
Python wait, one compiled graph for every routing. An expert without tokens gets a gradient of
zeros. The original loops over the samples and over the experts: 960 calls per image in CLIP alone.

On disk each expert keeps the original's names and orientation (`experts.3.fc1.weight` [F, D]).
`public_state_dict` hands out *views* of the stacked parameters under those names; saving reads
them, loading and upcycling write through them, and no second copy of a weight ever exists.

Letters: B samples, T tokens, D features, F hidden features, E experts, K experts a token, N tokens
flattened (B*T), M = N*K assignments of a token to an expert.
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


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# by the names that public configs use
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu, "silu": F.silu,
               "gelu_pytorch_tanh": tanh_gelu}  # fmt: skip

# checkpointed(block, x): run it again in the backward pass instead of keeping its activations. Its
# sorts are kept: they are the routing, and a token must not meet another expert the second time.
checkpointed = partial(
    checkpoint,
    use_reentrant=False,
    context_fn=partial(create_selective_checkpoint_contexts, [torch.ops.aten.sort.stable]),
)


class Aux(NamedTuple):
    """What a router says about a batch, beside its routing."""

    balance: Tensor  # scalar, 1 (even) to E (collapsed)
    z: Tensor  # scalar
    load: Tensor  # [E] share of the assignments that went to each expert; sums to 1, no gradient
    choice: Tensor  # [B, T, K] chosen experts, best first; E (no expert) where padded
    prob: Tensor | None = None  # [B, E] mean probability: balance comes from its product with
    share: Tensor | None = None  # [B, E] the share of tokens whose first choice it is, no gradient
    entropy: Tensor | None = None  # scalar, nats: 0 (sure of one expert) to log E (no idea)


class Router(nn.Module):
    """Chooses K of E experts for each token: x [B, T, D] -> (weights [B, T, K], Aux).

    Without a batch axis x [T, D] counts as one sample. `mask` [B, T] is True for real tokens;
    padded ones are neither routed (weight 0, choice E) nor counted.
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Aux]:
        # In float32 whatever surrounds it: near ties decide which expert learns.
        # CuMo: the original takes logits and z in the surrounding precision, bf16 in training.
        with torch.autocast(x.device.type, enabled=False):
            return self.route(x.to(torch.promote_types(x.dtype, torch.float32)), mask)

    def route(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Aux]:
        logits_BTE = F.linear(x, self.weight.to(x.dtype))
        probs_BTE = logits_BTE.softmax(-1)
        # A stable sort, not topk: ties go to the lower expert on every device.
        sorted_BTE, order_BTE = probs_BTE.sort(dim=-1, descending=True, stable=True)
        weights_BTK, choice_BTK = sorted_BTE[..., : self.top_k], order_BTE[..., : self.top_k]
        # CuMo: the paper writes Softmax(TopK(logits)), which is the same weights; with K = 1 the
        # weight is constant 1 and the router learns from its two losses only.
        weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdim=True)

        real_BT = torch.ones_like(probs_BTE[..., 0])
        if mask is not None:
            real_BT = mask.to(x.dtype)
            weights_BTK = weights_BTK * real_BT[..., None]
            choice_BTK = choice_BTK.masked_fill(~mask[..., None], len(self.weight))
        chosen_BTKE = choice_BTK[..., None] == torch.arange(len(self.weight), device=x.device)
        chosen_BTKE = chosen_BTKE.to(x.dtype)
        tokens_B = real_BT.sum(-1)
        mean_BT = real_BT / tokens_B[..., None].clamp(min=1)  # takes the mean of each sample
        prob_BE = torch.einsum("...t,...te->...e", mean_BT, probs_BTE)
        share_BE = torch.einsum("...t,...te->...e", mean_BT, chosen_BTKE[..., 0, :])
        balance = len(self.weight) * (prob_BE * share_BE).sum() / (tokens_B > 0).sum().clamp(min=1)
        count = tokens_B.sum().clamp(min=1)
        z = (real_BT * logits_BTE.logsumexp(-1) ** 2).sum() / count
        load_E = chosen_BTKE.flatten(0, -2).sum(0) / (count * self.top_k)
        entropy = torch.special.entr(probs_BTE.detach()).sum(-1)  # entr(p) = -p log p
        entropy = (real_BT * entropy).sum() / count
        return weights_BTK, Aux(balance, z, load_E, choice_BTK, prob_BE, share_BE, entropy)


def grouped_matmul(x_MD: Tensor, w_EDF: Tensor, ends_E: Tensor, rows_ME: Tensor) -> Tensor:
    """Rows ends[e-1] to ends[e] of x, times w[e], for all experts e at once.

    PyTorch's grouped product wants rows of whole 16 bytes in bfloat16; on a CPU and not compiled it
    takes float32 and float16 too. Elsewhere, write each row into its expert's own columns of a
    [M, E*D] matrix of zeros: an ordinary matrix product, exact, at E times the arithmetic.
    `rows_ME` is the one-hot of row -> expert.
    """
    aligned = all(size * x_MD.element_size() % 16 == 0 for size in w_EDF.shape[1:])
    eager_cpu = x_MD.device.type == "cpu" and not torch.compiler.is_compiling()
    more = (torch.float32, torch.float16) if eager_cpu else ()
    if aligned and x_MD.dtype in (torch.bfloat16, *more):
        return F.grouped_mm(x_MD, w_EDF, offs=ends_E)
    return (rows_ME[:, :, None] * x_MD[:, None, :]).flatten(1) @ w_EDF.flatten(0, 1)


class Experts(nn.Module):
    """E two-layer MLPs as stacked parameters; `gated` makes them SwiGLU: (act(x w1) * (x w3)) w2.

    x [M, in] is sorted by expert, expert e owns the rows from ends[e-1] to ends[e], and ends[-1] is
    M: every row has an expert.
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
        if torch.is_autocast_enabled(x_MD.device.type):  # it does not know grouped products
            x_MD = x_MD.to(torch.get_autocast_dtype(x_MD.device.type))
        experts_E = torch.arange(len(ends_E), device=x_MD.device)
        row_M = torch.arange(len(x_MD), device=x_MD.device)
        rows_ME = torch.searchsorted(ends_E, row_M, right=True)[:, None] == experts_E
        rows_ME = rows_ME.to(x_MD.dtype)

        def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            y = grouped_matmul(x, w.to(x.dtype), ends_E, rows_ME)
            # the one-hot product gives each row its expert's bias, and the bias an exact gradient
            return y if b is None else torch.addmm(y, rows_ME, b.to(x.dtype))

        hidden_MF = ACTIVATIONS[self.act](linear(x_MD, self.w1, self.b1))
        if self.w3 is not None:
            hidden_MF = hidden_MF * linear(x_MD, self.w3, None)
        return linear(hidden_MF, self.w2, self.b2)

    def public_state_dict(self, names: tuple[str, ...], prefix: str = "") -> dict[str, Tensor]:
        """Views of each expert's weights under public names, e.g. names=("fc1", "fc2")."""
        layers = [(self.w1, self.b1), (self.w2, self.b2), (self.w3, None)]
        views = {}
        for e in range(len(self.w1)):
            for name, (w_EDF, b_EF) in zip(names, layers):
                views[f"{prefix}{e}.{name}.weight"] = w_EDF.detach()[e].T
                if b_EF is not None:
                    views[f"{prefix}{e}.{name}.bias"] = b_EF.detach()[e]
        return views


class Permuted(torch.autograd.Function):
    """x[order]. Its gradient goes back the same way, g[inverse]; that of an index in general is
    added up row by row, which takes five times as long."""

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
        # 2) sort the assignments by expert; padded ones (choice E) come last and ride along with
        #    the last expert at weight 0, so that no row is left uninitialised
        sorted_M, order_M = aux.choice.flatten().sort(stable=True)
        experts_E = torch.arange(num_experts, device=x.device)
        ends_E = torch.searchsorted(sorted_M, experts_E, right=True, out_int32=True)
        ends_E[-1] = len(sorted_M)
        position_M = torch.empty_like(order_M)
        position_M[order_M] = torch.arange(len(order_M), device=x.device)
        # 3) run all experts
        x_MD = x.flatten(0, -2).repeat_interleave(K, 0)  # one row for each of a token's choices
        y_MD = self.experts(Permuted.apply(x_MD, order_M, position_M), ends_E)
        # 4) un-sort and combine
        y_BTKD = Permuted.apply(y_MD, position_M, order_M)
        y_BTKD = y_BTKD.view(*weights_BTK.shape, y_MD.shape[-1])
        return (weights_BTK[..., None] * y_BTKD).sum(-2).to(y_MD.dtype), aux

    def public_state_dict(self, names: tuple[str, ...], prefix: str = "") -> dict[str, Tensor]:
        """Views of all weights under public names: gate.weight, experts.0.<name>.weight, ..."""
        views = {f"{prefix}gate.weight": self.gate.weight.detach()}
        return views | self.experts.public_state_dict(names, f"{prefix}experts.")


class Connector(nn.Module):
    """From CLIP's features to the language model's: (x) -> (y, Aux, or None when dense).

    A two-layer MLP with exact GELU, in_dim -> out_dim -> out_dim, as in LLaVA; with num_experts > 0
    a sparse mixture of such MLPs (paper section 3.1, "MLP-MoE"). No residual, no norm.
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
