"""The command line: every field is a flag with help, every mistake one clear line."""

import dataclasses
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from data.flags import help_lines, parse, run, unescape
from sample import SampleConfig

ROOT = Path(__file__).resolve().parents[1]
FILES = [file for folder in ("bench", "extras", "runs", "tests/campaigns")
         for file in sorted((ROOT / folder).glob("**/*.py"))]  # fmt: skip
SCRIPTS = [str(file.relative_to(ROOT)) for file in FILES if "__main__" in file.read_text()]


@dataclass
class Config:
    lr: float = 1e-3  # peak learning rate, after 3% of warm-up
    row_tokens: int = 512  # tokens a row
    compile: bool = True  # torch.compile the blocks
    overwrite: bool = False  # train again: {x} %s %(prog)s
    scales: tuple = (1, 3)  # S2 scales
    out: str = "out"  # folder


def fails(capsys, *argv):
    """The one line that `argv` prints on stderr, with exit status 2 and an empty stdout."""
    with pytest.raises(SystemExit) as caught:
        parse(Config, argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err.split(": ", 1)[1].rstrip()


def test_field_without_a_default_is_an_argument_without_a_name(capsys):
    @dataclass
    class Named:
        file: str  # what to read
        n: int = 3  # how many

    assert parse(Named, ["x.json", "--n", "4"]) == (Named("x.json", 4), {"file", "n"})
    with pytest.raises(SystemExit):
        parse(Named, [])
    assert "required: file" in capsys.readouterr().err


def test_no_flags_give_the_defaults():
    assert parse(Config, []) == (Config(), set())


@pytest.mark.parametrize("argv, name, value", [
    (["--lr", "1e-4"], "lr", 1e-4), (["--lr=2"], "lr", 2.0), (["--lr", "-1"], "lr", -1.0),
    (["--lr", "inf"], "lr", float("inf")), (["--row-tokens", "64"], "row_tokens", 64),
    (["--no-compile"], "compile", False), (["--compile"], "compile", True),
    (["--overwrite"], "overwrite", True), (["--scales", "1,2,3"], "scales", (1, 2, 3)),
    (["--scales", "1"], "scales", (1,)), (["--out", ""], "out", ""),
    (["--out", "a b"], "out", "a b"),
])  # fmt: skip
def test_flag_sets_its_field_and_is_reported_as_given(argv, name, value):
    assert parse(Config, argv) == (dataclasses.replace(Config(), **{name: value}), {name})


@dataclass
class Asked:
    image: tuple[str, ...] = ()  # pictures
    ask: str = ""  # the question


@pytest.mark.parametrize("argv", [
    ["--image", "a", "b", "c"], ["--image", "a", "--image", "b", "c"],
    ["--image", "a", "--image", "b", "--image=c"],
])  # fmt: skip
def test_a_flag_of_several_words_given_again_adds_to_them(argv):
    assert parse(Asked, argv) == (Asked(image=("a", "b", "c")), {"image"})
    assert parse(Asked, ["--image", "d"])[0].image == ("d",), "nothing stays from the call before"


@pytest.mark.parametrize("argv, hint", [
    (["cat.jpg"], "'cat.jpg' belongs to no flag; did you mean --image cat.jpg?"),
    (["a b.PNG"], "'a b.PNG' belongs to no flag; did you mean --image 'a b.PNG'?"),
    (["Is it?"], "'Is it?' belongs to no flag; did you mean --ask \"Is it?\"?"),
    (["What", "now?"], "'What now?' belongs to no flag; did you mean --ask \"What now?\"?"),
])  # fmt: skip
def test_a_word_without_its_flag_is_told_which_one_it_lacks(argv, hint, capsys):
    with pytest.raises(SystemExit):
        parse(Asked, argv)
    assert capsys.readouterr().err.split(": ", 1)[1] == hint + "\n"


@pytest.mark.parametrize("typed, text", [
    (r"\n", "\n"), (r"a\tb", "a\tb"), (r"C:\\new", r"C:\new"), ("é\n", "é\n"), (r"\d", r"\d"),
])  # fmt: skip
def test_escapes_of_the_command_line(typed, text):
    assert unescape(typed) == text


@pytest.mark.parametrize("argv, flags, name, value", [
    (["--lr", "1", "--lr=2"], "--lr --lr", "lr", 2),
    (["--compile", "--no-compile"], "--compile --no-compile", "compile", False),
])  # fmt: skip
def test_a_flag_that_another_one_replaces_is_said(argv, flags, name, value, capsys):
    assert getattr(parse(Config, argv)[0], name) == value
    assert capsys.readouterr().err.endswith(f": {flags}: only the last one counts\n")


def test_a_path_in_the_home_folder_is_found_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert parse(Config, ["--out=~/x"])[0].out == "/home/ada/x"
    assert parse(Config, ["--out=~x/y"])[0].out == "~x/y"
    cfg, _ = parse(SampleConfig, ["--image=~/x", "--ask=~/x is where?", "--stop=~/x"])
    assert (cfg.image, cfg.ask, cfg.stop) == (("/home/ada/x",), "~/x is where?", ("~/x",))


def test_flag_given_with_its_default_counts_as_given():
    assert parse(Config, ["--row-tokens", "512"]) == (Config(), {"row_tokens"})


@pytest.mark.parametrize("typed, meant", [
    ("--lrr", "--lr"), ("-lr", "--lr"), ("--row_tokens", "--row-tokens"), ("--scale", "--scales"),
    ("--row-token", "--row-tokens"), ("--no-compil", "--no-compile"),
    ("--overwrit=1", "--overwrite"),
])  # fmt: skip
def test_typo_names_the_nearest_flag(typed, meant, capsys):
    shown = typed.split("=")[0]
    assert fails(capsys, typed, "3") == f"unknown flag {shown}; did you mean {meant}?"


def test_flag_like_no_other_points_to_help(capsys):
    assert fails(capsys, "--xyzzy") == "unknown flag --xyzzy; --help lists the flags"


@pytest.mark.parametrize("argv, complaint", [
    (["--lr", "fast"], "--lr: 'fast' is not a number"),
    (["--lr", "nan"], "--lr: 'nan' is not a number"),
    (["--lr"], "--lr: expected one argument"),
    (["--row-tokens", "1.5"], "--row-tokens: '1.5' is not an integer"),
    (["--row-tokens", ""], "--row-tokens: '' is not an integer"),
    (["--scales", "1;3"], "--scales: '1;3' is not integers such as 1,3"),
    (["--scales", "1,"], "--scales: '1,' is not integers such as 1,3"),
    (["--compile=False"], "--compile/--no-compile is a switch and takes no value"),
    (["--compile", "False"], "'False' belongs to no flag; a switch takes no value, write it "
                             "--name or --no-name"),
    (["cat.jpg"], "'cat.jpg' belongs to no flag; a switch takes no value, write it --name or "
                  "--no-name"),
])  # fmt: skip
def test_wrong_value_is_one_line_that_says_what_is_expected(argv, complaint, capsys):
    assert fails(capsys, *argv) == complaint


def test_help_shows_every_field_its_line_and_its_default_percent_signs_too(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, ["--help"], description="Learns 100 % of it.")
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "Learns 100 % of it." in shown
    for name, line in help_lines(Config).items():
        default = getattr(Config(), name)
        default = "1,3" if name == "scales" else default
        assert f"--{name.replace('_', '-')}" in shown and f"{line} [{default}]" in shown


def test_every_field_of_every_script_has_a_help_line():
    import eval as eval_script
    import sample
    import train

    for cls in (train.TrainConfig, sample.SampleConfig, eval_script.EvalConfig):
        lines = help_lines(cls)
        assert [f.name for f in dataclasses.fields(cls) if not lines.get(f.name)] == []
        assert parse(cls, []) == (cls(), set())


def test_field_without_a_comment_is_the_authors_mistake():
    @dataclass
    class Bare:
        depth: int = 3

    with pytest.raises(AssertionError, match="Bare.depth has no comment"):
        parse(Bare, [])


def test_value_error_ends_in_one_line_and_status_1(capsys):
    def main():
        raise ValueError("no such image\n; check the path")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert (
        caught.value.code == "error: no such image ; check the path"
    )  # sys.exit(text) is status 1


def test_ctrl_c_ends_in_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


LEFT = """
import os, sys
from data.flags import run

mains = lambda: print("x" * 999_999), lambda: print("x"), lambda: print(1, flush=True)
for main in mains:
    if not os.fork():  # each in a process of its own, with one import of torch for all
        sys.stdin.read()  # until the reader has left
        run(main)
        break
else:
    exit([os.waitstatus_to_exitcode(os.wait()[1]) for _ in mains] != [141] * 3)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_reader_that_has_left_is_no_error():
    with subprocess.Popen([sys.executable, "-c", LEFT], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:  # fmt: skip
        one.stdout.close()
        one.stdin.close()
        assert one.stderr.read() == b"" and one.wait() == 0


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself_and_does_nothing_else(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # a script puts the checkout there
    monkeypatch.setattr(os, "environ", dict(os.environ))
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except ImportError as error:  # a peer of the benchmarks
        pytest.skip(f"{script} needs {error.name}")
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: ")
