"""The settings of a training: which are refused, and the short table that opens it.

The settings themselves and their defaults stand in train.py, those of each stage in data/stages.py.
Here are the rules between them:

    check_values     a value that no training can have
    check_effects    a flag that would change nothing; each error names the way out
    overview         what will be trained, on what, and how; train.json holds every setting
    length           how many steps that will take

`given` is {name: value} of the command line, `cfg` a train.TrainConfig.
"""

import math

from tqdm import tqdm

from data.chat import TEMPLATES
from data.flags import as_flag, check_choice, check_numbers, shown
from data.images import MODES
from data.loader import Loader, check_workers
from data.packing import pack
from engine import memory, optim, rate, resume
from upcycle import PARTS

FEW = 50  # steps; a shorter training changes little
LOOKED_AT, PACKED = 48, 2000  # samples that an estimate of the steps encodes, and packs at most


def split_parts(text):
    """The parts in a flag such as "clip,mlp"."""
    return text.split(",") if text not in ("", "none") else []


# ------------------------------------------------------------------------------ refused


def check_values(cfg):
    """ValueError, with the flag and the way out, for a value that no training can have."""
    check_choice("template", cfg.template, TEMPLATES)
    check_choice("image-mode", cfg.image_mode, MODES)
    check_choice("weights", cfg.weights, ["", *optim.WEIGHTS])
    check_choice("moments", cfg.moments, ["", *optim.MOMENTS])
    for name, choices in (("scratch", split_parts(cfg.upcycle) or PARTS), ("freeze", PARTS)):
        for part in split_parts(getattr(cfg, name)):
            check_choice(name, part, choices)
    if set(split_parts(cfg.freeze)) == set(PARTS):
        raise ValueError(f"--freeze {cfg.freeze} leaves nothing to learn; freeze at most two parts")
    if cfg.recompute not in ("auto", "all", "none") and not cfg.recompute.isdecimal():
        raise ValueError(f"--recompute {cfg.recompute!r} is unknown; give a number of layers, or "
                         "all, none or auto (as few as the memory needs)")  # fmt: skip
    check_workers(cfg.workers)
    check_numbers(cfg, above_0=("lr", "clip_grad"), infinite=("clip_grad",),
                  counts=("rows", "row_tokens", "accumulate", "save_every"))  # fmt: skip
    if cfg.warmup >= 1:
        raise ValueError(f"--warmup {cfg.warmup} must be below 1")


def check_effects(given, cfgs):
    """ValueError for a flag that would change nothing in any of `cfgs`, {stage: its settings}."""

    def refuse(name, why):
        raise ValueError(f"{as_flag(name, given[name])} has no effect {why}")

    def among(*names):
        return [name for name in names if name in given]

    cfg = next(iter(cfgs.values()))
    if cfg.data and cfg.samples and cfg.epochs:
        raise ValueError(f"--samples {cfg.samples} and --epochs {cfg.epochs} both set the length; "
                         "give one of them")  # fmt: skip
    for name in among("epochs") if not cfg.data else []:
        refuse(name, "without --data; the emoji world has --samples, each a new scene")
    for name in among("image_folder") if not (cfg.data or cfg.val) else []:
        refuse(name, "without --data FILE; name the file whose pictures are in this folder")
    for name in among("augment") if cfg.data else []:
        refuse(name, "with --data; it recolors the drawings of the emoji world")
    for name in among("upcycle", "num_experts", "top_k", "scratch") if 3 not in cfgs else []:
        refuse(name, f"in stage {max(cfgs)}; only stage 3 makes experts")
    for name in among("num_experts", "top_k", "scratch") if cfg.upcycle == "none" else []:
        refuse(name, "with --upcycle none, which makes no experts; name parts, as in --upcycle "
                     "clip,mlp, or leave it out")  # fmt: skip
    for name in among("freeze") if list(cfgs) == [1] else []:
        refuse(name, "in stage 1, which trains the connector alone; give it to stage 2 or 3")
    for name in among("bf16") if cfg.weights.startswith("bf16") and not cfg.bf16 else []:
        refuse(name, f"with --weights {cfg.weights}, whose products are in bf16; leave one out")
    for name in among("balance_coef", "z_coef"):
        if not any(has_experts(memory.stage_model(each)) for each in cfgs.values()):
            refuse(name, "on a model without experts; stage 3 makes them (--upcycle clip,mlp)")


def has_experts(model):
    return bool(model.vision.num_experts or model.mlp_experts or model.llm.num_experts)


# ------------------------------------------------------------------------------ shown


def overview(cfg, plan):
    """The settings that matter, as a table of a few lines."""
    yes = lambda value: "yes" if value else "no"
    start = cfg.init or (f"{resume.stage_dir(cfg, cfg.stage - 1)}" if cfg.stage > 1 else "")
    rows = {"starts from": start or f"{cfg.clip} and {cfg.llm}, scales {shown(cfg.scales)}"}
    rows["learns"] = f"{plan.learning:,} of {plan.parameters:,} parameters"
    rows["learns"] += f"; frozen: {cfg.freeze}" if cfg.freeze and cfg.stage > 1 else ""
    if cfg.stage == 3 and cfg.upcycle != "none":
        rows["experts"] = f"{cfg.upcycle} upcycled: top {cfg.top_k} of {cfg.num_experts}"
        rows["experts"] += f"; {cfg.scratch} from scratch" if cfg.scratch else ""
    if has_experts(plan.model):
        rows["router losses"] = f"{cfg.balance_coef} x balance + {cfg.z_coef} x z"
    rows["data"] = cfg.data or f"the emoji world, seed {cfg.seed}"
    rows["data"] += f", pictures in {cfg.image_folder}" if cfg.image_folder else ""
    rows["format"] = f"template {cfg.template}, pictures made square by: {cfg.image_mode}"
    rows["step"] = f"{cfg.accumulate} x {cfg.rows} rows of {cfg.row_tokens} tokens"
    rows["optimizer"] = (f"lr {cfg.lr:g}, warm-up {cfg.warmup:g}, weight decay "
                         f"{cfg.weight_decay:g}, largest gradient {cfg.clip_grad:g}")  # fmt: skip
    rows["precision"] = (f"weights {cfg.weights}, moments {cfg.moments}, bf16 products "
                         f"{yes(cfg.bf16)}, {memory.recompute_in_words(plan)}")  # fmt: skip
    if not rate.has_fast_bf16(cfg.device):
        rows["precision"] += f"; {cfg.device} multiplies bf16 slowly, float32 is faster there"
    rows["machine"] = (f"{cfg.device}, {memory.available_memory(cfg.device) / memory.GB:.0f} GB; "
                       f"compile {yes(cfg.compile)}, workers {cfg.workers}")  # fmt: skip
    rows["needs about"] = memory.breakdown(plan)
    where = resume.stage_dir(cfg, cfg.stage)
    lines = [f"stage {cfg.stage} of {cfg.preset} -> {where} (train.json has every setting)"]
    return "\n".join(lines + [f"  {name:14} {text}" for name, text in rows.items()])


def estimated_steps(trainer):
    """About how many optimizer steps a Trainer will make; exact for a few samples. ValueError if
    none of the samples can be used."""
    cfg, n = trainer.cfg, len(trainer.order)
    places = range(0, n, math.ceil(n / LOOKED_AT))
    reader = Loader(trainer.data, (), trainer.code)
    coded = [reader[i] for i in trainer.order[list(places)].tolist()]
    lengths = [0 if isinstance(one, Exception) else len(one.ids) for one in coded]
    rest = trainer.order.tolist() if not any(lengths) else ()
    if rest and all(isinstance(reader[i], Exception) for i in tqdm(rest, "samples", leave=False)):
        raise ValueError(f"none of the {n:,} samples can be used; the first: {coded[0]}")
    packed = min(n, PACKED)
    some = ([0] * lengths[k % len(lengths)] for k in range(packed))
    batches = sum(1 for _ in pack(((ids, ids, []) for ids in some), cfg.rows, cfg.row_tokens))
    return math.ceil(batches * n / packed / cfg.accumulate)


def length(trainer, steps):
    """Lines on how long a training is, with a warning if that is too short to learn much."""
    cfg, n, records = trainer.cfg, len(trainer.order), len(trainer.data)
    epochs = f", {n / records:.3g} epochs of {records:,} records" if cfg.data else ""
    lines = [f"  {'length':14} {n:,} samples{epochs}: about {steps:,} steps"]
    if steps < FEW:
        more = math.ceil(4 * FEW / steps * n / records)
        longer = f"--epochs {more}" if cfg.data else f"--samples {more * n}"
        lines.append(f"  {'':14} so few steps change little; {longer} would make about {4 * FEW}")
    return "\n".join(lines)
