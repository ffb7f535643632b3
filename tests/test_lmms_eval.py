"""A CuMo gives lmms-eval the answers that it gives elsewhere. Skipped without lmms-eval."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from refused import refusal
from tiny import ROOT, TOKENIZER, tiny_cumo

import eval as evaluation
from data.tokenizer import Tokenizer
from engine.conversation import Conversation

pytest.importorskip("lmms_eval.api")
from lmms_eval.api.instance import Instance

from extras import lmms_eval as extra

TASK = """
task: scenes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function seen.pictures
doc_to_text: question
doc_to_target: answer
process_results: !function seen.right
generation_kwargs:
  until: []
  max_new_tokens: 48
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
SEEN = """
from pathlib import Path
from PIL import Image

def pictures(doc):
    return [Image.open(Path(__file__).parent / doc["image"])]

def right(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


def make_task(folder, n):
    """lmms-eval's task `scenes`: the questions and pictures of eval.py's split `seen`."""
    folder.mkdir()
    rows = []
    for k, (kind, question, answer, image) in enumerate(evaluation.exam("new", n, seed=1)):
        image.save(folder / f"{k}.png")
        rows.append({"kind": kind, "question": question, "answer": answer, "image": f"{k}.png"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scenes.yaml").write_text(TASK.format(folder=folder))
    (folder / "seen.py").write_text(SEEN)


def evaluate(folder, model, tokenizer):
    """The score and the answers according to lmms-eval."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False)
    examinee = extra.Examinee(model, tokenizer)
    results = simple_evaluate(model=examinee, tasks=["scenes"], task_manager=manager,
                              log_samples=True, bootstrap_iters=0)  # fmt: skip
    rows = sorted(results["samples"]["scenes"], key=lambda row: row["doc_id"])
    return results["results"]["scenes"]["right,none"], [row["filtered_resps"][0] for row in rows]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_lmms_eval_gives_the_answers_and_the_score_of_eval(tmp_path, offline):
    make_task(tmp_path / "task", n=8)
    model = tiny_cumo(experts=4, vocab=1024).eval()
    tokenizer = Tokenizer.from_pretrained(TOKENIZER.parent)
    asked = evaluation.exam("new", 8, seed=1)
    ours = [evaluation.answer_batch(model, tokenizer, [q], [image])[0] for _, q, _, image in asked]
    score, answers = evaluate(tmp_path / "task", model, tokenizer)
    assert answers == ours and any(ours)
    assert score == sum(a == right for a, (_, _, right, _) in zip(ours, asked)) / 8


@pytest.mark.slow
def test_trained_miniature_scores_the_same_under_both(tmp_path, offline):
    path = ROOT / "out" / "stage3"
    if not path.is_dir():
        pytest.skip("needs the trained miniature: runs/demo.sh")
    model = evaluation.CuMo.from_pretrained(path).eval()
    tokenizer = Tokenizer.from_pretrained(path)
    make_task(tmp_path / "task", n=80)
    ask = lambda *asked: evaluation.answer_batch(model, tokenizer, *asked)
    ours = evaluation.accuracy(ask, evaluation.exam("new", 80, seed=1), batch=1)["all"]
    score, _ = evaluate(tmp_path / "task", model, tokenizer)
    assert score == pytest.approx(ours) and score > 0.5


# ----------------------------------------------------------------------- requests by hand


@pytest.fixture
def examinee():
    model = tiny_cumo(experts=4, vocab=1024).eval()
    examinee = extra.Examinee(model, Tokenizer.from_pretrained(TOKENIZER.parent), 12)
    images = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    examinee.task_dict["t"] = {"test": [{"see": images[:1]}, {"see": images}, {"see": None}]}
    return examinee


def request(*arguments, kind="generate_until"):
    about = {"task": "t", "doc_id": 0, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=about)


def show(doc):
    return doc["see"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_answer_is_a_conversations_with_one_picture_several_or_none(number, examinee, monkeypatch):
    monkeypatch.setattr(extra, "has_fast_bf16", lambda _: False)  # a conversation is in float32
    ask = request("What is it?", {"max_new_tokens": 9}, show, number, "t", "test")
    (answer,) = examinee.generate_until([ask])
    talk = Conversation(examinee.model, examinee.tokenizer, max_new_tokens=9)
    images = examinee.task_dict["t"]["test"][number]["see"] or []
    assert answer == talk.ask("What is it?", images, lambda text: None).answer


def test_answer_ends_before_until_and_at_its_longest(examinee):
    ask = lambda **options: examinee.generate_until(
        [request("Why?", options, show, 0, "t", "test")]
    )[0]
    whole = ask(max_new_tokens=12)
    assert ask() == whole, "12 is the default of the model"
    word = whole.split()[1]
    for until in (word, [word], ["", word, "never said"]):
        assert ask(until=until) == whole[: whole.find(word)].rstrip()
    assert whole.startswith(ask(max_new_tokens=3)) and len(ask(max_new_tokens=3)) < len(whole)
    assert ask(until=[], do_sample=True, temperature=1.0) == whole, "always greedy"


def test_rounds_go_on_until_the_task_ends_them(examinee):
    seen = []

    def next_round(doc, previous_output, round_idx, previous_round_info):
        seen.append((list(previous_output), round_idx, previous_round_info))
        return doc["see"], f"And {round_idx}?", round_idx == 2, tuple(previous_output), round_idx

    ask = request("First?", {"max_new_tokens": 4}, show, next_round, 0, "t", "test")
    (answers,) = examinee.generate_until_multi_round([ask])
    alone = [examinee.generate_until([request(q, {"max_new_tokens": 4}, show, 0, "t", "test")])[0]
             for q in ("First?", "And 1?")]  # fmt: skip
    assert answers == alone
    assert seen == [(alone[:1], 1, None), (alone, 2, 1)]


def test_lowest_loss_is_the_most_probable_answer(examinee):
    model, tokenizer = examinee.model, examinee.tokenizer
    ask = lambda answer: examinee.loglikelihood(
        [request("Which?", answer, show, 0, "t", "test", kind="loglikelihood")]
    )[0]
    losses = {text: ask(text) for text in ("a cat", "the dog", "1")}
    assert all(loss > 0 and not greedy for loss, greedy in losses.values())
    assert ask(lambda doc: "a cat") == losses["a cat"] == ask(" a cat")
    (answer,) = examinee.generate_until(
        [request("Which?", {"max_new_tokens": 1}, show, 0, "t", "test")]
    )
    assert isinstance(answer, str) and model.training is False and tokenizer.eos is not None


def test_videos_are_refused_in_one_line(examinee):
    examinee.task_dict["t"]["test"][0]["see"] = ["clip.mp4"]
    with pytest.raises(ValueError, match="a task has a str instead of a picture"):
        examinee.generate_until([request("What?", {}, show, 0, "t", "test")])


# ----------------------------------------------------------------------- the command


@pytest.fixture
def checkpoint(tmp_path):
    tiny_cumo(experts=4, vocab=1024).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return tmp_path / "model"


@pytest.mark.slow  # lmms-eval reads its thousand tasks
def test_command_prints_a_table_and_writes_the_numbers(checkpoint, tmp_path, offline, monkeypatch,
                                                       capsys):  # fmt: skip
    make_task(tmp_path / "task", n=8)
    flags = ["--model", checkpoint, "--tasks", "scenes", "--include", tmp_path / "task", "--limit",
             "3", "--out", tmp_path / "out", "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["lmms_eval.py", *map(str, flags)])
    extra.main()
    assert "|scenes|" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "lmms_eval.json").read_text())
    assert (
        written["model"] == str(checkpoint) and 0 <= written["results"]["scenes"]["right,none"] <= 1
    )


@pytest.mark.slow
def test_unknown_task_is_one_line_with_the_nearest(checkpoint, monkeypatch, capsys):
    line = refusal(extra.main, ["--model", checkpoint, "--tasks", "popo"], monkeypatch, capsys)
    assert "lmms-eval has no 'popo'; it has pope" in line


def test_without_lmms_eval_the_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(extra, "lmms", object)
    assert 'pip install ".[eval]"' in refusal(extra.main, [], monkeypatch, capsys)


def test_file_is_not_taken_for_the_package():
    import lmms_eval

    assert Path(lmms_eval.__file__).parent.name == "lmms_eval"
    assert str(ROOT / "extras") not in sys.path and torch is not None
