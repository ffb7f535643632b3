"""Fine-tuning at a learning rate below bf16's rounding step: which optimizer still learns?

    python bench/rounding.py        # about a minute on one core

A small language model predicts the next character from the 16 before it. It is pretrained on the
emoji world's captions of things and on very few questions; then it learns the questions, in 1,000
steps at 4e-6, the rate of CuMo's stage 3. Every run starts from the same weights, which bf16
represents exactly, and sees the same batches. Runs differ in the precision of weights and moments
(engine/optim.py). "nearest" is torch.optim.AdamW on bf16 parameters. All arithmetic but the
optimizer's is float32, so only rounding is compared.

Writes bench/rounding.json: each run's loss (means of 20 steps), its largest deviation from the
float32 run over any 20 steps, its deviation over the last 100, and the measured bytes a parameter.
Draws bench/rounding.png.
"""

import argparse
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from data import world
from data.weights import write_json
from engine.optim import WEIGHTS, AdamW
from extras.plots import pyplot, save_figure

LR, STEPS, CONTEXT, SMOOTH = 4e-6, 1000, 16, 20
NEAREST = ("nearest", "nearest")
RUNS = [("fp32", "fp32"), ("bf16-master", "fp32"), ("bf16-sr", "fp32"), ("bf16-sr", "bf16"),
        ("fp32", "bf16"), NEAREST]  # fmt: skip


def read(task, scenes, seed):
    """Characters of `scenes` captions, or of two questions and answers for each scene."""
    rng, lines = np.random.default_rng(seed), []
    for _ in range(scenes):
        scene = world.sample_scene(rng, "train", "things")
        asked = world.questions(scene, rng, 2, world.KINDS) if task == "ask" else []
        lines.append(" ".join(f"{q} {a}." for _, q, a in asked) or world.caption(scene))
    return torch.tensor(list("\n".join(lines).encode()))


def initial(hidden, seed=0):
    """Weights of an embedding and two layers that predict a character from the last 16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {(128, 16): 1, (hidden, CONTEXT * 16): (CONTEXT * 16) ** -0.5, (128, hidden): 0.01}
    return [std * torch.randn(shape, generator=generator) for shape, std in shapes.items()]


def loss_of(params, windows):
    embed, w1, w2 = (p.float() for p in params)
    hidden = F.gelu(embed[windows[:, :-1]].flatten(1) @ w1.T)
    return F.cross_entropy(hidden @ w2.T, windows[:, -1])


def train(params, optimizer, text, steps, batch):
    """Train in place -> the loss of each step. A batch depends only on its step's number."""
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        at = torch.randint(len(text) - CONTEXT, (batch, 1), generator=generator)
        loss = loss_of(params, text[at + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pretrained(hidden, steps, batch, scenes):
    params = [nn.Parameter(w) for w in initial(hidden)]
    text = torch.cat([read("caption", scenes, 0), read("ask", scenes // 20, 0)])
    train(params, torch.optim.AdamW(params, lr=1e-3), text, steps, batch)
    return [p.detach().bfloat16() for p in params]


def fine_tune(weights, moments, start, text, batch):
    """Train for 1,000 steps -> (loss of each step, bytes a parameter)."""
    dtype = torch.bfloat16 if weights == "nearest" else WEIGHTS[weights]
    params = [nn.Parameter(w.to(dtype, copy=True)) for w in start]
    if weights == "nearest":
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0)
    else:
        optimizer = AdamW(params, lr=LR, weights=weights, moments=moments)
    losses = train(params, optimizer, text, STEPS, batch)
    held = [x for p in params for x in (p, p.grad, *optimizer.state[p].values())]
    size = sum(x.nbytes for x in held if torch.is_tensor(x) and x.dim())
    return losses, size / sum(p.numel() for p in params)


def deviations(losses, exact):
    """(largest deviation from the float32 run over any 20 steps, deviation over the last 100)"""
    run, fp32 = (np.reshape(x, (-1, SMOOTH)).mean(1) for x in (losses, exact))
    return float(abs(run / fp32 - 1).max()), float(
        np.mean(losses[-100:]) / np.mean(exact[-100:]) - 1
    )


def draw(rows, file):
    plt = pyplot()
    if not plt:
        return
    curves = {(row["weights"], row["moments"]): np.array(row["loss"]) for row in rows}
    exact, five = curves["fp32", "fp32"], np.ones(5) / 5
    steps = (np.arange(len(exact)) + 0.5) * SMOOTH
    shown = {  # Okabe and Ito's colors, safe for color blindness
        ("fp32", "fp32"): ("float32, 16 bytes a parameter", "#000000", "-", 2),
        ("bf16-sr", "fp32"): ("bf16, stochastic rounding, 12", "#56B4E9", "--", 2),
        ("bf16-sr", "bf16"): ("... bf16 moments, 8", "#E69F00", "-.", 1.5),
        NEAREST: ("plain bf16, rounded to nearest", "#D55E00", "-", 2),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for key, (label, color, dash, width) in shown.items():
        style = dict(color=color, linestyle=dash, linewidth=width)
        # a moving mean of 100 steps, because batches differ in difficulty
        left.plot(steps[2:-2], np.convolve(curves[key], five, "valid"), label=label, **style)
        if key != ("fp32", "fp32"):
            right.plot(steps, 100 * (curves[key] / exact - 1), **style)
    left.set(title=f"Loss at a learning rate of {LR:.0e}", xlabel="step", ylabel="cross-entropy")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    left.set_ylim(bottom=left.get_ylim()[0] - 0.03)
    right.axhspan(-1, 1, color="#000000", alpha=0.12, linewidth=0)
    right.text(990, -0.85, "within 1 % of float32", fontsize=8, ha="right")
    right.set(title="Deviation from float32, %", xlabel="step")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, file, dpi=100)


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False).parse_args()
    hidden, batch, rows, exact = 512, 64, [], None
    start, text = pretrained(hidden, 1000, batch, 3000), read("ask", 3000, 1)
    for weights, moments in RUNS:
        began = time.perf_counter()
        losses, size = fine_tune(weights, moments, start, text, batch)
        exact = exact or losses
        most, last = deviations(losses, exact)
        means = np.reshape(losses, (-1, SMOOTH)).mean(1).round(5).tolist()
        rows.append({"weights": weights, "moments": moments, "bytes_per_parameter": round(size, 3),
                     "largest_deviation": round(most, 5), "final_deviation": round(last, 5),
                     "loss": means})  # fmt: skip
        print(f"{weights:12} {moments:8} {size:6.2f} bytes  loss {means[0]:.4f} -> {means[-1]:.4f}"
              f"  deviation at most {most:.2%}, at the end {last:+.2%}"
              f"  {time.perf_counter() - began:.0f} s")  # fmt: skip
    spread = [round(w.float().std().item(), 4) for w in start]
    content = {"command": "python bench/rounding.py", "torch": torch.__version__, "lr": LR,
               "steps": STEPS, "hidden": hidden, "batch": batch, "steps_a_point": SMOOTH,
               "parameters": sum(w.numel() for w in start), "std_of_the_weights": spread,
               "rows": rows}  # fmt: skip
    write_json(ROOT / "bench" / "rounding.json", content)
    draw(rows, ROOT / "bench" / "rounding.png")


if __name__ == "__main__":
    main()
