"""Samples of a data set in a given order, from a given place on, read by worker processes.

    order     7 2 9 4 0 ...  ---> worker 1   7 . 9 . 0 ---.
    (data_order, --seed)      '-> worker 2   . 2 . 4 .   ---+--> 7 2 9 4 0 ...  --> packing

A worker opens the pictures of its samples, makes tensors of them, and tokens of the conversations;
it works ahead of the training, which so never waits for a disk. What comes out, and in which order,
does not depend on the number of workers. With 0 the training does it all itself.

    used        goes on to the packing
    cut         the same, but its last turns did not fit in a row (data/llava.py)
    rejected    teaches nothing
    skipped     its picture cannot be read; listed in OUT/stageN/skipped.jsonl

A rejected or skipped sample leaves an empty one in its place, so a place in the order says exactly
how far a training has come. A faulty sample (say, with an unknown role) ends the training.

A few broken pictures are no reason to stop for; a folder that has gone is. So a training ends when
more than 1 % of the samples it has met so far, and at least 10, were skipped: of fewer, one
percent says nothing, and the first sample alone could end it.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.chat import Rejected
from data.llava import Unreadable

KINDS = "used", "cut", "rejected", "skipped"
EMPTY = [], [], []  # in the place of a sample that cannot be used
SKIPPED_SHARE, SKIPPED_LEAST = 0.01, 10  # more than this share, and so many, end a training
AHEAD = 4  # samples that each worker holds ready


def data_order(n, samples, seed):
    """Indices of the samples in the order of use: every epoch a new permutation of all `n`."""
    epochs = -(-samples // n)
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])[:samples]


def default_workers(device):
    """None beside a CPU that has to train; 4 to feed a GPU (each reads some 50 photos a second), or
    as many as there are cores for each of this machine's training processes."""
    if not device.startswith("cuda"):
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores we may use
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def summary(counts, rejected, row_tokens):
    """What a training says of its samples at its end. ValueError if it could learn from none.
    rejected: the reasons of those that were left out before it began."""
    if not counts["used"] + counts["cut"]:
        raise ValueError(f"none of the {sum(counts.values())} samples holds an answer to learn "
                         f"within --row-tokens {row_tokens}; {counts['skipped']} of them were "
                         "skipped, as their picture cannot be read")  # fmt: skip
    words = [
        (counts["rejected"] + len(rejected), "had nothing to learn and were left out"),
        (counts["cut"], "were longer than a row and lost their last turns"),
        (counts["skipped"], "had a picture that cannot be read; skipped.jsonl lists them"),
    ]
    return [f"{n:,} samples {what}" for n, what in words if n]


def too_many(skipped, seen):
    return skipped >= SKIPPED_LEAST and skipped > SKIPPED_SHARE * seen


def as_it_is(x):  # DataLoader's own way walks through every list of token ids
    return x


def start_worker(_):
    """Ctrl-C and SIGTERM often reach the whole group: the parent alone answers, and saves. (A
    second SIGTERM is meant for us.) When the parent dies, however it does, so do we."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Loader:
    """Serves `data` in `order` (indices), through `code`: sample -> `data.llava.Encoded`.

    counts: how many of each of KINDS so far, kept up to date here. log: the file that lists skipped
    samples; None: they are listed nowhere.
    """

    def __init__(self, data, order, code, workers=0, counts=None, log=None):
        self.data, self.order, self.code, self.workers = data, order, code, workers
        self.counts, self.log = dict.fromkeys(KINDS, 0) if counts is None else counts, log

    def __getitem__(self, i):
        """`data[i]` encoded, by a worker. Its fault is handed over, not raised, to come out as it
        is. Pictures go as arrays: tensors would lie in shared memory, of which a container has
        64 MB, until the last of their step is there."""
        try:
            coded = self.code(self.data[i])
        except (ValueError, OSError) as fault:
            return fault
        return coded._replace(images=[image.numpy() for image in coded.images])

    def samples(self, start=0):
        """Yields (ids, labels, images [3, S, S]) from place `start` of the order on."""
        listed = self.listed_before(start)
        for place, coded in enumerate(self.stream(start), start):
            sample, kind = EMPTY, "skipped"
            if isinstance(coded, Unreadable):
                self.skip(coded, place, listed)
            elif isinstance(coded, Rejected):
                kind = "rejected"
                if self.counts[kind] < 3:
                    tqdm.write(f"left out: {coded}")
            elif isinstance(coded, Exception):
                raise coded
            else:
                sample = coded.ids, coded.labels, [torch.from_numpy(x) for x in coded.images]
                kind = "cut" if coded.dropped else "used"
            yield sample
            # Only now: a sample that `pack` keeps for its next batch is not used yet, and comes
            # again after a resume.
            self.counts[kind] += 1

    def stream(self, start):
        """What `self[i]` is for the order from `start` on, computed ahead by the workers."""
        generator = torch.Generator()  # else DataLoader draws its seed from the training's
        options = dict(batch_size=None, collate_fn=as_it_is, generator=generator)
        if self.workers:
            fork = "fork" if sys.platform == "linux" else None  # records need not be copied
            options |= dict(num_workers=self.workers, prefetch_factor=AHEAD,
                            worker_init_fn=start_worker, multiprocessing_context=fork)  # fmt: skip
        stream = iter(DataLoader(self, sampler=self.order[start:].tolist(), **options))
        main = threading.current_thread() is threading.main_thread()
        if self.workers and main and hasattr(signal, "SIGCHLD"):
            # DataLoader would raise a worker's death wherever the training is; wait for `next`
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from stream
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise ValueError(f"a process that reads the data has died ({error}), maybe for lack of "
                             "memory; try fewer --workers") from None  # fmt: skip
        finally:
            if self.workers:  # now; when garbage is collected it takes them 10 seconds
                stream._shutdown_workers()

    def listed_before(self, start):
        """{(id, path): reason} of what the log held when a training was at `start`; later lines
        are removed, and one that was cut short, as their samples come again."""
        if not (self.log and self.log.is_file()):
            return {}
        lines = self.log.read_bytes().splitlines(keepends=True)
        lines = [x for x in lines if x.endswith(b"\n") and json.loads(x)["place"] < start]
        os.truncate(self.log, sum(map(len, lines)))
        return {(row["id"], row["path"]): row["reason"] for row in map(json.loads, lines)}

    def skip(self, fault, place, listed):
        """List a sample (once, if it comes every epoch), and end the training if they are many."""
        name, path, reason = fault.args
        if (name, path) not in listed:
            listed[name, path] = reason
            if self.log:
                line = {"place": place, "id": name, "path": path, "reason": reason}
                with open(self.log, "a") as file:
                    file.write(json.dumps(line) + "\n")
            if len(listed) <= 3:
                tqdm.write(f"skipped: {fault}")
        skipped = self.counts["skipped"] + 1
        if too_many(skipped, place + 1):
            first = "; ".join(list(listed.values())[:3])
            raise ValueError(
                f"{skipped} of the first {place + 1:,} samples have a picture that cannot be read, "
                f"which is more than {100 * SKIPPED_SHARE:.0f} %: {first}; ... {self.log} lists "
                "them. Mend them, then the same command continues"
            )
