"""AdamW when the learning rate is smaller than the weights' rounding step.

    m <- beta1 m + (1 - beta1) g          w <- w - lr (weight_decay w + m' / (sqrt(v') + eps))
    v <- beta2 v + (1 - beta2) g^2        m' = m / (1 - beta1^t),  v' = v / (1 - beta2^t)

(arXiv 1711.05101). In float32 that is 16 bytes a parameter with its gradient: 122 GiB for CuMo-7B.
bfloat16 halves it but keeps 8 significant bits: the neighbours of 0.03 are 1.2e-4 away, and CuMo's
step of 4e-6 (paper, Table 6), rounded to nearest, leaves the weight where it was, for ever. Two
ways out, chosen with `weights`; bytes with fp32 / bf16 / int8 `moments`:

    fp32         float32 weights                                                  16 / 12 / 10
    bf16-master  a float32 copy takes the step; the weight is its rounding        16 / 12 / 10
    bf16-sr      float32 arithmetic, stochastic rounding back: no copy            12 /  8 /  6

Stochastic rounding goes up as often as the number is far on its way up: 1 step of 4e-6 in 30 moves
the weight above, by 1.2e-4, so that the mean is exact. It is one addition: the upper half of a
float32's bits is a bfloat16, and 16 random bits added to the lower half carry over with just that
probability.

The moments need it as well. With beta2 = 0.999, v shrinks by 1e-3 a step, less than half of bf16's
spacing: rounded to nearest, it would only ever rise, and learning would stop. In int8, 256 values
share a float32 scale. v goes from the largest g^2 of a block to the smallest, and one that becomes
0 divides a step by eps: so its code is logarithmic, 8 steps an octave over 32 octaves, and 0 stands
for nothing but 0. m is stored in units of sqrt(v), the size Adam divides it by: all are near 1,
whatever the gradients' sizes, and an error moves no weight by more than a small part of lr.

The noise is a hash of (seed, step, parameter, element) in integers: no state to save, nothing that
another random number could disturb, the same bits on every device. A resumed run is the same run.

Under FSDP2 each process steps its rows; an element's noise comes from its place in the whole
parameter, so the same gradients give the weights of a single process, bit for bit, with any number
of processes. Not so of experts, which are cut along another axis: there it is other noise. In int8
blocks would end where the rows of a process end; that is refused.
"""

import functools
import hashlib
import itertools
import struct

import torch
from torch import Tensor

WEIGHTS = {"fp32": torch.float32, "bf16-master": torch.bfloat16, "bf16-sr": torch.bfloat16}
MOMENTS = {  # the dtypes of m and v
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
}
BLOCK = 256  # values that share a scale in int8
CACHE = 2**17  # values a CPU steps at a time, whose float32 temporaries stay in its cache
TINY = torch.finfo(torch.float32).tiny


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")


def bytes_per_parameter(weights: str, moments: str) -> float:
    """Weight, gradient, moments, master copy and scales (these for sizes in multiples of 256)."""
    check_choice("weights", weights, WEIGHTS)
    check_choice("moments", moments, MOMENTS)
    master, scales = 4 * (weights == "bf16-master"), 2 * 4 / BLOCK * (moments == "int8")
    sizes = [dtype.itemsize for dtype in (WEIGHTS[weights],) * 2 + MOMENTS[moments]]
    return sum(sizes) + master + scales


# --------------------------------------------------------------------------------- rounding


def noise_keys(seed: int, step: int, index: int) -> list[Tensor]:
    """Keys for the noise of weight, m and v of parameter `index`. Tensors of the CPU: as numbers
    they would be constants of the compiled step, on the GPU they would have to be sent there."""
    digest = hashlib.blake2s(struct.pack("<3q", seed, step, index), digest_size=12).digest()
    return [torch.tensor(key, dtype=torch.int32) for key in struct.unpack("<3i", digest)]


def noise(like: Tensor, key: Tensor, start: Tensor) -> Tensor:
    """32 random bits, an int32, for each element of `like`, whose first one has the place `start`.

    The integer hash lowbias32 (github.com/skeeto/hash-prospector), with the key mixed in twice.
    int32 products wrap around; `>>` copies the sign bit, which the masks remove.
    """
    place = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    x = (place + start) ^ key
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D ^ key
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def stochastic_round(x: Tensor, bits: Tensor, drop: int = 16) -> Tensor:
    """float32 x to one of its two neighbours whose last `drop` bits are 0; in the mean, x.

    The bits of a float are sign, exponent, mantissa: adding 1 to them is the next number away from
    0, over the ends of octaves too. Infinities and NaNs stay what they are.
    """
    kept = x.view(torch.int32) + (bits & (1 << drop) - 1) & -(1 << drop)
    return torch.where(x.isfinite(), kept.view(torch.float32), x)


CODE_OF_1 = 0x3F800000 >> 20  # float32's exponent and first 3 bits of mantissa, for 1.0


def unpack_v(v8: Tensor, scale: Tensor) -> Tensor:
    ratio = (v8.int() + (CODE_OF_1 - 255) << 20).view(torch.float32)
    return torch.where(v8 > 0, ratio * scale, 0)


def pack_v(v: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """v [blocks, 256] -> uint8 and scale [blocks, 1]: the largest is 255, 8 steps are a half."""
    scale = v.amax(1, keepdim=True)
    ratio = stochastic_round(v / scale.clamp(min=TINY), bits, 20)
    code = (ratio.view(torch.int32) >> 20) - (CODE_OF_1 - 255)
    return torch.where(v > 0, code.clamp(1, 255), 0).to(torch.uint8), scale


def pack_m(m: Tensor, v: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """m [blocks, 256] in units of sqrt(v), v as it will be read -> int8 and scale [blocks, 1]."""
    x = torch.where(v > TINY, m * v.rsqrt(), 0)
    scale = x.abs().amax(1, keepdim=True) / 127
    x = x / scale.clamp(min=TINY) + (bits >> 8 & 0xFFFFFF) * 2.0**-24  # + [0, 1), then floor
    return x.floor().clamp(-127, 127).to(torch.int8), scale


# --------------------------------------------------------------------------------- the step


@functools.lru_cache(maxsize=32)
def factors(lr, betas, eps, weight_decay, step):
    """The numbers of a step, computed in float64, as tensors of the CPU (see `noise_keys`)."""
    (beta1, beta2), (fix1, fix2) = betas, (1 - beta**step for beta in betas)
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr / fix1, fix2**0.5, eps)
    return [torch.tensor(x) for x in numbers]


def adamw(p, g, m, v, master, m_scale, v_scale, numbers, keys, start):
    """One step of one parameter, flat, in place; in int8, of whole blocks or of less than one.

    Plain elementwise arithmetic, which torch.compile makes one kernel of: each number is read once
    and written once, and nothing in float32 is ever in memory but what is stored in float32. In
    int8 the maxima of the blocks stand between, and there are a few kernels.
    """
    beta1, rest1, beta2, rest2, shrink, rate, root, eps = numbers
    key_p, key_m, key_v = keys
    if m_scale is not None:
        shape = (-1, BLOCK) if p.numel() % BLOCK == 0 else (1, -1)
        p, g, m, v = (x.view(shape) for x in (p, g, m, v))
        master = None if master is None else master.view(shape)
        m_scale, v_scale = m_scale.view(-1, 1), v_scale.view(-1, 1)
    # 1) read
    w, g = (p if master is None else master).float(), g.float()
    v_old = v.float() if v_scale is None else unpack_v(v, v_scale)
    m_old = m.float() if m_scale is None else m * m_scale * v_old.sqrt()
    # 2) step
    m_new, v_new = beta1 * m_old + rest1 * g, beta2 * v_old + rest2 * g * g
    w = w * shrink - rate * m_new / (v_new.sqrt() / root + eps)
    # 3) round and write
    if m_scale is not None:
        v_code, v_top = pack_v(v_new, noise(p, key_v, start))
        m_code, m_top = pack_m(m_new, unpack_v(v_code, v_top), noise(p, key_m, start))
        for old, new in (m, m_code), (v, v_code), (m_scale, m_top), (v_scale, v_top):
            old.copy_(new)
    elif m.dtype == torch.bfloat16:
        m.copy_(stochastic_round(m_new, noise(p, key_m, start)))
        v.copy_(stochastic_round(v_new, noise(p, key_v, start)))
    else:
        m.copy_(m_new)
        v.copy_(v_new)
    if master is not None:
        master.copy_(w)
    elif p.dtype == torch.bfloat16:
        w = stochastic_round(w, noise(p, key_p, start))
    p.copy_(w)  # of a master copy: rounded to nearest


@functools.cache
def compiled_adamw():
    """One graph for all lengths: a hundred shapes are not compiled a hundred times."""
    return torch.compile(adamw, dynamic=True, fullgraph=True)


def local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor; flat."""
    return (x.to_local() if hasattr(x, "to_local") else x).detach().view(-1)


def first_place(p: Tensor) -> Tensor:
    """Place of the first element of `local(p)` in the whole parameter, flat."""
    start = 0
    cut = [(i, s) for i, s in enumerate(getattr(p, "placements", ())) if not s.is_replicate()]
    if cut:
        (i, shard), *more = cut
        if more:
            raise ValueError(f"AdamW steps parameters cut along one axis, not {p.placements}")
        rank = p.device_mesh.get_local_rank(i)
        start = rank * local(p).numel()  # along another axis all parts are alike
        if shard.is_shard(0):
            rows = -(-p.shape[0] // p.device_mesh.size(i))  # of a process, as torch.chunk cuts
            start = min(rows * rank, p.shape[0]) * (p.numel() // p.shape[0])
    return torch.tensor(start).to(torch.int32)  # past 2^31 it wraps around, like the noise


class AdamW(torch.optim.Optimizer):
    """AdamW with a choice of precision, `weights` and `moments`; see the top of this file.

    seed: of the rounding. compile: torch.compile the step (None: on CUDA).
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

    def start(self, p, group):
        """The state of a parameter before its first step."""
        m_dtype, v_dtype = MOMENTS[group["moments"]]
        state = {"step": 0, "m": torch.zeros_like(p, dtype=m_dtype),
                 "v": torch.zeros_like(p, dtype=v_dtype)}  # fmt: skip
        if group["moments"] == "int8":
            blocks = -(-local(p).numel() // BLOCK)
            state |= {k: torch.zeros(blocks, device=p.device) for k in ("m_scale", "v_scale")}
        if group["weights"] == "bf16-master":
            state["master"] = p.detach().float()
        return state

    def update(self, p, index, group):
        """Step parameter number `index`."""
        state = self.state[p]
        if not state:
            state |= self.start(p, group)
        state["step"] += 1
        numbers = factors(*(group[k] for k in ("lr", "betas", "eps", "weight_decay")),
                          state["step"])  # fmt: skip
        keys = noise_keys(group["seed"], state["step"], index)
        tensors = [p, p.grad.contiguous(), *(state.get(k) for k in ("m", "v", "master"))]
        tensors = [None if x is None else local(x) for x in tensors]
        scales, first, n = (
            [state.get("m_scale"), state.get("v_scale")],
            first_place(p),
            len(tensors[0]),
        )
        fused = p.is_cuda if self.compile is None else self.compile
        step = compiled_adamw() if fused else adamw
        whole = n if scales[0] is None else n - n % BLOCK  # then the last, shorter block
        ends = {0, whole, n} if fused or p.is_cuda else {*range(0, n, CACHE), whole, n}
        for a, b in itertools.pairwise(sorted(ends)):
            blocks = slice(a // BLOCK, -(-b // BLOCK))
            pieces = [x if x is None else x[a:b].data for x in tensors]
            pieces += [x if x is None else x[blocks].data for x in scales]
            step(*pieces, numbers, keys, first + a)
        torch.autograd.graph.increment_version(p)  # which .data does not

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
        """Refuses another precision. torch's own would cast all state to the parameter's dtype:
        of a bf16 parameter, float32 moments and the master copy would come back rounded."""
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
