"""The effect of int8 weights (engine/quant.py) on memory and answers.

    python bench/quant.py                            # writes bench/quant.json

The miniature of the demo (out/stage3) takes the exam of eval.py. SmolLM2-135M-Instruct (weights/,
see runs/smollm2.sh) reads this project's documents, at the commit in the results: its loss a token,
and how often its most probable next token is that of the float32 weights.
"""

import argparse
import json
import pathlib
import sys
from functools import partial

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from bench.speed import conditions
from data.exam import SPLITS, exam
from data.flags import run
from data.tokenizer import Tokenizer
from engine.quant import quantize
from eval import accuracy, answer_batch
from llm import LLM
from sample import load_model

PRECISIONS = {"float32": (torch.float32, ""), "bfloat16": (torch.bfloat16, ""),
              "int8": (torch.float32, "int8")}  # fmt: skip


def megabytes(module):
    return sum(t.nbytes for t in module.state_dict().values()) / 2**20


@torch.no_grad()
def reading(folder, length=512):
    """Loss a token of our own documents, and the share of next tokens equal to float32's."""
    tokenizer, greedy, rows = Tokenizer.from_pretrained(folder), {}, {}
    text = "".join(
        (ROOT / name).read_text() for name in ("README.md", "docs/LOG.md", "data/MIXTURE.md")
    )
    ids = torch.tensor(tokenizer.encode(text))
    ids = ids[: len(ids) // length * length].view(-1, length)
    for name, (dtype, quant) in PRECISIONS.items():
        llm = LLM.from_pretrained(folder, dtype).eval()
        llm = quantize(llm) if quant else llm
        logits = torch.cat([llm(row[None])[:, :-1].float() for row in ids])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        greedy[name] = logits.argmax(-1)
        same = (greedy[name] == greedy["float32"]).float().mean()
        rows[name] = {"megabytes": megabytes(llm), "loss": loss.item(), "same": same.item()}
        print(f"SmolLM2, {name}: {rows[name]}")
    return {"tokens": ids.numel(), **rows}


def answering(folder, n):
    """Share of exact answers of the miniature, and the megabytes of its language model."""
    rows, tokenizer = {}, Tokenizer.from_pretrained(folder)
    for name, (dtype, quant) in PRECISIONS.items():
        model = load_model(folder, "cpu", dtype, quant)
        rows[name] = {"megabytes": megabytes(model.llm)}
        ask = partial(answer_batch, model, tokenizer)
        for split in SPLITS:
            rows[name][split] = accuracy(ask, exam(split, n, 1), 50, f"{name} {split}")["all"]
        print(f"miniature, {name}: {rows[name]}")
    return {"questions": n, **rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default=str(ROOT / "out" / "stage3"))
    parser.add_argument("--llm", default=str(ROOT / "weights" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--n", type=int, default=800, help="questions a split")
    args = parser.parse_args()
    result = conditions() | {"command": "python bench/quant.py"}
    result |= {"smollm2": reading(args.llm), "miniature": answering(args.model, args.n)}
    if args != parser.parse_args([]):
        print("bench/quant.json is not written: it has the results of the defaults")
        return
    (ROOT / "bench" / "quant.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
