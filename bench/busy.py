"""Training next to other jobs: how should OpenMP's threads wait for each other?

    python bench/busy.py            # about ten minutes on idle cores; needs a finished demo in out/

After each operation the threads of a process wait at a barrier. A thread that spins there is fast
when its partner runs, and wastes a whole time slice when another job has taken the partner's core.
Each row trains stage 3 of the miniature with one setting, next to no, two and six endless loops.
Writes bench/busy.json: samples per second, the median of the steps after the first three.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from bench.speed import conditions
from data.weights import write_json

SETTINGS = {
    "as train.py chooses": {"GOMP_SPINCOUNT": "", "OMP_WAIT_POLICY": ""},
    "libgomp": {"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": ""},
    **{f"spin {n}": {"GOMP_SPINCOUNT": str(n)} for n in (300, 1_000, 3_000, 10_000, 30_000)},
    "passive": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": ""},
    "one thread": {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": ""},
}


def samples_per_second(setting, seconds):
    """Speed of a training that is stopped after so many seconds of steps."""
    env = {k: v for k, v in (os.environ | SETTINGS[setting]).items() if v}
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "train.py", "--stage", "3", "--init", "out/stage2", "--out", out]
        training = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
                                    stderr=subprocess.DEVNULL)  # fmt: skip
        log = pathlib.Path(out) / "stage3" / "metrics.jsonl"
        while training.poll() is None:
            try:
                training.wait(1)
            except subprocess.TimeoutExpired:
                rows = log.read_text().splitlines()[:-1] if log.is_file() else []
                speeds = [json.loads(row)["samples_per_s"] for row in rows][3:]
                if len(speeds) >= 2 and sum(15 / s for s in speeds) > seconds:
                    training.kill()
                    training.wait()
                    return round(statistics.median(speeds), 2)
    raise ValueError(f"the training ended early ({training.returncode}); is there out/stage2?")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=15, help="of steps, for each number")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--loads", nargs="+", type=int, default=[0, 2, 6], help="endless loops")
    parser.add_argument("--repeats", type=int, default=3, help="turns; each number is a median")
    args = parser.parse_args()
    speeds = {setting: {str(load): [] for load in args.loads} for setting in args.settings}
    for _ in range(args.repeats):  # in turns, so that a slow minute meets all settings
        for load in args.loads:
            for setting in args.settings:
                loop = [sys.executable, "-c", "while True: pass"]
                jobs = [subprocess.Popen(loop) for _ in range(load)]
                try:
                    speed = samples_per_second(setting, args.seconds)
                finally:
                    for job in jobs:
                        job.kill()
                        job.wait()
                speeds[setting][str(load)].append(speed)
                print(f"{load} loops, {setting}: {speed}", flush=True)
    rows = [{"setting": setting} | {load: statistics.median(all) for load, all in row.items()}
            for setting, row in speeds.items()]  # fmt: skip
    write_json(ROOT / "bench" / "busy.json", conditions() | {"rows": rows})


if __name__ == "__main__":
    main()
