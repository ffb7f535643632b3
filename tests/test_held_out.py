"""A held-out LLaVA file: its loss does not depend on packing, an answer is right or it is not."""

import json
import shutil
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import TOKENIZER, tiny_cumo

import eval as evaluation
import train
from data.chat import IGNORE
from data.llava import LlavaData, encode
from data.packing import pack
from data.tokenizer import Tokenizer
from engine import held_out

TOKENS = Tokenizer.from_pretrained(TOKENIZER.parent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 records: one turn or two, with a picture or without, and one that teaches nothing."""
    folder, rows = tmp_path_factory.mktemp("own"), []
    for i in range(12):
        Image.radial_gradient("L").rotate(30 * i).convert("RGB").save(folder / f"{i}.png")
        turns = []
        for k in range(1 + i % 2):
            tag = "<image>\n" if i % 3 and not k else ""
            turns.append({"from": "human", "value": f"{tag}What is {i}?"})
            turns.append({"from": "gpt", "value": "a red cat " * (1 + i % 4)})
        picture = {"image": f"{i}.png"} if i % 3 else {}
        rows.append({"id": f"n{i}", "conversations": turns} | picture)
    rows.append({"id": "empty", "conversations": [turns[0] | {"value": "Hello?"}]})
    (folder / "val.json").write_text(json.dumps(rows))
    model = tiny_cumo(experts=4, vocab=1024)
    model.save_pretrained(folder / "model")
    shutil.copy(TOKENIZER, folder / "model")
    return folder


@pytest.fixture
def model():
    return tiny_cumo(experts=4, vocab=1024).eval()


@pytest.fixture
def data(folder):
    return LlavaData(folder / "val.json", folder)


def encoded(model, data):
    code = partial(encode, tokenizer=TOKENS, template=model.cfg.template, image_size=24,
                   image_tokens=model.image_tokens, image_mode=model.cfg.image_mode)  # fmt: skip
    return [code(data[i]) for i in range(len(data))]


@torch.no_grad()
def plain_loss(model, samples):
    """The mean over all learned tokens, each sample alone and unpacked."""
    losses = []
    for ids, labels, images, _ in samples:
        images = torch.stack([torch.as_tensor(x) for x in images]) if images else None
        logits = model(torch.tensor([ids]), images).logits[0, :-1]
        losses.append(F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="none",
                                      ignore_index=IGNORE))  # fmt: skip
    learned = sum(label != IGNORE for sample in samples for label in sample.labels)
    return torch.cat(losses).sum().item() / learned


@pytest.mark.parametrize("rows, length", [(1, 200), (2, 256), (8, 1024)])
def test_the_loss_does_not_depend_on_packing(rows, length, model, data):
    samples = encoded(model, data)
    batches = pack([one[:3] for one in samples], rows, length)
    total, learned = held_out.loss_of(model, batches, "cpu", nullcontext)
    assert total / learned == pytest.approx(plain_loss(model, samples), rel=1e-5)
    assert not model.training


def test_answers_do_not_depend_on_the_batch_and_follow_the_true_turns(model, data):
    found = [held_out.judge(model, TOKENS, data, batch, nullcontext) for batch in (1, 5, 100)]
    assert found[0]["answers"] == found[1]["answers"] == found[2]["answers"]
    assert found[0]["loss"] == pytest.approx(found[2]["loss"], rel=1e-5)
    assert [one.id for one in found[0]["answers"]][:4] == ["n0", "n1", "n1", "n2"]
    assert found[0]["answers"][2].question == "What is 1?"
    assert [one.truth for one in found[0]["answers"]][:2] == ["a red cat", "a red cat a red cat"]
    assert len(found[0]["left_out"]) == 1 and "it has no answer" in found[0]["left_out"][0]


def test_an_answer_is_right_only_if_its_text_is_the_same(model, data, monkeypatch):
    """The model says the truth, and then what it likes after the end token."""
    asked = [one for sample, coded in zip(data, encoded(model, data))
             for one in held_out.questions_of(coded, sample, model.image_tokens)]  # fmt: skip
    truths = iter(asked)

    def generate(tokens, images, segments, max_new_tokens, eos_token_id):
        rows, wrong = [], asked[3][1]
        for _ in tokens:
            ids = next(truths)[1]
            said = ids if ids is not wrong else [ids[0] + 1, *ids[1:]]
            rows.append((said + [77] * max_new_tokens)[:max_new_tokens])
        return torch.tensor(rows)

    monkeypatch.setattr(model, "generate", generate)
    found = held_out.judge(model, TOKENS, data, 4, nullcontext)
    assert [one.right for one in found["answers"]] == [k != 3 for k in range(len(asked))]
    assert found["exact"] == pytest.approx(1 - 1 / len(asked))


def test_eval_prints_loss_and_exact_answers_of_own_data(folder, tmp_path, monkeypatch, capsys):
    flags = ["--model", folder / "model", "--data", folder / "val.json", "--device", "cpu",
             "--image-folder", folder, "--out", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    evaluation.main()
    said = capsys.readouterr().out
    assert "18 answers of 12 records" in said and "  loss    " in said
    assert "  exact   0.0%, 0 of 18" in said and "1 records left out: " in said
    content = json.loads((tmp_path / "out" / "own_data.json").read_text())
    assert len(content["answers"]) == 18 and content["exact"] == 0 and content["expert_load"]
    assert f"  loss    {content['loss']:.4f} nats a token" in said


def test_eval_leaves_no_empty_folder(folder, tmp_path, monkeypatch):
    for flags in (["--model", str(tmp_path / "nowhere")], []):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--out", str(tmp_path / "out"), *flags])
        with pytest.raises(ValueError):
            evaluation.main()
        assert not any(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["eval.py", "--out", str(folder / "0.png" / "out")])
    with pytest.raises(ValueError, match="0.png/out cannot be written"):
        evaluation.main()
    with pytest.raises(ValueError, match="--seed 3 has no effect on given questions"):
        evaluation.check_flags(evaluation.EvalConfig(data="a.json", seed=3), {"seed", "data"})


# ------------------------------------------------------------------------------ train.py --val


@pytest.fixture
def flags(folder, tmp_path):
    own = dict(data=str(folder / "val.json"), image_folder=str(folder), device="cpu", bf16=False)
    return own | dict(init=str(folder / "model"), upcycle="none", rows=2, row_tokens=80,
                      epochs=3, save_every=4, plot=False, lr=1e-3)  # fmt: skip


def rows_of(out):
    lines = (out / "stage3" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_held_out_loss_is_logged_and_changes_nothing_else(flags, folder, tmp_path, capsys):
    val = {"val": str(folder / "val.json")}
    for name, more in (("with", val), ("without", {})):
        cfg = train.resolve(flags | more | {"out": str(tmp_path / name)}, 3)
        assert train.train_stage(cfg)
    found, plain = rows_of(tmp_path / "with"), rows_of(tmp_path / "without")
    due = [row["step"] for row in found if "val_loss" in row]
    assert due == sorted({1, *range(4, len(found) + 1, 4), len(found)}) and len(due) > 2
    assert [row["loss"] for row in found] == [row["loss"] for row in plain]
    assert [row["grad_norm"] for row in found] == [row["grad_norm"] for row in plain]
    first, *_, last = [row["val_loss"] for row in found if "val_loss" in row]
    assert last < first
    done = evaluation.CuMo.from_pretrained(tmp_path / "with" / "stage3").eval()
    own = plain_loss(done, encoded(done, LlavaData(folder / "val.json", folder)))
    assert last == pytest.approx(own, rel=1e-5), "the loss of the finished weights"
    assert "held-out loss" in capsys.readouterr().out
    cfg = train.resolve(flags | {"out": str(tmp_path / "with")}, 3)
    assert train.train_stage(cfg), "--val may change: it decides nothing about the weights"


def test_a_held_out_file_without_an_answer_is_one_line(flags, tmp_path, folder):
    turns = [{"from": "human", "value": "What? " * 60}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "long.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    more = {"val": str(tmp_path / "long.json"), "out": str(tmp_path / "out")}
    with pytest.raises(
        ValueError, match="--val .*long.json: no record can be used; .*--row-tokens"
    ):
        train.train_stage(train.resolve(flags | more, 3))
