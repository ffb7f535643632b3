"""A step has one loss and one gradient, however its samples are split over rows, accumulated
batches and processes."""

import json
import shutil

import pytest
import torch
from PIL import Image
from test_fsdp import begin, end, server  # noqa: F401  a fixture for the processes
from tiny import TOKENIZER, tiny_cumo

import train
from cumo import IGNORE, IMAGE_TOKEN
from data.packing import collate, step_shares
from engine import fsdp

WORDS = (3, 22, 3, 11, 1, 20, 2, 7)  # learned tokens of the samples
PICTURES = {"every sample": range(8), "some": (1, 2, 3, 7), "one": (5,), "none": ()}
close = lambda a, b, **how: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, **how)


def whole_batch(pictures):
    """Eight rows of one sample each, with very different numbers of learned tokens."""
    torch.manual_seed(1)
    tokens, segments = torch.randint(97, (8, 36)), torch.ones(8, 36, dtype=torch.int64)
    labels = torch.full((8, 36), IGNORE)
    for row, words in enumerate(WORDS):
        if row in pictures:
            tokens[row, 2:11] = IMAGE_TOKEN
        labels[row, 13 : 13 + words] = tokens[row, 13 : 13 + words]
        segments[row, 13 + words :] = 0
    images = torch.randn(len(pictures), 3, 24, 24)
    return dict(tokens=tokens, labels=labels, segments=segments, images=images)


def split(batch, rows):
    """The same samples in batches of so many rows."""
    per_row = (batch["tokens"] == IMAGE_TOKEN).sum(1) // 9
    ends = [0, *per_row.cumsum(0).tolist()]
    return [{k: batch[k][r : r + rows] for k in ("tokens", "labels", "segments")}
            | {"images": batch["images"][ends[r] : ends[r + rows]]}
            for r in range(0, 8, rows)]  # fmt: skip


def step(model, batches, place=(0, 1)):
    """The loss of a step over these batches, and its gradients."""
    model.zero_grad()
    total = 0
    for batch, shares in zip(batches, step_shares(batches)):
        out = model(**collate(batch, 9, *place), shares=shares)
        out.loss.backward()
        total += out.loss.detach()
    grads = {
        n: p.grad if p.grad is None else fsdp.full(p.grad) for n, p in model.named_parameters()
    }
    return total, grads


def compare(model, pictures, splits):
    batch = whole_batch(pictures)
    loss, grads = step(tiny_cumo(experts=8 * hasattr(model.connector, "moe")).train(), [batch])
    for rows in splits:
        other, others = step(model, split(batch, rows), fsdp.world())
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-6)
        for name, grad in grads.items():
            if grad is None:
                assert others[name] is None or not others[name].any(), name
            else:
                close(others[name], grad, msg=f"{name}, {rows} rows")


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("experts", [0, 8], ids=["dense", "sparse"])
def test_any_split_over_rows_and_accumulation_is_the_same_step(experts, pictures):
    compare(tiny_cumo(experts).train(), PICTURES[pictures], (8, 4, 2, 1))


def in_processes(experts, pictures):
    model = fsdp.shard(tiny_cumo(experts).train(), "cpu", bf16=False)
    compare(model, pictures, (8, 4, 2))


@pytest.mark.parametrize("experts, pictures", [(8, "some"), (0, "one")])
def test_any_split_over_processes_is_the_same_step(experts, pictures):
    end(begin(2, in_processes, experts, tuple(PICTURES[pictures])))


def test_shares_count_what_each_mean_is_a_mean_of():
    a, b = split(whole_batch(PICTURES["some"]), 4)
    first, second = step_shares([a, b])
    assert first["lm"] == pytest.approx(sum(WORDS[:4]) / sum(WORDS))
    assert (first["clip"], first["mlp"], second["mlp"]) == (3 / 4, 3 / 4, 1 / 4)
    assert first["llm"] + second["llm"] == pytest.approx(1)
    nothing = dict(a, labels=torch.full((4, 36), IGNORE))
    assert [share["lm"] for share in step_shares([nothing, nothing])] == [0, 0]


def test_a_training_logs_the_same_step_for_any_split(tmp_path):
    """Through the loader and the packing: answers of 3, 86, 3 and 86 words, two with a picture."""
    tiny_cumo(8, vocab=1024).save_pretrained(tmp_path)
    shutil.copy(TOKENIZER, tmp_path)
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "a.png")
    samples = []
    for k, words in enumerate((3, 86, 3, 86)):
        asked, more = "What is this?" + " cat" * (86 - words), {}
        if k > 1:
            asked, more = "<image>\n" + asked, {"image": "a.png"}
        turns = [("human", asked), ("gpt", " ".join(["dog"] * words))]
        turns = [{"from": who, "value": text} for who, text in turns]
        samples.append({"id": str(k), "conversations": turns} | more)
    (tmp_path / "data.json").write_text(json.dumps(samples))
    flags = dict(init=str(tmp_path), data=str(tmp_path / "data.json"), image_folder=str(tmp_path),
                 row_tokens=170, upcycle="none", bf16=False, device="cpu", weights="fp32",
                 moments="fp32", template="mistral_instruct")  # fmt: skip
    found = []
    for rows, accumulate in ((4, 1), (2, 2), (1, 4)):
        more = dict(rows=rows, accumulate=accumulate, out=str(tmp_path / f"{rows}"))
        trainer = train.Trainer(train.resolve(flags | more, 3))
        batches = list(trainer.batches())
        assert [len(batch["tokens"]) for batch in batches] == [rows] * accumulate
        trainer.model.train()
        found.append(trainer.train_step(batches))
    whole = found[0]
    parts = whole["lm_loss"] + sum(
        0.1 * whole[f"{part}_balance"] + 0.01 * whole[f"{part}_z"] for part in ("clip", "mlp")
    )
    assert whole["loss"] == pytest.approx(parts, abs=2e-6), "the loss is the logged parts"
    for name in ("loss", "lm_loss", "clip_balance", "mlp_z", "clip_load", "mlp_entropy"):
        for other in found[1:]:
            close(torch.tensor(other[name]), torch.tensor(whole[name]), msg=name)
    for other in found[1:]:
        assert other["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
