"""AdamW for learning rates below the rounding step of bfloat16 weights.

    m <- beta1 m + (1 - beta1) g          w <- w - lr (weight_decay w + m' / (sqrt(v') + eps))
    v <- beta2 v + (1 - beta2) g^2        m' = m / (1 - beta1^t),  v' = v / (1 - beta2^t)

(arXiv 1711.05101). In float32 this takes 16 bytes a parameter with its gradient, 123 GB for
CuMo-7B. bfloat16 needs half, but its neighbours of 0.03 are 1.2e-4 apart: CuMo's step of 4e-6
(paper, Table 6), rounded to nearest, never changes such a weight. `weights` chooses a way out.
Bytes a parameter with fp32 / bf16 `moments`:

    fp32         float32 weights                                                  16 / 12
    bf16-master  a float32 copy takes the step; the weight is its rounding        16 / 12
    bf16-sr      float32 arithmetic, stochastic rounding back to bf16, no copy    12 /  8

Stochastic rounding picks either neighbour with a probability that keeps the mean exact: 1 step of
4e-6 in 30 moves the weight by 1.2e-4. A bfloat16 is the upper half of a float32, so 16 random bits
added to the lower half carry into it with that probability. bf16 moments need the same: with beta2
= 0.999, v shrinks by 1e-3 a step, less than half of bf16's spacing. Rounded to nearest, v could
only grow, and learning would stop.

The noise is an integer hash of (seed, step, parameter, element). It has no state to save and is the
same on every device, so a resumed run repeats it. Under FSDP2 the hash takes an element's index in
the whole parameter: with equal gradients, sharded training equals a single process bit for bit.
Experts are the exception: they are sharded along another axis, and their noise differs.
"""

import functools
import hashlib
import itertools
import struct

import torch
from torch import Tensor

from data.flags import check_choice

WEIGHTS = {"fp32": torch.float32, "bf16-master": torch.bfloat16, "bf16-sr": torch.bfloat16}
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHE = 2**17  # elements a CPU updates at a time, so that their float32 temporaries fit its cache


def bytes_per_parameter(weights: str, moments: str) -> int:
    """Weight, gradient, both moments and the master copy."""
    check_choice("weights", weights, WEIGHTS)
    check_choice("moments", moments, MOMENTS)
    master = 4 * (weights == "bf16-master")
    return 2 * WEIGHTS[weights].itemsize + 2 * MOMENTS[moments].itemsize + master


# --------------------------------------------------------------------------------- rounding


def noise_keys(seed: int, step: int, index: int) -> list[Tensor]:
    """Keys for the noise of weight, m and v of parameter `index`. They are CPU tensors: Python
    integers would be constants of the compiled step, GPU tensors would have to be copied there."""
    digest = hashlib.blake2s(struct.pack("<3q", seed, step, index), digest_size=12).digest()
    return [torch.tensor(key, dtype=torch.int32) for key in struct.unpack("<3i", digest)]


def noise(like: Tensor, key: Tensor, offset: Tensor) -> Tensor:
    """32 random bits, an int32, for each element of `like`; the first one has the index `offset`.

    The integer hash lowbias32 (github.com/skeeto/hash-prospector), with the key mixed in twice.
    int32 products wrap around; `>>` copies the sign bit, so the masks remove it.
    """
    index = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    x = (index + offset) ^ key
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D ^ key
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """float32 x to one of its two neighbours in bfloat16, still stored as float32.

    The bits of a float are sign, exponent, mantissa: adding 1 to them gives the next number away
    from 0, even where the exponent changes. Infinities and NaNs stay what they are.
    """
    rounded = x.view(torch.int32) + (bits & 0xFFFF) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


# --------------------------------------------------------------------------------- the step


@functools.lru_cache(maxsize=32)
def factors(lr, betas, eps, weight_decay, step):
    """The scalars of a step, computed in float64, as CPU tensors (see `noise_keys`)."""
    (beta1, beta2), (fix1, fix2) = betas, (1 - beta**step for beta in betas)
    scalars = (beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr / fix1, fix2**0.5, eps)
    return [torch.tensor(x) for x in scalars]


def adamw(p, g, m, v, master, scalars, keys, offset):
    """One step of one parameter, flat, in place.

    The arithmetic is elementwise, so torch.compile makes one kernel of it: each number is read and
    written once, and the float32 temporaries never reach memory.
    """
    beta1, rest1, beta2, rest2, shrink, rate, root, eps = scalars
    key_p, key_m, key_v = keys
    w, g = (p if master is None else master).float(), g.float()
    m_new, v_new = beta1 * m.float() + rest1 * g, beta2 * v.float() + rest2 * g * g
    w = w * shrink - rate * m_new / (v_new.sqrt() / root + eps)
    if m.dtype == torch.bfloat16:
        m_new = stochastic_round(m_new, noise(p, key_m, offset))
        v_new = stochastic_round(v_new, noise(p, key_v, offset))
    m.copy_(m_new)
    v.copy_(v_new)
    if master is not None:
        master.copy_(w)
    elif p.dtype == torch.bfloat16:
        w = stochastic_round(w, noise(p, key_p, offset))
    p.copy_(w)  # with a master copy: rounded to nearest


@functools.cache
def compiled_adamw():
    """One graph for all lengths, so that a hundred shapes do not compile a hundred times."""
    return torch.compile(adamw, dynamic=True, fullgraph=True)


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the whole tensor; flat."""
    return (x.to_local() if hasattr(x, "to_local") else x).detach().view(-1)


def first_index(p: Tensor) -> Tensor:
    """Index of the first element of `local(p)` in the whole parameter, flat."""
    start = 0
    cut = [(i, s) for i, s in enumerate(getattr(p, "placements", ())) if not s.is_replicate()]
    if cut:
        (i, shard), *more = cut
        if more:
            raise ValueError(f"AdamW needs parameters sharded along one axis, not {p.placements}")
        rank = p.device_mesh.get_local_rank(i)
        start = rank * local(p).numel()  # along another axis all shards have the same size
        if shard.is_shard(0):
            rows = -(-p.shape[0] // p.device_mesh.size(i))  # a rank's rows, as torch.chunk cuts
            start = min(rows * rank, p.shape[0]) * (p.numel() // p.shape[0])
    return torch.tensor(start).to(torch.int32)  # wraps around past 2^31, like the noise


class AdamW(torch.optim.Optimizer):
    """AdamW with a choice of precision, `weights` and `moments`; see the top of this file.

    seed: seed of the rounding noise. compile: torch.compile the step (None: only on CUDA).
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, weights="fp32",
                 moments="fp32", seed=0, compile=None):  # fmt: skip
        self.compile = compile
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, seed=seed,
                                      weight_decay=weight_decay, weights=weights,
                                      moments=moments))  # fmt: skip

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_choice("weights", group["weights"], WEIGHTS)
        check_choice("moments", group["moments"], MOMENTS)
        want = WEIGHTS[group["weights"]]
        for p in group["params"]:
            if p.dtype != want:
                self.param_groups.pop()
                raise ValueError(f"weights={group['weights']!r} takes parameters of {want}, not "
                                 f"{p.dtype}; convert the model with .to({want})")  # fmt: skip

    def update(self, p, index, group):
        """Step parameter number `index`."""
        state = self.state[p]
        if not state:
            m, v = (torch.zeros_like(p, dtype=MOMENTS[group["moments"]]) for _ in range(2))
            state |= {"step": 0, "m": m, "v": v}
            if group["weights"] == "bf16-master":
                state["master"] = p.detach().float()
        state["step"] += 1
        scalars = factors(*(group[k] for k in ("lr", "betas", "eps", "weight_decay")),
                          state["step"])  # fmt: skip
        keys, offset = noise_keys(group["seed"], state["step"], index), first_index(p)
        tensors = [p, p.grad.contiguous(), state["m"], state["v"], state.get("master")]
        tensors = [None if x is None else local(x) for x in tensors]
        n, fused = len(tensors[0]), p.is_cuda if self.compile is None else self.compile
        step, size = compiled_adamw() if fused else adamw, n if fused or p.is_cuda else CACHE
        for a in range(0, n, max(size, 1)):
            pieces = [None if x is None else x[a : a + size].data for x in tensors]
            step(*pieces, scalars, keys, offset + a)
        torch.autograd.graph.increment_version(p)  # a change through `.data` is not seen

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = itertools.count()
        for group in self.param_groups:
            for p in group["params"]:
                i = next(index)
                if p.grad is not None:
                    self.update(p, i, group)
        return loss

    def load_state_dict(self, state_dict):
        """Load without casting: torch's own would round the float32 moments and master copy of a
        bf16 parameter. ValueError if the state was saved with another precision."""
        for mine, saved in zip(self.param_groups, state_dict["param_groups"]):
            for k in ("weights", "moments"):
                if saved.get(k) != mine[k]:
                    raise ValueError(f"the optimizer was saved with {k}={saved.get(k)!r} and "
                                     f"cannot go on with {mine[k]!r}; use the same")  # fmt: skip
        super().load_state_dict(state_dict | {"state": {}})
        ids, mine = ([p for group in groups for p in group["params"]]
                     for groups in (state_dict["param_groups"], self.param_groups))  # fmt: skip
        for i, p in zip(ids, mine):
            if i in state_dict["state"]:
                state = state_dict["state"][i].items()
                self.state[p] = {k: v.to(p.device) if torch.is_tensor(v) else v for k, v in state}


def param_groups(model, weight_decay):
    """The trainable parameters: matrices decay; norms and biases do not."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.dim() > 1 and not name.endswith((".b1", ".b2"))].append(p)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def make_optimizer(model, cfg):
    """PyTorch's AdamW in float32, the one above in any other precision."""
    groups = param_groups(model, cfg.weight_decay)
    if (cfg.weights, cfg.moments) == ("fp32", "fp32"):
        return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    return AdamW(groups, lr=cfg.lr, weights=cfg.weights, moments=cfg.moments, seed=cfg.seed)
