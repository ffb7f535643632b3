"""Kill a training at random moments, checkpoint writing included; nothing may be lost.

    python tests/crash.py --kills 10 --seed 0

A tiny stage 2 that writes a resume point after every step is killed (SIGKILL) so many times, each
time at a random moment, every other time while it saves; the same command goes on each time. In the
end its weights must equal those of a run that nobody disturbed, bit for bit, and so must the loss
of every step. Prints how far each life came and what it was doing; exits 1 if the two runs differ.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch
from safetensors.torch import load_file
from tiny import tiny_weights

import train
from data.weights import write_json


def command(weights, init, out, samples):
    flags = weights | dict(stage=2, init=init, out=out, samples=samples, save_every=1)
    words = [("--" + name.replace("_", "-"), str(value)) for name, value in flags.items()]
    return [sys.executable, str(ROOT / "train.py"), *(word for pair in words for word in pair)]


def quietly(go):
    subprocess.run(go, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def steps(folder):
    log = folder / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def save_begun(folder):
    """When the save that is under way began, 0 if none is (or was cut short)."""
    try:
        return (folder / "resume.pt.partial").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def live_and_die(go, folder, dice):
    """One life, killed at a random moment -> (steps so far, whether a save was cut short)."""
    seen, old = steps(folder), save_begun(folder)
    process = subprocess.Popen(go, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and steps(folder) <= seen and save_begun(folder) in (0, old):
        time.sleep(0.002)  # until it trains
    deadline = time.time() + dice.uniform(0, 0.8)
    aim = dice.random() < 0.5  # every other time at a save
    while process.poll() is None and time.time() < deadline + 2 * aim:
        if aim and save_begun(folder) not in (0, old):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    return steps(folder), save_begun(folder) not in (0, old)


def result(folder):
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    return load_file(folder / "model.safetensors"), losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--out", help="write the lives as JSON, too")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # the same sums in the same order, here and in the lives
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        weights = tiny_weights(place)
        first = train.resolve(weights | dict(out=str(place / "init"), samples=4), 1)
        assert train.train_stage(first)
        init = place / "init" / "stage1"
        quietly(command(weights, init, place / "calm", args.samples))
        go, folder = command(weights, init, place / "killed", args.samples), place / "killed/stage2"
        lives = []
        for life in range(args.kills):
            so_far, cut = live_and_die(go, folder, dice)
            lives.append({"killed after step": so_far, "in the middle of a save": cut})
            print(f"life {life}: killed after step {so_far}" + ", in the middle of a save" * cut)
        quietly(go)
        (calm, calm_losses), (killed, losses) = result(place / "calm/stage2"), result(folder)
    same = calm.keys() == killed.keys() and all(torch.equal(calm[k], killed[k]) for k in calm)
    print(f"weights {'equal' if same else 'DIFFER'}, losses of {len(losses)} steps "
          f"{'equal' if losses == calm_losses else 'DIFFER'}")  # fmt: skip
    if args.out:
        command_line = f"python tests/crash.py --kills {args.kills} --seed {args.seed}"
        equal = {"weights equal": same, "losses equal": losses == calm_losses}
        write_json(
            args.out, {"command": command_line, "lives": lives, "steps": len(losses)} | equal
        )
    sys.exit(0 if same and losses == calm_losses else 1)


if __name__ == "__main__":
    main()
