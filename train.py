"""Train a CuMo in its three stages. Like make: a stage that is finished is not made again.

    python train.py                 # all three stages of the miniature, minutes on a laptop CPU
    python train.py --stage 3       # stage 3; first stages 1 and 2 if they are missing
    python train.py --stage 3 --init out/stage2 --data mine.json --image-folder pics --out mine

The story of a stage, in the order of this file:

    resolve      settings: default -> preset -> table (data/stages.py) -> --init -> command line
    build        the model to start from: public weights, or the stage before, upcycled
    batches      conversations -> ids and labels -> rows packed with whole conversations
    train_step   forward, backward, clip, step
    train_stage  steps until the data is used up, with resume points; then a checkpoint

Stage k writes `out/stage<k>/`: a checkpoint with the names of the released CuMo, and what
engine/resume.py needs to continue after Ctrl-C or a crash as if nothing had happened.
"""

import data  # noqa: F401  isort: skip  before torch: sets how OpenMP waits
import json
import math
import os
import shlex
import sys
import time
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial

import torch
from tqdm import tqdm

from clip_moe import CLIPVision
from cumo import CuMo, CuMoConfig
from data import loader
from data.chat import end_tokens, template_of
from data.checkpoint import start_from
from data.flags import check_device, parse, run
from data.hub import local_folder
from data.llava import check_row, encode
from data.packing import check_rows, collate, pack, step_metrics, step_shares
from data.stages import WORLD_TASK, table_of
from data.tokenizer import Tokenizer
from engine import compiling, fsdp, held_out, memory, optim, profile, rate, resume, settings
from engine.resume import stage_dir
from llm import LLM
from mlp_moe import Connector
from upcycle import PARTS, upcycle


@dataclass
class ModelSettings:
    """The same in all stages of one model."""

    preset: str = "mini"  # mini, smol-mini, smol, mistral-7b or mixtral-8x7b
    clip: str = ""  # CLIP weights: a folder, or a name on the hub
    llm: str = ""  # language model weights: a folder, or a name on the hub
    scales: tuple = (1,)  # S2: 1 is CLIP's own image size; 1,3 adds 3 x 3 tiles
    seed: int = 0  # of weights, data order and routers


@dataclass
class PrecisionSettings:
    """For every stage that runs; they change the trained weights."""

    bf16: bool | None = None  # bf16 autocast of float32 weights; default: if hardware has bf16
    weights: str = ""  # fp32, bf16-master or bf16-sr (engine/optim.py); empty: what fits
    moments: str = ""  # AdamW's moments: fp32 or bf16; empty: what fits


@dataclass
class RunSettings:
    """For every stage that runs; they change the trained weights by rounding at most."""

    stage: int = 0  # train this stage, and first those it needs; 0: all three
    out: str = "out"  # folder of the three stages
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    compile: bool | None = None  # torch.compile the blocks; default: on a GPU
    recompute: str = "auto"  # layers under gradient checkpointing: N, all, none; auto: what fits
    profile: bool = False  # profile steps 5 to 7, into the stage's folder; training goes on
    estimate: bool = False  # print the memory of the stage on each size of card, and stop
    plot: bool = True  # draw the loss curves when a stage ends (pip install matplotlib)
    wandb: bool = False  # log to Weights & Biases as well (pip install wandb)
    workers: int = 0  # processes that read the data; if not given: up to 4 on a GPU
    overwrite: bool = False  # train the stage from its first step again
    save_every: int = 200  # steps between two resume points


@dataclass
class StageSettings:
    """Of the stage that --stage names (0: all three). data/stages.py overrides these defaults."""

    data: str = ""  # LLaVA JSON or JSONL; empty: the emoji world
    image_folder: str = ""  # folder that the image paths of --data are relative to
    limit: int = 0  # use only the first N records of --data; 0: all
    val: str = ""  # held-out LLaVA file: its loss is logged at each --save-every
    samples: int = 0  # number of samples to see; 0: see --epochs
    epochs: int = 0  # if --samples is 0: how often to see all of --data (0: once)
    augment: bool = True  # recolor the drawings of the emoji world
    init: str = ""  # start from this checkpoint; if --stage is not given, only stage 3 runs
    template: str = "mistral_instruct_system"  # how conversations are written
    image_mode: str = "pad"  # pad (add borders) or square (crop the middle)
    rows: int = 8  # packed rows per batch
    row_tokens: int = 256  # tokens per row
    accumulate: int = 1  # batches per step
    lr: float = 1e-3  # peak learning rate
    warmup: float = 0.03  # share of the samples with a rising learning rate
    weight_decay: float = 0.0  # of the matrices
    clip_grad: float = 1.0  # largest gradient norm
    upcycle: str = "clip,mlp"  # sparse in stage 3: clip, mlp (the connector), llm; or "none"
    num_experts: int = 4  # experts of a sparse block
    top_k: int = 2  # experts per token
    scratch: str = ""  # sparse parts whose experts start random instead of as copies (ablation)
    freeze: str = ""  # parts that do not learn in stages 2 and 3 (clip, mlp, llm)
    balance_coef: float = 0.1  # weight of the balance losses
    z_coef: float = 0.01  # weight of the router z-losses


@dataclass
class TrainConfig(StageSettings, RunSettings, PrecisionSettings, ModelSettings):
    """All settings; each is a flag."""

    def of(self, *groups):
        """{name: value} of the settings in these groups."""
        return {f.name: getattr(self, f.name) for group in groups for f in fields(group)}

    shared = property(lambda self: self.of(ModelSettings))

    @property
    def must_match(self):
        """The settings that a stage must keep when it is resumed: all that change its weights."""
        every = self.of(ModelSettings, PrecisionSettings, StageSettings)
        return {name: value for name, value in every.items() if name != "val"}


def resolve(given, stage, target=True):
    """The settings of one stage: defaults, preset, table (data/stages.py), then `given`.

    given: {field: value} from the command line and --init's checkpoint. A stage that runs only
    because another one needs it (`target=False`) takes its StageSettings from the table.
    """
    table = table_of(given.get("preset", "mini"), stage)
    own = {field.name for field in fields(StageSettings)}
    given = {k: v for k, v in given.items() if target or k not in own}
    cfg = TrainConfig(**(table | given))
    cfg.stage = stage
    if "bf16" not in given:
        cfg.bf16 = cfg.estimate or rate.has_fast_bf16(cfg.device)
    if "compile" not in given:
        cfg.compile = cfg.device.startswith("cuda")
    if "workers" not in given:
        cfg.workers = loader.default_workers(cfg.device)
    if cfg.data and "samples" not in given:
        cfg.samples = 0  # all of it
    settings.check_values(cfg)
    return cfg


def trained_modules(cfg):
    """The submodules of a CuMo that this stage trains."""
    if cfg.stage == 1:
        return ["connector"]
    modules = dict(zip(PARTS, ("vision", "connector", "llm")))
    return [name for part, name in modules.items() if part not in settings.split_parts(cfg.freeze)]


def lr_at(done, cfg):
    """Learning rate when a share `done` (0 to 1) of the samples is used: warm-up, then cosine. (The
    number of steps is not known in advance: a row is packed with as many samples as fit.)"""
    if done < cfg.warmup:
        return cfg.lr * (done + 1e-3) / (cfg.warmup + 1e-3)  # not 0 at the first step
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1, (done - cfg.warmup) / (1 - cfg.warmup))))


def stage_plan(cfg):
    """The memory.Plan of one batch of this stage."""
    return memory.plan_stage(cfg, trained_modules(cfg))


def choose_precision(cfg):
    """Set those flags of precision and memory that were not given -> memory.Plan."""
    plan = memory.best_plan(cfg, stage_plan(cfg))
    cfg.weights, cfg.moments, cfg.recompute = plan.weights, plan.moments, str(plan.recompute)
    return plan


# ------------------------------------------------------------------------------ one stage


def build(cfg):
    """The model a stage starts from (on the CPU), and where its tokenizer is."""
    source = cfg.init or (stage_dir(cfg, cfg.stage - 1) if cfg.stage > 1 else cfg.llm)
    dtype = torch.float32 if cfg.weights == "fp32" else torch.bfloat16
    if cfg.stage == 1 and not cfg.init:
        vision = CLIPVision.from_pretrained(local_folder(cfg.clip), cfg.scales, dtype=dtype)
        llm = LLM.from_pretrained(local_folder(cfg.llm), dtype=dtype)
        with torch.device("meta"):  # random weights of a 7B would take 28 GB, and be thrown away
            model = CuMo(CuMoConfig(vision.cfg, llm.cfg))
        model.vision, model.llm = vision, llm
        model.connector = Connector(vision.cfg.dim * len(vision.cfg.scales), llm.cfg.dim).to(dtype)
    else:
        resume.refuse_changed_weights(source)
        model = CuMo.from_pretrained(source, dtype=dtype)
    if cfg.stage == 3 and cfg.upcycle != "none":
        parts, scratch = cfg.upcycle.split(","), settings.split_parts(cfg.scratch)
        model = upcycle(model, parts, cfg.num_experts, cfg.top_k, cfg.seed, scratch)
    model.vision.recompute, model.llm.recompute = memory.recomputed(model.cfg, cfg.recompute)
    for name, module in model.named_children():  # vision, connector, llm
        module.requires_grad_(name in trained_modules(cfg))
    model.cfg.balance_coef, model.cfg.z_coef = cfg.balance_coef, cfg.z_coef
    known = model.cfg.template if cfg.init else ""
    model.cfg.image_mode, model.cfg.template = cfg.image_mode, cfg.template
    if cfg.template == "plain":  # for captions only: store one for questions
        model.cfg.template = known or template_of(Tokenizer.from_pretrained(source))
    return model, source


class Trainer:
    """Model, optimizer and place in the data of one stage."""

    def __init__(self, cfg):
        self.world = fsdp.world()  # (rank, number of ranks)
        check_rows(cfg.rows, self.world[1])
        torch.manual_seed(cfg.seed)
        self.cfg, self.folder = cfg, stage_dir(cfg, cfg.stage)
        self.data = loader.open_data(cfg, WORLD_TASK[cfg.stage])
        self.records = resume.check_data(cfg, self.data)
        with fsdp.in_turn():
            self.model, source = build(cfg)
            fsdp.shard(self.model, cfg.device, cfg.bf16)
        self.tokenizer = Tokenizer.from_pretrained(source)
        ends = end_tokens(self.tokenizer, self.model.cfg.template)
        self.model.cfg.llm.bos_token_id = self.tokenizer.bos
        self.model.cfg.llm.eos_token_id = ends if len(ends) > 1 else ends[0]
        check_row(cfg.row_tokens, self.tokenizer, cfg.template, self.model.image_tokens)
        self.optimizer = optim.make_optimizer(self.model, cfg)
        samples = cfg.samples or max(1, cfg.epochs) * len(self.data)
        self.order = loader.data_order(len(self.data), samples, cfg.seed)
        self.step, self.used, self.seconds, self.stop = 0, 0, 0.0, False
        self.counts = dict.fromkeys(loader.KINDS, 0)
        self.rates = rate.rates(cfg.device, torch.bfloat16 if cfg.bf16 else torch.float32)
        self.work = rate.operations(self.model.cfg, cfg.stage, cfg.row_tokens)
        self.code = partial(
            encode, tokenizer=self.tokenizer, template=cfg.template, max_tokens=cfg.row_tokens,
            image_tokens=self.model.image_tokens, image_size=self.model.cfg.vision.image_size,
            image_mode=cfg.image_mode)  # fmt: skip
        self.validation = held_out.open_file(cfg, self.code)
        if cfg.compile:
            compiling.compile_blocks(self.model)

    def batches(self):
        """Packed batches, from the first unused sample on."""
        cfg, log = self.cfg, self.folder / "skipped.jsonl" if fsdp.is_main() else None
        self.read = dict(self.counts)  # what was read; self.counts: what was used
        stream = loader.Loader(self.data, self.order, self.code, cfg.workers, self.read, log)
        return pack(stream.samples(self.used), cfg.rows, cfg.row_tokens)

    def train_step(self, batches, start=None):
        """One optimizer step over a list of batches -> metrics; `start`: when reading began."""
        cfg, start, before = self.cfg, start or time.perf_counter(), self.used
        tokens, n_images, metrics, shares = 0, 0, [], step_shares(batches)
        for batch, share in zip(batches, shares):
            given = collate(batch, self.model.image_tokens, *self.world, cfg.device)
            with torch.autocast(cfg.device, torch.bfloat16, cfg.bf16 and cfg.weights == "fp32"):
                out = self.model(**given, shares=share)
            if out.loss.requires_grad:  # false if no image is there and the LLM is frozen
                out.loss.backward()
            metrics.append(out.metrics())
            tokens += int((batch["segments"] > 0).sum())
            n_images += len(batch["images"])
            self.used += batch["samples"]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip_grad)
        norm = fsdp.full(norm).item()
        if not math.isfinite(norm):
            names = [self.data.name(i) for i in self.order[before : self.used].tolist()]
            raise ValueError(
                f"the loss or a gradient is not finite in the step of samples {', '.join(names)}; "
                f"correct them or lower --lr, or try --weights fp32 --no-bf16; then --overwrite"
            )
        lr = lr_at((before + self.used) / 2 / len(self.order), cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        took = time.perf_counter() - start
        self.seconds += took
        work = (tokens * self.work[0] + n_images * self.work[1]) / self.world[1]
        return {"step": self.step, "samples": self.used, **step_metrics(metrics, shares), "lr": lr,
                "grad_norm": norm, "tokens_per_s": round(tokens / took),
                "samples_per_s": round((self.used - before) / took, 2),
                **{k: round(work / took / r, 4) for k, r in self.rates.items()}}  # fmt: skip

    def loop(self, wandb=None):
        """Train to the end of the data -> True, or until Ctrl-C -> False."""
        main, device = fsdp.is_main(), self.cfg.device
        bar = tqdm(total=len(self.order), initial=self.used, unit="sample",
                   desc=f"stage {self.cfg.stage}", disable=not main)  # fmt: skip
        self.model.train()
        log = open(self.folder / "metrics.jsonl" if main else os.devnull, "a", buffering=1)
        steps = loader.in_steps(self.batches(), self.cfg.accumulate, self.read, device != "cpu")
        with log, bar, closing(steps), profile.record(self) as recorded:  # closing ends the workers
            while not fsdp.any_rank(self.stop, device):
                start = time.perf_counter()
                batches, counts = next(steps, (None, None))
                if not batches:
                    self.counts = self.read
                    return True
                metrics = self.train_step(batches, start)
                metrics["memory_gb"] = round(memory.peak_memory(device) / memory.GB, 2)
                metrics |= held_out.log(self)
                self.counts = counts
                log.write(json.dumps(metrics) + "\n")
                if wandb:
                    wandb.log(metrics, step=self.step)
                bar.update(self.used - bar.n)
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", lr=f"{metrics['lr']:.1e}",
                                tok_s=metrics["tokens_per_s"], GB=metrics["memory_gb"],
                                **{k: f"{metrics[k]:.0%}" for k in self.rates})  # fmt: skip
                if resume.is_due(self):
                    resume.save_point(self)
                recorded()
            return False


def train_stage(cfg):
    """Train a stage, from its beginning or its resume point. False: interrupted by the user."""
    folder, name = stage_dir(cfg, cfg.stage), f"stage {cfg.stage}"
    state = None if cfg.overwrite else resume.earlier_state(cfg, folder)
    if state and state["finished"]:
        print(f"{name}: {resume.finished_line(cfg, state)}")
        return True
    check_device(cfg.device)
    plan = choose_precision(cfg)
    print(settings.overview(cfg, plan))
    wandb = None
    if cfg.wandb and fsdp.is_main():
        from extras.wandb_log import open_wandb

        wandb = open_wandb(cfg)
    trainer = Trainer(cfg)
    steps = settings.estimated_steps(trainer)
    print(settings.length(trainer, steps))
    resume.check_disk(cfg, plan, steps)
    resume.open_stage(trainer, state)
    with resume.stop_on_signals(trainer), memory.advice(plan, cfg.device):
        compiling.warm_up(trainer, plan.images)
        done = trainer.loop(wandb)
        if not done:
            resume.save_point(trainer)
    if not done:
        words = [word for word in sys.argv if word != "--overwrite"]
        again = f"{fsdp.launcher()} {shlex.join(words)}"
        print(f"stopped after {trainer.used:,} samples; to continue: {again}")
        fsdp.barrier()  # rank 0 saves until here
        return False
    lines = loader.summary(trainer.counts, trainer.data, cfg.row_tokens)
    model = fsdp.gather_model(trainer.model)
    if fsdp.is_main():
        peak = round(memory.peak_memory(cfg.device) / memory.GB, 2)
        resume.finish(trainer, model, peak_memory_gb=peak)
        for line in [f"finished in {trainer.seconds:.0f} s -> {folder}", *lines]:
            print(f"{name}: {line}")
        if cfg.plot:
            from extras.plots import draw_metrics

            draw_metrics(folder, cfg.stage)
    fsdp.barrier()
    return True


def main():
    cfg, given = parse(TrainConfig, description=__doc__)
    given = {name: getattr(cfg, name) for name in given}
    if cfg.stage not in (0, 1, 2, 3):
        raise ValueError(f"--stage {cfg.stage}: choose 1, 2, 3, or 0 for all three")
    fsdp.start(cfg.device)
    last = cfg.stage or 3
    first = last if cfg.init else 1
    given = start_from(given, last) if cfg.init else given
    cfgs = {k: resolve(given, k, cfg.stage in (0, k)) for k in range(first, last + 1)}
    settings.check_effects(given, {k: c for k, c in cfgs.items() if cfg.stage in (0, k)})
    if cfg.estimate:
        for stage_cfg in [cfgs[last]] if cfg.stage else cfgs.values():
            print(memory.report(stage_cfg, stage_plan(stage_cfg)))
        return
    with resume.alone(cfg.out, cfg.device):
        for stage, stage_cfg in cfgs.items():  # all are resolved before the first is trained
            if cfg.stage not in (0, stage):
                if resume.is_finished(stage_dir(stage_cfg, stage), stage_cfg.shared):
                    continue
                print(f"stage {last} needs stage {stage}, which is not finished")
            if not train_stage(stage_cfg):
                # As a program that Ctrl-C ends; torchrun, however, would call it a failure.
                sys.exit(130 if fsdp.world()[1] == 1 else 0)


if __name__ == "__main__":
    run(main)
