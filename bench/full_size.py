"""CuMo-7B at full size with random weights: a training step, or generation. Needs no download.

    python bench/full_size.py train --stage 3                   # seconds, MFU and peak memory
    python bench/full_size.py generate --compile --quant int8   # ms a token, share of bandwidth

Random weights take as long as trained ones. Training runs train.py's own Trainer on the emoji
world: a row of 4,096 tokens holds six or seven questions, each about a picture. Generation answers
a prompt of one picture and 64 tokens; the first token is left out of the ms a token. Each prints
one line of JSON at its end, and adds it to --into. bench/gpu.sh runs all of it.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
import train
from cumo import IMAGE_TOKEN, CuMo
from data.flags import check_choice, check_device, parse, run
from data.stages import PRESETS
from data.world import World
from engine import memory, profile, settings
from engine.decode import fast_step
from engine.quant import quantize

PROMPT = 64  # tokens of text in a prompt
TOKENIZER = ROOT / "data" / "mini" / "llm"  # its ids are valid for every preset


@dataclass
class Config:
    what: str  # train or generate
    preset: str = "mistral-7b"  # shapes of the models
    stage: int = 3  # stage to train
    llm_layers: int = 0  # layers of the language model; 0: all
    clip_layers: int = 0  # layers of CLIP; 0: all
    steps: int = 8  # optimizer steps, the first of which compile
    accumulate: int = 4  # batches of a step
    weights: str = ""  # fp32, bf16-master or bf16-sr; empty: what fits
    recompute: bool | None = None  # gradient checkpointing; default: only if needed to fit
    compile: bool = True  # compiled blocks, or for generation fast steps
    profile: bool = False  # record three steps (engine/profile.py)
    quant: str = ""  # int8: generate with weights of one byte
    batch: int = 1  # answers at once
    tokens: int = 64  # tokens of an answer
    runs: int = 5  # answers to time
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    out: str = "out/full_size"  # folder of the profile
    into: str = ""  # file that the line of JSON is added to


def resolved(cfg):
    """The train.TrainConfig of the stage."""
    given = dict(preset=cfg.preset, accumulate=cfg.accumulate, compile=cfg.compile, out=cfg.out,
                 device=cfg.device, profile=cfg.profile, recompute=cfg.recompute,
                 weights=cfg.weights, samples=10**6)  # fmt: skip
    return train.resolve(given, cfg.stage)


@torch.no_grad()
def random_model(stage, dtype):
    """A CuMo of the shapes that a train.TrainConfig names, made on its device."""
    with torch.device("meta"):
        model = CuMo(memory.stage_model(stage)).to(dtype)
    model.to_empty(device=stage.device)
    for p in model.parameters():
        p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1)
    return model


def build(stage):
    """What train.build does, without files."""
    model = random_model(stage, torch.float32 if stage.weights == "fp32" else torch.bfloat16)
    model.vision.recompute = model.llm.recompute = bool(stage.recompute)
    for name, module in model.named_children():
        module.requires_grad_(name in train.trained_modules(stage))
    model.cfg.image_mode, model.cfg.template = stage.image_mode, stage.template
    return model, TOKENIZER


def train_steps(cfg):
    stage = resolved(cfg)
    plan = train.choose_precision(stage)
    print(settings.overview(stage, plan), flush=True)
    train.build, train.loader.open_data = (
        build,
        lambda stage, task: World("train", task, stage.samples, stage.seed, stage.augment),
    )
    trainer = train.Trainer(stage)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.model.train()
    batches, seen = trainer.batches(), []
    with memory.advice(plan, stage.device), profile.record(trainer) as recorded:
        for _ in range(cfg.steps):
            start, taken = time.perf_counter(), list(islice(batches, stage.accumulate))
            metrics = trainer.train_step(taken)
            peak = memory.peak_memory(stage.device) / memory.GB
            seen.append(metrics | {"seconds": time.perf_counter() - start, "memory_gb": peak})
            show = {k: seen[-1][k] for k in ("step", "seconds", "tokens_per_s", "mfu", "memory_gb")}
            print(show, flush=True)
            recorded()
    settled = sorted(seen[cfg.steps // 2 :], key=lambda one: one["seconds"])
    middle = settled[len(settled) // 2]
    reserved = torch.cuda.max_memory_reserved() / memory.GB if "cuda" in stage.device else None
    found = {k: middle[k] for k in ("seconds", "tokens_per_s", "mfu", "memory_gb")}
    return found | {"seconds_first_step": seen[0]["seconds"], "reserved_gb": reserved,
                    "estimate_gb": memory.total(plan) / memory.GB, "rate": trainer.rates["mfu"],
                    "weights": stage.weights, "moments": stage.moments,
                    "recompute": stage.recompute}  # fmt: skip


def bandwidth(device):
    """Bytes a second at which a gigabyte is read: the best of ten."""
    x, best = torch.ones(2**28, device=device), 0
    for _ in range(10):
        start = time.perf_counter()
        x.sum().item()
        best = max(best, x.nbytes / (time.perf_counter() - start))
    return best


@torch.no_grad()
def generate(cfg):
    model = random_model(resolved(replace(cfg, weights="bf16-sr")), torch.bfloat16).eval()
    llm = quantize(model.llm) if cfg.quant else model.llm
    prompt = torch.full((cfg.batch, model.image_tokens + PROMPT), 5)
    prompt[:, 9 : 9 + model.image_tokens] = IMAGE_TOKEN
    size = model.cfg.vision.image_size
    images = torch.zeros(cfg.batch, 3, size, size, device=cfg.device)
    answer = partial(model.generate, prompt.to(cfg.device), images,
                     step=fast_step if cfg.compile else None)  # fmt: skip

    def seconds(n):
        start = time.perf_counter()
        answer(max_new_tokens=n).tolist()  # waits for the GPU
        return time.perf_counter() - start

    warm_up = sum(seconds(1 + n * cfg.tokens) for n in (0, 1, 0, 1))  # a new length compiles again
    firsts, nexts = [], []
    for _ in range(cfg.runs):
        firsts.append(seconds(1))
        nexts.append((seconds(1 + cfg.tokens) - firsts[-1]) / cfg.tokens)
    first, token = statistics.median(firsts), statistics.median(nexts)
    read = sum(x.nbytes for x in llm.state_dict().values())
    read -= llm.model.embed_tokens.weight.nbytes if llm.head is not llm.model.embed_tokens else 0
    speed = bandwidth(cfg.device)
    return {"warm_up_s": warm_up, "first_ms": first * 1e3, "ms_a_token": token * 1e3,
            "tokens_per_s": cfg.batch / token, "weights_gb": read / 1e9, "gb_s": speed / 1e9,
            "share_of_bandwidth": read / token / speed}  # fmt: skip


def main():
    cfg, given = parse(Config, description=__doc__.split("\n")[0])
    check_choice("what", cfg.what, ("train", "generate"))
    check_choice("preset", cfg.preset, PRESETS)
    check_choice("quant", cfg.quant, ("", "int8"))
    check_device(cfg.device)
    for name, layers in (("clip", cfg.clip_layers), ("llm", cfg.llm_layers)):
        known = PRESETS[cfg.preset][name]
        if layers:
            memory.KNOWN[known] = replace(memory.KNOWN[known], n_layers=layers)
    torch.manual_seed(0)
    found = (train_steps if cfg.what == "train" else generate)(cfg)
    card = torch.cuda.get_device_name() if "cuda" in cfg.device else cfg.device
    asked = {name: getattr(cfg, name) for name in sorted(given - {"into", "out"})}
    line = json.dumps(asked | {"card": card, "torch": torch.__version__} | found)
    print(line)
    if cfg.into:
        with open(cfg.into, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    run(main)
