"""What the stages of a training are made of: settings, presets, and the table of the stages.

    default -> preset -> table of the stages -> command line

is the order in which a setting gets its value (`resolve`). The table stands here as the paper's
does (Table 6); so does the question of memory, which is answered before a weight is loaded
(`choose_precision`): how exact can the training be on this machine? train.py does the rest.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import zlib
from dataclasses import dataclass

import torch

from clip_moe import CLIPVisionConfig
from cumo import CuMoConfig
from data.chat import TEMPLATES
from data.flags import check_choice
from data.hub import local_folder
from data.images import MODES
from data.loader import default_workers
from data.weights import read_config
from engine import fsdp, memory
from engine.memory import has_fast_bf16
from engine.optim import MOMENTS, WEIGHTS
from llm import LLMConfig
from upcycle import PARTS, sparse_config


@dataclass
class TrainConfig:
    preset: str = "mini"  # mini, smol-mini, smol, mistral-7b or mixtral-8x7b
    stage: int = 0  # train this stage, and first those it needs; 0: all three
    out: str = "out"  # folder of the three stages
    clip: str = ""  # the CLIP weights: a folder, or a name on the hub
    llm: str = ""  # the language model's: a folder, or a name on the hub
    scales: tuple = (1,)  # S2 scales of the image features
    seed: int = 0  # of weights, data order and routers
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    bf16: bool = True  # bf16 products over float32 weights, where the hardware has them
    compile: bool = False  # torch.compile the blocks; on unless --no-compile on a GPU
    weights: str = ""  # fp32, bf16-master or bf16-sr; empty: what fits (--estimate)
    moments: str = ""  # AdamW's: fp32 or bf16; empty: what fits
    recompute: bool | None = None  # activations, to save memory; None: if it takes that to fit
    estimate: bool = False  # print what the stage takes on each size of card, and stop
    wandb: bool = False  # log to Weights & Biases as well (pip install wandb)
    workers: int = 0  # processes that read the data; unless given up to 4 on a GPU, else none
    overwrite: bool = False  # train a finished stage again
    save_every: int = 200  # steps between two resume points
    # the rest belongs to the stages that --stage names
    data: str = ""  # LLaVA JSON or JSONL; empty: the emoji world
    image_folder: str = ""  # where the image paths of --data start
    limit: int = 0  # use only so many records of --data, the first ones; 0: all
    samples: int = 0  # how many samples to see; 0: all of --data, once
    augment: bool = True  # recolour the drawings of the emoji world
    init: str = ""  # start from this checkpoint; without --stage, stage 3 alone
    template: str = "mistral_instruct_system"  # how conversations are written
    image_mode: str = "pad"  # how pictures become square: pad or square
    rows: int = 8  # packed rows a batch
    row_tokens: int = 256  # tokens a row
    accumulate: int = 1  # batches a step
    lr: float = 1e-3  # peak learning rate
    warmup: float = 0.03  # share of the samples with a rising learning rate
    weight_decay: float = 0.0  # of the matrices
    clip_grad: float = 1.0  # largest gradient norm
    upcycle: str = "clip,mlp"  # parts made sparse in stage 3 (clip, mlp, llm); "none": stay dense
    num_experts: int = 4  # experts of a sparse block
    top_k: int = 2  # experts a token visits
    scratch: str = ""  # of these parts, those whose experts start random, not as copies (ablation)
    freeze: str = ""  # parts that do not learn in stages 2 and 3 (clip, mlp, llm)
    balance_coef: float = 0.1  # weight of the balance losses
    z_coef: float = 0.01  # weight of the router z-losses


CLIP_L = "openai/clip-vit-large-patch14-336"
PRESETS = {
    "mini": dict(clip="data/mini/clip", llm="data/mini/llm"),
    "smol-mini": dict(clip="data/mini/clip", llm="weights/SmolLM2-135M-Instruct"),
    "smol": dict(clip="openai/clip-vit-base-patch16", llm="HuggingFaceTB/SmolLM2-135M-Instruct"),
    "mistral-7b": dict(clip=CLIP_L, llm="mistralai/Mistral-7B-Instruct-v0.2", scales=(1, 3)),
    "mixtral-8x7b": dict(clip=CLIP_L, llm="mistralai/Mixtral-8x7B-Instruct-v0.1", scales=(1, 3)),
}
# Learning rates and lengths as in the paper's Table 6; a step sees about as many samples (256, 128,
# 128). The miniature's were found by trying (docs/LOG.md).
PAPER = {
    1: dict(template="plain", lr=1e-3, rows=4, accumulate=20, row_tokens=2048, image_mode="square"),
    2: dict(template="mistral_instruct_system", lr=2e-6, rows=1, accumulate=28, row_tokens=4096),
    3: dict(template="mistral_instruct_system", lr=4e-6, rows=1, accumulate=28, row_tokens=4096),
}
MINI = {
    1: dict(template="plain", lr=2e-3, samples=3_000, row_tokens=280),
    2: dict(template="mistral_instruct", lr=2.5e-4, samples=3_000, row_tokens=224),
    3: dict(template="mistral_instruct", lr=2e-4, samples=5_200, row_tokens=288),
}
CHATML = dict(template="chatml")
SMOL = {1: PAPER[1], 2: PAPER[2] | CHATML, 3: PAPER[3] | CHATML}
SMOL_MINI = {  # a real language model under the miniature CLIP; only stage 1 has been run
    1: dict(template="plain", lr=1e-3, samples=1_000, rows=2, row_tokens=216, accumulate=1),
    2: dict(template="chatml", lr=1e-4, samples=2_000, rows=2, row_tokens=384, accumulate=4),
    3: dict(template="chatml", lr=5e-5, samples=4_000, rows=2, row_tokens=384, accumulate=4),
}
STAGES = {"mini": MINI, "smol-mini": SMOL_MINI, "smol": SMOL, "mistral-7b": PAPER,
          "mixtral-8x7b": PAPER}  # fmt: skip
WORLD_TASK = {1: "name", 2: "describe", 3: "ask"}  # what the emoji world teaches in each stage
SHARED = ("preset", "clip", "llm", "scales", "seed")  # the same in all stages of one model
IRRELEVANT = ("stage", "out", "device", "compile", "recompute", "estimate", "wandb", "workers",
              "overwrite", "save_every")  # to what is learned  # fmt: skip


# ------------------------------------------------------------------------------ pure arithmetic


def resolve(given, stage, target=True):
    """The configuration of one stage: defaults, then preset, stage table and command line.

    given: {field: value} from the command line. Of a stage that runs only because another needs it
    (`target=False`), the stage's own fields keep their table's values.
    """
    preset = given.get("preset", "mini")
    check_choice("preset", preset, PRESETS)
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    shared = set(names[: names.index("data")])
    own = {k: v for k, v in given.items() if target or k in shared}
    cfg = TrainConfig(**(PRESETS[preset] | STAGES[preset][stage] | own))
    cfg.stage = stage
    if "bf16" not in own:
        cfg.bf16 = cfg.estimate or has_fast_bf16(cfg.device)
    if "compile" not in own:
        cfg.compile = cfg.device.startswith("cuda")
    if "workers" not in own:
        cfg.workers = default_workers(cfg.device)
    if cfg.data and "samples" not in own:
        cfg.samples = 0  # one's own data is seen once
    check_choice("template", cfg.template, TEMPLATES)
    check_choice("image-mode", cfg.image_mode, MODES)
    check_choice("weights", cfg.weights, ["", *WEIGHTS])
    check_choice("moments", cfg.moments, ["", *MOMENTS])
    for name, choices in (("scratch", cfg.upcycle.split(",")), ("freeze", PARTS)):
        for part in split_parts(getattr(cfg, name)):
            check_choice(name, part, choices)
    if set(split_parts(cfg.freeze)) == set(PARTS):
        raise ValueError(f"--freeze {cfg.freeze} leaves nothing to learn; freeze at most two parts")
    for name in ("lr", "clip_grad", "weight_decay", "balance_coef", "z_coef"):
        value, flag = getattr(cfg, name), "--" + name.replace("_", "-")
        if value < 0 or value == 0 and name in ("lr", "clip_grad"):
            least = "above 0" if name in ("lr", "clip_grad") else "0 or more"
            raise ValueError(f"{flag} {value} must be {least}")
        if value == math.inf and name != "clip_grad":
            raise ValueError(f"{flag} {value} must be finite")
    most = max(16, 4 * (os.cpu_count() or 1))
    if cfg.workers > most:
        raise ValueError(
            f"--workers {cfg.workers} are too many for this machine; take up to {most}"
        )
    if not 0 <= cfg.warmup < 1:
        raise ValueError(f"--warmup {cfg.warmup} must be from 0 to below 1")
    for name in ("samples", "limit", "workers", "rows", "row_tokens", "accumulate", "save_every"):
        value, least = getattr(cfg, name), int(name not in ("samples", "limit", "workers"))
        if value < least:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value} is too small, take {least} or more")
    return cfg


def split_parts(text):
    """The parts in a flag such as "clip,mlp"."""
    return text.split(",") if text else []


def learning(cfg):
    """The submodules of a CuMo that this stage trains."""
    if cfg.stage == 1:
        return ["connector"]
    modules = dict(zip(PARTS, ("vision", "connector", "llm")))
    return [name for part, name in modules.items() if part not in split_parts(cfg.freeze)]


def lr_at(done, cfg):
    """Learning rate when a share `done` (0 to 1) of the samples is used: warm-up, cosine."""
    if done < cfg.warmup:
        return cfg.lr * (done + 1e-3) / (cfg.warmup + 1e-3)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1, (done - cfg.warmup) / (1 - cfg.warmup))))


# ------------------------------------------------------------------------------ stages on disk


def stage_dir(cfg, stage):
    return pathlib.Path(cfg.out) / f"stage{stage}"


def read_state(folder):
    """The train.json of a stage, its configuration and state; None if it was not begun."""
    file = folder / "train.json"
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_text())
        state["config"], state["finished"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{file} is damaged; --overwrite begins the stage again") from None
    return state


def begin(folder):
    """Make `folder` anew for a stage. ValueError if something else than a stage lies there.

    An earlier stage goes by a rename, at once: one that is half removed looks like a stranger's.
    """
    gone, ours = folder.with_name(folder.name + ".gone"), ("train.json", "train.json.partial")
    if folder.exists():
        files = [file.name for file in folder.iterdir()]
        if files and not any(name in files for name in ours):
            raise ValueError(f"{folder} holds files that no training made; name another --out")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
    folder.mkdir(parents=True)
    shutil.rmtree(gone, ignore_errors=True)


def checksums(folder):
    """{file: CRC-32} of the weights of a stage."""
    sums = {}
    for file in sorted(folder.glob("*.safetensors")):
        crc = 0
        with open(file, "rb") as opened:
            while part := opened.read(2**24):
                crc = zlib.crc32(part, crc)
        sums[file.name] = f"{crc:08x}"
    return sums


def check_sums(folder):
    """ValueError if the weights in `folder` are a finished stage's and not what it has written."""
    folder = pathlib.Path(folder)
    try:
        written = dict(json.loads((folder / "train.json").read_text())["crc32"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # from elsewhere, or from before there were checksums
    now = checksums(folder)
    for name in sorted(written.keys() | now):
        if now.get(name) != written.get(name):
            raise ValueError(f"{folder / name} is not what its stage wrote (its CRC-32 is not that "
                             "in train.json): copy it anew, or --overwrite it")  # fmt: skip


def differences(cfg, state, fields=None):
    """`lr was 0.1, now 0.2` for each of the `fields` (None: all) in which a stage's differ."""
    then, now = state["config"], json.loads(json.dumps(dataclasses.asdict(cfg)))
    fields = [k for k in fields or now if k not in IRRELEVANT]
    # a flag that is younger than the stage was off, and off is written "", 0, False or null
    differ = [k for k in fields if (now[k] or None) != (then.get(k) or None)]
    return [f"{k} was {then.get(k)!r}, now {now[k]!r}" for k in differ]


def refuse_difference(cfg, state, folder, fields=None):
    """ValueError that names the `fields` (None: all) in which `folder`'s configuration differs."""
    shown = ", ".join(differences(cfg, state, fields))
    if shown:
        raise ValueError(f"{folder} was made with another configuration: {shown}. Use the same "
                         "flags, another --out, or --overwrite")  # fmt: skip


# ------------------------------------------------------------------------------ memory


def model_config(cfg):
    """The configuration of the model that `build` will make, read or known without its weights."""
    before = stage_dir(cfg, cfg.stage - 1)  # there, and of this model?
    state = read_state(before) or {"finished": False}
    ours = state["finished"] and not differences(cfg, state, SHARED)
    if cfg.init or ours:
        folder = local_folder(cfg.init or before, "config")
        model = CuMoConfig.from_original(read_config(folder), folder)
    else:
        if cfg.llm == PRESETS["smol-mini"]["llm"] and not pathlib.Path(cfg.llm).is_dir():
            raise ValueError(f"--llm: {cfg.llm!r} is not there; runs/smollm2.sh makes it")
        vision, llm = (
            memory.KNOWN.get(name) or kind.from_hf(read_config(local_folder(name, "config")))
            for name, kind in ((cfg.clip, CLIPVisionConfig), (cfg.llm, LLMConfig))
        )
        model = CuMoConfig(dataclasses.replace(vision, scales=cfg.scales), llm)
    if cfg.stage == 3 and cfg.upcycle != "none":
        model = sparse_config(model, cfg.upcycle.split(","), cfg.num_experts, cfg.top_k)
    return model


def plan_of(cfg):
    """What a batch of this stage takes: a memory.Plan."""
    _, processes = fsdp.world()
    tokens = cfg.rows * cfg.row_tokens // processes
    return memory.make_plan(model_config(cfg), cfg.stage, tokens, learning(cfg), bf16=cfg.bf16,
                            processes=processes)  # fmt: skip


def fixed(cfg):
    """What the flags say about precision and memory."""
    given = {name: getattr(cfg, name) for name in ("weights", "moments", "recompute")}
    return {name: value for name, value in given.items() if value not in ("", None)}


def choose_precision(cfg):
    """Fill in the precision and memory settings that the flags leave open. Returns the Plan."""
    best = memory.choose_precision(plan_of(cfg), cfg.device, fixed(cfg))
    cfg.weights, cfg.moments, cfg.recompute = best.weights, best.moments, best.recompute
    return best


def print_estimate(cfg):
    """What this stage would take on each size of card, with the flags that are given fixed."""
    batch = f"{cfg.rows} rows of {cfg.row_tokens} tokens"
    print(f"stage {cfg.stage} of {cfg.preset}, {batch} a batch:")
    print(memory.table(plan_of(cfg), **fixed(cfg)))
