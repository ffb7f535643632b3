"""Every fault that can hit a training's files, many times: nothing may be lost.

    python tests/campaigns/crash.py --kills 100 --seed 0 --out bench/faults.json     # 3 kills in CI

A tiny stage 2 meets one fault after another, and the same command continues each time. Its final
weights must equal those of an undisturbed run bit for bit, and so must the loss of every step. A
process that finds a resume point must start from it: only steps since the last save are repeated.
Each kind of fault is tried up to `--kills` times, each of the `points` at most once:

    killed          SIGKILL at a random moment, every other time during a save
    points          SIGKILL before and after each fsync, rename, truncation and removal, and with a
                    file of weights half written
    disk error      each of these calls fails instead (EIO)
    disk full       a disk of a random size (a tmpfs, or a limit on the size of files where none can
                    be mounted), with room again for the next process
    read-only       a read-only disk, for a new training and for one that continues
    cut, bit flip   the newest resume point is cut short, or has one wrong bit: an error must name
                    it, and the previous one is used (flips in the gaps of the file go unnoticed)
    finished stage  the same damage to the weights that the next stage starts from: it must refuse

Each process is a fork of this one, which has imported PyTorch already, and takes half a second.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"
import torch
from tiny import command, tiny_weights

import data.weights
import train
from data.flags import run
from data.weights import write_json
from engine import resume
from runs.results import commit, machine

CALLS = [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "truncate"), (os, "unlink"),
         (os, "mkdir")]  # fmt: skip
WRITERS = [(torch, "save"), (data.weights, "save_file")]  # called with (content, file)


# ------------------------------------------------------------------------------------- one process


def at_point(number, act, only="", count=None):
    """Call `act` at the `number`-th point (see the file's docstring), or the `number`-th one named
    `only`, such as "before fsync". The file `count` gets the names of all points."""
    seen = iter(range(10**9))

    def point(name, *args):
        if count:
            with open(count, "a") as file:
                file.write(name + "\n")
        if only in ("", name) and next(seen) == number:
            act(*args)

    def watched(original, name):
        def call(*args, **options):
            point(f"before {name}")
            result = original(*args, **options)
            point(f"after {name}")
            return result

        return call

    def watched_writer(original, name):
        def write(content, file, *more):
            point(f"in {name}", original, content, file)
            return original(content, file, *more)

        return write

    for owner, name in CALLS:
        setattr(owner, name, watched(getattr(owner, name), name))
    for owner, name in WRITERS:
        setattr(owner, name, watched_writer(getattr(owner, name), name))


def die(write=None, content=None, file=None):
    if write:  # leave the file half written
        write(content, file)
        with open(file, "rb+") as half:
            half.truncate(os.path.getsize(file) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


die_at_the_third_save = partial(at_point, 2, die, "in save")


def fail(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def small_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def spawn(go, said, prepare=None):
    """Fork this process to run train.py as the command `go`, with its output in the file `said`."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = go[1:]
        sys.modules["matplotlib"] = None  # its import takes longer than the training
        if prepare:
            prepare()
        run(train.main)
        code = 0
    except SystemExit as end:
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        os._exit(code)


def end_of(pid):
    """Exit status of a process; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Training:
    """A command, its folder, and `calm`, the undisturbed training to compare with."""

    def __init__(self, place, flags, calm=None):
        self.place, self.calm = place, calm
        place.mkdir(exist_ok=True)
        self.folder, self.said = place / "stage2", place.with_suffix(".txt")
        self.go = command(flags | dict(stage=2, save_every=1), place)

    def clean(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, prepare=None):
        """Run the command to its end, killed or not -> its exit status."""
        return end_of(spawn(self.go, self.said, prepare))

    def saved_step(self):
        """The step of the resume point that the next process would start from."""
        found = [self.folder / name for name in resume.RESUME if (self.folder / name).is_file()]
        return torch.load(found[0], mmap=True)["step"] if found else 0

    def result(self):
        losses = [json.loads(line)["loss"] for line in (self.folder / "metrics.jsonl").open()]
        weights = (self.folder / "model.safetensors").read_bytes()
        return hashlib.sha256(weights).hexdigest(), losses

    def continues(self, said=""):
        """Whether the same command continues, prints `said`, and gives the undisturbed result."""
        found, done = resume.has_resume_point(self.folder), resume.is_finished(self.folder)
        code, words = self.run(), self.said.read_text()
        resumed = "resumed after" in words or not found or done
        good = code == 0 and resumed and said in words and self.result() == self.calm.result()
        if not good:
            print(f"LOST (exit status {code}): {words[-2000:]}")
        return good

    def refuses(self, said=""):
        """Whether the command ends with one error line that contains `said`."""
        code, words = self.run(), self.said.read_text()
        lines = [line for line in words.splitlines() if line.startswith("error: ")]
        good = code == 1 and len(lines) == 1 and said in lines[0] and "Traceback" not in words
        if not good:
            print(f"NO CLEAR ERROR (exit status {code}): {words[-2000:]}")
        return good


# ------------------------------------------------------------------------------------- the faults


def kill_at_random(training, kills, dice):
    """Yields for each kill whether it was survived, once its training has ended."""
    took = []
    for _ in range(2):
        training.clean()
        start = time.time()
        assert training.continues()
        took.append(time.time() - start)
    whole = min(took)
    training.clean()
    open_kills, kept = 0, True
    for _ in range(kills):
        if resume.is_finished(training.folder):
            yield from [kept and training.continues()] * open_kills
            open_kills, kept = 0, True
            training.clean()
        before, aside = training.saved_step(), training.folder / "resume.pt.partial"
        pid, begun = spawn(training.go, training.said), time.time()
        deadline, aim = begun + dice.uniform(0, whole), dice.random() < 0.5
        while time.time() < deadline:
            time.sleep(0.001)
        while aim and time.time() < deadline + whole and not aside.exists():
            pass
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
        kept &= resume.is_finished(training.folder) or training.saved_step() >= before
        open_kills += 1
    yield from [kept and training.continues()] * open_kills


def points_of(training):
    """The names of all points of an undisturbed process."""
    training.clean()
    names = training.place.with_suffix(".points")
    names.unlink(missing_ok=True)
    assert training.run(partial(at_point, -1, die, count=names)) == 0
    return names.read_text().splitlines()


def kill_at_points(training, points):
    for number, _ in points:
        training.clean()
        code = training.run(partial(at_point, number, die))
        yield code == -signal.SIGKILL and training.continues()


def fail_at_points(training, points):
    for number, name in points:
        if name.startswith("after"):
            continue  # the same as failing before the next one
        training.clean()
        code = training.run(partial(at_point, number, fail))
        clear = "Traceback" not in training.said.read_text()
        yield clear and code in (0, 1) and training.continues()  # 0: a leftover file is harmless


class Disk:
    """A small disk (tmpfs) at the folder `place`; `there` is False where none can be mounted."""

    def __init__(self, place):
        place.mkdir()
        self.place = str(place)
        self.there = self.mount("size=64m", new=True)

    def mount(self, options, new=False):
        words = ["-t", "tmpfs", "-o", options, "none"] if new else ["-o", f"remount,{options}"]
        done = subprocess.run(["mount", *words, self.place], capture_output=True)
        return done.returncode == 0

    def close(self):
        if self.there:
            subprocess.run(["umount", self.place], check=True)


def fill_disk(training, times, dice, disk):
    training.clean()
    assert training.run(die_at_the_third_save) < 0
    most = 3 * (training.folder / "resume.pt").stat().st_size
    for _ in range(times):
        training.clean()
        size = dice.randrange(8192, most)
        if disk.there:
            disk.mount(f"size={size // 1024}k")
            clear = training.refuses()
            disk.mount("size=64m")
        else:
            size //= 3
            code = training.run(partial(small_files, size))
            clear = code == 1 and "Traceback" not in training.said.read_text()
        yield clear and training.continues()


def read_only(training, times, disk):
    for k in range(times if disk.there else 0):
        training.clean()
        if k % 2:
            assert training.run(die_at_the_third_save) < 0
        there = sorted((f, f.read_bytes()) for f in training.folder.glob("*"))
        disk.mount("ro")
        clear = training.refuses("Read-only file system")
        disk.mount("rw,size=64m")
        same = there == sorted((f, f.read_bytes()) for f in training.folder.glob("*"))
        yield clear and same and training.continues()


def damaged(content, kind, dice):
    content = bytearray(content)
    if kind == "cut":
        return content[: dice.randrange(len(content))]
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    return content


def damage(training, times, dice, kind, unnoticed):
    training.clean()
    assert training.run(die_at_the_third_save) < 0 and resume.has_resume_point(training.folder)
    kept = training.place.with_suffix(".kept")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(training.folder, kept)
    for _ in range(times):
        training.clean()
        shutil.copytree(kept, training.folder)
        newest = training.folder / resume.RESUME[0]
        newest.write_bytes(damaged(newest.read_bytes(), kind, dice))
        good = training.continues()
        if f"{newest} cannot be read" not in training.said.read_text():
            unnoticed[kind] += 1
        yield good


def damage_weights(training, init, times, dice):
    """Damage the weights of the finished stage 1 that this one starts from."""
    file = init / "model.safetensors"
    whole = file.read_bytes()
    for k in range(times):
        training.clean()
        file.write_bytes(damaged(whole, ("cut", "bit flip")[k % 2], dice))
        clear = training.refuses("model.safetensors is not what its stage wrote")
        file.write_bytes(whole)
        yield clear and training.continues()


# ------------------------------------------------------------------------------------- the campaign


def campaign(place, kills, samples, seed, only, write):
    """-> {kind: {"tried", "survived", "lost"}}; `write` gets facts of the run and these counts
    after each kind."""
    dice = random.Random(seed)
    weights = tiny_weights(place) | dict(samples=samples, rows=1, row_tokens=128)
    stage1 = command(weights | dict(stage=1, samples=4), place / "init")
    assert end_of(spawn(stage1, place / "init.txt")) == 0
    flags = weights | dict(init=place / "init" / "stage1")
    calm = Training(place / "calm", flags)
    subprocess.run(calm.go, check=True, capture_output=True)  # a new process and not a fork
    training = Training(place / "disturbed", flags, calm)
    points = list(enumerate(points_of(training)))
    disk = Disk(place / "disk")
    on_disk = Training(place / "disk" / "out", flags, calm)
    on_disk.said = place / "on_disk.txt"
    some = sorted(dice.sample(points, min(kills, len(points))))
    few, unnoticed = -(-kills // 4), Counter()
    kinds = {
        "killed": kill_at_random(training, kills, dice),
        "points": kill_at_points(training, some),
        "disk error": fail_at_points(training, some),
        "disk full": fill_disk(on_disk, few, dice, disk),
        "read-only": read_only(on_disk, -(-few // 2), disk),
        "cut": damage(training, few, dice, "cut", unnoticed),
        "bit flip": damage(training, kills, dice, "bit flip", unnoticed),
        "finished stage": damage_weights(training, place / "init" / "stage1", few, dice),
    }
    counts, about = {}, {"points": len(points), "tmpfs": disk.there}
    about["steps"] = len(calm.result()[1])
    try:
        for kind, runs in kinds.items():
            if only and kind not in only:
                continue
            dice.seed(f"{seed} {kind}")  # the same with --only
            start, survived = time.time(), list(runs)
            counts[kind] = {"tried": len(survived), "survived": sum(survived),
                            "lost": len(survived) - sum(survived)}  # fmt: skip
            if kind in unnoticed:
                counts[kind]["in blanks"] = unnoticed[kind]
            print(f"{kind:15} {counts[kind]} in {time.time() - start:.0f} s", flush=True)
            write(about, counts)
    finally:
        disk.close()
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=3, help="how often of each kind [3]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10, help="length of the training [10]")
    parser.add_argument("--only", nargs="+", default=[], help="these kinds of faults")
    parser.add_argument("--out", help="JSON file whose `crash` gets the counts")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same order of sums here and in the forks

    def write(about, counts):
        if not args.out:
            return
        go = f"python tests/campaigns/crash.py --kills {args.kills} --seed {args.seed}"
        about = {"command": go, "commit": commit(), "machine": machine()} | about
        file = Path(args.out)
        there = json.loads(file.read_text()) if file.is_file() else {}
        kinds = there.get("crash", {}).get("kinds", {}) | counts
        write_json(file, there | {"crash": about | {"kinds": kinds}})

    with tempfile.TemporaryDirectory() as place:
        counts = campaign(Path(place), args.kills, args.samples, args.seed, args.only, write)
    sys.exit(sum(kind["lost"] for kind in counts.values()) > 0)


if __name__ == "__main__":
    main()
