"""Everything between files on disk and tensors; imports none of the model files."""

import os
import sys

# OpenMP's threads wait for each other after every operation. On a busy machine, a thread that spins
# long for a partner that is not running wastes its core (bench/busy.py, docs/RESULTS.md). libgomp
# reads this when torch is loaded, so scripts import `data` before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def in_one_line(kind, error, trace):
    """The excepthook: Ctrl-C while torch and the scripts load ends in one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = in_one_line
