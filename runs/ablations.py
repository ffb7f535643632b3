"""The paper's ablations (Table 3) in miniature: one change at a time, everything else equal.

    python runs/ablations.py                       # every row, three seeds
    python runs/ablations.py --rows a,f-top1       # a whole group, or single rows
    python runs/ablations.py --samples 64 --questions 16 --out out/try --bench out/try

Every run is a stage 3 from the same stage 2, with the same questions in the same order for all rows
of a seed, and an exam on held-out scenes (eval.py). A run that is in several groups of the table is
trained once. Missing stages 1 and 2 in out/ are trained first. Ctrl-C stops it; the same command
continues and skips finished runs. A run uses one thread: to use two cores, start the command twice,
and each process takes the remaining runs.

Then `python runs/results.py` writes the table from bench/ablations/results.json.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import resource
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from cumo import CuMo
from data.exam import SPLITS, exam
from data.flags import parse, run
from data.tokenizer import Tokenizer
from data.weights import write_json
from engine.resume import is_finished, read_state
from eval import EvalConfig, accuracy, answer_batch
from mlp_moe import SparseMoE
from runs import results
from runs.pictures import draw_ablations

FROZEN = dict(freeze="clip")  # as in LLaVA
NO_LOSSES = dict(balance_coef=0, z_coef=0)
RUNS = {  # flags of train.py that differ from CuMo's own stage 3
    "a-dense": FROZEN | dict(upcycle="none"),
    "a-scratch": FROZEN | NO_LOSSES | dict(upcycle="mlp", scratch="mlp"),
    "a-copies": FROZEN | NO_LOSSES | dict(upcycle="mlp"),
    "a-losses": FROZEN | dict(upcycle="mlp"),
    "a-8": FROZEN | dict(upcycle="mlp", num_experts=8),
    "b-clip": dict(upcycle="mlp"),
    "b-cumo": {},
    "b-8": dict(num_experts=8),
    "b-scratch": dict(scratch="clip"),
    "c-llm": dict(upcycle="clip,mlp,llm"),
    "d-12": dict(scales="1,2"),
    "d-13": dict(scales="1,3"),
    "e-without": dict(init=1),
    "f-top1": dict(top_k=1),
    "f-top4": dict(top_k=4),
}
# The table's groups. Each row ends with the paper's SQA, TextVQA, MM-Vet and SEED, if it has them.
CUMO = (72.8, 59.7, 35.4, 69.8)
NO_PFT = (71.7, 59.3, 34.3, 69.6)
NOT_TRIED = "not in the paper"
MLP_MOE = (73.5, 57.4, 33.1, 67.4)
GROUPS = [
    ("a", "connector sparse (MLP-MoE), CLIP frozen", [
        ("a-dense", "dense", (72.8, 57.6, 32.1, 66.4)),
        ("a-scratch", "2 of 4 experts, from scratch", (68.1, 55.6, 29.3, 65.1)),
        ("a-copies", "... upcycled instead", (73.7, 57.2, 32.3, 67.1)),
        ("a-losses", "... with auxiliary losses", MLP_MOE),
        ("a-8", "... 2 of 8 experts", (73.4, 57.6, 32.4, 67.2)),
    ]),
    ("b", "CLIP sparse too (CLIP-MoE)", [
        ("a-losses", "MLP-MoE, CLIP frozen", MLP_MOE),
        ("b-clip", "CLIP unfrozen", (72.0, 58.9, 34.7, 69.0)),
        ("b-cumo", "... 2 of 4 experts (CuMo)", CUMO),
        ("b-8", "... 2 of 8 experts", (71.0, 59.0, 33.6, 69.2)),
        ("b-scratch", "... CLIP's from scratch", "did not converge"),
    ]),
    ("c", "language model sparse too", [
        ("b-cumo", "CuMo", CUMO),
        ("c-llm", "language model upcycled", (72.8, 57.0, 35.2, 69.9)),
    ]),
    ("d", "scales of the image", [
        ("b-cumo", "1", NO_PFT),
        ("d-12", "1 and 2", (71.7, 60.6, 35.0, 69.7)),
        ("d-13", "1 and 3", (72.9, 61.0, 37.0, 69.7)),
    ]),
    ("e", "pre-finetuning (stage 2)", [
        ("e-without", "without", NO_PFT),
        ("b-cumo", "with", (73.0, 62.8, 37.2, 70.9)),
    ]),
    ("f", "experts that a token visits", [
        ("f-top1", "1 of 4", NOT_TRIED),
        ("b-cumo", "2 of 4", NOT_TRIED),
        ("f-top4", "4 of 4", NOT_TRIED),
    ]),
]  # fmt: skip


@dataclass
class AblationConfig:
    rows: str = ""  # names of runs, or letters of groups, as in a,f-top1; empty: all
    seeds: tuple = (0, 1, 2)  # of the questions, their order and the routers
    samples: int = 1600  # of stage 3
    questions: int = 400  # of the exam, a split
    threads: int = 1  # of a training; two are faster, but take more CPU time
    demo: str = "out"  # folder of stages 1 and 2
    out: str = "out/ablations"  # folder of the runs
    bench: str = "bench/ablations"  # folder of results.json and ablations.png


def chosen_runs(rows):
    """The names of the runs in a flag such as "a,f-top1", in the order of the table."""
    names = set()
    for word in rows.split(",") if rows else RUNS:
        group = [name for letter, _, lines in GROUPS if letter == word for name, *_ in lines]
        if not group and word not in RUNS:
            letters = ", ".join(letter for letter, *_ in GROUPS)
            raise ValueError(f"--rows {word!r}: choose from {letters}, {', '.join(RUNS)}")
        names.update(group or [word])
    return [name for name in RUNS if name in names]


def command(cfg, name, seed):
    """The command of a training, as words; its --out also gets the log and the CPU time."""
    flags = {"init": 2} | RUNS[name]
    folder = pathlib.Path(cfg.out, f"scales-{flags['scales']}") if "scales" in flags else cfg.demo
    flags["init"] = pathlib.Path(folder, f"stage{flags['init']}")
    flags |= dict(seed=seed, samples=cfg.samples, out=pathlib.Path(cfg.out, f"{name}-{seed}"))
    words = (w for k, v in flags.items() for w in ("--" + k.replace("_", "-"), str(v)))
    return ["python", "train.py", "--stage", "3", *words]


@contextlib.contextmanager
def lock(folder, wait=True):
    """Lock a folder against other processes. Yields False if another has it and `wait` is off."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            ours = True
        except BlockingIOError:
            ours = False
        yield ours


def run_training(words, folder):
    """Run a training, with its output in `folder`/train.log -> its CPU seconds, earlier attempts
    included. KeyboardInterrupt after Ctrl-C, once it has saved a resume point."""
    folder.mkdir(parents=True, exist_ok=True)
    file, stops = folder / "cpu.json", []
    seconds = json.loads(file.read_text())["seconds"] if file.is_file() else 0.0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(folder / "train.log", "a") as log:
        child = subprocess.Popen([sys.executable, *words[1:]], stdout=log, stderr=log)

    def stop(*_):
        stops.append(1)
        child.send_signal(signal.SIGINT)

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    status = child.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    write_json(file, {"seconds": seconds})
    if stops:
        raise KeyboardInterrupt
    if status:
        last = (folder / "train.log").read_text().strip().splitlines()[-1:]
        raise ValueError(f"{shlex.join(words)} failed: {''.join(last)} ({folder / 'train.log'})")
    return seconds


def parameters(model):
    """(all, active) parameters of a model; a token activates K of the E experts."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for module in model.modules():
        if isinstance(module, SparseMoE):
            share = 1 - module.gate.top_k / len(module.gate.weight)
            idle += round(share * sum(p.numel() for p in module.experts.parameters()))
    return total, total - idle


def examine(folder, questions):
    """Accuracy by split of the checkpoint in `folder`, and its parameters."""
    model = CuMo.from_pretrained(folder, device=EvalConfig.device).eval()
    ask = partial(answer_batch, model, Tokenizer.from_pretrained(folder))
    shares = {}
    for split in SPLITS:
        asked = exam(split, questions, EvalConfig.seed)
        shares[split] = accuracy(ask, asked, EvalConfig.batch, split)["all"]
    total, active = parameters(model)
    return {"accuracy": shares, "parameters": total, "active_parameters": active}


def train_and_examine(cfg, name, seed):
    """Train and examine one run -> its row of results.json."""
    words = command(cfg, name, seed)
    folder = pathlib.Path(words[words.index("--out") + 1])
    before = pathlib.Path(words[words.index("--init") + 1])
    with lock(before.parent):  # shared by the seeds
        if not is_finished(before):
            scales = ["--scales", RUNS[name]["scales"]] if "scales" in RUNS[name] else []
            flags = ["--stage", before.name[-1], "--out", str(before.parent), *scales]
            run_training(["python", "train.py", *flags], before.parent)
    seconds = run_training(words, folder)
    if not is_finished(folder / "stage3"):
        raise ValueError(f"{folder} was interrupted; the same command continues")
    bf16 = read_state(folder / "stage3")["config"]["bf16"]
    groups = [group for group, _, lines in GROUPS if name in [line[0] for line in lines]]
    return {
        "name": name,
        "groups": groups,
        "seed": seed,
        **examine(folder / "stage3", cfg.questions),
        "cpu_seconds": round(seconds, 1),
        "machine": results.machine(),
        "precision": "bf16" if bf16 else "float32",
        "commit": results.commit(),
        "command": shlex.join(words),
    }


def read_results(cfg):
    """results.json, or a new one. ValueError if its runs have another length."""
    file = pathlib.Path(cfg.bench, "results.json")
    lengths = {"samples": cfg.samples, "questions": cfg.questions}
    content = {"command": "runs/ablations.py", **lengths, "rows": []}
    if file.is_file():
        content |= json.loads(file.read_text())
        if any(content[k] != n for k, n in lengths.items()):
            raise ValueError(f"{file} has runs of {content['samples']} samples and "
                             f"{content['questions']} questions; name another --bench, and another "
                             "--out")  # fmt: skip
    groups = [{"group": group, "title": title,
               "rows": [{"name": n, "label": label, "paper": paper} for n, label, paper in lines]}
              for group, title, lines in GROUPS]  # fmt: skip
    return content | {"groups": groups}


def merge(content, row):
    """Add a row to `content`, or replace the one of the same run and seed."""
    rows = [r for r in content["rows"] if (r["name"], r["seed"]) != (row["name"], row["seed"])]
    rows = sorted([*rows, row], key=lambda r: (list(RUNS).index(r["name"]), r["seed"]))
    return content | {"rows": rows}


def main():
    cfg, _ = parse(AblationConfig, description=__doc__.split("\n")[0])
    if min(cfg.samples, cfg.questions, cfg.threads) < 1:
        raise ValueError(f"--samples {cfg.samples}, --questions {cfg.questions} and --threads "
                         f"{cfg.threads} must be 1 or more")  # fmt: skip
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = str(cfg.threads)
    torch.set_num_threads(cfg.threads)
    file = pathlib.Path(cfg.bench, "results.json")
    todo = [(name, seed) for seed in cfg.seeds for name in chosen_runs(cfg.rows)]
    bar = tqdm(todo, unit="run")
    try:
        for name, seed in bar:
            bar.set_description(f"{name}, seed {seed}")
            with lock(pathlib.Path(cfg.out, f"{name}-{seed}"), wait=False) as ours:
                done = {(row["name"], row["seed"]) for row in read_results(cfg)["rows"]}
                if not ours or (name, seed) in done:
                    continue
                row = train_and_examine(cfg, name, seed)
                with lock(pathlib.Path(cfg.out)):
                    write_json(file, merge(read_results(cfg), row))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command continues")
    content = read_results(cfg)
    print(results.ablations_table(content))
    draw_ablations(results.ablations(content), file.with_name("ablations.png"))


if __name__ == "__main__":
    run(main)
