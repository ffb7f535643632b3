"""The peers of bench/speed.py that are written here, and processes that run a peer apart.

The device and the precision of all races are chosen here too: bfloat16 where the processor
multiplies it in hardware, float32 elsewhere.
"""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from engine.rate import has_fast_bf16
from mlp_moe import ACTIVATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if has_fast_bf16(DEVICE) else torch.float32


class DenseMLP(nn.Module):
    def __init__(self, dim, hidden, out, act):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(dim, hidden), nn.Linear(hidden, out), act

    def forward(self, x):
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class LoopMoE(nn.Module):
    """The sparse block as the original runs it: sample by sample, expert by expert."""

    def __init__(self, dim, hidden, out, act, num_experts=4, top_k=2):
        super().__init__()
        self.gate, self.top_k = nn.Linear(dim, num_experts, bias=False), top_k
        self.experts = nn.ModuleList(DenseMLP(dim, hidden, out, act) for _ in range(num_experts))
        self.out = out

    def forward(self, x):
        weights, choice = self.gate(x).float().softmax(-1).topk(self.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        samples = []
        for x_TD, weights_TK, choice_TK in zip(x, weights, choice):
            y = x_TD.new_zeros(len(x_TD), self.out)
            for e, expert in enumerate(self.experts):
                token, slot = torch.where(choice_TK == e)
                y = y.index_add(0, token, weights_TK[token, slot, None] * expert(x_TD[token]))
            samples.append(y)
        return torch.stack(samples)


class Process:
    """A script of this folder in a process of its own, with its own threads and memory:
    (line for its standard input) -> the numbers that it prints in reply."""

    def __init__(self, script, *words):
        words = [sys.executable, str(Path(__file__).with_name(script)), *map(str, words)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(words, text=True, **pipes)
        ready = self.process.stdout.readline()
        assert ready == "ready\n", f"{' '.join(words[1:])} did not start; run it by hand"

    def __call__(self, line=""):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return [float(x) for x in self.process.stdout.readline().split()]

    def close(self):
        self.process.communicate()
