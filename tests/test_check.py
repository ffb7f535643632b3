"""`python -m data.check` finds what training would refuse, leave out or cut."""

import json
import pathlib
import re
import sys

import pytest
from PIL import Image

from data import check
from data.tokenizer import Tokenizer

MINI = pathlib.Path(__file__).parents[1] / "data" / "mini"


def talk(*texts):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


GOOD = {"id": "good", "image": "red.png", "conversations": talk("<image>\nWhat?", "a cat")}
LONG = {"id": "long", "conversations": talk("Count.", "one", *("More.", "one two " * 150) * 3)}
LATE = {"id": "late", "conversations": talk("Count. " * 200, "one")}  # its answer does not fit
EMPTY = {"id": "empty", "conversations": talk("Q", " ")}
DAMAGED = GOOD | {"id": "damaged", "image": "text.png"}
THIN = GOOD | {"id": "thin", "image": "thin.png"}
FAULTY = [
    GOOD | {"id": "gone", "image": "gone.png"},
    GOOD | {"id": "tagless", "conversations": talk("Q", "A")},
    {"id": "robot", "conversations": [{"from": "robot", "value": "Q"}]},
    DAMAGED,
    THIN,
    "no record",
]


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """report(records, *flags) -> (exit status, what was printed)."""
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    Image.new("L", (20_000, 1)).save(tmp_path / "thin.png")
    (tmp_path / "text.png").write_text("no picture")

    def run(records, *flags):
        (tmp_path / "my.json").write_text(json.dumps(records))
        argv = ["check", str(tmp_path / "my.json"), "--image-folder", str(tmp_path)]
        argv += ["--llm", str(MINI / "llm"), "--clip", str(MINI / "clip"), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        status = 0
        try:
            check.main()
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().out

    return run


def test_good_data_has_its_sizes_and_lengths_and_status_0(report):
    status, out = report([GOOD, GOOD | {"id": 2}, LONG])
    assert status == 0
    assert "3 records; 3 are used, 0 left out, 0 skipped, 0 would stop" in out
    assert "images: 2; width 20 to 20, median 20; height 10 to 10" in out
    assert "longer than --row-tokens 256, hence cut: 1 (33.3 %), by 3 questions" in out
    assert int(re.search(r"tokens a sample: .*most ([\d,]+)", out)[1].replace(",", "")) > 256
    assert int(re.search(r"of them learned: .*most (\d+)", out)[1]) < 256


def test_every_fault_is_named_with_its_record_and_status_is_1(report):
    status, out = report([GOOD, *FAULTY, EMPTY, LATE])
    assert status == 1
    assert "9 records; 1 are used, 2 left out, 2 skipped, 4 would stop training" in out
    stops = re.findall(r"  stops: (.*)", out)
    reasons = ["(id 'gone'): no image", "(id 'tagless'): the number of images is 1",
               "(id 'robot'): turn 0 is from 'robot'",
               'record 6 (id None): has no field "conversations"']  # fmt: skip
    assert len(stops) == 4 and all(reason in stop for reason, stop in zip(reasons, stops))
    damaged, thin = re.findall(r"  skipped: (.*)", out)
    assert "sample damaged: " in damaged and "sample thin: a picture of 20000x1" in thin
    first, second = re.findall(r"  left out: (.*)", out)
    assert "(id 'empty'): answer 1 is empty" in first
    assert "sample late: its first question and answer alone do not fit" in second


def test_samples_that_are_left_out_stop_no_training(report):
    assert report([GOOD, EMPTY])[0] == 0
    assert report([EMPTY])[0] == 1, "nothing would be left"


def test_broken_pictures_have_status_1_only_when_they_would_stop_a_training(report):
    assert report([GOOD] + [DAMAGED] * 9)[0] == 0, "fewer than 10"
    status, out = report([GOOD] + [DAMAGED] * 10)
    assert status == 1 and "10 of 11 cannot be read; so many would stop training" in out


def test_row_too_short_for_an_image_is_one_clear_line(report):
    with pytest.raises(ValueError, match="--row-tokens 64 is too short: an image takes 64 tokens"):
        report([GOOD], "--row-tokens", "64")


def test_longer_rows_cut_less(report):
    status, out = report([GOOD, LONG, LATE], "--row-tokens", "2048")
    assert status == 0 and "3 are used" in out and "hence cut: 0" in out


def test_long_lists_of_faults_are_shortened_unless_asked_for(report):
    _, out = report([GOOD, *[FAULTY[0]] * 25])
    assert out.count("stops: ") == 21 and "5 more; --list 0 lists all" in out
    _, out = report([GOOD, *[FAULTY[0]] * 25], "--list", "0")
    assert out.count("stops: ") == 25


def test_shown_sample_marks_what_is_learned(report):
    _, out = report([GOOD, GOOD | {"id": "second"}], "--show", "1")
    assert "second" not in out
    assert "<s><s>[INST] <image: 64 tokens>\nWhat? [/INST]« a cat </s>»" in out


def test_learned_text_is_green_on_a_terminal_unless_no_color_is_set(report, monkeypatch):
    for no_color, green in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
        _, out = report([GOOD], "--show", "1")
        assert ("\033[32m a cat </s>\033[0m" in out) == green


def test_typed_marks_are_shown_as_typed_and_control_tokens_by_name():
    tokenizer = Tokenizer.from_pretrained(MINI / "llm")
    ids = [tokenizer.bos, *tokenizer.encode("say </s>"), tokenizer.eos]
    labels = [check.IGNORE, *ids[1:]]
    assert check.painted(ids, labels, tokenizer, False) == "<s>«say </s></s>»"


@pytest.mark.parametrize("config, error", [
    ({"vision_config": 5}, "no CLIP vision config"),
    ({"hidden_size": 8}, "no image_size and patch_size"),
    ({"image_size": "64", "patch_size": 8}, "--clip .* pictures of '64'"),
    ({"image_size": 64, "patch_size": 0}, "patches of 0"),
])  # fmt: skip
def test_a_folder_that_is_no_clip_is_one_clear_line(config, error, report, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=error):
        report([GOOD], "--clip", str(tmp_path))


def test_unknown_template_or_mode_is_one_clear_line(report):
    with pytest.raises(ValueError, match="--image-mode 'padd' is unknown; choose from"):
        report([GOOD], "--image-mode", "padd")
    with pytest.raises(ValueError, match="template 'vicuna' is unknown; choose from plain"):
        report([GOOD], "--template", "vicuna")
    with pytest.raises(ValueError, match="chatml needs the token"):
        report([GOOD], "--template", "chatml")
