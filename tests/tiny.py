"""Models of a few thousand parameters, for tests in milliseconds."""

import shutil
import sys
from pathlib import Path

import torch

from clip_moe import CLIPVision, CLIPVisionConfig
from cumo import IMAGE_TOKEN, CuMo, CuMoConfig
from data.weights import write_json, write_tensors
from llm import LLM, LLMConfig

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "data" / "mini" / "llm" / "tokenizer.json"


def tiny_cumo(experts=0, llm_experts=0, scales=(1,), seed=0, window=None, vocab=97):
    """A CuMo with 9 visual tokens an image; `experts` in CLIP and connector (0: dense)."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(image_size=24, patch_size=8, dim=24, hidden_dim=40, n_layers=3,
                              n_heads=2, scales=scales, num_experts=experts)  # fmt: skip
    llm = LLMConfig(vocab_size=vocab, dim=32, hidden_dim=56, n_layers=2, n_heads=4, n_kv_heads=2,
                    sliding_window=window, num_experts=llm_experts)  # fmt: skip
    model = CuMo(CuMoConfig(vision, llm, mlp_experts=experts))
    with torch.no_grad():  # larger than initial weights, so that differences show
        for p in model.llm.parameters():
            if p.dim() > 1:
                p.mul_(5)
    return model


def question(*runs, image_tokens=9):
    """A row of token ids; "i" in `runs` stands for an image: question(5, "i", 7)."""
    ids = []
    for run in runs:
        ids += [IMAGE_TOKEN] * image_tokens if run == "i" else [run]
    return ids


def tiny_weights(folder):
    """Flags that start a training from tiny random CLIP and LLM directories made in `folder`."""
    torch.manual_seed(0)
    clip = CLIPVision(
        CLIPVisionConfig(image_size=64, patch_size=16, dim=32, hidden_dim=48, n_layers=3, n_heads=2)
    )
    llm = LLM(LLMConfig(1024, dim=32, hidden_dim=48, n_layers=2, n_heads=2, n_kv_heads=1))
    for name, model, config in (("clip", clip, clip.cfg), ("llm", llm, llm.cfg)):
        write_tensors(folder / name, model.public_state_dict())
        write_json(folder / name / "config.json", config.to_hf())
    shutil.copy(TOKENIZER, folder / "llm")
    sizes = dict(samples=40, rows=2, row_tokens=256, accumulate=1, save_every=3)
    folders = dict(clip=str(folder / "clip"), llm=str(folder / "llm"))
    return folders | sizes | dict(plot=False)  # drawing takes longer than training


def command(weights, out, *more):
    """The command of a training: train.py, the flags `weights`, --out, and `more` words."""
    given = weights | {"out": out}
    flags = [f"--no-{name}" if value is False else f"--{name.replace('_', '-')}={value}"
             for name, value in given.items()]  # fmt: skip
    return [sys.executable, str(ROOT / "train.py"), *flags, *more]
