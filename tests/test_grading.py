"""Grading in one pass says what generation says; a wide CLIP starts as the narrow one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ROOT, TOKENIZER, tiny_cumo

from cumo import CuMo
from data.chat import IGNORE, render
from data.exam import exam
from data.images import preprocess
from data.packing import assemble, collate
from data.tokenizer import Tokenizer
from data.weights import copy_into, write_json
from eval import answer_batch
from runs import grading
from runs.grading import examine, grade
from runs.wide import widen

TOKENS = Tokenizer.from_pretrained(TOKENIZER.parent)


def coded(model, question, answer, picture):
    """(ids, labels, images) of a question with its answer."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    ids, labels = render(turns, TOKENS, model.cfg.template, model.image_tokens, n_images=1)
    return ids, labels, [preprocess(picture, model.cfg.vision.image_size, "pad").numpy()]


@pytest.fixture(scope="module")
def asked():
    return exam("new", 36, 1)


@pytest.fixture(scope="module")
def model(asked):
    """A tiny sparse CuMo that has learned the answers to every other question by heart."""
    model = tiny_cumo(experts=4, vocab=881)
    model.cfg.template = "mistral_instruct"
    rows = [[coded(model, *one[1:])] for one in asked[::2]]
    batch = collate(assemble(rows, max(len(row[0][0]) for row in rows)), model.image_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_one_pass_grades_as_generation_does(model, asked):
    right, _ = grade(model, TOKENS, asked, batch=7)
    _, questions, truths, pictures = zip(*asked)
    said = answer_batch(model, TOKENS, questions, pictures)
    assert right.tolist() == [text == truth for text, truth in zip(said, truths)]
    assert 0.3 < right.mean() < 0.9, "some right and some wrong, or the test shows nothing"


def test_loss_is_the_sum_over_the_tokens_of_the_right_answer(model, asked, monkeypatch):
    monkeypatch.setattr(grading, "has_fast_bf16", lambda device: False)
    _, loss = grade(model, TOKENS, asked, batch=7)
    for one, found in zip(asked, loss):
        ids, labels, images = coded(model, *one[1:])
        with torch.no_grad():
            logits = model(torch.tensor([ids]), torch.tensor(np.stack(images))).logits[0]
        learned = [i for i, label in enumerate(labels) if label != IGNORE]
        assert ids[learned[-1]] == TOKENS.eos, "the end of the answer counts"
        slow = sum(F.cross_entropy(logits[i - 1], torch.tensor(ids[i])).item() for i in learned)
        assert found == pytest.approx(slow, rel=1e-4, abs=1e-5)


def test_examine_keeps_every_answer(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    copy_into(tmp_path, TOKENIZER)
    summary = examine(tmp_path, 6)
    with np.load(tmp_path / "exam.npz") as kept:
        right, loss = kept["right"], kept["loss"]
    assert right.shape == loss.shape == (3, 6) and right.dtype == bool and (loss > 0).all()
    assert summary["accuracy"]["pairs"] == pytest.approx(right[1].mean(), abs=1e-5)
    assert summary["loss"]["style"] == pytest.approx(loss[2].mean(), abs=1e-5)
    assert summary["active_parameters"] < summary["parameters"]


@pytest.mark.slow
def test_one_pass_grades_the_demo_as_generation_does():
    folder = ROOT / "out" / "stage3"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("needs a finished demo in out/")
    model, tokenizer = CuMo.from_pretrained(folder).eval(), Tokenizer.from_pretrained(folder)
    asked = exam("new", 60, 1) + exam("pairs", 60, 1)
    right, _ = grade(model, tokenizer, asked)
    _, questions, truths, pictures = zip(*asked)
    said = answer_batch(model, tokenizer, questions, pictures)
    differ = [one[1:3] for one, ok, text in zip(asked, right, said) if ok != (text == one[2])]
    assert not differ, "a near tie, or the same text with other tokens"


# ------------------------------------------------------------------------------ a wide CLIP


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(a dense model, the same with a wide CLIP)"""
    folder, narrow = tmp_path_factory.mktemp("wide"), tiny_cumo(vocab=881)
    narrow.save_pretrained(folder / "stage2")
    copy_into(folder / "stage2", TOKENIZER)
    state = {"finished": True, "config": {"stage": 2}, "crc32": {"model.safetensors": "0"}}
    write_json(folder / "stage2" / "train.json", state)
    widen(folder / "stage2", folder / "wide" / "stage2")
    return narrow, CuMo.from_pretrained(folder / "wide" / "stage2"), folder / "wide" / "stage2"


def test_a_wide_clip_gives_the_outputs_of_the_narrow_one(wide):
    narrow, model, folder = wide
    assert model.cfg.vision.hidden_dim == 2 * narrow.cfg.vision.hidden_dim
    images = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_images(images), narrow.encode_images(images),
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
    assert Tokenizer.from_pretrained(folder).encode("a cat") == TOKENS.encode("a cat")


def test_both_halves_of_a_wide_mlp_learn_something_of_their_own(wide):
    _, model, _ = wide
    model.encode_images(torch.randn(2, 3, 24, 24)).square().sum().backward()
    for layer in model.vision.layers[:-1]:  # the last one is not used
        first, second = layer.mlp.fc1.weight.grad.chunk(2)
        # AdamW ignores the size of a gradient, so it is the direction that must differ.
        assert F.cosine_similarity(first, second).max() < 0.999
