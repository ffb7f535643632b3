"""Weights & Biases: a second place for the metrics of train.py."""

import dataclasses
from pathlib import Path


def open_wandb(cfg):
    """Start a run of wandb, or continue that of a resumed stage; cfg: a train.TrainConfig.
    ValueError if wandb is not installed."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs a package: pip install wandb") from None
    name = f"{Path(cfg.out).name}-stage{cfg.stage}"
    return wandb.init(project="nanocumo", name=name, config=dataclasses.asdict(cfg), resume="allow",
                      id=name)  # fmt: skip
