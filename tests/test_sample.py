"""Asking about a picture from the command line: the answer streams, an error takes one line."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from refused import knows_kinds, refusal
from tiny import tiny_cumo

import eval as eval_script
import sample
import train
import upcycle
from data import hub
from data.flags import run
from engine.conversation import files_of

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


def test_an_answer_does_not_wait_for_the_import_of_a_compiler(model_dir):
    """torch._dynamo and sympy take more than a second, and only --compile needs them."""
    script = ("import sys, sample; sample.main();"
              "print('imported:', {'sympy', 'torch._dynamo'} & {*sys.modules})")  # fmt: skip
    flags = ["--model", model_dir, "--image", ROOT / "cat.jpg", "--max-new-tokens", "2"]
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.endswith("imported: set()\n"), done.stdout + done.stderr


def command(model_dir, *flags):
    length = [] if "--max-new-tokens" in flags else ["--max-new-tokens", "4"]
    return [sys.executable, ROOT / "sample.py", "--model", model_dir, *length, *flags]


def test_answers_about_a_picture_and_without_one_and_leaves_standard_input_alone(model_dir, ask):
    """In `while read file; do python sample.py --image $file; done` it holds the next files."""
    flags = "--image", ROOT / "cat.jpg"
    read, write = os.pipe()
    os.write(write, b"next.jpg\n")
    done = subprocess.run(command(model_dir, *flags), stdin=read, capture_output=True, text=True)
    os.close(write)
    assert os.read(read, 99) == b"next.jpg\n"
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr
    same = ask("--model", model_dir, "--max-new-tokens", 4, *flags)
    assert same == done.stdout
    other = ask("--model", model_dir, "--max-new-tokens", 4, "--ask", "What is a cat?")
    assert other.endswith("\n") and other != same


def test_language_model_alone_answers_without_a_picture(tmp_path, ask):
    tiny_cumo(vocab=1024).llm.save_pretrained(tmp_path)
    shutil.copy(MINI / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="no chat_template and may be a base model.*--template"):
        ask("--model", tmp_path, "--ask", "What is a cat?")
    assert ask("--model", tmp_path, "--ask", "What?", "--template", "llama2").endswith("\n")
    with pytest.raises(ValueError, match="needs the token .INST., which this tokenizer lacks"):
        ask("--model", tmp_path, "--ask", "What is a cat?", "--template", "mistral_v3")
    shutil.copy(MINI / "tokenizer_config.json", tmp_path)
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
    assert drawn.out == ask(*flags).out and drawn.err.startswith(f"wrote {file}\n")
    assert json.loads(ask(*flags, "--json", "--experts", file).out)["tokens"] <= 4
    assert Image.open(file).width > 700
    own, before = tmp_path / "own.png", (ROOT / "cat.jpg").read_bytes()
    own.write_bytes(before)
    for same in (own, tmp_path / "." / "x" / ".." / "own.png"):
        flags = ["--model", model_dir, "--image", own, "--experts", same]
        (tmp_path / "x").mkdir(exist_ok=True)
        assert "would replace your picture" in refusal(sample.main, flags, monkeypatch, capsys)
    assert own.read_bytes() == before


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


def test_a_question_may_be_piped_and_a_slow_pipe_is_waited_for(model_dir, ask, monkeypatch):
    flags = "--model", model_dir, "--max-new-tokens", 4, "--image", ROOT / "cat.jpg"
    wanted, waiting = ask(*flags, "--ask", "Is it red?"), threading.Event()
    read, write = os.pipe()

    class Told(io.StringIO):
        def write(self, text):
            if text.startswith("waiting for a question on standard input"):
                waiting.set()

    def slow():
        assert waiting.wait(300)
        os.write(write, b"Is it red?\n")
        os.close(write)

    keep = os.dup(0)
    os.dup2(read, 0)
    try:
        monkeypatch.setattr(sys, "stdin", open(0, closefd=False))
        monkeypatch.setattr(sys, "stderr", Told())
        typing = threading.Thread(target=slow)
        typing.start()
        assert ask(*flags, "--ask", "-") == wanted
        typing.join()
    finally:
        os.dup2(keep, 0)
        for file in (keep, read):
            os.close(file)
    assert waiting.is_set()


def test_closed_input_is_no_question(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # Python does this after `<&-`
    assert sample.read_question() == ""


def test_an_empty_pipe_is_an_empty_question(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    flags = ["--model", model_dir, "--ask", "-"]
    assert "the question is empty" in refusal(sample.main, flags, monkeypatch, capsys)


def test_every_image_flag_adds_a_picture(model_dir, tmp_path, ask):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    flags = ["--model", model_dir, "--ask", "What is it?", "--max-new-tokens", 8]
    cat, red = ROOT / "cat.jpg", tmp_path / "red.png"
    assert ask(*flags, "--image", cat, "--image", red) == ask(*flags, "--image", cat, red)
    said = json.loads(ask(*flags, "--json", "--image", cat, "--image", red))
    assert said["images"] == [str(cat), str(red)] and said["question"] == "What is it?"


def test_json_has_the_answer_its_tokens_and_seconds(model_dir, ask):
    flags = ["--model", model_dir, "--image", ROOT / "cat.jpg", "--max-new-tokens", 4]
    said = json.loads(ask(*flags, "--json"))
    assert said["answer"] == ask(*flags).strip() and said["model"] == str(model_dir)
    assert 0 < said["tokens"] <= 4 and 0 < said["first_token_seconds"] <= said["seconds"]
    assert said["finish_reason"] == "length" and said["question"] == "Describe the picture."
    assert said["images"] == [str(ROOT / "cat.jpg")]


def test_a_cut_answer_and_a_missing_picture_are_told_on_stderr(model_dir, ask, capsys):
    def noted(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(model_dir), *flags])
        sample.main()
        return capsys.readouterr()

    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = noted("--image", str(ROOT / "cat.jpg"), "--max-new-tokens", "4")
        assert seen.err == "(cut: --max-new-tokens 4 allows no more)\n"
        guessed = noted("--ask", "Is it red?", "--max-new-tokens", "4", "--json")
        assert guessed.err == "(no picture in this conversation; --image FILE adds one)\n"
        assert len(guessed.out.splitlines()) == 1


def test_a_stop_text_may_be_a_line_break(model_dir, monkeypatch):
    class Seen(Exception):
        pass

    def conversation(*_, stop, **options):
        raise Seen(stop)

    monkeypatch.setattr(sample, "Conversation", conversation)
    flags = ["--stop", "\\n", "a\\tb", "--stop", "C:\\\\n", "café"]
    monkeypatch.setattr(sys, "argv", ["x", "--model", str(model_dir), "--ask", "Q", *flags])
    with pytest.raises(Seen) as seen:
        sample.main()
    assert seen.value.args == (("\n", "a\tb", "C:\\n", "café"),)


def test_a_reader_that_has_left_ends_it_without_a_word(model_dir):
    words = [str(word) for word in command(model_dir, "--ask", "What?", "--max-new-tokens", "99")]
    done = subprocess.run(["bash", "-o", "pipefail", "-c", '"$@" | head -c 3', "-", *words],
                          capture_output=True, text=True)  # fmt: skip
    assert done.stderr == "(no picture in this conversation; --image FILE adds one)\n"
    assert len(done.stdout) == 3 and done.returncode == 141


def test_ctrl_c_while_the_model_loads_is_one_line(monkeypatch, capsys, model_dir):
    def load_model(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "load_model", load_model)
    assert refusal(sample.main, ["--model", model_dir, "--ask", "Q"], monkeypatch, capsys) == (
        "interrupted"
    )


@pytest.mark.parametrize("script", ["train.py", "sample.py", "eval.py", "upcycle.py"])
def test_ctrl_c_while_torch_loads_is_one_line(tmp_path, script):
    """A stand-in for torch that takes long to load."""
    (tmp_path / "torch.py").write_text("print('loading', flush=True); import time; time.sleep(20)")
    with subprocess.Popen([sys.executable, ROOT / script], text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as start:  # fmt: skip
        assert start.stdout.readline() == "loading\n"
        start.send_signal(signal.SIGINT)
        assert start.communicate()[1] == "\ninterrupted\n"
    assert start.returncode in (130, -signal.SIGINT)


def test_ctrl_c_keeps_the_answer_so_far_and_says_so_in_json(model_dir, monkeypatch, capsys):
    flags = "--ask", "What?", "--json", "--max-new-tokens", "30000", "--context", "32000"
    press = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    original = sample.Conversation.ask

    def asked(*args):
        press.start()
        return original(*args)

    monkeypatch.setattr(sample.Conversation, "ask", asked)
    monkeypatch.setattr(sys, "argv", list(map(str, command(model_dir, *flags)[1:])))
    try:
        with pytest.raises(SystemExit) as end:
            run(sample.main)
    finally:
        press.cancel()
    shown, errors = capsys.readouterr()
    assert json.loads(shown)["finish_reason"] == "interrupted" and end.value.code == 130
    assert errors.startswith("(no picture") and errors.endswith(")\n\ninterrupted\n")


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
    errors = [line for line in shown.err.splitlines()[1:] if not line.startswith("(")]
    return shown.out.splitlines(), errors  # without COMMANDS and notes about answers


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
    kept, (_, refused) = chatted(model_dir, lines, monkeypatch, capsys, "--context", "180")
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
    assert refused == f"error: {tmp_path / 'line.png'}: 1x20000 is too narrow for mode pad; crop it"
    assert [answer] == chatted(model_dir, ["What?"], monkeypatch, capsys)[0]
    flags = "--chat", "--image", tmp_path / "line.png"
    assert "too narrow" in refusal(sample.main, ["--model", model_dir, *flags], monkeypatch, capsys)


def test_a_language_model_alone_refuses_pictures_in_a_chat(tmp_path, monkeypatch, capsys):
    tiny_cumo(vocab=1024).llm.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, tmp_path)
    lines = [f"/image {ROOT / 'cat.jpg'}", "What?"]
    answers, refused = chatted(tmp_path, lines, monkeypatch, capsys)
    assert len(answers) == 1
    assert refused == ["error: this is a language model without vision; ask without a picture"]


def test_a_chat_in_json_prints_nothing_but_json(model_dir, monkeypatch, capsys):
    lines = ["/image nowhere.jpg", "What?", "And now?"]
    shown, errors = chatted(model_dir, lines, monkeypatch, capsys, "--json")
    assert [json.loads(line)["tokens"] <= 4 for line in shown] == [True] * 2 and len(errors) == 1


def test_a_chat_confirms_pictures_and_resets_and_has_help(model_dir, monkeypatch, capsys):
    picture = f"/image {ROOT / 'cat.jpg'}"
    lines = ["/help", picture, "What?", picture, "And this?", "/reset", picture, "/exit", "No"]
    answers, (help, added, again, reset, fresh) = chatted(model_dir, lines, monkeypatch, capsys)
    assert len(answers) == 2 and help.startswith("/image FILE adds a picture to the next question")
    assert added == again == fresh == f"added {ROOT / 'cat.jpg'}, 256 x 256 pixels"
    assert reset == "started over: turns and pictures are forgotten"


def test_a_chat_without_a_picture_says_so_once(model_dir, monkeypatch, capsys):
    lines = iter(["What?", "And?", "/reset", "What?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or end())
    words = [str(word) for word in command(model_dir, "--chat")[2:]]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    sample.main()
    note = "(no picture in this conversation; /image FILE adds one)"
    assert capsys.readouterr().err.splitlines().count(note) == 2


@pytest.mark.parametrize("written", [
    "{}/my cat.png", "'{}/my cat.png'", '"{}/my cat.png"', "{}/my\\ cat.png", "~/my cat.png",
    "~/my\\ cat.png", "  {}/my cat.png  ", "{}/it's.png", "{}/my\\ cat.png '{}/it'\\''s.png'",
])  # fmt: skip
def test_a_file_after_image_may_be_quoted_escaped_or_in_the_home_folder(
    tmp_path, monkeypatch, written
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my cat.png", "it's.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    found = files_of(written.replace("{}", str(tmp_path)))
    both = [str(tmp_path / "my cat.png"), str(tmp_path / "it's.png")]
    assert found == (both if written.count("png") > 1 else both["it" in written :][:1])


def test_a_path_alone_in_a_chat_gets_the_command_that_adds_it(model_dir, monkeypatch, capsys):
    path = str(ROOT / "cat.jpg")
    _, errors = chatted(model_dir, [path], monkeypatch, capsys)
    assert errors == [f"error: to add a picture, type /image {path}"]
    _, errors = chatted(model_dir, ["/image no cat.jpg"], monkeypatch, capsys)
    assert errors == ["error: no cat.jpg: no such image; check the path"]


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
        (["--ask", "What?", "--top-p", "0.9"], "--top-p has no effect without --temperature"),
        (["--ask", "What?", "--top-k", "9"], "--top-k has no effect without --temperature"),
        (["--ask", "What?", "--seed", "9"], "--seed has no effect without --temperature"),
        (["--ask", "Is <image> red?"], "has 1 <image> tags and 0 pictures"),
        (["cat.jpg"], "'cat.jpg' belongs to no flag; did you mean --image cat.jpg?"),
        (["my cat.JPG"], "did you mean --image 'my cat.JPG'?"),
        (["Is", "it", "red?"], 'did you mean --ask "Is it red?"?'),
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


def trained(folder, *stages):
    """A folder as train.py leaves it, with these finished `stages`."""
    for k in stages:
        tiny_cumo(experts=4 * (k == 3), vocab=1024).save_pretrained(folder / f"stage{k}")
        shutil.copy(MINI / "tokenizer.json", folder / f"stage{k}")
        (folder / f"stage{k}" / "train.json").write_text('{"finished": true}')


COMMANDS = {  # how each program is given a model
    "sample": lambda model: (sample.main, ["--ask", "Q", "--model", model]),
    "eval": lambda model: (eval_script.main, ["--model", model, "--out", "evaluated"]),
    "upcycle": lambda model: (upcycle.main, [model, "upcycled"]),
    "train": lambda model: (train.main, ["--init", model, "--out", "new"]),
}


@pytest.mark.parametrize("program", COMMANDS)
@pytest.mark.parametrize("state, model, reason", [
    ([], "out/stage2", "out/stage2 does not exist; `python train.py --stage 2` makes it"),
    ([], "mine/stage3", "mine/stage3 does not exist; `python train.py --stage 3 --out mine` makes"),
    ([], "out/stage4", "out/stage4 does not exist; out/ has no model; `python train.py` makes"),
    ([1, 2, 3], "out/stage4", "out/stage4 does not exist; out/ has stage1, stage2, stage3"),
    ([1, 2, 3], "out/upcycled", "out/upcycled does not exist; out/ has stage1, stage2, stage3"),
    ([1, -2], "out/stage2", "out/stage2 is not finished; `python train.py --stage 2`, with the "),
    ([-1], "out", "no trained model in out/; `python train.py` makes one"),
    ([], "out", "no trained model in out/; `python train.py` makes one"),
])  # fmt: skip
def test_a_stage_that_is_not_there_is_named_with_the_command_that_makes_it(
    tmp_path, monkeypatch, capsys, program, state, model, reason
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "ROOT", tmp_path / "nowhere")
    trained(tmp_path / "out", *(k for k in state if k > 0))
    for k in (-k for k in state if k < 0):  # interrupted
        (tmp_path / "out" / f"stage{k}").mkdir(parents=True)
        (tmp_path / "out" / f"stage{k}" / "train.json").write_text('{"finished": false}')
    assert reason in refusal(*COMMANDS[program](model), monkeypatch, capsys)


def test_a_finished_stage_that_lost_its_configuration_is_not_called_unfinished(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "out", 3)
    (tmp_path / "out" / "stage3" / "train.json").write_text('{"finished": true}')
    (tmp_path / "out" / "stage3" / "config.json").unlink()
    flags = ["--ask", "Q", "--model", "out/stage3"]
    way = "no config.json; copy it again, or `python train.py --stage 3 --overwrite` trains it"
    assert f"out/stage3 has {way}" in refusal(sample.main, flags, monkeypatch, capsys)
    (tmp_path / "out" / "stage3" / "train.json").write_text('{"finished": false}')
    said = "out/stage3 is not finished; `python train.py --stage 3`, with the flags it began"
    assert said in refusal(sample.main, flags, monkeypatch, capsys), "a crash before config.json"


def test_from_another_folder_the_demos_stages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "ROOT", tmp_path / "nanocumo")
    trained(tmp_path / "nanocumo" / "out", 1, 2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for model, there in (([], "out"), (["--model", "out"], "out"),
                         (["--model", "out/stage2"], "out/stage2")):  # fmt: skip
        line = refusal(sample.main, ["--ask", "Q", *model], monkeypatch, capsys)
        assert f"{there} is not in this folder; it is {tmp_path / 'nanocumo' / there}" in line


def test_a_folder_of_stages_means_the_furthest_that_is_finished(tmp_path, ask, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "out", 1, 2)
    flags = ["--ask", "What?", "--max-new-tokens", 4, "--json"]
    for named in ([], ["--model", "out"], ["--model", tmp_path / "out"]):
        assert json.loads(ask(*flags, *named))["model"].endswith("out/stage2")
    (tmp_path / "out" / "stage3").mkdir()
    (tmp_path / "out" / "stage3" / "train.json").write_text('{"finished": false}')
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()
    shown = capsys.readouterr()
    assert json.loads(shown.out)["model"] == "out/stage2"
    assert shown.err.startswith("out/stage3 is not finished; this is out/stage2\n")
    reason = "out is no model but the folder of a training; name out/stage2 or out/stage1"
    assert reason in refusal(upcycle.main, ["out", "sparse"], monkeypatch, capsys)
