"""Fast steps for `LLM.generate`: one call of C++ on a CPU, one replayed CUDA graph on a GPU.

`LLM.hidden` takes about forty PyTorch calls a layer. With hundreds of tokens at once their overhead
is small; for a single token it dominates, and the matrix products themselves were tuned for many
rows. llm.py remains the reference (tests/test_decode.py).

    llm.generate(tokens, max_new_tokens=9, step=fast_step)

On a CPU, decode.cpp does the same arithmetic for all layers in one call, near memory bandwidth
(bench/speed.py decode). It is compiled at the first use; ~/.cache/nanocumo keeps the result.

    step = Step.of(llm, cache)      # None where PyTorch must do it: experts, a GPU, float16
    if step.takes(x, None):         # x [C, T] tokens: the next of C answers, or a short question
        logits = step(x)            # [C, V] of the last token, float32; the cache holds T more

On a GPU, `OneToken` compiles the blocks, with products tuned for one row, records the kernels of a
step as a CUDA graph, and replays them: one launch a token. Elsewhere it runs without the graph.

Letters: C answers, T tokens of each, B = C T rows, D features, H query heads, A head size, F hidden
features, V vocabulary, U slots of the cache.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
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

from data.configs import rescaled
from llm import LLM, Block, Cache

SOURCE = Path(__file__).with_name("decode.cpp")
# no -ffast-math: it adds in any order, and makes the whole process flush denormals to 0
FLAGS = "-O3 -march=native -fno-math-errno -std=gnu++17 -fopenmp -shared -fPIC".split()
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.int8: "int8_t"}
WIDEST = 2**15  # input features of a matrix; decode.cpp keeps some rows on its stack
MOVING = threading.Lock()  # held by the thread that moves weights
DONE, NO_TOKEN, NOT_FINITE = range(3)  # as in decode.cpp
MOST_ROWS = 64  # with more rows PyTorch's products are as fast


def fast_step(llm, cache):
    """A function like `LLM.step` for this cache. ValueError if the C++ cannot be compiled."""
    native = Step.of(llm, cache)
    fast = native or OneToken(llm, cache)

    def step(x, segments):
        if not fast.takes(x, segments):  # a prompt: seen once, so not worth compiling
            return llm.step(x, segments, cache)
        return fast(x), fast.greatest

    return step


# ------------------------------------------------------------------------------ PyTorch


@functools.cache
def tuned(function):
    """`function`, compiled. The tuning fuses a product of one row with what is before and after it;
    an int8 weight is then read once, and never written out in bfloat16."""
    return torch.compile(function, options={"coordinate_descent_tuning": True})


@functools.cache
def recording_stream(device):
    """One for all recordings: PyTorch keeps the workspace of the products for each stream."""
    return torch.cuda.Stream(device)


def recorded(run, device):
    """The kernels of `run()` as a CUDA graph -> a function that replays them and returns the same
    output tensors with new content. ValueError if one of them cannot be recorded."""
    graph, stream = torch.cuda.CUDAGraph(), recording_stream(device)
    try:
        with torch.cuda.device(device):
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                out = run()
    except RuntimeError as error:
        first = error.__context__ or error  # the end of the capture fails too, and says less
        why = (str(first).splitlines() or [type(first).__name__])[0]
        raise ValueError(f"this GPU cannot record a step as a CUDA graph: {why}. Without compile "
                         "the answers are the same, only slower") from error  # fmt: skip
    return lambda: graph.replay() or out


class Rolling(Cache):
    """A cache for steps of one token: slot and position are tensors, and each step advances them
    on the device. So all steps are the same kernels on the same addresses."""

    def __init__(self, cache):
        self.keys, self.values, self.places = cache.keys, cache.values, cache.places
        self.size = self.view = cache.size
        self.next, self.slots_T = torch.zeros_like(cache.next), cache.next.new_zeros(1)
        self.seen = None  # tokens of `cache` that slot and position have followed

    def follow(self, cache):
        """Continue after the tokens that `cache` holds."""
        self.next.copy_(cache.next)
        self.slots_T.fill_(cache.seen % self.size)
        self.seen = cache.seen

    def reserve(self, pos_BT):
        return pos_BT + self.next

    def advance(self):
        self.next += 1
        self.slots_T.add_(1).remainder_(self.size)


class OneToken:
    """The next token of each row of `cache`, by PyTorch. Made for one answer: its first step runs
    kernel by kernel, which also compiles and tunes; on a GPU the next ones replay a CUDA graph."""

    def __init__(self, llm, cache):
        self.llm, self.cache, self.rolling, self.step = llm, cache, Rolling(cache), self.run
        self.tokens = torch.zeros_like(cache.next)
        # a graph knows addresses only: keep the weights alive if the model gets other ones
        self.kept = [x.detach() for x in (*llm.parameters(), *llm.buffers())]

    def takes(self, x: Tensor, segments: Tensor | None) -> bool:
        """Whether x is one token [C, 1] of each row, for which the cache has room."""
        one = x.shape == self.tokens.shape and not x.is_floating_point() and segments is None
        return one and (self.cache.ring or self.cache.seen < self.cache.size)

    def run(self):
        llm, rolling = self.llm, self.rolling
        x, _ = llm.hidden(llm.embed(self.tokens), None, rolling, run=tuned(Block.forward))
        logits_CV = tuned(type(llm).logits)(llm, x)[:, 0].float()
        rolling.advance()
        return logits_CV, logits_CV.sum(), *logits_CV.max(-1)

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens [C, 1] -> logits [C, V]; the next call overwrites them. `greatest` as in `Step`.
        ValueError if a GPU cannot record the step."""
        cache, rolling = self.cache, self.rolling
        if rolling.seen != cache.seen:
            rolling.follow(cache)
        self.tokens.copy_(x)
        logits_CV, total, high_C, best_C = self.step()
        rolling.seen = cache.seen = cache.seen + 1
        cache.next = rolling.next
        if self.step == self.run and x.is_cuda:
            self.step = recorded(self.run, x.device)
        self.greatest = (high_C, best_C.clone()) if math.isfinite(total) else None
        return logits_CV


# ------------------------------------------------------------------------------ C++


class Matrix(Structure):
    _fields_ = [("weight", c_void_p), ("scale", c_void_p)]


class Layer(Structure):
    _fields_ = [(name, c_void_p) for name in ("norm1", "norm2")]
    _fields_ += [(name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")]
    _fields_ += [(name, c_void_p) for name in ("keys", "values")]


class Arguments(Structure):  # `Step` of decode.cpp
    _fields_ = [(name, c_int) for name in "C T B D H G A F V U".split()]
    _fields_ += [(name, c_int) for name in "stride layers threads window used slot".split()]
    _fields_ += [("eps", c_float)]
    _fields_ += [(name, c_void_p) for name in "frequency norm places position".split()]
    _fields_ += [(name, c_void_p) for name in ("tokens", "embeddings")]
    _fields_ += [("layer", POINTER(Layer)), ("embedding", Matrix), ("head", Matrix)]
    _fields_ += [(name, c_void_p) for name in "q logits mask score high best".split()]
    _fields_ += [(name, c_void_p) for name in "x cos sin attended gated".split()]


@functools.cache
def compile_step(weight: str, cache: str):
    """The function `step` of decode.cpp, compiled for this processor and these types.

    ValueError if there is no compiler, or if it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not SOURCE.is_file():
        missing = "a C++ compiler (g++ or clang++)" if SOURCE.is_file() else str(SOURCE)
        raise ValueError(f"compile needs {missing}, which is missing; without it answers are the "
                         "same, only slower")  # fmt: skip
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
                os.replace(out, library)  # atomic, so several processes may compile it at once
        return ctypes.CDLL(str(library)).step
    except OSError as error:
        raise ValueError(f"{compiler} cannot make {library}: {error}") from None


def processor() -> str:
    """What -march=native depends on: several machines may share a home folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    known = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(known))])


def matrices(block) -> list[torch.nn.Module]:
    attention, mlp = block.self_attn, block.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj]  # fmt: skip


def huge_pages(size: int) -> Tensor:
    """`size` bytes of zeros, [size] uint8, on huge pages where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has it
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def pack_weights(modules: list[torch.nn.Module]) -> None:
    """Move the modules' weights into one block of memory, on huge pages.

    SmolLM2's weights fill 66,000 pages of 4 KiB, and address translation takes time (docs/LOG.md).
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
    def of(llm: LLM, cache) -> "Step | None":
        """None for what decode.cpp does not support: experts, float16, a GPU, many rows. ValueError
        if it cannot be compiled. The weights of `llm` are moved, see `pack_weights`."""
        blocks, keys = llm.model.layers, cache.keys
        if not blocks or any(block.sparse for block in blocks) or keys.device.type != "cpu":
            return None
        outer = {llm.model.embed_tokens, llm.head}  # one module if the head is tied
        modules = [*outer, *itertools.chain(*map(matrices, blocks))]
        kinds = {module.weight.dtype for module in modules}
        widest = max(max(module.weight.shape[1] for module in modules), 64 * llm.cfg.head_dim)
        if len(kinds) > 1 or not kinds <= {*TYPES} or keys.dtype not in (*TYPES,)[:2]:
            return None
        if keys.shape[1] > MOST_ROWS or widest > WIDEST:
            return None
        compile_step(TYPES[llm.head.weight.dtype], TYPES[keys.dtype])  # before anything moves
        with MOVING, torch.inference_mode(False), torch.no_grad():
            pack_weights(modules)
        return Step(llm, cache)

    def __init__(self, llm, cache):
        cfg, C, B, threads = llm.cfg, cache.keys.shape[1], MOST_ROWS, torch.get_num_threads()
        self.cache, self.kept = cache, []  # owners of the memory that the pointers below refer to
        self.step = compile_step(TYPES[llm.head.weight.dtype], TYPES[cache.keys.dtype])
        pair = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32)
        turn = 1 / cfg.rope_theta ** (pair / cfg.head_dim)
        turn = rescaled(turn, cfg.rope_scaling) if cfg.rope_scaling else turn
        layers = []
        for block, keys, values in zip(llm.model.layers, cache.keys, cache.values):
            norms = block.input_layernorm, block.post_attention_layernorm
            layers.append(Layer(*(self.at(norm.weight) for norm in norms),
                                *map(self.matrix, matrices(block)),
                                keys.data_ptr(), values.data_ptr()))  # fmt: skip
        H, A, U = cfg.n_heads, cfg.head_dim, cache.size
        self.logits = torch.empty(C, cfg.vocab_size)
        self.high, self.best = torch.empty(C), torch.empty(C, dtype=torch.int64)
        inputs = H * A, cfg.hidden_dim  # decode.cpp may store pairs, so round up to an even number
        attended, gated = (self.at(torch.zeros(B, features + 1)) for features in inputs)
        x, cos, sin = (self.at(torch.zeros(B, n)) for n in (cfg.dim, A // 2, A // 2))
        stride = -(-U // 16) * 16  # 16 and the 4 below: the most WIDTH and HEADS of decode.cpp
        mask, score = self.at(torch.zeros(B, stride)), self.at(torch.zeros(threads, 4, stride))
        self.arguments = Arguments(
            C=C, D=cfg.dim, H=H, G=cfg.n_kv_heads, A=A, F=cfg.hidden_dim, V=cfg.vocab_size, U=U,
            stride=stride, layers=len(layers), threads=threads, window=cfg.sliding_window or 0,
            eps=cfg.rms_norm_eps, frequency=self.at(turn),
            norm=self.at(llm.model.norm.weight), places=cache.places.data_ptr(),
            layer=(Layer * len(layers))(*layers), x=x, cos=cos, sin=sin,
            q=self.at(torch.zeros(B, H, A)), logits=self.logits.data_ptr(), mask=mask, score=score,
            attended=attended, gated=gated, high=self.high.data_ptr(), best=self.best.data_ptr(),
            embedding=self.matrix(llm.model.embed_tokens), head=self.matrix(llm.head),
        )  # fmt: skip

    def at(self, tensor: Tensor) -> int:
        """Address of the tensor, or of a copy in float32."""
        self.kept.append(tensor.detach().float().contiguous())
        return self.kept[-1].data_ptr()

    def matrix(self, module: torch.nn.Module) -> Matrix:
        scale = getattr(module, "scale", None)  # int8: engine/quant.py
        assert module.weight.is_contiguous()
        self.kept.append(module.weight.detach())  # keeps it alive if the model gets other weights
        return Matrix(module.weight.data_ptr(), None if scale is None else self.at(scale))

    def takes(self, x: Tensor, segments: Tensor | None) -> bool:
        """Whether x [C, T] or [C, T, D] has few rows, no padding, and contiguous free slots."""
        (C, T), cache = x.shape[:2], self.cache
        padded = T > 1 and segments is not None and not segments.all()
        fits = cache.seen + T <= cache.size or T == 1 and cache.ring
        return 0 < C * T <= MOST_ROWS and fits and not padded

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens [C, T] or their embeddings [C, T, D] -> logits [C, V] of the last token; the next
        call overwrites them. `greatest` is the maximum of the logits [C] and its token [C], or None
        if a logit is not finite. ValueError if x does not fit the cache or holds no valid token."""
        cache, now, tokens = self.cache, self.arguments, not x.is_floating_point()
        wanted = (now.C,) if tokens else (now.C, now.D)
        if (len(x), *x.shape[2:]) != wanted or x.dim() < 2 or not self.takes(x, None):
            raise ValueError(
                f"x {[*x.shape]} does not fit a cache of {now.C} rows, {now.D} features"
            )
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
        self.greatest = (self.high, self.best.clone()) if outcome == DONE else None
        return self.logits
