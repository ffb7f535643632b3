"""`python -m data.check` finds what training would refuse, leave out or cut."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import TOKENIZER, tiny_weights

import train
from clip_moe import CLIPVision
from cumo import CuMo, CuMoConfig
from data import check
from data.chat import IGNORE
from data.stages import PRESETS
from data.tokenizer import Tokenizer
from llm import LLM

MINI = Path(__file__).parents[1] / "data" / "mini"


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
    picture = Image.new("RGB", (20, 10), "red")
    picture.putpixel((3, 3), (0, 0, 0))
    picture.save(tmp_path / "red.png")
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
    assert "longer than --row-tokens 400, hence cut: 1 (33.3 %), by 2 questions" in out
    assert int(re.search(r"tokens a sample: .*most ([\d,]+)", out)[1].replace(",", "")) > 400
    assert int(re.search(r"of them learned: .*most (\d+)", out)[1]) < 400
    assert "my.json: 2 of 3 records have a picture\n" in out


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
    assert "text.png: is no image" in damaged and "thin.png: 20000x1 is too" in thin
    first, second = re.findall(r"  left out: (.*)", out)
    assert "(id 'empty'): answer 1 is empty" in first
    assert "(id 'late'): its first question and answer alone do not fit" in second
    at = [re.search(r"my.json: record (\d) \(id (.*?)\): ", line) for line in out.splitlines()
          if line.startswith("  ")]  # fmt: skip
    assert [int(m[1]) for m in at] == [1, 2, 3, 6, 4, 5, 7, 8], "record and id"


def test_pictures_of_one_color_are_listed_but_used(report, tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    picture.putpixel((3, 3), (254, 0, 0))
    picture.save(tmp_path / "nearly.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    status, out = report(
        [GOOD | {"image": name, "id": name} for name in ("nearly.png", "black.png")]
    )
    assert status == 0 and "2 are used" in out
    (line,) = re.findall(r"  one color: (.*)", out)
    assert line == f"{tmp_path / 'my.json'}: record 1 (id 'black.png'): {tmp_path / 'black.png'}"


def test_deep_pictures_are_skipped_with_the_way_out(report, tmp_path):
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "deep.png")
    _, out = report([GOOD | {"image": "deep.png", "id": "deep"}])
    assert "record 0 (id 'deep'): " in out and "deep.png: its values x go from 4,095 to" in out


def test_text_and_conversations_stop_a_stage_1(report):
    status, out = report([GOOD, {"id": "t", "conversations": talk("Q", "A")}], "--stage", "1")
    assert status == 1 and "record 1 (id 't'): template plain takes an image and its caption" in out


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("init", [False, True])
def test_a_row_longer_than_the_models_positions_is_an_error_as_in_training(
    init, window, small, tmp_path
):
    folder, flags = small
    source = folder / "stage2" if init else Path(flags["llm"])
    config = json.loads((source / "config.json").read_text())
    config |= {"max_position_embeddings": 600, "sliding_window": window}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {"init": str(tmp_path)} if init else flags | {"llm": str(tmp_path)}
    rows = dict(template="mistral_instruct", image_mode="pad")
    tokenizer = Tokenizer.from_pretrained(flags["llm"])
    look = lambda n: check.check_records(
        check.CheckConfig("x.json", **names, **rows, row_tokens=n), tokenizer, [])  # fmt: skip
    look(600)
    if window:
        look(601)
        return
    with pytest.raises(ValueError, match="--row-tokens 601 is longer than the 600 positions of"):
        look(601)


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
    with pytest.raises(ValueError, match="template 'alpaca' is unknown; choose from plain"):
        report([GOOD], "--template", "alpaca")
    with pytest.raises(ValueError, match="chatml needs the token"):
        report([GOOD], "--template", "chatml")
    with pytest.raises(ValueError, match="--preset 'big' is unknown; choose from mini, smol-mini"):
        report([GOOD], "--preset", "big")
    with pytest.raises(ValueError, match="--stage 0 is unknown; choose from 1, 2, 3"):
        report([GOOD], "--stage", "0")
    with pytest.raises(ValueError, match="--row-tokens 0 must be 1 or more"):
        report([GOOD], "--row-tokens", "0")


# ------------------------------------------------------------------ the check and the training


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with pictures, tiny weights whose tokenizer suits every template, and a model of
    them in stage1/ and stage2/ -> (folder, flags)."""
    folder = tmp_path_factory.mktemp("small")
    flags = {name: tiny_weights(folder)[name] for name in ("clip", "llm")}
    spec = json.loads(TOKENIZER.read_text())
    for token, name in zip(spec["added_tokens"], ("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        spec["model"]["vocab"][name] = spec["model"]["vocab"].pop(token["content"])
        token["content"] = name
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    vision, llm = CLIPVision.from_pretrained(flags["clip"]), LLM.from_pretrained(flags["llm"])
    model = CuMo(CuMoConfig(vision.cfg, llm.cfg))
    for place in (folder / "llm", folder / "stage1", folder / "stage2"):
        if place.name != "llm":
            model.save_pretrained(place)
        (place / "tokenizer.json").write_text(json.dumps(spec))
        (place / "tokenizer_config.json").write_text(json.dumps(names))
    for k in range(3):
        Image.radial_gradient("L").resize((30 + k, 40)).save(folder / f"{k}.png")
    (folder / "text.png").write_text("no picture")
    return folder, flags


def some_records(stage):
    """Samples of every kind that a training counts, of all lengths; captions for stage 1."""
    texts = [("<image>\nWhat?", "one two " * n) for n in (1, 30, 60, 90, 130, 200, 2500)]
    texts += [("<image>\nWhat?", " ")]
    pictures = [f"{k % 3}.png" for k in range(len(texts))]
    if stage > 1:
        turns = ("More.", "one two " * 60)
        texts += [("<image>\nWhat?", "red", *turns * n) for n in (1, 2, 4, 40)]
        texts += [("<image> or <image>?", "red", "<image>", "one " * 500), ("Hi", "ho", "And?")]
        texts += [("docker run <image>", "It runs <image>."), ("Q " * 5000, "A"), ("Q",)]
        pictures += [["0.png"]] * 4 + [["0.png", "1.png", "2.png"], *[""] * 4]
    texts.append(texts[0])
    pictures.append("text.png")
    return [{"conversations": talk(*said), "image": image} for said, image in zip(texts, pictures)]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_check_says_what_the_training_does(preset, stage, small, tmp_path):
    folder, flags = small
    file = tmp_path / "my.json"
    file.write_text(json.dumps(some_records(stage)))
    own = flags | dict(preset=preset, stage=stage, data=str(file), image_folder=str(folder))
    asked = check.resolve(check.CheckConfig(**own), set(own))
    precision = dict(weights="fp32", moments="fp32", device="cpu")
    cfg = train.resolve(own | precision | dict(out=str(folder)), stage)
    for name in ("template", "image_mode", "row_tokens"):
        assert getattr(asked, name) == getattr(cfg, name)
    records = json.loads(file.read_text())
    report, _ = check.check_records(asked, Tokenizer.from_pretrained(asked.llm), records)
    trainer = train.Trainer(cfg)
    trainer.folder = tmp_path
    learned = sum(int((batch["labels"] != IGNORE).sum()) for batch in trainer.batches())
    counts, left_out = trainer.read, len(trainer.data.rejected)
    assert not report.faults and sum(counts.values()) + left_out == len(records)
    assert counts["cut"] == report.cut and counts["used"] == len(report.lengths) - report.cut
    assert counts["rejected"] + left_out == len(report.left_out)
    assert counts["skipped"] == len(report.skipped) == 1
    assert learned == sum(report.learned) > 0
    if stage > 1:
        assert report.cut and report.left_out


@pytest.mark.parametrize("fault", [
    {"image": "0.png", "conversations": talk("Q", "A")}, {"conversations": talk("Q", "A")},
    {"images": ["0.png"], "conversations": talk("<image>", "A")},
    {"image": "0.png", "conversations": talk("<image>", "A", "And?", "B")},
    {"image": "gone.png", "conversations": talk("<image>", "A")},
])  # fmt: skip
@pytest.mark.parametrize("stage", [1, 3])
def test_check_stops_where_the_training_would(fault, stage, small, tmp_path):
    folder, flags = small
    file = tmp_path / "my.json"
    good = {"image": "0.png", "conversations": talk("<image>", "A")}
    file.write_text(json.dumps([good, fault]))
    own = flags | dict(stage=stage, data=str(file), image_folder=str(folder))
    asked = check.resolve(check.CheckConfig(**own), set(own))
    tokenizer = Tokenizer.from_pretrained(asked.llm)
    report, _ = check.check_records(asked, tokenizer, [good, fault])
    precision = dict(weights="fp32", moments="fp32", device="cpu")
    cfg = train.resolve(own | precision | dict(out=str(folder)), stage)
    if report.faults:
        with pytest.raises(ValueError, match=re.escape(str(report.faults[0]))):
            train.Trainer(cfg)
    else:
        assert len(train.Trainer(cfg).data) == 2


def test_flags_win_over_the_table_and_a_checkpoint_has_its_own_tokenizer(small, tmp_path):
    folder, _ = small
    own = dict(data="x.json", template="plain", row_tokens=99, image_mode="square")
    asked = check.resolve(check.CheckConfig(**own), set(own))
    assert (asked.template, asked.row_tokens, asked.image_mode) == ("plain", 99, "square")
    assert asked.llm == "data/mini/llm"
    init = check.CheckConfig("x.json", init=str(folder / "stage2"))
    assert check.image_side(init, check.model_fields(init)[0]) == (64, 16)
    config = json.loads((folder / "stage2" / "config.json").read_text())
    config["vision_config"]["patch_size"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"--init {tmp_path}: pictures of 64 .* patches of 0"):
        faulty = check.CheckConfig("x.json", init=str(tmp_path))
        check.image_side(faulty, check.model_fields(faulty)[0])
