"""A long training: memory and open files stay constant, every epoch uses every sample once.

    python tests/campaigns/long_run.py --steps 50000 --out bench/faults.json

A tiny stage 2 takes one sample a step, with or without a picture. Every 200 steps it records the
process's memory (RSS), its open files and the size of metrics.jsonl. The slope of the memory is
taken over the second half. Before that, two processes train a tenth of the steps each: the same
seed must give the same weights.
"""

import argparse
import gc
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import torch
from PIL import Image
from tiny import tiny_weights

import train
from data import llava
from data.weights import write_json
from runs.results import commit, machine

EVERY = 200
SAMPLES = 500  # in the file; a step takes one


def flags_of(place):
    """Flags of a training with one sample a step; every tenth has a picture."""
    Image.new("RGB", (30, 20), "green").save(place / "a.png")
    records = []
    for k in range(SAMPLES):
        image, tag = ("a.png", "<image>\n") if k % 10 == 9 else (None, "")
        turns = [{"from": "human", "value": f"{tag}What is {k}?"},
                 {"from": "gpt", "value": f"A number: {k * 7 % 97}" + " and one" * 12}]  # fmt: skip
        records.append({"id": k, "image": image, "conversations": turns})
    (place / "data.json").write_text(json.dumps(records))
    sizes = dict(rows=1, row_tokens=96, accumulate=1, save_every=500, data=str(place / "data.json"))
    options = dict(image_folder=str(place), template="mistral_instruct", lr=1e-4, init="")
    return tiny_weights(place) | sizes | options


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def one_training(flags, out, steps, watched=None):
    """Train stage 1 briefly, then stage 2, in a fork of this process -> sha256 of the weights."""
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return hashlib.sha256((out / "stage2" / "model.safetensors").read_bytes()).hexdigest()
    code = 1
    try:
        sys.stderr = sys.stdout = open(os.devnull, "w")
        first = flags | dict(samples=20, out=str(out), stage=1, template="plain")
        for name in ("data", "image_folder"):
            first.pop(name)
        assert train.train_stage(train.resolve(first | dict(row_tokens=256), 1))
        # Every sample fills more than half a row, so each step takes one.
        cfg = train.resolve(flags | dict(samples=steps, out=str(out)), 2)
        if watched:
            watch(watched)
        assert train.train_stage(cfg)
        if watched:
            watched["file"].write_text(json.dumps(watched["rows"]))
            watched["file"].with_suffix(".order").write_text(json.dumps(watched["order"]))
        code = 0
    finally:
        os._exit(code)


def watch(watched):
    """Record what must not grow during the training, and which samples it reads."""
    step, get = train.Trainer.train_step, llava.LlavaData.__getitem__

    def watching_step(self, *args):
        metrics = step(self, *args)
        if metrics and self.step % EVERY == 0:
            gc.collect()
            log = self.folder / "metrics.jsonl"
            watched["rows"].append({
                "step": self.step, "used": self.used, "rss_mib": round(resident_mib(), 2),
                "files": len(os.listdir("/proc/self/fd")), "metrics_bytes": log.stat().st_size,
            })  # fmt: skip
        return metrics

    def watching_get(self, i):
        watched["order"].append(i)
        return get(self, i)

    train.Trainer.train_step, llava.LlavaData.__getitem__ = watching_step, watching_get


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--out", help="JSON file whose `long` gets the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        flags = flags_of(place)
        twice = [one_training(flags, place / f"short{k}", args.steps // 10) for k in (0, 1)]
        watched = {"rows": [], "order": [], "file": place / "rows.json"}
        one_training(flags, place / "long", args.steps, watched)
        rows = json.loads(watched["file"].read_text())
        order = json.loads(watched["file"].with_suffix(".order").read_text())
    late = rows[len(rows) // 2 :]
    slope = np.polyfit([row["step"] for row in late], [row["rss_mib"] for row in late], 1)[0]
    epochs = [order[k : k + SAMPLES] for k in range(0, len(order), SAMPLES)]
    found = {
        "steps": rows[-1]["step"],
        "rss_mib": [late[0]["rss_mib"], late[-1]["rss_mib"]],
        "rss_slope_kib_per_1000_steps": round(slope * 1000 * 1024, 1),
        "files": sorted({row["files"] for row in rows}),
        "metrics_bytes_per_step": round(rows[-1]["metrics_bytes"] / rows[-1]["step"]),
        "epochs": len(epochs),
        "repeated within an epoch": sum(len(epoch) - len(set(epoch)) for epoch in epochs),
        "epochs in one order": len(epochs) - len({tuple(epoch) for epoch in epochs}),
        "same seed twice": twice[0] == twice[1],
        "seconds": round(time.time() - start),
    }
    print(json.dumps(found, indent=1))
    if args.out:
        file = Path(args.out)
        there = json.loads(file.read_text()) if file.is_file() else {}
        about = {
            "command": f"python tests/campaigns/long_run.py --steps {args.steps}",
            "commit": commit(),
        }
        write_json(file, there | {"long": about | {"machine": machine()} | found})
    flat = found["rss_slope_kib_per_1000_steps"] < 100 and found["files"][-1] == found["files"][0]
    fresh = not found["repeated within an epoch"] and not found["epochs in one order"]
    sys.exit(not (flat and fresh and found["same seed twice"]))


if __name__ == "__main__":
    main()
