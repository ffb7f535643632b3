"""A dense CLIP with MLPs of twice the width: as many active parameters as 2 of 4 experts.

CuMo's CLIP-MoE does more work for a token than the dense CLIP that it is compared with. A fair
rival does the same work and starts from the same outputs: `widen` gives every hidden feature a
copy, and splits each weight that reads it between the two, in random shares:

    y = fc2 h      becomes      y = (s * fc2) h + ((1 - s) * fc2) h'      with h' = h

With equal shares, s = 1/2, both copies would get equal gradients and stay copies in training, so
the MLP would be no wider than before. AdamW moves every weight by the same step, so at first the
output moves up to twice as far in a step as that of the narrow MLP.
"""

from dataclasses import replace

import torch

from cumo import CuMo
from data.tokenizer import Tokenizer
from data.weights import copy_into, write_json
from engine.resume import read_state


@torch.no_grad()
def widen(source, folder):
    """Write the finished stage `source` to `folder` with wide MLPs in CLIP and equal outputs."""
    model = CuMo.from_pretrained(source)
    weights, generator = model.state_dict(), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.startswith("vision.") and ".mlp.fc1." in name:
            weights[name] = torch.cat([weight, weight])
        elif name.startswith("vision.") and name.endswith(".mlp.fc2.weight"):
            share = torch.rand(weight.shape, generator=generator)
            weights[name] = torch.cat([share * weight, (1 - share) * weight], dim=1)
    vision = replace(model.cfg.vision, hidden_dim=2 * model.cfg.vision.hidden_dim)
    wide = CuMo(replace(model.cfg, vision=vision))
    wide.load_state_dict(weights)
    wide.save_pretrained(folder)
    for file in Tokenizer.from_pretrained(source).files:
        copy_into(folder, file)
    state = read_state(source)
    write_json(folder / "train.json", {k: state[k] for k in ("finished", "config")})
