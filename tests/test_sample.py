"""Asking about a picture from the command line: the answer streams, mistakes get one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from refused import refusal
from tiny import tiny_cumo

import sample
from data.tokenizer import Tokenizer
from sample import Printer, prompt

ROOT = Path(__file__).parents[1]
MINI = ROOT / "data" / "mini" / "llm"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_cumo(experts=4, vocab=1024).save_pretrained(folder)
    shutil.copy(MINI / "tokenizer.json", folder)
    return folder


@pytest.fixture
def ask(monkeypatch, capsys):
    """sample.py with these flags, in this process -> what it prints."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        sample.main()
        return capsys.readouterr().out

    return run


def test_answers_about_a_picture_and_without_one(model_dir, ask):
    flags = "--image", ROOT / "cat.jpg"
    command = [sys.executable, ROOT / "sample.py", "--model", model_dir, "--max-new-tokens", "4"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr
    same = ask("--model", model_dir, "--max-new-tokens", 4, *flags)
    assert same == done.stdout
    other = ask("--model", model_dir, "--max-new-tokens", 4, "--ask", "What is a cat?")
    assert other.endswith("\n") and other != same


def test_language_model_alone_answers_without_a_picture(tmp_path, ask):
    tiny_cumo(vocab=1024).llm.save_pretrained(tmp_path)
    shutil.copy(MINI / "tokenizer.json", tmp_path)
    flags = ["--model", tmp_path, "--max-new-tokens", 4]
    assert ask(*flags, "--ask", "What is a cat?").endswith("\n")
    with pytest.raises(ValueError, match="sees nothing; leave out --image"):
        ask(*flags, "--image", ROOT / "cat.jpg")


def test_experts_draws_a_map_and_answers_the_same(model_dir, tmp_path, ask):
    flags = ["--model", model_dir, "--image", ROOT / "cat.jpg", "--max-new-tokens", 4]
    file = tmp_path / "experts.png"
    assert ask(*flags, "--experts", file) == f"wrote {file}\n" + ask(*flags)
    assert Image.open(file).width > 700


def test_experts_of_a_model_without_any_are_refused_before_an_answer(tmp_path, ask, capsys):
    dense = tiny_cumo(vocab=1024)
    for name, model in (("dense", dense), ("llm", dense.llm)):
        model.save_pretrained(tmp_path / name)
        shutil.copy(MINI / "tokenizer.json", tmp_path / name)
        with pytest.raises(ValueError, match="x.png: no expert of this model sees pictures; leave"):
            ask("--model", tmp_path / name, "--image", ROOT / "cat.jpg", "--experts", "x.png")
        assert capsys.readouterr().out == ""


def test_prompt_of_a_language_model_alone_has_one_bos():
    model, tokenizer = tiny_cumo(vocab=1024).llm, Tokenizer.from_pretrained(MINI)
    tokens, pixels = prompt(model, tokenizer, "What is a cat?", [])
    assert tokens[0].tolist() == [1, *tokenizer.encode("[INST] What is a cat? [/INST]")]
    assert pixels is None


def test_the_same_seed_gives_the_same_answer(model_dir, ask):
    flags = ["--model", model_dir, "--ask", "What?", "--temperature", 1, "--max-new-tokens", 8]
    answers = [ask(*flags, "--seed", seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_prompt_holds_the_image_before_the_question():
    model, tokenizer = tiny_cumo(vocab=1024), Tokenizer.from_pretrained(MINI)
    tokens, pixels = prompt(model, tokenizer, "What is <image> this?", [Image.new("RGB", (9, 5))])
    assert (tokens == -200).sum() == model.image_tokens and pixels.shape == (1, 3, 24, 24)
    text = tokenizer.decode([i for i in tokens[0].tolist() if i >= 0])
    assert text.endswith("What is  this? [/INST]"), "a tag in the question is no second image"


def test_printer_streams_whole_characters(capsys):
    tokenizer = Tokenizer.from_pretrained(MINI)
    printer = Printer(tokenizer)
    shown = []
    for i in tokenizer.encode(" café 🐱 end"):
        printer(torch.tensor([[i]]))
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == "café 🐱 end" and "\ufffd" not in "".join(shown)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image", "nowhere.jpg"], "nowhere.jpg"),
        (["--image", "text.jpg"], "text.jpg"),
        (["--image", "."], "folder"),
        (["--ask", "  "], "question is empty"),
        ([], "--image FILE"),
        (["--ask", "What?", "--experts", "x.png"], "--experts x.png draws what experts see: give"),
        (["--imgae", "cat.jpg"], "did you mean --image?"),
        (["--ask", "What?", "--temperature", "-1"], "temperature"),
        (["--ask", "What?", "--top-p", "0"], "top_p"),
        (["--ask", "What?", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--ask", "What?", "--model", "nowhere"], "nowhere"),
        (["--ask", "What?", "--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_bad_input_gets_one_line(model_dir, tmp_path, flags, message, monkeypatch, capsys):
    (tmp_path / "text.jpg").write_text("this is no picture")
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in flags else ["--model", model_dir]
    assert message in refusal(sample.main, [*model, *flags], monkeypatch, capsys)


def test_without_a_trained_model_it_says_which_command_makes_one(tmp_path, ask, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`python train.py` makes one"):
        ask("--image", ROOT / "cat.jpg")
