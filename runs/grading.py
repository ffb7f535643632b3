"""Grade a model on the exam without generating: one forward pass over questions and answers.

    right, loss = grade(model, tokenizer, exam("new", 4000, 1))      # two arrays [4000]

Greedy decoding gives the right answer if and only if each of its tokens is the most likely one
after the right tokens before it: the first wrong token ends both. So a single pass over question
and answer says whether the model would answer right, several times faster than generation. The
last of the tokens is the one that ends an answer. An answer counts as wrong if the model writes the
same text with other tokens than the tokenizer, such as " ca" + "t" for " cat".

The same pass gives the loss of the right answer: -log p(answer), in nats, the sum over its tokens.
A difference that is too small to change the most likely token still shows in the loss.
"""

from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cumo import CuMo
from data.chat import IGNORE, IMAGE_TAG
from data.exam import SPLITS, exam
from data.llava import encode
from data.packing import assemble, collate
from data.tokenizer import Tokenizer
from data.world import records
from engine.rate import has_fast_bf16
from eval import EvalConfig
from mlp_moe import SparseMoE


@torch.no_grad()
def grade(model, tokenizer, asked, batch=50, label=""):
    """Questions of data/exam.py [(type, question, answer, picture)] -> (right [n] bool, loss [n]
    float32)."""
    code = partial(
        encode, tokenizer=tokenizer, template=model.cfg.template, image_tokens=model.image_tokens,
        image_size=model.cfg.vision.image_size, image_mode=model.cfg.image_mode)  # fmt: skip
    right, loss = [], []
    for start in tqdm(range(0, len(asked), batch), desc=label, leave=False):
        rows = []
        for kind, question, answer, picture in asked[start : start + batch]:
            turns = records([(kind, f"{IMAGE_TAG}\n{question}", answer)])
            rows.append([code({"id": question, "images": [picture], "conversations": turns})[:3]])
        longest = max(len(row[0][0]) for row in rows)
        given = collate(assemble(rows, longest), model.image_tokens, device=model.device.type)
        labels = given.pop("labels")[:, 1:]
        with torch.autocast(model.device.type, torch.bfloat16, has_fast_bf16(model.device)):
            logits = model(**given).logits[:, :-1]
        learned = labels != IGNORE
        logits, labels, row = logits[learned].float(), labels[learned], learned.nonzero()[:, 0]
        wrong = torch.bincount(row, (logits.argmax(-1) != labels).float(), len(rows))
        right.append((wrong == 0).cpu())
        loss.append(torch.bincount(row, F.cross_entropy(logits, labels, reduction="none")).cpu())
    return torch.cat(right).numpy(), torch.cat(loss).float().numpy()


@cache
def questions_of(split, n):
    """The exam's questions of a split: drawing them takes half as long as grading a model."""
    return exam(split, n, EvalConfig.seed)


def parameters(model):
    """(all, active) parameters of a model; a token activates K of the E experts."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for module in model.modules():
        if isinstance(module, SparseMoE):
            share = 1 - module.gate.top_k / len(module.gate.weight)
            idle += round(share * sum(p.numel() for p in module.experts.parameters()))
    return total, total - idle


def examine(folder, n):
    """Grade the checkpoint in `folder` on n questions a split; the answers go to its exam.npz.
    Returns accuracy and loss by split, and the model's parameters."""
    model = CuMo.from_pretrained(folder, device=EvalConfig.device).eval()
    tokenizer = Tokenizer.from_pretrained(folder)
    graded = [grade(model, tokenizer, questions_of(split, n), label=split) for split in SPLITS]
    right, loss = map(np.stack, zip(*graded))
    np.savez(folder / "exam.npz", right=right, loss=loss)
    total, active = parameters(model)
    by_split = lambda values: {split: round(float(x.mean()), 5) for split, x in zip(SPLITS, values)}
    return {"accuracy": by_split(right), "loss": by_split(loss), "parameters": total,
            "active_parameters": active}  # fmt: skip
