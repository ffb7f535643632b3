"""torch.compile for training: what is compiled, and when.

Blocks are compiled one by one. All blocks of a model share their code, so a 32-layer model takes as
long as one layer. The rows of the language model have one length. The number of images differs from
batch to batch, and the compiler makes new code for a single image and again beyond some sizes. Each
takes 14 to 44 seconds, so on a GPU `warm_up` meets every number of images before the first step.
"""

import time

import torch

from engine import fsdp

LIMIT = 64  # variants of a block; beyond, PyTorch silently stops compiling (its default: 8)


def compile_blocks(model):
    """Compile the blocks of CLIP and of the language model, and the connector, in place."""
    torch._dynamo.config.recompile_limit = LIMIT
    for block in model.llm.model.layers:
        block.compile(dynamic=False)
    for block in (*model.vision.layers, model.connector):
        block.compile(dynamic=True)


def warm_up(trainer):
    """Run the image half forward and backward for every number of images that a batch can hold."""
    cfg, model = trainer.cfg, trainer.model
    if not cfg.compile or not cfg.device.startswith("cuda"):
        return
    start, most = time.perf_counter(), cfg.rows * cfg.row_tokens // model.image_tokens
    most, side = most // fsdp.world()[1], model.cfg.vision.image_size
    for n in range(1, most + 1):
        images = torch.zeros(n, 3, side, side, device=cfg.device)
        with torch.autocast(cfg.device, torch.bfloat16, cfg.bf16 and cfg.weights == "fp32"):
            x = model.encode_images(images)
        if x.requires_grad:
            x.float().sum().backward()
        model.zero_grad(set_to_none=True)
        if trainer.stop:
            return
    if most and fsdp.is_main():
        print(f"compiled for 1 to {most} images a batch in {time.perf_counter() - start:.0f} s")
