"""torch.compile for training: what is compiled, and when.

Blocks are compiled one by one. All blocks of a model share their code, so a 32-layer model takes as
long as one layer. The rows of the language model have one length. The number of images differs from
batch to batch, and the compiler makes new code for a single image and again beyond some sizes. Each
takes 14 to 44 seconds, so `warm_up` meets the numbers of images before the first step.
"""

import time

import numpy as np
import torch

from data.chat import IGNORE, IMAGE_TOKEN
from data.packing import assemble, collate
from engine import fsdp

LIMIT = 64  # variants of a block; beyond, PyTorch silently stops compiling (its default: 8)


def compile_blocks(model):
    """Compile the blocks of CLIP and of the language model, and the connector, in place."""
    torch._dynamo.config.recompile_limit = LIMIT
    for block in model.llm.model.layers:
        block.compile(dynamic=False)
    for block in (*model.vision.layers, model.connector):
        block.compile(dynamic=True)


def warm_up(trainer, most):
    """A forward and backward pass for each number of images up to `most`, what the memory estimate
    counts for a rank. Held-out losses, and batches with more images, compile when they are met."""
    cfg, model, start = trainer.cfg, trainer.model, time.perf_counter()
    if not cfg.compile:
        return
    rows, side = cfg.rows // fsdp.world()[1], model.cfg.vision.image_size
    most = min(most, rows * ((cfg.row_tokens - 2) // model.image_tokens))

    def row(n_images):  # one sample: images, then two tokens, of which the second is learned
        ids = [IMAGE_TOKEN] * (n_images * model.image_tokens) + [0, 0]
        return [
            (
                ids,
                [IGNORE] * (len(ids) - 1) + [0],
                [np.zeros((3, side, side), np.float32)] * n_images,
            )
        ]

    for n in range(most + 1):
        batch = assemble([row(n // rows + (r < n % rows)) for r in range(rows)], cfg.row_tokens)
        given = collate(batch, model.image_tokens, device=cfg.device)
        with torch.autocast(cfg.device, torch.bfloat16, cfg.bf16 and cfg.weights == "fp32"):
            loss = model(**given).loss
        if loss.requires_grad:
            loss.backward()
        model.zero_grad(set_to_none=True)
        if fsdp.any_rank(trainer.stop, cfg.device):
            return
    if fsdp.is_main():
        print(f"compiled for 0 to {most} images a batch in {time.perf_counter() - start:.0f} s")
