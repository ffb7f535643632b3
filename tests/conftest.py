import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in processes that tests start
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # for tiny tensors on busy cores: two threads took 70 s, one took 17 s


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Flags that start a training from tiny random CLIP and LLM directories."""
    from tiny import tiny_weights  # imports the project, so not before sys.path is set

    return tiny_weights(tmp_path_factory.mktemp("weights"))
