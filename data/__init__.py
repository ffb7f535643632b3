"""Everything between files on disk and tensors; imports none of the model files."""

import os

# OpenMP's threads wait for each other after every operation. On a busy machine, a thread that spins
# long for a partner that is not running wastes its core (bench/busy.py, docs/RESULTS.md). libgomp
# reads this when torch is loaded, so scripts import `data` before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
