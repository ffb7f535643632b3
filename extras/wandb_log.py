"""Weights & Biases: a second place for the metrics of train.py."""

import dataclasses
from pathlib import Path


def open_wandb(cfg):
    """A run to log to, continued if the stage is resumed. ValueError if wandb is not installed.

    cfg: a train.TrainConfig.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs a package: pip install wandb") from None
    name = f"{Path(cfg.out).name}-stage{cfg.stage}"
    return wandb.init(project="nanocumo", name=name, config=dataclasses.asdict(cfg), resume="allow",
                      id=name)  # fmt: skip
