import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny tensors: on busy cores two threads took 70 s instead of 17


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Flags that start a training from tiny random CLIP and LLM directories."""
    from tiny import tiny_weights  # which imports the project

    return tiny_weights(tmp_path_factory.mktemp("weights"))
