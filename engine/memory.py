"""The memory and arithmetic that a training needs, estimated before anything is loaded.

    python train.py --preset mistral-7b --stage 3 --estimate

Three of the four parts follow from the number of parameters alone (engine/optim.py):

    weights      every parameter, 4 bytes in float32 or 2 in bf16
    gradients    every parameter that learns, in the precision of the weights
    optimizer    two moments for each of these, 4 or 2 bytes each, and 4 for a master copy
    activations  what the forward pass keeps for the backward pass; grows with the tokens of a batch

For each token, a block of the language model keeps the inputs of its products:

    x, norm(x) | q k v | attention output | x, norm(x) | gate, up, their product

about 18 D numbers, or 72 GB for the 32 blocks of Mistral-7B and 4 rows of 4,096 tokens. Under
gradient checkpointing a block keeps only its input and computes the rest again in the backward
pass, for a third more arithmetic; `--recompute auto` does that to as few layers as the memory
needs. CLIP needs more than the language model: at scales 1,3 it reads 5,770 tokens an image.

tests/test_memory.py compares the estimates with PyTorch's own allocator of a card, and with what
autograd keeps on a CPU.
Letters as in mlp_moe.py and llm.py. Sizes are bytes; a GB is 2^30 bytes, as cards are sold.
"""

import contextlib
import os
import pathlib
import re
import sys
from dataclasses import dataclass, replace

import torch

from clip_moe import CLIPVisionConfig
from cumo import CuMo, CuMoConfig
from data.hub import fetched, local_folder
from data.packing import check_positions
from data.weights import on_meta, read_config
from engine import fsdp, resume
from engine.optim import WEIGHTS, bytes_per_parameter
from llm import LOGITS_AT_ONCE, LLMConfig
from upcycle import sparse_config

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

GB = 2**30
CARDS = (24, 48, 80, 141)  # GB: RTX 4090, L40S, A100 or H100, H200
FREE = 0.95  # share of the memory that an estimate may fill
PROGRAM = int(0.35 * GB)  # PyTorch and this code in main memory
SPARSE = int(0.4 * GB)  # measured: experts' bf16 products on a CPU, of ever new sizes, take more

# (weights, moments) from the most exact to the smallest
LADDER = (("fp32", "fp32"), ("bf16-master", "fp32"), ("bf16-master", "bf16"), ("bf16-sr", "bf16"))

MISTRAL = dict(vocab_size=32000, dim=4096, hidden_dim=14336, n_layers=32, n_heads=32, n_kv_heads=8,
               rope_theta=1e6)  # fmt: skip
KNOWN = {  # models of the presets, so that an estimate needs no download
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(),
    "openai/clip-vit-base-patch16": CLIPVisionConfig(
        image_size=224, patch_size=16, dim=768, hidden_dim=3072, n_layers=12, n_heads=12
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": LLMConfig(**MISTRAL),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": LLMConfig(**MISTRAL, num_experts=8),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LLMConfig(
        49152, 576, 1536, 30, 9, 3, rope_theta=1e5, tie_embeddings=True
    ),
}


@dataclass(frozen=True)
class Plan:
    """Everything about a training that decides how much memory it needs."""

    model: CuMoConfig
    stage: int
    parameters: int  # all of them
    learning: int  # those that this stage trains
    tokens: int  # in a batch of one rank, padding included
    row_tokens: int = 0  # in a row; 0: all
    weights: str = "fp32"
    moments: str = "fp32"
    recompute: int = 0  # layers under gradient checkpointing, see `recomputed`
    bf16: bool = True  # products in bf16, so activations take 2 bytes
    processes: int = 1  # ranks that weights, gradients and moments are sharded over
    n_images: int | None = None  # in a batch; None: as many as fit into the rows
    cpu: bool = False  # on a CPU, uncompiled, more is kept

    @property
    def patches(self) -> int:
        return (self.model.vision.image_size // self.model.vision.patch_size) ** 2

    @property
    def images(self) -> int:
        if self.n_images is not None:
            return self.n_images
        text = 16 if self.stage == 1 else 48  # tokens that come with an image, at least
        return self.tokens // self.length * (self.length // (self.patches + text))

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return min(self.row_tokens or self.tokens, self.tokens)

    @property
    def casts(self) -> bool:
        """Under autocast, products take bf16 copies of float32 weights and activations."""
        return self.bf16 and self.weights == "fp32"

    @property
    def size(self) -> int:
        """Bytes of an activation."""
        return 2 if self.bf16 else WEIGHTS[self.weights].itemsize

    @property
    def stream(self) -> int:
        """Bytes of a number of x, which has the precision of the weights."""
        return WEIGHTS[self.weights].itemsize


def clip_bytes(plan: Plan) -> int:
    """Bytes that one layer of CLIP keeps for a token."""
    cfg, D, size = plan.model.vision, plan.model.vision.dim, plan.size
    x = 2 * D * plan.stream  # before and after attention
    if not plan.cpu:  # norm(x); q, k, v; output
        return x + size * 5 * D + mlp_bytes(plan, cfg, True, 2)
    norms = 4 if plan.casts else 2  # autocast casts for each of q, k, v and the MLP
    scores = cfg.n_heads * (1 + plan.patches) if size == 2 else D  # float32: a copy of the output
    return x + size * ((norms + 4) * D + scores) + mlp_bytes(plan, cfg, True, 3)


def llm_bytes(plan: Plan) -> int:
    """Bytes that one block of the language model keeps for a token. A frozen block does not keep
    the inputs of its products, because only the gradients of its weights need them."""
    cfg, D, size, learns = plan.model.llm, plan.model.llm.dim, plan.size, plan.stage > 1
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    mlp = mlp_bytes(plan, cfg, learns, (3 if plan.cpu else 2) + learns)
    if not plan.cpu:  # x twice; their norms; q, k, v; output
        return 2 * D * plan.stream + size * (3 * learns * D + 2 * q + 2 * kv) + mlp
    norms = 4 * 2 * D * (2 if learns else 1)  # in float32: x, and x over its root mean square
    inputs = learns * ((5 if plan.casts else 2) * D + q)
    attention = q + 2 * kv + cfg.n_heads * plan.length if size == 2 else 4 * q
    return norms + size * (inputs + attention) + mlp


def mlp_bytes(plan: Plan, cfg, learns: bool, wide: int) -> int:
    """Bytes that an MLP, or the chosen experts of a sparse block, keeps for a token besides its
    input. wide: how many numbers of the hidden size, such as before and after the activation."""
    if not cfg.num_experts:
        return plan.size * wide * cfg.hidden_dim
    # each of K experts keeps its input, and its output for the weighted sum; the router's input is
    # in float32
    expert = learns * cfg.dim + wide * cfg.hidden_dim + cfg.dim
    return plan.size * cfg.top_k * expert + 4 * cfg.dim


def clip_tokens(cfg: CuMoConfig, images: int) -> list[int]:
    """Tokens that CLIP reads at each scale for so many images."""
    side = cfg.vision.image_size // cfg.vision.patch_size
    tiles = [scale**2 if i else 1 for i, scale in enumerate(cfg.vision.scales)]
    return [images * n * (1 + side**2) for n in tiles]


def kept(plan: Plan) -> tuple[int, int, int]:
    """Bytes that CLIP, the connector and the language model keep for the backward pass."""
    cfg, (n_clip, n_llm) = plan.model, recomputed(plan.model, plan.recompute)
    vision, llm = cfg.vision, cfg.llm
    clip = n_clip * vision.dim * plan.stream + (vision.n_layers - 1 - n_clip) * clip_bytes(plan)
    clip *= sum(clip_tokens(cfg, plan.images)) * (plan.stage > 1)  # stage 1 does not train it
    features, hidden = vision.dim * len(vision.scales), 2 * llm.dim  # before and after GELU
    experts = cfg.mlp_top_k * (features + hidden + llm.dim) if cfg.mlp_experts else hidden
    connector = plan.size * plan.images * plan.patches * (features + experts)
    text = n_llm * llm.dim * plan.stream + (llm.n_layers - n_llm) * llm_bytes(plan)
    text *= plan.tokens
    if plan.casts and plan.processes == 1:  # bf16 copies of the weights, also of a frozen block's
        rows = 2 * (llm.n_heads + llm.n_kv_heads) * llm.head_dim
        rows += 3 * llm.hidden_dim * max(1, llm.num_experts)
        text += 2 * (plan.learning + (plan.stage == 1) * (llm.n_layers - n_llm) * rows * llm.dim)
    return clip, connector, text


def activations(plan: Plan) -> int:
    """Bytes that a batch takes at its peak: what is kept, and what one operation needs besides.

    Three numbers are fitted to a GPU (bench/mock_card.json): a layer under way takes 1.3 times what
    it keeps; the allocator loses 5 % and 1.25 layers of CLIP between blocks of unequal size.
    """
    llm, (clip, connector, text) = plan.model.llm, kept(plan)
    logits = min(LOGITS_AT_ONCE, plan.tokens * llm.vocab_size)
    grads = plan.tokens * llm.dim + llm.vocab_size * llm.dim * (plan.stage > 1)  # x, head
    work = 4 * 4 * logits + plan.size * grads
    if recomputed(plan.model, plan.recompute)[1]:
        work = max(work, 1.3 * plan.tokens * llm_bytes(plan))
    layer = max(clip_tokens(plan.model, plan.images)) * clip_bytes(plan)
    peak = max(clip + connector + text + work, clip + 1.3 * layer)
    if plan.cpu:  # tensors of ever new sizes leave part of the heap unused
        return int((2 if plan.bf16 else 1.5) * peak)
    return int(1.05 * peak + 1.25 * layer * (plan.stage > 1))


def make_plan(
    cfg: CuMoConfig, stage: int, tokens: int, learning: list[str] | None = None, **choices
) -> Plan:
    """The plan of a stage that trains the submodules `learning` (None: as the paper does)."""
    with on_meta():
        model = CuMo(cfg)
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    if learning is None:
        learning = ["connector"] if stage == 1 else list(sizes)
    return Plan(cfg, stage, sum(sizes.values()), sum(map(sizes.get, learning)), tokens, **choices)


def part_config(flag: str, name: str, kind: type) -> CLIPVisionConfig | LLMConfig:
    """The configuration of --clip or --llm. ValueError, with the flag, if it is of another kind."""
    if name in KNOWN:
        return KNOWN[name]
    config = read_config(local_folder(name, "config"))
    try:
        return kind.from_hf(config)
    except ValueError as error:
        raise ValueError(f"--{flag} {name}: {error}") from None


def stage_model(cfg) -> CuMoConfig:
    """The configuration of the model that a stage will train, without loading its weights.

    cfg: a train.TrainConfig.
    """
    before = resume.stage_dir(cfg, cfg.stage - 1)
    state = resume.read_state(before)
    ours = state and state["finished"] and not resume.differences(cfg.shared, state)
    if cfg.init or ours:
        folder = local_folder(cfg.init or before, "config")
        model = CuMoConfig.from_original(read_config(folder), folder)
    else:
        if cfg.llm.startswith("weights/SmolLM2") and not fetched(cfg.llm, "config"):
            raise ValueError(f"--llm: {cfg.llm!r} is missing; runs/smollm2.sh makes it")
        vision = part_config("clip", cfg.clip, CLIPVisionConfig)
        llm = part_config("llm", cfg.llm, LLMConfig)
        model = CuMoConfig(replace(vision, scales=cfg.scales), llm)
    if cfg.stage == 3 and cfg.upcycle != "none":
        model = sparse_config(model, cfg.upcycle.split(","), cfg.num_experts, cfg.top_k)
    return model


def plan_stage(cfg, learning: list[str]) -> Plan:
    """The plan of a stage (cfg: a train.TrainConfig) that trains the submodules `learning`."""
    processes = fsdp.world()[1]
    tokens, model = cfg.rows * cfg.row_tokens // processes, stage_model(cfg)
    check_positions(cfg.row_tokens, model.llm.max_positions, model.llm.sliding_window)
    cpu = not (cfg.estimate or cfg.device.startswith("cuda"))
    return make_plan(model, cfg.stage, tokens, learning, row_tokens=cfg.row_tokens, bf16=cfg.bf16,
                     processes=processes, cpu=cpu)  # fmt: skip


def recomputed(cfg: CuMoConfig, choice: int | str) -> tuple[int, int]:
    """`choice` of --recompute -> how many layers of CLIP and of the language model are recomputed.
    ValueError for more than there are."""
    # CLIP's come first, because a gigabyte saved there costs less arithmetic: a sparse layer of
    # CLIP-L keeps four times the bytes per operation of a layer of Mistral-7B. (Stage 1 keeps
    # nothing of CLIP, so there only the language model's layers save memory.)
    clip, llm = cfg.vision.n_layers - 1, cfg.llm.n_layers
    n = {"none": 0, "auto": 0, "all": clip + llm}.get(choice)
    n = int(choice) if n is None else n
    if n > clip + llm:
        raise ValueError(f"--recompute {n}: the model has {clip + llm} layers to recompute, {clip} "
                         f"of CLIP and {llm} of the language model; give at most {clip + llm}, or "
                         "all")  # fmt: skip
    return min(n, clip), max(0, n - clip)


def chosen(cfg, plan: Plan) -> dict:
    """What the flags of a training say about precision and memory."""
    given = {name: getattr(cfg, name) for name in ("weights", "moments") if getattr(cfg, name)}
    if cfg.recompute != "auto":
        given["recompute"] = sum(recomputed(plan.model, cfg.recompute))
    return given


def estimate(plan: Plan) -> dict[str, int]:
    """{part: bytes} of one rank."""
    size = WEIGHTS[plan.weights].itemsize
    more = bytes_per_parameter(plan.weights, plan.moments) - 2 * size
    parameters, learning = (n // plan.processes for n in (plan.parameters, plan.learning))
    parts = {"weights": parameters * size, "gradients": learning * size,
             "optimizer": learning * more, "activations": activations(plan)}  # fmt: skip
    experts = (plan.model.vision.num_experts, plan.model.mlp_experts, plan.model.llm.num_experts)
    program = PROGRAM + SPARSE * bool(any(experts) and plan.bf16)
    return parts | ({"program": program} if plan.cpu else {})


def total(plan: Plan) -> int:
    return sum(estimate(plan).values())


def first_that_fits(plan: Plan, available: int, **fixed) -> Plan:
    """The most exact plan within `available` bytes, or else the smallest. Recomputes as few layers
    as this precision needs to fit. `fixed`: settings to keep, such as weights="fp32"."""
    counts = range(1 + sum(recomputed(plan.model, "all")))
    ways = [{"weights": w, "moments": m, "recompute": n} for w, m in LADDER for n in counts]
    ways = [replace(plan, **way | fixed) for way in ways]
    return next((p for p in ways if total(p) <= FREE * available), min(ways, key=total))


def best_plan(cfg, plan: Plan) -> Plan:
    """The most exact plan that fits the device and the flags of `cfg`, a train.TrainConfig.
    ValueError if even the smallest needs more than twice the memory: beyond the estimate's error.
    """
    there = available_memory(cfg.device)
    best = first_that_fits(plan, there, **chosen(cfg, plan))
    if total(best) > 2 * there:
        raise ValueError(
            f"stage {plan.stage} takes about {total(best) / GB:.0f} GB, and this machine has "
            f"{there / GB:.0f}: lower --rows or --row-tokens, or take a smaller --preset "
            "(--estimate shows the parts)"
        )
    return best


def peak_memory(device: str) -> int:
    """Peak bytes of this process, reserved on the card or in main memory; 0 if unknown."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_reserved(device)
    status = pathlib.Path("/proc/self/status")  # Linux: getrusage may be the parent's
    if status.is_file():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: str) -> int:
    """Bytes that are free on the card, or those of the machine."""
    if str(device).startswith("cuda"):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused  # kept from a stage before
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def breakdown(plan: Plan) -> str:
    """`61.2 GB: weights 15.4, gradients 15.4, ...`"""
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in estimate(plan).items())
    return f"{total(plan) / GB:.1f} GB: {parts}"


def to_flags(plan: Plan) -> str:
    """The plan as command-line flags."""
    most = sum(recomputed(plan.model, "all"))
    layers = {0: "none", most: "all"}.get(plan.recompute, plan.recompute)
    return f"--weights {plan.weights} --moments {plan.moments} --recompute {layers}"


def recompute_in_words(plan: Plan) -> str:
    """`recompute 23 of 23 layers of CLIP, 5 of 32 of the language model`"""
    counts, most = recomputed(plan.model, plan.recompute), recomputed(plan.model, "all")
    (clip, llm), (clips, llms) = counts, most
    return f"recompute {clip} of {clips} layers of CLIP, {llm} of {llms} of the language model"


def table(plan: Plan, **fixed) -> str:
    """The most exact plan for each card, and the one without recomputation, if that fits."""
    lines = []
    for card in CARDS:
        best = first_that_fits(plan, card * GB, **fixed)
        fits = total(best) <= FREE * card * GB
        shown = to_flags(best) if fits else "too small even with " + to_flags(best)
        lines.append(f"{card:4} GB  {shown:55}  {breakdown(best)}")
        fast = first_that_fits(plan, card * GB, **{"recompute": 0} | fixed)
        if fits and fast.recompute < best.recompute and total(fast) <= FREE * card * GB:
            lines.append(f"{'faster':>7}  {to_flags(fast):55}  {breakdown(fast)}")
    return "\n".join(lines)


def report(cfg, plan: Plan) -> str:
    """What --estimate prints of a stage; cfg: its train.TrainConfig."""
    batch = f"{cfg.rows} rows of {cfg.row_tokens} tokens a batch"
    return f"stage {cfg.stage} of {cfg.preset}, {batch}:\n{table(plan, **chosen(cfg, plan))}"


def remedies(plan: Plan) -> list[str]:
    """Changes that save memory, the largest first: `--moments bf16 saves 12.1 GB`."""
    most = sum(recomputed(plan.model, "all"))
    changes = {"--recompute all": {"recompute": most}, "--weights bf16-sr": {"weights": "bf16-sr"},
               "--moments bf16": {"moments": "bf16"},
               "half the --rows, twice the --accumulate": {"tokens": plan.tokens // 2}}  # fmt: skip
    saved = {name: total(plan) - total(replace(plan, **change)) for name, change in changes.items()}
    ranked = sorted(saved.items(), key=lambda item: -item[1])
    return [f"{name} saves {size / GB:.1f} GB" for name, size in ranked if size > 0.05 * GB]


def is_out_of_memory(error) -> bool:
    """Also inside the compiler, which wraps the error in its own."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate" in str(error):
        return True
    inner = getattr(error, "inner_exception", None) or error.__cause__
    return inner is not None and is_out_of_memory(inner)


@contextlib.contextmanager
def advice(plan: Plan, device: str):
    """Turn an out-of-memory error into a ValueError that names the flags that help."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        saving = "; ".join(remedies(plan)) or "a smaller model"
        raise ValueError(f"out of memory on {device}; the estimate was {breakdown(plan)}. "
                         f"What would help: {saving}") from None  # fmt: skip
