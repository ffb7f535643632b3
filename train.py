"""Train a CuMo in its three stages, on one machine, like make: what is there is not made again.

    python train.py                 # all three stages of the miniature, minutes on a laptop CPU
    python train.py --stage 3       # stage 3; runs stages 1 and 2 first if they are not there
    python train.py --stage 3 --init out/stage2 --data mine.json --image-folder pics --out mine

    stage                    trains           learns from                   starts from
    1 connector pre-training the connector    captions                      CLIP + LLM weights
    2 pre-finetuning         everything       dense captions                stage 1
    3 instruction tuning     everything,      questions and answers         stage 2, upcycled
                             sparse now

(paper, section 3.3 and Table 6). Stage k lives in `out/stage<k>/`: a checkpoint in the layout of
the released CuMo, `train.json` (the configuration, resolved), `metrics.jsonl` and `loss.png`. While
it trains, `resume.pt` holds everything needed to go on after Ctrl-C or a crash as if nothing had
happened: weights, moments, random state and the place in the data.

The learning rate follows the share of the data that has been used, not the number of steps, because
rows are packed with as many conversations as fit.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import parallel
from clip_moe import CLIPVision
from cumo import CuMo, CuMoConfig, check_device, has_fast_bf16
from data.chat import TEMPLATES, Rejected, template_of
from data.flags import parse, run
from data.hub import resolve as local_folder
from data.images import MODES
from data.llava import LlavaData, encode
from data.packing import pack
from data.tokenizer import Tokenizer
from data.weights import write_json
from data.world import World
from eval import draw_load, pyplot
from llm import LLM
from upcycle import upcycle

try:
    import resource
except ImportError:  # Windows does not tell how much memory a process took
    resource = None


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
    compile: bool = False  # torch.compile the blocks
    overwrite: bool = False  # train a finished stage again
    save_every: int = 200  # steps between two resume points
    # the rest belongs to the stages that --stage names
    data: str = ""  # LLaVA JSON or JSONL; empty: the emoji world
    image_folder: str = ""  # where the image paths of --data start
    samples: int = 0  # how many samples to see; 0: all of --data, once
    augment: bool = True  # recolour the drawings of the emoji world
    init: str = ""  # start from this checkpoint; without --stage, stage 3 alone
    template: str = "mistral_instruct_system"  # how conversations are written
    image_mode: str = "pad"  # how pictures become square: pad or square
    rows: int = 8  # packed rows a batch
    row_tokens: int = 256  # tokens a row
    accumulate: int = 2  # batches a step
    lr: float = 1e-3  # peak learning rate
    warmup: float = 0.03  # share of the samples with a rising learning rate
    weight_decay: float = 0.0  # of the matrices
    clip_grad: float = 1.0  # largest gradient norm
    upcycle: str = "clip,mlp"  # parts made sparse in stage 3 (clip, mlp, llm); "none": stay dense
    num_experts: int = 4  # experts of a sparse block
    top_k: int = 2  # experts a token visits
    scratch: bool = False  # random experts instead of copies (ablation)
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
# 128). The miniature's were found by trying (LOG.md).
PAPER = {
    1: dict(template="plain", lr=1e-3, rows=16, accumulate=5, row_tokens=2048, image_mode="square"),
    2: dict(template="mistral_instruct_system", lr=2e-6, rows=4, accumulate=7, row_tokens=4096),
    3: dict(template="mistral_instruct_system", lr=4e-6, rows=4, accumulate=7, row_tokens=4096),
}
MINI = {
    1: dict(template="plain", lr=2e-3, samples=4_500),
    2: dict(template="mistral_instruct", lr=2e-4, samples=6_000),
    3: dict(template="mistral_instruct", lr=1.5e-4, samples=10_000),
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
IRRELEVANT = ("stage", "out", "device", "compile", "overwrite", "save_every")  # to what is learned


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
        cfg.bf16 = has_fast_bf16(cfg.device)
    if cfg.data and "samples" not in own:
        cfg.samples = 0  # one's own data is seen once
    check_choice("template", cfg.template, TEMPLATES)
    check_choice("image-mode", cfg.image_mode, MODES)
    if not 0 <= cfg.warmup < 1 or cfg.lr <= 0:
        raise ValueError(f"--warmup {cfg.warmup} must be from 0 to below 1, --lr {cfg.lr} above 0")
    for name in ("samples", "rows", "row_tokens", "accumulate", "save_every"):
        value, least = getattr(cfg, name), int(name != "samples")
        if value < least:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value} is too small, take {least} or more")
    return cfg


def check_choice(flag, value, choices):
    if value not in choices:
        raise ValueError(f"--{flag} {value!r} is unknown; choose from {', '.join(choices)}")


def lr_at(done, cfg):
    """Learning rate when a share `done` (0 to 1) of the samples is used: warm-up, cosine."""
    if done < cfg.warmup:
        return cfg.lr * (done + 1e-3) / (cfg.warmup + 1e-3)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1, (done - cfg.warmup) / (1 - cfg.warmup))))


def param_groups(model, cfg):
    """Trainable parameters for AdamW: matrices decay; norms and biases, stacked too, do not."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.dim() > 1 and not name.endswith((".b1", ".b2"))].append(p)
    return [
        {"params": groups[True], "weight_decay": cfg.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def data_order(n, samples, seed):
    """Indices of the samples in the order of use: every epoch a new permutation of all `n`."""
    epochs = -(-samples // n)
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])[:samples]


# ------------------------------------------------------------------------------ starting a stage


def stage_dir(cfg, stage):
    return pathlib.Path(cfg.out) / f"stage{stage}"


def read_state(folder):
    """The train.json of a stage, its configuration and state; None if it was not begun."""
    file = folder / "train.json"
    return json.loads(file.read_text()) if file.is_file() else None


def refuse_difference(cfg, state, folder, fields=None):
    """ValueError that names the `fields` (None: all) in which `folder`'s configuration differs."""
    then, now = state["config"], json.loads(json.dumps(dataclasses.asdict(cfg)))
    differ = [k for k in fields or now if k not in IRRELEVANT and now[k] != then.get(k)]
    if differ:
        shown = ", ".join(f"{k} was {then.get(k)!r}, now {now[k]!r}" for k in differ)
        raise ValueError(f"{folder} was made with another configuration: {shown}. Use the same "
                         "flags, another --out, or --overwrite")  # fmt: skip


def build(cfg):
    """The model a stage starts from (float32, on the CPU), and where its tokenizer lies."""
    source = cfg.init or (stage_dir(cfg, cfg.stage - 1) if cfg.stage > 1 else cfg.llm)
    if cfg.stage == 1 and not cfg.init:
        if cfg.llm == PRESETS["smol-mini"]["llm"] and not pathlib.Path(cfg.llm).is_dir():
            raise ValueError(f"--llm: {cfg.llm!r} is not there; data/convert_smollm2.py makes it")
        clip, folder = local_folder(cfg.clip), local_folder(cfg.llm)
        vision, llm = CLIPVision.from_pretrained(clip, cfg.scales), LLM.from_pretrained(folder)
        model = CuMo(CuMoConfig(vision.cfg, llm.cfg))
        model.vision, model.llm = vision, llm
    else:
        model = CuMo.from_pretrained(source)
    if cfg.stage == 3 and cfg.upcycle != "none":
        parts = tuple(cfg.upcycle.split(","))
        model = upcycle(model, parts, cfg.num_experts, cfg.top_k, cfg.seed, cfg.scratch)
    model.requires_grad_(cfg.stage > 1)
    model.connector.requires_grad_(True)
    model.cfg.balance_coef, model.cfg.z_coef = cfg.balance_coef, cfg.z_coef
    model.cfg.image_mode = cfg.image_mode
    model.cfg.template = cfg.template
    if cfg.template == "plain":  # which is for captions only; a user's questions need another
        model.cfg.template = template_of(Tokenizer.from_pretrained(source))
    return model, source


def open_data(cfg):
    if cfg.data:
        return LlavaData(cfg.data, cfg.image_folder)
    if cfg.preset not in ("mini", "smol-mini"):
        raise ValueError(
            f"stage {cfg.stage} of {cfg.preset} needs data of its own: run it by itself, with "
            f"--stage {cfg.stage} --data FILE.json --image-folder DIR"
        )
    if not cfg.samples:
        raise ValueError("--samples 0 means all of --data; the emoji world needs a number")
    return World("train", WORLD_TASK[cfg.stage], cfg.samples, cfg.seed, cfg.augment)


# ------------------------------------------------------------------------------ one stage


PLACE = ("step", "used", "rejected", "seconds")  # how far a Trainer has come


class Trainer:
    """Model, optimizer and place in the data of one stage, with everything needed to resume it."""

    def __init__(self, cfg):
        check_device(cfg.device)
        parallel.check_rows(cfg.rows)
        torch.manual_seed(cfg.seed)
        self.cfg, self.folder = cfg, stage_dir(cfg, cfg.stage)
        self.data = open_data(cfg)
        with parallel.in_turn():
            self.model, source = build(cfg)
            parallel.shard(self.model, cfg.device, cfg.bf16)
        self.tokenizer = Tokenizer.from_pretrained(source)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, cfg), lr=cfg.lr, fused=True)
        self.order = data_order(len(self.data), cfg.samples or len(self.data), cfg.seed)
        self.step, self.used, self.rejected, self.seconds, self.stop = 0, 0, 0, 0.0, False
        if cfg.compile:
            for block in [*self.model.vision.layers, *self.model.llm.model.layers]:
                block.compile()

    def batches(self):
        """Packed batches from where the last one ended."""
        cfg, model = self.cfg, self.model
        image = (model.image_tokens, model.cfg.vision.image_size, cfg.image_mode)

        def encoded():
            for i in self.order[self.used :].tolist():
                try:
                    yield encode(self.data[i], self.tokenizer, cfg.template, *image, cfg.row_tokens)
                except Rejected as reason:
                    self.rejected += 1
                    if self.rejected <= 3:
                        tqdm.write(f"left out: {reason}")
                    yield [], [], []

        return pack(encoded(), cfg.rows, cfg.row_tokens)

    def train_step(self, batches):
        """One optimizer step over `accumulate` batches -> metrics; None at the end of the data."""
        cfg, start, before = self.cfg, time.perf_counter(), self.used
        taken = [batch for _, batch in zip(range(cfg.accumulate), batches)]
        if not taken:
            return None
        tokens, metrics = 0, []
        for batch in taken:
            mine = parallel.own_rows(batch, self.model.image_tokens)
            with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
                out = self.model(**{name: x.to(cfg.device) for name, x in mine.items()})
            if out.loss.requires_grad:  # else the connector alone learns, and there is no image
                (out.loss / len(taken)).backward()
            metrics.append(describe(out))
            tokens += int((batch["segments"] > 0).sum())
            self.used += batch["samples"]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip_grad)
        norm = parallel.full(norm).item()
        if not math.isfinite(norm):
            raise ValueError(
                f"the loss is not finite after {self.used} samples; lower --lr or try --no-bf16. "
                f"The last resume point in {self.folder} is good"
            )
        lr = lr_at((before + self.used) / 2 / len(self.order), cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        took = time.perf_counter() - start
        self.seconds += took
        return {"step": self.step, "samples": self.used, **mean(metrics), "lr": lr,
                "grad_norm": norm, "tokens_per_s": round(tokens / took)}  # fmt: skip

    def save_resume(self):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "rng": torch.get_rng_state(), **{k: getattr(self, k) for k in PLACE}}  # fmt: skip
        state = parallel.gather(state)
        if not parallel.first():
            return
        partial = self.folder / "resume.pt.partial"
        with open(partial, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        partial.replace(self.folder / "resume.pt")

    def load_resume(self):
        options = dict(map_location="cpu", mmap=parallel.world()[1] > 1)  # each reads its share
        state = torch.load(self.folder / "resume.pt", weights_only=True, **options)
        parallel.load(self.model, self.optimizer, state)
        for name in PLACE:
            setattr(self, name, state[name])
        torch.set_rng_state(state["rng"])
        if not parallel.first():
            return
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()[: self.step]
        (self.folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))

    def loop(self):
        """Train to the end of the data -> True, or until Ctrl-C -> False."""
        first, device = parallel.first(), self.cfg.device
        bar = tqdm(total=len(self.order), initial=self.used, unit="sample",
                   desc=f"stage {self.cfg.stage}", disable=not first)  # fmt: skip
        batches = self.batches()
        self.model.train()
        with open(self.folder / "metrics.jsonl" if first else os.devnull, "a") as log, bar:
            while not parallel.anyone(self.stop, device):
                metrics = self.train_step(batches)
                if metrics is None:
                    return True
                log.write(json.dumps(metrics) + "\n")
                bar.update(self.used - bar.n)
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", lr=f"{metrics['lr']:.1e}",
                                tok_s=f"{metrics['tokens_per_s']:.0f}")  # fmt: skip
                if self.step % self.cfg.save_every == 0:
                    log.flush()
                    self.save_resume()
            return False


def describe(out):
    """The numbers of one forward pass that are worth keeping."""
    metrics = {"loss": out.loss.item(), "lm_loss": out.lm_loss.item()}
    for part, losses in out.aux.items():
        if losses:
            metrics |= {f"{part}_balance": losses[0].item(), f"{part}_z": losses[1].item()}
            metrics[f"{part}_load"] = out.load[part].tolist()
    return metrics


def mean(rows):
    """Mean of each number, or list of numbers, over the rows that have it."""
    names = {name: None for row in rows for name in row}
    columns = {name: np.array([row[name] for row in rows if name in row]) for name in names}
    return {name: values.mean(0).round(6).tolist() for name, values in columns.items()}


def train_stage(cfg):
    """Train a stage, from its beginning or its resume point. False: interrupted by the user."""
    folder, name = stage_dir(cfg, cfg.stage), f"stage {cfg.stage}"
    state = None if cfg.overwrite else read_state(folder)
    if state:
        refuse_difference(cfg, state, folder)
        if state["finished"]:
            print(f"{name}: finished in {folder}")
            return True
    trainer = Trainer(cfg)
    shown = {k: v for k, v in dataclasses.asdict(cfg).items() if v != ""}
    print(f"{name}: " + " ".join(f"{k}={v}" for k, v in shown.items()))
    every = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(f"{name}: trains {trained:,} of {every:,} parameters on {len(trainer.order):,} samples")
    if state and (folder / "resume.pt").is_file():
        trainer.load_resume()
        print(f"{name}: resumed after {trainer.used:,} samples")
    elif parallel.first():
        if folder.exists() and any(folder.iterdir()) and not read_state(folder):
            raise ValueError(f"{folder} holds files that no training made; name another --out")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if parallel.first():
        write_json(folder / "train.json", {"finished": False, "config": dataclasses.asdict(cfg)})

    def stop(*_):
        trainer.stop = True

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    done = trainer.loop()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if not done:
        trainer.save_resume()
        print(f"stopped after {trainer.used:,} samples; the same command continues")
        return False
    if trainer.rejected == len(trainer.order):
        raise ValueError(f"none of the {trainer.rejected} samples holds an answer to learn within "
                         f"--row-tokens {cfg.row_tokens}")  # fmt: skip
    model = parallel.whole_model(trainer.model)
    if parallel.first():
        finish(trainer, model)
    parallel.wait()
    return True


def finish(trainer, model):
    """Turn a fully trained stage into a checkpoint, and draw its curves."""
    folder, cfg = trainer.folder, trainer.cfg
    model.save_pretrained(folder)
    for file in trainer.tokenizer.files:
        shutil.copy(file, folder)
    rejected = [*getattr(trainer.data, "rejected", []), *[""] * trainer.rejected]
    if rejected:
        print(f"stage {cfg.stage}: {len(rejected)} samples had nothing to learn and were left out")
    seconds = round(trainer.seconds, 1)
    state = {"finished": True, "seconds": seconds, "samples": trainer.used}
    if resource:
        unit = 2**30 if sys.platform == "darwin" else 2**20
        state["peak_memory_gb"] = round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2
        )
    write_json(folder / "train.json", state | {"config": dataclasses.asdict(cfg)})
    (folder / "resume.pt").unlink(missing_ok=True)
    print(f"stage {cfg.stage}: finished in {seconds:.0f} s -> {folder}")
    draw_metrics(folder)


def draw_metrics(folder):
    """loss.png, and for a sparse stage experts.png: the load over the last fifth of the steps."""
    plt = pyplot()
    if not plt:
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    every = dict.fromkeys(name for row in rows for name in row)
    names = [k for k in every if k == "lm_loss" or k.endswith(("_balance", "_z"))]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names):
        points = [(row["samples"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points), linewidth=0.8)
        axis.set(title=name, xlabel="samples", yscale="log" if name == "lm_loss" else "linear")
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=100)
    plt.close(figure)
    print(f"wrote {folder / 'loss.png'}")
    late, load = mean(rows[-(len(rows) // 5 + 1) :]), {}
    for part in ("clip", "mlp", "llm"):
        shares = np.atleast_2d(late.get(f"{part}_load", [[]]))
        load |= {f"{part} {layer}": row.tolist() for layer, row in enumerate(shares) if len(row)}
    if load:
        draw_load(load, folder / "experts.png")


def main():
    cfg, given = parse(TrainConfig, description=__doc__.split("\n")[0])
    given = {name: getattr(cfg, name) for name in given}
    if cfg.stage not in (0, 1, 2, 3):
        raise ValueError(f"--stage {cfg.stage}: choose 1, 2, 3, or 0 for all three")
    parallel.start(cfg.device)
    last = cfg.stage or 3
    first = last if cfg.init else 1
    for stage in range(first, last + 1):
        target = cfg.stage in (0, stage)
        stage_cfg = resolve(given, stage, target)
        if not target:
            state = read_state(stage_dir(stage_cfg, stage))
            if state and state["finished"]:
                refuse_difference(stage_cfg, state, stage_dir(stage_cfg, stage), SHARED)
                continue
            print(f"stage {last} needs stage {stage}, which is not there yet")
        if not train_stage(stage_cfg):
            return


if __name__ == "__main__":
    run(main)
