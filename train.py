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

The settings and the table of the stages are in stages.py; here is what is done with them: build
the model a stage starts from, step through the data, save, resume, finish.

The learning rate follows the share of the data that has been used, not the number of steps, because
rows are packed with as many conversations as fit.
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import time
from contextlib import closing
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from clip_moe import CLIPVision
from cumo import CuMo, CuMoConfig, check_device
from data.chat import template_of
from data.flags import parse, run
from data.hub import local_folder
from data.llava import LlavaData, check_row, encode
from data.loader import KINDS, Loader, data_order, summary
from data.packing import pack
from data.tokenizer import Tokenizer
from data.weights import check_zip, copy_into, publish, sync, write_json
from data.world import World
from engine import fsdp, memory
from engine.optim import AdamW
from extras.plots import draw_metrics
from llm import LLM
from mlp_moe import Connector
from stages import (
    SHARED,
    WORLD_TASK,
    TrainConfig,
    begin,
    check_sums,
    checksums,
    choose_precision,
    learning,
    lr_at,
    print_estimate,
    read_state,
    refuse_difference,
    resolve,
    split_parts,
    stage_dir,
)
from upcycle import upcycle


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


def make_optimizer(model, cfg):
    """PyTorch's own AdamW in float32, ours (engine/optim.py) for all else."""
    groups = param_groups(model, cfg)
    if cfg.moments == "int8" and fsdp.world()[1] > 1:
        raise ValueError("--moments int8 is for one process; take bf16, which many have room for")
    if (cfg.weights, cfg.moments) == ("fp32", "fp32"):
        return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    return AdamW(groups, lr=cfg.lr, weights=cfg.weights, moments=cfg.moments, seed=cfg.seed)


# ------------------------------------------------------------------------------ starting a stage


def build(cfg):
    """The model a stage starts from (on the CPU), and where its tokenizer lies."""
    source = cfg.init or (stage_dir(cfg, cfg.stage - 1) if cfg.stage > 1 else cfg.llm)
    dtype = torch.float32 if cfg.weights == "fp32" else torch.bfloat16
    if cfg.stage == 1 and not cfg.init:
        clip, folder = local_folder(cfg.clip), local_folder(cfg.llm)
        vision = CLIPVision.from_pretrained(clip, cfg.scales, dtype)
        llm = LLM.from_pretrained(folder, dtype)
        with torch.device("meta"):  # a random one of CuMo-7B would be 28 GB to throw away
            model = CuMo(CuMoConfig(vision.cfg, llm.cfg))
        model.vision, model.llm = vision, llm
        model.connector = Connector(vision.cfg.dim * len(vision.cfg.scales), llm.cfg.dim).to(dtype)
    else:
        check_sums(source)
        model = CuMo.from_pretrained(source, dtype=dtype)
    if cfg.stage == 3 and cfg.upcycle != "none":
        parts, scratch = cfg.upcycle.split(","), split_parts(cfg.scratch)
        model = upcycle(model, parts, cfg.num_experts, cfg.top_k, cfg.seed, scratch)
    model.vision.checkpoint = model.llm.recompute = bool(cfg.recompute)
    for name, module in model.named_children():  # vision, connector, llm
        module.requires_grad_(name in learning(cfg))
    model.cfg.balance_coef, model.cfg.z_coef = cfg.balance_coef, cfg.z_coef
    model.cfg.image_mode = cfg.image_mode
    model.cfg.template = cfg.template
    if cfg.template == "plain":  # which is for captions only; a user's questions need another
        model.cfg.template = template_of(Tokenizer.from_pretrained(source))
    return model, source


def open_data(cfg):
    if cfg.data:
        return LlavaData(cfg.data, cfg.image_folder, cfg.limit)
    if cfg.limit:
        raise ValueError(f"--limit {cfg.limit} is for --data; the emoji world has --samples")
    if cfg.preset not in ("mini", "smol-mini"):
        raise ValueError(
            f"stage {cfg.stage} of {cfg.preset} needs data of its own: run it by itself, with "
            f"--stage {cfg.stage} --data FILE.json --image-folder DIR"
        )
    if not cfg.samples:
        raise ValueError("--samples 0 means all of --data; the emoji world needs a number")
    return World("train", WORLD_TASK[cfg.stage], cfg.samples, cfg.seed, cfg.augment)


# ------------------------------------------------------------------------------ one stage


RESUME = ("resume.pt", "resume.old.pt")  # the newest first
PLACE = ("step", "used", "counts", "seconds")  # how far a Trainer has come


class Trainer:
    """Model, optimizer and place in the data of one stage, with everything needed to resume it."""

    def __init__(self, cfg):
        check_device(cfg.device)
        fsdp.check_rows(cfg.rows)
        torch.manual_seed(cfg.seed)
        self.cfg, self.folder = cfg, stage_dir(cfg, cfg.stage)
        self.data = open_data(cfg)
        with fsdp.in_turn():
            self.model, source = build(cfg)
            fsdp.shard(self.model, cfg.device, cfg.bf16)
        self.tokenizer = Tokenizer.from_pretrained(source)
        check_row(cfg.row_tokens, self.tokenizer, cfg.template, self.model.image_tokens)
        self.optimizer = make_optimizer(self.model, cfg)
        self.order = data_order(len(self.data), cfg.samples or len(self.data), cfg.seed)
        self.step, self.used, self.seconds, self.stop = 0, 0, 0.0, False
        self.counts = dict.fromkeys(KINDS, 0)
        self.rate = memory.product_rate(cfg.device, torch.bfloat16 if cfg.bf16 else torch.float32)
        if cfg.compile:  # rows have one length; the number of images differs from batch to batch
            for block in self.model.llm.model.layers:
                block.compile(dynamic=False)
            for block in self.model.vision.layers:
                block.compile(dynamic=True)

    def batches(self):
        """Packed batches from where the last one ended."""
        cfg, model = self.cfg, self.model
        code = partial(
            encode, tokenizer=self.tokenizer, template=cfg.template, max_tokens=cfg.row_tokens,
            image_tokens=model.image_tokens, image_size=model.cfg.vision.image_size,
            image_mode=cfg.image_mode)  # fmt: skip
        skipped = self.folder / "skipped.jsonl" if fsdp.first() else None
        loader = Loader(self.data, self.order, code, cfg.workers, self.counts, skipped)
        return pack(loader.samples(self.used), cfg.rows, cfg.row_tokens)

    def train_step(self, batches):
        """One optimizer step over `accumulate` batches -> metrics; None at the end of the data."""
        cfg, start, before = self.cfg, time.perf_counter(), self.used
        taken = [batch for _, batch in zip(range(cfg.accumulate), batches)]
        if not taken:
            return None
        tokens, images_seen, metrics = 0, 0, []
        for batch in taken:
            mine = fsdp.collate(batch, self.model.image_tokens)
            with torch.autocast(cfg.device, torch.bfloat16, cfg.bf16 and cfg.weights == "fp32"):
                out = self.model(**{name: x.to(cfg.device) for name, x in mine.items()})
            if out.loss.requires_grad:  # else the connector alone learns, and there is no image
                (out.loss / len(taken)).backward()
            metrics.append(describe(out))
            tokens += int((batch["segments"] > 0).sum())
            images_seen += len(batch["images"])
            self.used += batch["samples"]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip_grad)
        norm = fsdp.full(norm).item()
        if not math.isfinite(norm):
            names = [self.data.name(i) for i in self.order[before : self.used].tolist()]
            good = any((self.folder / name).is_file() for name in RESUME)
            raise ValueError(
                f"the loss or a gradient is not finite in the batch of samples {', '.join(names)}; "
                "mend them, lower --lr, or try --no-bf16"
                + f". The last resume point in {self.folder} is good"
                * good
            )
        lr = lr_at((before + self.used) / 2 / len(self.order), cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        took = time.perf_counter() - start
        self.seconds += took
        work = memory.operations(self.model.cfg, cfg.stage, tokens, images_seen, cfg.row_tokens)
        return {"step": self.step, "samples": self.used, **mean(metrics), "lr": lr,
                "grad_norm": norm, "tokens_per_s": round(tokens / took),
                "samples_per_s": round((self.used - before) / took, 2),
                "mfu": round(work / took / self.rate / fsdp.world()[1], 4),
                "memory_gb": round(memory.peak_memory(cfg.device) / memory.GB, 2)}  # fmt: skip

    def save_resume(self):
        """Write resume.pt aside, then put it in place; the one before stays as resume.old.pt."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "rng": torch.get_rng_state(), **{k: getattr(self, k) for k in PLACE}}  # fmt: skip
        state = fsdp.gather(state)
        if not fsdp.first():
            return
        newest, older = (self.folder / name for name in RESUME)
        aside = self.folder / (newest.name + ".partial")
        try:
            sync(self.folder / "metrics.jsonl")
            torch.save(state, aside)
            if newest.is_file():
                newest.replace(older)
            publish(newest)
        except (OSError, RuntimeError) as error:  # PyTorch's writer has no OSError
            aside.unlink(missing_ok=True)
            raise ValueError(
                f"{newest} cannot be written (is the disk full?): {error!r:.99}; the one before is "
                "good, and the same command continues"
            ) from None

    def load_resume(self):
        """Go back to the newest resume point that can be read. ValueError if there is none."""
        for name in RESUME:
            file = self.folder / name
            try:
                check_zip(file)
                mmap = fsdp.world()[1] > 1  # each process reads its share alone
                state = torch.load(file, weights_only=True, map_location="cpu", mmap=mmap)
                break
            except FileNotFoundError:  # the machine stopped between two renames
                continue
            except Exception as error:  # a file that is cut short or damaged raises anything
                print(f"{file} cannot be read ({error!r:.99}), trying the one before")
        else:
            raise ValueError(f"no resume point in {self.folder} can be read; --overwrite begins "
                             "the stage again")  # fmt: skip
        fsdp.load(self.model, self.optimizer, state)
        for name in PLACE:
            setattr(self, name, state[name])
        torch.set_rng_state(state["rng"])
        if not fsdp.first():
            return
        log = self.folder / "metrics.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)[: self.step]
        os.truncate(log, sum(map(len, lines)))

    def loop(self, wandb=None):
        """Train to the end of the data -> True, or until Ctrl-C -> False."""
        first, device = fsdp.first(), self.cfg.device
        bar = tqdm(total=len(self.order), initial=self.used, unit="sample",
                   desc=f"stage {self.cfg.stage}", disable=not first)  # fmt: skip
        self.model.train()
        log = open(self.folder / "metrics.jsonl" if first else os.devnull, "a", buffering=1)
        with log, bar, closing(self.batches()) as batches:  # closing ends the workers
            while not fsdp.anyone(self.stop, device):
                metrics = self.train_step(batches)
                if metrics is None:
                    return True
                log.write(json.dumps(metrics) + "\n")
                if wandb:
                    wandb.log(metrics, step=self.step)
                bar.update(self.used - bar.n)
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", lr=f"{metrics['lr']:.1e}",
                                tok_s=metrics["tokens_per_s"], mfu=f"{metrics['mfu']:.0%}",
                                GB=metrics["memory_gb"])  # fmt: skip
                if self.step % self.cfg.save_every == 0:
                    self.save_resume()
            return False


def open_wandb(cfg):
    """A run of Weights & Biases to log to, if --wandb asks for one. ValueError without it."""
    if not cfg.wandb:
        return None
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs a package: pip install wandb") from None
    name = f"{pathlib.Path(cfg.out).name}-stage{cfg.stage}"
    return wandb.init(project="nanocumo", name=name, config=dataclasses.asdict(cfg), resume="allow",
                      id=name)  # fmt: skip


def describe(out):
    """The numbers of one forward pass that are worth keeping."""
    metrics = {"loss": out.loss.item(), "lm_loss": out.lm_loss.item()}
    for part, losses in out.aux.items():
        if losses:
            metrics |= {f"{part}_balance": losses[0].item(), f"{part}_z": losses[1].item()}
            metrics[f"{part}_load"] = out.load[part].tolist()
            metrics[f"{part}_entropy"] = out.entropy[part].tolist()
    return metrics


def mean(rows):
    """Mean of each number, or list of numbers, over the rows that have it."""
    names = {name: None for row in rows for name in row}
    columns = {name: np.array([row[name] for row in rows if name in row]) for name in names}
    return {name: values.mean(0).round(6).tolist() for name, values in columns.items()}


def announced(cfg, name):
    """Say what is about to be trained, with which memory; returns the plan (`budget`)."""
    check_device(cfg.device)
    plan = choose_precision(cfg)
    shown = {k: v for k, v in dataclasses.asdict(cfg).items() if v != ""}
    print(f"{name}: " + " ".join(f"{k}={v}" for k, v in shown.items()))
    print(f"{name}: takes about {memory.describe(plan)}; "
          f"the machine has {memory.available_memory(cfg.device) / memory.GB:.0f} GB")  # fmt: skip
    return plan


def train_stage(cfg):
    """Train a stage, from its beginning or its resume point. False: interrupted by the user."""
    folder, name = stage_dir(cfg, cfg.stage), f"stage {cfg.stage}"
    state = None if cfg.overwrite else read_state(folder)
    if state:
        begun = any((folder / name).is_file() for name in RESUME)
        if begun or state["finished"]:  # else there is nothing to be lost
            config = state["config"]
            cfg.weights = cfg.weights or config.get("weights")  # chosen by another card, maybe
            cfg.moments = cfg.moments or config.get("moments")
            refuse_difference(cfg, state, folder)
        if state["finished"]:
            print(f"{name}: finished in {folder}")
            return True
    plan = announced(cfg, name)
    wandb = open_wandb(cfg) if fsdp.first() else None
    trainer = Trainer(cfg)
    every = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(f"{name}: trains {trained:,} of {every:,} parameters on {len(trainer.order):,} samples")
    if state and begun:
        trainer.load_resume()
        print(f"{name}: resumed after {trainer.used:,} samples")
    elif fsdp.first():
        begin(folder)
    if fsdp.first():
        write_json(folder / "train.json", {"finished": False, "config": dataclasses.asdict(cfg)})

    def stop(*_):
        trainer.stop = True

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        done = trainer.loop(wandb)
        if not done:  # saved before a second Ctrl-C counts
            trainer.save_resume()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        saving = "; ".join(memory.remedies(plan)) or "a smaller model"
        raise ValueError(f"out of memory on {cfg.device}, where {memory.describe(plan)} were "
                         f"expected. What would help: {saving}") from None  # fmt: skip
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not done:
        again = shlex.join(["python", *(word for word in sys.argv if word != "--overwrite")])
        print(f"stopped after {trainer.used:,} samples; the same command continues: {again}")
        return False
    lines = summary(trainer.counts, getattr(trainer.data, "rejected", []), cfg.row_tokens)
    model = fsdp.whole_model(trainer.model)
    if fsdp.first():
        finish(trainer, model)
        for line in lines:
            print(f"{name}: {line}")
    fsdp.wait()
    return True


def finish(trainer, model):
    """Turn a fully trained stage into a checkpoint, and draw its curves."""
    folder, cfg = trainer.folder, trainer.cfg
    model.save_pretrained(folder)
    for file in trainer.tokenizer.files:
        copy_into(folder, file)
    seconds = round(trainer.seconds, 1)
    state = {"finished": True, "seconds": seconds, "samples": trainer.used}
    state["peak_memory_gb"] = round(memory.peak_memory(cfg.device) / memory.GB, 2)
    state["crc32"] = checksums(folder)
    write_json(folder / "train.json", state | {"config": dataclasses.asdict(cfg)})
    for file in folder.glob("resume*"):
        file.unlink()
    print(f"stage {cfg.stage}: finished in {seconds:.0f} s -> {folder}")
    draw_metrics(folder, cfg.stage)


def main():
    cfg, given = parse(TrainConfig, description=__doc__.split("\n")[0])
    given = {name: getattr(cfg, name) for name in given}
    if cfg.stage not in (0, 1, 2, 3):
        raise ValueError(f"--stage {cfg.stage}: choose 1, 2, 3, or 0 for all three")
    fsdp.start(cfg.device)
    last = cfg.stage or 3
    first = last if cfg.init else 1
    cfgs = {k: resolve(given, k, cfg.stage in (0, k)) for k in range(first, last + 1)}
    for stage, stage_cfg in cfgs.items():  # all resolved before the first is trained
        target = cfg.stage in (0, stage)
        if cfg.estimate:
            print_estimate(stage_cfg) if target else None
            continue
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
