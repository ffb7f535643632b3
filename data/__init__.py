"""Everything between files on disk and tensors; imports none of the model files."""

import os
import sys


def runnable_threads():
    """Threads on this machine that want a core now, this one included; 0 if Linux is not there to
    tell."""
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].split("/")[0])
    except (OSError, IndexError, ValueError):
        return 0


# OpenMP's threads wait for each other after every operation. On a busy machine, a thread that spins
# long for a partner that is not running wastes its core; on an idle one, a thread that sleeps takes
# long to wake up (bench/busy.py, docs/RESULTS.md). libgomp reads this when torch is loaded, so
# scripts import `data` before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    crowded = runnable_threads() > 2 * (os.cpu_count() or 1)
    os.environ.setdefault("GOMP_SPINCOUNT", "0" if crowded else "3000")
# oneDNN keeps a program for every shape of a product, 1,024 of them by default. Batches differ in
# their number of images: after 120 steps of stage 3 these took 0.9 GB, and 64 are as fast.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def in_one_line(kind, error, trace):
    """The excepthook: Ctrl-C while torch and the scripts load ends in one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = in_one_line
