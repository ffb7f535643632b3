"""A few tokens on a CPU, in C++ (decode.cpp): what `generate(compile=True)` runs there.

`LLM.hidden` makes a token by some forty calls of PyTorch a layer, each with its own start and end.
With hundreds of tokens at once that is nothing; with one, it is most of the time, and what remains
are matrix products that were made for many rows. decode.cpp does the same arithmetic in one call
for all layers, with sums in float32, or in whole numbers for int8 weights; at nearly the speed at
which the memory gives out the weights (bench/speed.py decode). llm.py stays what one reads,
trains, and compares it with (tests/test_decode.py).

    step = Step.of(llm, cache)      # None where PyTorch must do it: experts, a GPU, float16
    if step.takes(x, None):         # x [C, T] tokens: the next of C answers, or a short question
        logits = step(x)            # [C, V] of the last token, float32; the cache has T tokens more

The compiler runs at the first use, for seconds; what it made is kept in ~/.cache/nanocumo.

Letters: C answers, T tokens of each, B = C T rows, D features, H query heads, A features a head,
F hidden features, V words, N slots of the cache, M = N rounded up to sixteens.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from ctypes import POINTER, Structure, c_float, c_int, c_void_p
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("decode.cpp")
# no -ffast-math: it would add in any order, and have all of this process round small numbers to 0
FLAGS = "-O3 -march=native -fno-math-errno -std=gnu++17 -fopenmp -shared -fPIC".split()
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.int8: "int8_t"}
WIDEST = 2**15  # features of a matrix; decode.cpp keeps some rows of them on its stack
MOVING = threading.Lock()  # one thread at a time moves weights
DONE, NO_TOKEN, NOT_FINITE = range(3)  # as in decode.cpp
MOST_ROWS = 64  # with more of them PyTorch's products are as fast


class Matrix(Structure):
    _fields_ = [("weight", c_void_p), ("scale", c_void_p)]


class Layer(Structure):
    _fields_ = [(name, c_void_p) for name in ("norm1", "norm2")]
    _fields_ += [(name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")]
    _fields_ += [(name, c_void_p) for name in ("keys", "values")]


class Arguments(Structure):  # `Step` of decode.cpp
    _fields_ = [
        (name, c_int) for name in "C T B D H G A F V N M layers threads window used slot".split()
    ]
    _fields_ += [("eps", c_float)]
    _fields_ += [(name, c_void_p) for name in "frequency norm places position".split()]
    _fields_ += [(name, c_void_p) for name in ("tokens", "embeddings")]
    _fields_ += [("layer", POINTER(Layer)), ("embedding", Matrix), ("head", Matrix)]
    _fields_ += [(name, c_void_p) for name in "q logits mask score high likeliest".split()]
    _fields_ += [(name, c_void_p) for name in "x cos sin a u".split()]


@functools.cache
def build(weight: str, cache: str):
    """The function `step` of decode.cpp, compiled for this processor and these types.

    ValueError if there is no compiler, or if it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not SOURCE.is_file():
        lacking = "a C++ compiler (g++ or clang++)" if SOURCE.is_file() else str(SOURCE)
        raise ValueError(f"compile needs {lacking}, which is not there; it works without, slower")
    command = [*compiler.split(), *FLAGS, f"-DWEIGHT={weight}", f"-DCACHE={cache}", str(SOURCE)]
    about = [SOURCE.read_text(), " ".join(command), processor(), torch.__version__]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanocumo"
    library = folder / f"decode-{key}.so"
    try:
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                out = Path(place) / library.name
                done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
                if done.returncode:
                    said = done.stderr.splitlines() or ["no reason given"]
                    why = next((line for line in said if "error" in line), said[0])
                    raise ValueError(f"{compiler} cannot compile {SOURCE.name}: {why}")
                os.replace(out, library)  # whole or not at all, whoever else compiles it
        return ctypes.CDLL(str(library)).step
    except OSError as error:
        raise ValueError(f"{compiler} cannot make {library}: {error}") from None


def processor() -> str:
    """What -march=native sees, as far as the system tells: a home may be shared by many."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    known = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(known))])


def matrices(block) -> list[torch.nn.Module]:
    attention, mlp = block.self_attn, block.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj]  # fmt: skip


def huge_pages(size: int) -> Tensor:
    """So many bytes of zeros, [size] uint8, on pages of megabytes where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # which only Linux has
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def pack_weights(modules: list[torch.nn.Module]) -> None:
    """Move their weights into one piece of memory, on huge pages.

    SmolLM2's lie on 66,000 pages of 4 KiB, and looking those up costs time (docs/LOG.md).
    """
    scattered = len({module.weight.untyped_storage().data_ptr() for module in modules}) > 1
    if not scattered:
        return
    sizes = [-(-module.weight.nbytes // 64) * 64 for module in modules]
    for module, place in zip(modules, huge_pages(sum(sizes)).split(sizes)):
        old = module.weight.detach()
        new = place[: old.nbytes].view(old.dtype).view(old.shape)
        module.weight.data = new.copy_(old)


class Step:
    """The next tokens of each row of `cache`. Made for one answer, since it points into weights."""

    @staticmethod
    def of(llm, cache) -> "Step | None":
        """None where this code does not reach: experts, float16, a GPU, a crowd of rows. ValueError
        if it cannot be compiled. The weights of `llm` are moved, see `together`."""
        blocks, keys = llm.model.layers, cache.keys
        if not blocks or any(block.sparse for block in blocks) or keys.device.type != "cpu":
            return None
        head = llm.model.embed_tokens if llm.cfg.tie_embeddings else llm.lm_head
        embedding = llm.model.embed_tokens
        outer = {embedding, head}  # or one, which is both
        modules = [*outer, *itertools.chain(*map(matrices, blocks))]
        kinds = {module.weight.dtype for module in modules}
        widest = max(max(module.weight.shape[1] for module in modules), 64 * llm.cfg.head_dim)
        if len(kinds) > 1 or not kinds <= {*TYPES} or keys.dtype not in (*TYPES,)[:2]:
            return None
        if keys.shape[1] > MOST_ROWS or widest > WIDEST:
            return None
        build(TYPES[head.weight.dtype], TYPES[keys.dtype])  # or nothing has been moved
        with MOVING, torch.inference_mode(False), torch.no_grad():
            pack_weights(modules)
        return Step(llm, cache, head)

    def __init__(self, llm, cache, head):
        cfg, C, B, threads = llm.cfg, cache.keys.shape[1], MOST_ROWS, torch.get_num_threads()
        self.cache, self.kept = cache, []  # what the pointers below point into
        self.step = build(TYPES[head.weight.dtype], TYPES[cache.keys.dtype])
        pair = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32)
        layers = []
        for block, keys, values in zip(llm.model.layers, cache.keys, cache.values):
            norms = block.input_layernorm, block.post_attention_layernorm
            layers.append(Layer(*(self.at(norm.weight) for norm in norms),
                                *map(self.matrix, matrices(block)),
                                keys.data_ptr(), values.data_ptr()))  # fmt: skip
        H, A, N = cfg.n_heads, cfg.head_dim, cache.size
        self.logits = torch.empty(C, cfg.vocab_size)
        self.high, self.likeliest = torch.empty(C), torch.empty(C, dtype=torch.int64)
        inputs = H * A, cfg.hidden_dim  # may be pairs, of an even number then
        a, u = (self.at(torch.zeros(B, features + 1)) for features in inputs)
        x, cos, sin = (self.at(torch.zeros(B, n)) for n in (cfg.dim, A // 2, A // 2))
        M = -(-N // 16) * 16  # and 4 below: the most WIDTH and HEADS of decode.cpp can be
        mask, score = self.at(torch.zeros(B, M)), self.at(torch.zeros(threads, 4, M))
        self.arguments = Arguments(
            C=C, D=cfg.dim, H=H, G=cfg.n_kv_heads, A=A, F=cfg.hidden_dim, V=cfg.vocab_size, N=N,
            M=M, layers=len(layers), threads=threads, window=cfg.sliding_window or 0,
            eps=cfg.rms_norm_eps, frequency=self.at(1 / cfg.rope_theta ** (pair / A)),
            norm=self.at(llm.model.norm.weight), places=cache.places.data_ptr(),
            layer=(Layer * len(layers))(*layers), x=x, cos=cos, sin=sin,
            q=self.at(torch.zeros(B, H, A)), logits=self.logits.data_ptr(), mask=mask, score=score,
            a=a, u=u,
            high=self.high.data_ptr(), likeliest=self.likeliest.data_ptr(),
            embedding=self.matrix(llm.model.embed_tokens), head=self.matrix(head),
        )  # fmt: skip

    def at(self, tensor: Tensor) -> int:
        """Address of the tensor, or of a copy in float32."""
        self.kept.append(tensor.detach().float().contiguous())
        return self.kept[-1].data_ptr()

    def matrix(self, module: torch.nn.Module) -> Matrix:
        scale = getattr(module, "scale", None)  # int8: engine/quant.py
        assert module.weight.is_contiguous()
        self.kept.append(module.weight.detach())  # stays, even if the model gets others meanwhile
        return Matrix(module.weight.data_ptr(), None if scale is None else self.at(scale))

    def takes(self, x: Tensor, segments: Tensor | None) -> bool:
        """Whether x [C, T] or [C, T, D] is some rows, but few, without padding, and finds its slots
        side by side."""
        C, T = x.shape[:2]
        padded = T > 1 and segments is not None and not segments.all()
        fits = T == 1 or self.cache.seen + T <= self.cache.size
        return 0 < C * T <= MOST_ROWS and fits and not padded

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens [C, T] or their embeddings [C, T, D] -> logits [C, V] of the last, which the next
        call overwrites. `greatest`, overwritten as well, is the greatest logit [C] and its token
        [C], or None if a logit is not finite. ValueError if x does not fit the cache, or holds
        what is no token."""
        cache, now, tokens = self.cache, self.arguments, not x.is_floating_point()
        wanted = (now.C,) if tokens else (now.C, now.D)
        if (len(x), *x.shape[2:]) != wanted or x.dim() < 2 or not self.takes(x, None):
            raise ValueError(
                f"x {[*x.shape]} does not fit a cache of {now.C} rows, {now.D} features"
            )
        cache.check(x.shape[1])
        dtype = torch.int64 if tokens else torch.float32
        if x.dtype != dtype or not x.is_contiguous():
            x = x.to(dtype).contiguous()
        T = now.T = x.shape[1]
        now.B = len(x) * T
        now.tokens, now.embeddings = (x.data_ptr(), None) if tokens else (None, x.data_ptr())
        now.position = cache.next.data_ptr()
        now.slot, now.used = cache.seen % cache.size, min(cache.seen + T, cache.size)
        outcome = self.step(ctypes.byref(now))
        if outcome == NO_TOKEN:
            raise ValueError(f"tokens {x.min()} to {x.max()} must be 0 to {now.V - 1}")
        cache.seen += T
        self.greatest = (self.high, self.likeliest) if outcome == DONE else None
        return self.logits
