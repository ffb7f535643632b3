"""The paper's ablations (Table 3) in miniature: one change at a time, everything else equal.

    python runs/ablations.py                       # every row, on two cores
    python runs/ablations.py --rows a,f-top1       # a whole group, or single rows
    python runs/ablations.py --samples 64 --questions 48 --out out/try --bench out/try

Every run is a stage 3, with the same samples in the same order for all rows of a seed, and an exam
on held-out scenes (runs/grading.py), the same for all. All start from one stage 2, except for other
scales (stages 1 and 2 of their own), "without stage 2", and MLPs twice as wide (runs/wide.py). The
rows of the paper's main claims have five seeds and come first, the others three. A run that is in
several groups is trained once.

The CLIP of the demo was pretrained until it named nearly all things and letters: experts would have
little to learn. These runs start from a weak one, data/mini/weak_clip, which names about half of
them: it has narrow MLPs, and its pretraining was cut short (`runs/make/pretrain_clip.py --steps
3000 --hidden-dim 96`; docs/LOG.md says how it was chosen). For the demo's: --clip data/mini/clip
--demo out, and --out and --bench of its own.

Ctrl-C stops it; the same command continues and skips finished runs. A run uses one thread; --jobs
processes each take the next open run.

The results go to bench/ablations/, and `python runs/results.py` writes the table of docs/RESULTS.md
from there (runs/verdicts.py).
"""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import resource
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

SCRIPT = pathlib.Path(__file__).resolve()
ROOT = SCRIPT.parents[1]
sys.path.insert(0, str(ROOT))
from data.exam import LEAST
from data.flags import check_numbers, parse, run
from data.weights import write_json
from engine.resume import crc_of_weights, is_finished, read_state
from runs import results, verdicts
from runs.grading import examine
from runs.pictures import draw_ablations
from runs.wide import widen

FROZEN = dict(freeze="clip")  # as in LLaVA
NO_LOSSES = dict(balance_coef=0, z_coef=0)
RUNS = {  # flags of train.py that differ from CuMo's own stage 3
    "a-dense": FROZEN | dict(upcycle="none"),
    "a-scratch": FROZEN | NO_LOSSES | dict(upcycle="mlp", scratch="mlp"),
    "a-copies": FROZEN | NO_LOSSES | dict(upcycle="mlp"),
    "a-losses": FROZEN | dict(upcycle="mlp"),
    "a-8": FROZEN | dict(upcycle="mlp", num_experts=8),
    "b-clip": dict(upcycle="mlp"),
    "b-wide": dict(upcycle="mlp", init="wide"),
    "b-cumo": {},
    "b-8": dict(num_experts=8),
    "b-scratch": dict(scratch="clip"),
    "c-llm": dict(upcycle="clip,mlp,llm"),
    "d-12": dict(scales="1,2"),
    "d-13": dict(scales="1,3"),
    "e-without": dict(init=1),
    "f-top1": dict(top_k=1),
    "f-top4": dict(top_k=4),
    "g-dense": dict(upcycle="none"),
}
# The paper's main claims: dense or MLP-MoE or CLIP-MoE, CLIP frozen or not, 1 or 2 scales, from
# scratch; a dense CLIP with as many active parameters; all dense. They get more seeds.
MAIN = "a-dense a-scratch a-losses b-clip b-wide b-cumo b-scratch d-12 g-dense".split()
# The table's groups. A row: the run, the run that it is compared with, its label, and the paper's
# SQA, TextVQA, MM-Vet and SEED, if it has them.
CUMO = (72.8, 59.7, 35.4, 69.8)
NO_PFT = (71.7, 59.3, 34.3, 69.6)
NOT_TRIED = "not in the paper"
MLP_MOE = (73.5, 57.4, 33.1, 67.4)
DENSE = (72.8, 57.6, 32.1, 66.4)
UNFROZEN = (72.0, 58.9, 34.7, 69.0)
GROUPS = [
    ("a", "connector sparse (MLP-MoE), CLIP frozen", [
        ("a-dense", "", "dense, CLIP frozen", DENSE),
        ("a-scratch", "a-dense", "2 of 4 experts, from scratch", (68.1, 55.6, 29.3, 65.1)),
        ("a-copies", "a-scratch", "2 of 4, upcycled", (73.7, 57.2, 32.3, 67.1)),
        ("a-losses", "a-copies", "2 of 4, auxiliary losses", MLP_MOE),
        ("a-8", "a-losses", "2 of 8 experts", (73.4, 57.6, 32.4, 67.2)),
    ]),
    ("b", "CLIP sparse too (CLIP-MoE)", [
        ("a-losses", "", "CLIP frozen", MLP_MOE),
        ("b-clip", "a-losses", "CLIP unfrozen", UNFROZEN),
        ("b-wide", "b-clip", "CLIP twice as wide", NOT_TRIED),
        ("b-cumo", "b-clip", "2 of 4 experts (CuMo)", CUMO),
        ("b-8", "b-cumo", "2 of 8 experts", (71.0, 59.0, 33.6, 69.2)),
        ("b-scratch", "b-cumo", "2 of 4, from scratch", "did not converge"),
    ]),
    ("c", "language model sparse too", [
        ("b-cumo", "", "CuMo", NO_PFT),  # at the lower LR, as 4x7B probably is
        ("c-llm", "b-cumo", "language model upcycled", (72.8, 57.0, 35.2, 69.9)),
    ]),
    ("d", "scales of the image", [
        ("b-cumo", "", "scale 1", NO_PFT),
        ("d-12", "b-cumo", "scales 1 and 2", (71.7, 60.6, 35.0, 69.7)),
        ("d-13", "b-cumo", "scales 1 and 3", (72.9, 61.0, 37.0, 69.7)),
    ]),
    ("e", "pre-finetuning (stage 2)", [
        ("e-without", "", "without", NO_PFT),
        ("b-cumo", "e-without", "with", (73.0, 62.8, 37.2, 70.9)),
    ]),
    ("f", "experts that a token visits", [
        ("f-top1", "", "1 of 4", NOT_TRIED),
        ("b-cumo", "f-top1", "2 of 4", NOT_TRIED),
        ("f-top4", "b-cumo", "4 of 4", NOT_TRIED),
    ]),
    ("g", "sparse against dense, CLIP unfrozen", [
        ("g-dense", "", "dense", NOT_TRIED),
        ("b-clip", "g-dense", "connector sparse", NOT_TRIED),
        ("b-cumo", "g-dense", "CuMo", NOT_TRIED),
        ("b-cumo", "b-wide", "CuMo", NOT_TRIED),
        ("a-losses", "a-dense", "connector sparse, CLIP frozen", MLP_MOE),
        ("b-cumo", "a-dense", "CuMo", CUMO),
    ]),
]  # fmt: skip


@dataclass
class AblationConfig:
    rows: str = ""  # names of runs, or letters of groups, as in a,f-top1; empty: all
    seeds: tuple = ()  # of the samples, their order and the routers; empty: 0 to 4, or 2 to 4
    samples: int = 5600  # of stage 3, as many as in the demo
    questions: int = 4000  # of the exam, a split
    jobs: int = 2  # processes, each with its own run; 0: one without a table, used internally
    threads: int = 1  # of a training; two are faster, but take more CPU time
    clip: str = "data/mini/weak_clip"  # CLIP of stages 1 and 2
    demo: str = "out/weak"  # folder of stages 1 and 2
    out: str = "out/ablations"  # folder of the runs
    bench: str = "bench/ablations"  # folder of results.json, exam.npz and ablations.png


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


def stages_of(cfg, name):
    """The folder of stages 1 and 2 from which a run comes."""
    scales = RUNS[name].get("scales")
    return pathlib.Path(cfg.out, f"scales-{scales}") if scales else pathlib.Path(cfg.demo)


def start_of(cfg, name):
    """The folder of the stage that a run starts from."""
    init = RUNS[name].get("init", 2)
    if init == "wide":
        return pathlib.Path(cfg.out, "wide", "stage2")
    return stages_of(cfg, name) / f"stage{init}"


def command(cfg, name, seed):
    """The command of a training, as words; its --out also gets the log and the CPU time."""
    flags = {"init": ""} | RUNS[name] | {"init": start_of(cfg, name)}
    flags |= dict(seed=seed, samples=cfg.samples, out=pathlib.Path(cfg.out, f"{name}-{seed}"))
    words = (w for k, v in flags.items() for w in ("--" + k.replace("_", "-"), str(v)))
    return ["python", "train.py", "--stage", "3", *words]


@contextlib.contextmanager
def lock(folder, wait=True):
    """Lock a folder against other commands. Yields False if another has it and `wait` is off."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            ours = True
        except BlockingIOError:
            ours = False
        yield ours


def on_stop(handler):
    """Let `handler` answer Ctrl-C, a terminated process and a closed terminal (but for nohup) ->
    {signal: handler before}."""
    numbers = [signal.SIGINT, signal.SIGTERM]  # ignored behind &, and yet obeyed
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def run_training(words, folder):
    """Run a training, with its output in `folder`/train.log -> its CPU seconds, earlier attempts
    included. KeyboardInterrupt after Ctrl-C, once it has saved a resume point."""
    folder.mkdir(parents=True, exist_ok=True)
    file, children, stops = folder / "cpu.json", [], []
    seconds = json.loads(file.read_text())["seconds"] if file.is_file() else 0.0

    def stop(*_):
        stops.append(1)
        for child in children:
            child.send_signal(signal.SIGINT)

    earlier, before = on_stop(stop), resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(folder / "train.log", "a") as log:
        words = [sys.executable, *words[1:]]
        children.append(subprocess.Popen(words, stdout=log, stderr=log))
    status = children[0].wait()
    for number, handler in earlier.items():
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


def check_clip(cfg):
    """ValueError if runs would start from a stage that was made with another --clip."""
    for folder in {stages_of(cfg, name) / "stage2" for name, _ in planned(cfg)}:
        if is_finished(folder) and (used := read_state(folder)["config"]["clip"]) != cfg.clip:
            raise ValueError(f"--clip {cfg.clip}, but {folder} was trained with {used}; name "
                             "another --demo and --out")  # fmt: skip


def prepare(cfg, name, seed):
    """Make the stages that a run starts from, unless they are finished -> CRC-32 of their weights.

    ValueError if finished runs of the same seed come from other weights, as after training stages 1
    and 2 again on another type of CPU: such rows cannot be compared."""
    folder, scales = stages_of(cfg, name), RUNS[name].get("scales")
    flags = ["--stage", "2", "--out", str(folder), "--clip", cfg.clip]
    with lock(folder):  # shared by runs and seeds
        if not is_finished(folder / "stage2"):
            flags += ["--scales", scales] if scales else []
            run_training(["python", "train.py", *flags], folder)
        if name == "b-wide" and not is_finished(start_of(cfg, name)):
            widen(folder / "stage2", start_of(cfg, name))
    crc = "-".join(crc for k in (1, 2) for crc in crc_of_weights(folder / f"stage{k}").values())
    for row in read_results(cfg)["rows"]:
        same = row["seed"] == seed and stages_of(cfg, row["name"]) == folder
        if same and row["start"] != crc:
            raise ValueError(f"stages 1 and 2 in {folder} have CRC-32 {crc}, those of the table's "
                             f"{row['name']}-{seed} {row['start']}; get that folder from where it "
                             "was trained, or name other --seeds or another --bench")  # fmt: skip
    return crc


def train_and_examine(cfg, name, seed):
    """Train and examine one run -> its row of results.json."""
    words = command(cfg, name, seed)
    folder = pathlib.Path(words[words.index("--out") + 1])
    start = prepare(cfg, name, seed)
    seconds = run_training(words, folder)
    bf16 = read_state(folder / "stage3")["config"]["bf16"]
    return {
        "name": name,
        "seed": seed,
        "start": start,
        **examine(folder / "stage3", cfg.questions),
        "cpu_seconds": round(seconds, 1),
        "machine": results.machine(),
        "precision": "bf16" if bf16 else "float32",
        "commit": results.commit(),
        "command": shlex.join(words),
    }


def read_results(cfg):
    """results.json, or a new one. ValueError if its runs have another length, another CLIP or
    another number of threads, which changes the rounding."""
    file = pathlib.Path(cfg.bench, "results.json")
    same = {k: getattr(cfg, k) for k in ("samples", "questions", "clip", "threads")}
    content = {"command": "runs/ablations.py", **same, "rows": []}
    if file.is_file():
        content |= json.loads(file.read_text())
        if any(content[k] != value for k, value in same.items()):
            said = ", ".join(f"--{k} {content[k]}" for k in same)
            raise ValueError(f"{file} has runs with {said}; name another --bench and --out")
    groups = [{"group": group, "title": title,
               "rows": [dict(zip(("name", "against", "label", "paper"), line)) for line in lines]}
              for group, title, lines in GROUPS]  # fmt: skip
    return content | {"groups": groups}


def merge(content, row):
    """Add a row to `content`, or replace the one of the same run and seed."""
    rows = [r for r in content["rows"] if (r["name"], r["seed"]) != (row["name"], row["seed"])]
    rows = sorted([*rows, row], key=lambda r: (list(RUNS).index(r["name"]), r["seed"]))
    return content | {"rows": rows}


def publish_run(cfg, row):
    """Add a run to --bench: first its answers, then its row, which marks it as finished."""
    run, file = f"{row['name']}-{row['seed']}", pathlib.Path(cfg.bench, "exam.npz")
    folder = pathlib.Path(cfg.out, run, "stage3")
    with open(folder / "metrics.jsonl") as lines, np.load(folder / "exam.npz") as exam:
        training = [json.loads(line)["lm_loss"] for line in lines]
        packed = verdicts.pack(exam["right"], exam["loss"], training)
    with lock(file.parent):
        verdicts.write_answers(file, verdicts.read_answers(file) | {run: packed})
        write_json(file.with_name("results.json"), merge(read_results(cfg), row))


def planned(cfg):
    """[(run, seed)]: first the main claims, seed by seed, then the others, row by row."""
    runs = [(name, seed) for name in chosen_runs(cfg.rows)
            for seed in cfg.seeds or range(0 if name in MAIN else 2, 5)]  # fmt: skip
    return sorted(runs, key=lambda run: run[1] if run[0] in MAIN else math.inf)


@contextlib.contextmanager
def other_jobs(cfg, failures):
    """Start --jobs - 1 other processes with the same command, and wait for them at the end. What
    went wrong in them is added to `failures`. An exception here, such as Ctrl-C, stops them too."""
    pathlib.Path(cfg.out).mkdir(parents=True, exist_ok=True)
    words, jobs = [sys.executable, str(SCRIPT), *sys.argv[1:], "--jobs", "0"], []
    for k in range(1, cfg.jobs):
        with open(pathlib.Path(cfg.out, f"job-{k}.log"), "w") as log:
            # In a session of its own, Ctrl-C reaches it once: from here.
            jobs.append(subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True))
    try:
        yield
        for k, job in enumerate(jobs, 1):
            if job.wait():
                log = pathlib.Path(cfg.out, f"job-{k}.log")
                last = log.read_text().strip().splitlines()[-1:]
                failures.append(f"another job, see {log}: {''.join(last)}")
    except BaseException:
        for job in jobs:
            job.send_signal(signal.SIGINT)
        for job in jobs:
            job.wait()
        raise


def main():
    cfg, _ = parse(AblationConfig, description=__doc__.split("\n")[0])
    check_numbers(cfg, counts=("samples", "questions", "threads"))
    if cfg.questions < LEAST:
        raise ValueError(f"--questions {cfg.questions} must be {LEAST} or more")
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = str(cfg.threads)
    torch.set_num_threads(cfg.threads)
    on_stop(signal.default_int_handler)
    read_results(cfg)  # refuse other lengths or another CLIP before any job starts
    check_clip(cfg)
    bar, failures = tqdm(planned(cfg), unit="run"), []
    try:
        with other_jobs(cfg, failures):
            for name, seed in bar:
                bar.set_description(f"{name}, seed {seed}")
                with lock(pathlib.Path(cfg.out, f"{name}-{seed}"), wait=False) as ours:
                    done = {(row["name"], row["seed"]) for row in read_results(cfg)["rows"]}
                    if ours and (name, seed) not in done:
                        try:
                            publish_run(cfg, train_and_examine(cfg, name, seed))
                        except ValueError as error:  # the others do not depend on it
                            failures.append(f"{name}, seed {seed}: {error}")
                            tqdm.write(failures[-1])
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command continues")
    if cfg.jobs:
        bench = pathlib.Path(cfg.bench)
        bench.mkdir(parents=True, exist_ok=True)  # if every run failed
        content = read_results(cfg)
        groups = verdicts.ablations(content, verdicts.read_answers(bench / "exam.npz"))
        print(*verdicts.tables(groups), sep="\n\n")
        draw_ablations(groups, bench / "ablations.png")
        done = {(row["name"], row["seed"]) for row in content["rows"]}
        if missing := [f"{name}-{seed}" for name, seed in planned(cfg) if (name, seed) not in done]:
            print(f"\nnot in the table: {', '.join(missing)} (failed, or another command has them)")
    if failures:
        raise ValueError(f"failed: {len(failures)}; the first: {failures[0]}")


if __name__ == "__main__":
    run(main)
