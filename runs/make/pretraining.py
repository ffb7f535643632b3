"""What pretrain_llm.py and pretrain_clip.py share: the optimizer, its schedule, the export."""

import pathlib

import torch

from data.weights import write_json, write_tensors

MINI = pathlib.Path(__file__).resolve().parents[2] / "data" / "mini"


def export(folder, tensors, config):
    """Write a Hugging Face directory, in bfloat16 like most public weights."""
    write_tensors(folder, {name: t.to(torch.bfloat16) for name, t in tensors.items()})
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})


def adamw(parameters, lr):
    """AdamW with weight decay for matrices only."""
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def set_lr(optimizer, lr, step, steps):
    """Warm up for 100 steps, stay constant, decay to zero over the second half."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (step + 1) / 100) * min(1, 2 * (1 - step / steps))


def update(optimizer, parameters):
    """One step with the gradients of all `parameters`, clipped to norm 1."""
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
