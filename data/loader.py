"""Samples of a data set in a given order, from any place on, read ahead by worker processes.

    order     7 2 9 4 0 ...  ---> worker 1   7 . 9 . 0 ---.
    (data_order, --seed)      '-> worker 2   . 2 . 4 .   ---+--> 7 2 9 4 0 ...  --> packing

A worker opens the pictures of its samples and tokenizes the conversations. Workers run ahead of
the training, so the training does not wait for the disk. The samples and their order do not depend
on the number of workers; with 0 workers the training process reads them itself. Every sample is
counted as one of four kinds:

    used        goes on to the packing
    cut         the same, but its last turns did not fit in a row (data/llava.py)
    rejected    teaches nothing
    skipped     its picture cannot be read; listed in OUT/stageN/skipped.jsonl

An empty sample takes the place of a rejected or skipped one, so the number of samples used says
exactly how far a training is. A faulty sample (an unknown role, for example) ends the training.

A few broken pictures should not stop a training; a missing folder should. So a training ends when
more than 1 % of the samples so far, and at least 10, were skipped. Without the lower limit the
first broken picture could end it.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.chat import Rejected
from data.llava import LlavaData, Unreadable
from data.world import World

KINDS = "used", "cut", "rejected", "skipped"
EMPTY = [], [], []  # takes the place of a sample that cannot be used
SKIPPED_SHARE, SKIPPED_LEAST = 0.01, 10  # a training ends above this share and from this number on
AHEAD = 4  # samples that each worker keeps ready


def open_data(cfg, task):
    """The samples of --data, or those of a `task` of the emoji world; cfg: a train.TrainConfig."""
    if cfg.data:
        data = LlavaData(cfg.data, cfg.image_folder, cfg.limit, cfg.template)
        print(data.pictures)
        return data
    if cfg.limit:
        raise ValueError(f"--limit {cfg.limit} is for --data; the emoji world has --samples")
    if cfg.preset not in ("mini", "smol-mini"):
        raise ValueError(
            f"stage {cfg.stage} of {cfg.preset} needs data of its own: run it alone, with "
            f"--stage {cfg.stage} --data FILE.json --image-folder DIR"
        )
    if not cfg.samples:
        raise ValueError("--samples 0 means all of --data; the emoji world needs a number")
    return World("train", task, cfg.samples, cfg.seed, cfg.augment)


def data_order(n, samples, seed):
    """Indices of the samples in the order of use: every epoch a new permutation of all `n`."""
    epochs = -(-samples // n)
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])[:samples]


def default_workers(device):
    """0 for training on a CPU, which has no core to spare; for a GPU up to 4 (each reads about 50
    photos a second), but no more than this process's share of the cores."""
    if not device.startswith("cuda"):
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores we may use
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_workers(workers):
    """ValueError for more processes than this machine can run."""
    most = max(16, 4 * (os.cpu_count() or 1))
    if workers > most:
        raise ValueError(f"--workers {workers} are too many for this machine; take up to {most}")


def summary(counts, data, row_tokens):
    """Lines about the samples of `data` that a finished training left out or cut. ValueError if it
    could use none."""
    if not counts["used"] + counts["cut"]:
        raise ValueError(f"none of the {sum(counts.values())} samples holds an answer to learn "
                         f"within --row-tokens {row_tokens}; {counts['skipped']} of them were "
                         "skipped, as their picture cannot be read. Correct the data, then "
                         "begin the stage again with --overwrite")  # fmt: skip
    rejected = getattr(data, "rejected", [])  # those left out before the first step
    words = [
        (counts["rejected"] + len(rejected), "had nothing to learn and were left out"),
        (counts["cut"], "were longer than a row and lost their last turns"),
        (counts["skipped"], "had a picture that cannot be read; skipped.jsonl lists them"),
    ]
    return [f"{n:,} samples {what}" for n, what in words if n]


def too_many(skipped, seen):
    """Whether so many skipped samples of those `seen` end a training."""
    return skipped >= SKIPPED_LEAST and skipped > SKIPPED_SHARE * seen


def in_steps(batches, size, counts, ahead):
    """Yields (the next `size` batches, a copy of `counts` as they are then). With `ahead`, a thread
    reads the next step's batches while this one's are computed: on a GPU, not on a busy CPU."""
    take = lambda: (list(islice(batches, size)), dict(counts))
    with closing(batches), ThreadPoolExecutor(1) as thread:
        taken = take()  # in the main thread, which starts the workers
        while taken[0]:
            following = thread.submit(take) if ahead else None
            yield taken
            taken = following.result() if ahead else take()


def unchanged(x):  # DataLoader's default would convert every list of token ids
    return x


def start_worker(_):
    """Leave signals to the parent process, and exit when it dies.

    Ctrl-C and SIGTERM often reach the whole process group; the parent alone saves and stops the
    workers. A second SIGTERM comes from the parent and ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Loader:
    """Serves `data` in `order` (indices), each sample through `code`: sample -> `Encoded`.

    counts: number of samples of each of the KINDS so far, updated here. log: the file that lists
    skipped samples, or None.
    """

    def __init__(self, data, order, code, workers=0, counts=None, log=None):
        self.data, self.order, self.code, self.workers = data, order, code, workers
        self.counts, self.log = dict.fromkeys(KINDS, 0) if counts is None else counts, log

    def __getitem__(self, i):
        """`data[i]` encoded, perhaps in a worker. A fault is returned, so that the training process
        can raise it unchanged. Pictures stay arrays: tensors would be sent through shared memory,
        and a container often has only 64 MB of it."""
        try:
            return self.code(self.data[i])
        except (ValueError, OSError) as fault:
            return fault

    def samples(self, start=0):
        """Yields (ids, labels, images [3, S, S]) from place `start` of the order on."""
        reasons = self.open_log(start)
        order = self.order[start:].tolist()
        stream = self.read_ahead(order) if self.workers else (self[i] for i in order)
        for place, coded in enumerate(stream, start):
            sample, kind = EMPTY, "skipped"
            if isinstance(coded, Unreadable):
                self.skip(coded, place, reasons)
            elif isinstance(coded, Rejected):
                kind = "rejected"
                if self.counts[kind] < 3:
                    tqdm.write(f"left out: {coded}")
            elif isinstance(coded, Exception):
                raise coded
            else:
                sample = coded.ids, coded.labels, coded.images
                kind = "cut" if coded.dropped else "used"
            yield sample
            # Count after the yield: a sample that `pack` keeps for its next batch is not used yet,
            # and a resumed training reads it again.
            self.counts[kind] += 1

    def read_ahead(self, order):
        """Yields `self[i]` for i in `order`, computed ahead by the workers."""
        generator = torch.Generator()  # without it, DataLoader draws from the training's generator
        fork = "fork" if sys.platform == "linux" else None  # records need not be copied
        loader = DataLoader(
            self, sampler=order, batch_size=None, collate_fn=unchanged, generator=generator,
            num_workers=self.workers, prefetch_factor=AHEAD, worker_init_fn=start_worker,
            multiprocessing_context=fork)  # fmt: skip
        stream = iter(loader)
        main = threading.current_thread() is threading.main_thread()
        if main and hasattr(signal, "SIGCHLD"):
            # DataLoader's handler raises a worker's death anywhere in the training. Without it,
            # `next` raises.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from stream
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise ValueError(f"a process that reads the data has died ({error}), maybe for lack of "
                             "memory; try fewer --workers") from None  # fmt: skip
        finally:
            stream._shutdown_workers()  # garbage collection would take 10 seconds

    def open_log(self, start):
        """{(id, path): reason} of the samples skipped before place `start`. Later lines are removed
        from the log, since their samples come again, and so is a line that was cut short."""
        if not (self.log and self.log.is_file()):
            return {}
        lines = self.log.read_bytes().splitlines(keepends=True)
        lines = [x for x in lines if x.endswith(b"\n") and json.loads(x)["place"] < start]
        os.truncate(self.log, sum(map(len, lines)))
        return {(row["id"], row["path"]): row["reason"] for row in map(json.loads, lines)}

    def skip(self, fault, place, reasons):
        """Log a skipped sample (once, not every epoch). ValueError if too many were skipped."""
        name, path, reason = fault.args
        if (name, path) not in reasons:
            reasons[name, path] = reason
            if self.log:
                line = {"place": place, "id": name, "path": path, "reason": reason}
                with open(self.log, "a") as file:
                    file.write(json.dumps(line) + "\n")
            if len(reasons) <= 3:
                tqdm.write(f"skipped: {fault}")
        skipped = self.counts["skipped"] + 1
        if too_many(skipped, place + 1):
            first = "; ".join(list(reasons.values())[:3])
            raise ValueError(
                f"{skipped} of the first {place + 1:,} samples have a picture that cannot be read, "
                f"which is more than {100 * SKIPPED_SHARE:.0f} %: {first}; ... {self.log} lists "
                "them all. Repair the pictures, then the same command continues"
            )
