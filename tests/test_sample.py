"""Asking about a picture from the command line: the answer streams, an error takes one line."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from refused import knows_kinds, refusal
from tiny import tiny_cumo

import sample

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
    with pytest.raises(ValueError, match="without vision; ask without a picture"):
        ask(*flags, "--image", ROOT / "cat.jpg")


def test_experts_draws_a_map_and_answers_the_same(model_dir, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def ask(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        sample.main()
        return capsys.readouterr()

    flags = ["--model", model_dir, "--image", ROOT / "cat.jpg", "--max-new-tokens", 4]
    file = tmp_path / "experts.png"
    drawn = ask(*flags, "--experts", file)
    assert drawn.out == ask(*flags).out and drawn.err == f"wrote {file}\n"
    assert json.loads(ask(*flags, "--json", "--experts", file).out)["tokens"] <= 4
    assert Image.open(file).width > 700


def test_experts_of_a_model_without_any_are_refused_before_an_answer(tmp_path, ask, capsys):
    dense = tiny_cumo(vocab=1024)
    for name, model in (("dense", dense), ("llm", dense.llm)):
        model.save_pretrained(tmp_path / name)
        shutil.copy(MINI / "tokenizer.json", tmp_path / name)
        with pytest.raises(ValueError, match="x.png: no expert of this model sees pictures; leave"):
            ask("--model", tmp_path / name, "--image", ROOT / "cat.jpg", "--experts", "x.png")
        assert capsys.readouterr().out == ""


def test_the_same_seed_gives_the_same_answer(model_dir, ask):
    flags = ["--model", model_dir, "--ask", "What?", "--temperature", 1, "--max-new-tokens", 8]
    answers = [ask(*flags, "--seed", seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def command(model_dir, *flags):
    return [
        sys.executable,
        ROOT / "sample.py",
        "--model",
        model_dir,
        "--max-new-tokens",
        "4",
        *flags,
    ]


def test_a_question_may_be_piped_and_a_slow_pipe_is_waited_for(model_dir, ask):
    flags = "--image", ROOT / "cat.jpg"
    given = ["--model", model_dir, "--max-new-tokens", 4, *flags]
    with subprocess.Popen(command(model_dir, *flags), stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as slow:  # fmt: skip
        assert slow.stderr.readline().startswith("waiting for a question on the pipe (--ask gives")
        assert slow.communicate("Is it red?\n")[0] == ask(*given, "--ask", "Is it red?")
    with subprocess.Popen(command(model_dir, *flags, "--ask", "Is it red?"), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as silent:  # fmt: skip
        assert silent.stdout.read() == ask(*given, "--ask", "Is it red?"), "the pipe is not read"


def test_closed_input_is_no_question(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # Python does this after `<&-`
    assert sample.piped() == ""


def test_json_has_the_answer_its_tokens_and_seconds(model_dir, ask):
    flags = ["--model", model_dir, "--image", ROOT / "cat.jpg", "--max-new-tokens", 4]
    said = json.loads(ask(*flags, "--json"))
    assert said["answer"] == ask(*flags).strip() and said["model"] == str(model_dir)
    assert 0 < said["tokens"] <= 4 and 0 < said["first_token_seconds"] <= said["seconds"]


def test_several_pictures_are_seen(model_dir, tmp_path, ask):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    flags = ["--model", model_dir, "--ask", "What is it?", "--max-new-tokens", 8]
    cat, red = ROOT / "cat.jpg", tmp_path / "red.png"
    assert len({ask(*flags, "--image", *some) for some in ([cat], [red], [cat, red])}) == 3


def chatted(model_dir, lines, monkeypatch, capsys, *flags):
    lines = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or end())
    monkeypatch.setattr(
        sys, "argv", ["sample.py", *map(str, command(model_dir, "--chat", *flags)[2:])]
    )
    sample.main()
    shown = capsys.readouterr()
    return shown.out.splitlines(), shown.err.splitlines()[1:]  # without COMMANDS


def end():
    raise EOFError


def test_chat_remembers_until_it_is_reset(model_dir, monkeypatch, capsys):
    picture, run = f"/image {ROOT / 'cat.jpg'}", (model_dir, monkeypatch, capsys)
    ask = lambda *lines: chatted(run[0], lines, *run[1:])[0]
    first, second = ask(picture, "What is it?", "And now?")
    assert ask(picture, "What is it?", "/reset", "And now?") == [first, ask("And now?")[0]]
    assert second != ask("And now?")[0]
    assert ask(picture, "What is it?", "/quit", "And now?") == [first]


def test_a_mistake_in_a_chat_is_one_line_and_the_chat_goes_on(model_dir, monkeypatch, capsys):
    lines = ["/image nowhere.jpg", "/imgae", "What?"]
    (answer,), (missing, unknown) = chatted(model_dir, lines, monkeypatch, capsys)
    assert missing.startswith("error: nowhere.jpg: no such image")
    assert unknown.startswith("error: /imgae is no command; /image FILE") and answer
    picture, long, short = f"/image {ROOT / 'cat.jpg'}", "word " * 200, "What?"
    lines = [picture, long, short]
    kept, (refused,) = chatted(model_dir, lines, monkeypatch, capsys, "--context", "180")
    assert refused.startswith("error: question and answer may take"), "the picture must be kept"
    run = model_dir, [picture, short], monkeypatch, capsys
    assert kept == chatted(*run, "--context", "180")[0]
    shown = chatted(model_dir, ["a", "b", "c"], monkeypatch, capsys, "--context", "150")[0]
    assert re.fullmatch(r"\(the oldest turns were dropped for lack of room: \d\)", shown[-1])


def test_a_picture_that_cannot_be_seen_is_refused_at_once_and_forgotten(
    model_dir, tmp_path, monkeypatch, capsys
):
    Image.new("L", (1, 20_000)).save(tmp_path / "line.png")
    lines = [f"/image {tmp_path / 'line.png'}", "What?"]
    (answer,), (refused,) = chatted(model_dir, lines, monkeypatch, capsys)
    assert re.fullmatch("error: a picture of 1x20000 is too narrow for mode pad; crop it", refused)
    assert [answer] == chatted(model_dir, ["What?"], monkeypatch, capsys)[0]
    flags = "--chat", "--image", tmp_path / "line.png"
    assert "too narrow" in refusal(sample.main, ["--model", model_dir, *flags], monkeypatch, capsys)


def test_a_language_model_alone_refuses_pictures_in_a_chat(tmp_path, monkeypatch, capsys):
    tiny_cumo(vocab=1024).llm.save_pretrained(tmp_path)
    shutil.copy(MINI / "tokenizer.json", tmp_path)
    lines = [f"/image {ROOT / 'cat.jpg'}", "What?"]
    answers, refused = chatted(tmp_path, lines, monkeypatch, capsys)
    assert len(answers) == 1
    assert refused == ["error: this is a language model without vision; ask without a picture"]


def test_a_chat_in_json_prints_nothing_but_json(model_dir, monkeypatch, capsys):
    lines = ["/image nowhere.jpg", "What?", "And now?"]
    shown, errors = chatted(model_dir, lines, monkeypatch, capsys, "--json")
    assert [json.loads(line)["tokens"] <= 4 for line in shown] == [True] * 2 and len(errors) == 1


def test_ctrl_c_ends_the_answer_and_not_the_chat(model_dir):
    flags = command(model_dir, "--chat", "--max-new-tokens", "30000", "--context", "32000")
    with subprocess.Popen([*flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as talk:  # fmt: skip
        talk.stdin.write(b"What?\n")
        talk.stdin.flush()
        assert talk.stdout.read(20), "the answer has begun"
        talk.send_signal(signal.SIGINT)
        talk.stdin.write(b"/imgae\n")
        talk.stdin.close()
        talk.stdout.read()
        assert b"error: /imgae is no command" in talk.stderr.read()
    assert talk.returncode == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image", "nowhere.jpg"], "nowhere.jpg"),
        (["--image", "text.jpg"], "text.jpg"),
        (["--image", "."], "folder"),
        (["--ask", "  "], "question is empty"),
        ([], "--image FILE"),
        (["--ask", "What?", "--experts", "x.png"], "--experts x.png draws the routing of one"),
        (["--imgae", "cat.jpg"], "did you mean --image?"),
        (["--ask", "What?", "--temperature", "-1"], "temperature"),
        (["--ask", "What?", "--top-p", "0"], "--top-p 0.0 must be above 0 and up to 1"),
        (["--ask", "What?", "--max-new-tokens", "0"], "--max-new-tokens 0 must be 1 or more"),
        (["--ask", "What?", "--model", "nowhere"], "nowhere"),
        (["--ask", "What?", "--device", "cuda:99"], "--device cuda:99"),
        (["--ask", "What?", "--chat"], "--ask is for one answer"),
        (["--ask", "What?", "--dtype", "fp16"], "--dtype 'fp16' is unknown; choose from float32"),
        (["--ask", "What?", "--context", "9"], "there is room for 9: ask less"),
        (["--ask", "What?", "--context", "0"], "--context 0 must be 1 or more"),
        (["--ask", "What?", "--top-k", "-1"], "--top-k -1 must be 1 or more"),
    ],
)
def test_bad_input_gets_one_line(model_dir, tmp_path, flags, message, monkeypatch, capsys):
    (tmp_path / "text.jpg").write_text("this is no picture")
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in flags else ["--model", model_dir]
    assert message in refusal(sample.main, [*model, *flags], monkeypatch, capsys)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top-p", "2"], "--top-p 2.0 must be above 0 and up to 1"),
        (
            ["--experts", "no/x.png"],
            "--experts no/x.png cannot be written; name a file in a folder",
        ),
        (["--experts", "."], "--experts . cannot be written"),
        (["--experts", "x"], "--experts x: its name must end in .png, or another format"),
        pytest.param(
            ["--experts", "x.doc"], "--experts x.doc: its name must end in .png", marks=knows_kinds
        ),
    ],
)
def test_bad_flags_show_before_a_model_is_loaded(tmp_path, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load_model", None)
    monkeypatch.chdir(tmp_path)
    flags = ["--model", tmp_path, "--image", ROOT / "cat.jpg", "--ask", "What?", *flags]
    assert message in refusal(sample.main, flags, monkeypatch, capsys)


def test_without_a_trained_model_it_says_which_command_makes_one(tmp_path, ask, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`python train.py` makes one"):
        ask("--image", ROOT / "cat.jpg")
