"""Settings of a training: no flag is ignored, a checkpoint decides what it has been taught."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from refused import refusal
from tiny import ROOT, TOKENIZER, tiny_cumo

import train
from clip_moe import CLIPVisionConfig
from data import check, checkpoint
from data.stages import PRESETS
from data.weights import read_config, write_json
from engine import memory, resume, settings
from llm import LLMConfig


def save(model, folder, **config):
    """A checkpoint whose train.json has these settings; without any: one that is not ours."""
    model.save_pretrained(folder)
    shutil.copy(TOKENIZER, folder)
    if config:
        write_json(folder / "train.json", {"finished": True, "config": config})
    return folder


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def own_data(folder, n=10):
    """A LLaVA file of n records with one picture, in `folder`."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    rows = [{"id": str(i), "image": "a.png", "conversations": talk(f"<image>\nIs it {i}?", "one")}
            for i in range(n)]  # fmt: skip
    (folder / "mine.json").write_text(json.dumps(rows))
    return folder / "mine.json"


@pytest.fixture
def stage2(tmp_path):
    """A dense stage 2 of ours, with another template and picture mode than the preset's."""
    model = tiny_cumo(vocab=1024)
    model.cfg.template, model.cfg.image_mode = "mistral_instruct_system", "square"
    config = dict(preset="mini", stage=2, clip="my/clip", llm="my/llm", lr=0.5, row_tokens=99)
    return save(model, tmp_path / "stage2", **config)


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    train.main()


# ------------------------------------------------------------------------------ no effect


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--init", "S2", "--scales", "1,3"],
         "--scales 1,3 has no effect with --init S2, which holds the whole model (scales: 1)"),
        (["--init", "S2", "--llm", "does/not-exist"],
         "--llm does/not-exist has no effect with --init S2, which holds the whole model (llm"),
        (["--init", "S2", "--clip", "other"], "--clip other has no effect with --init"),
        (["--init", "S2", "--upcycle", "none", "--num-experts", "8"],
         "--num-experts 8 has no effect with --upcycle none"),
        (["--init", "S2", "--upcycle", "none", "--top-k", "1"], "--top-k 1 has no effect with"),
        (["--init", "S2", "--upcycle", "none", "--scratch", "clip"], "--scratch clip has no"),
        (["--stage", "2", "--num-experts", "8"],
         "--num-experts 8 has no effect in stage 2; only stage 3 makes experts"),
        (["--stage", "1", "--upcycle", "clip"], "--upcycle clip has no effect in stage 1"),
        (["--stage", "1", "--freeze", "clip"], "--freeze clip has no effect in stage 1"),
        (["--stage", "2", "--balance-coef", "1"], "--balance-coef 1.0 has no effect on a model"),
        (["--init", "S2", "--upcycle", "none", "--z-coef", "1"], "--z-coef 1.0 has no effect on"),
        (["--image-folder", "pics"], "--image-folder pics has no effect without --data FILE"),
        (["--epochs", "3"], "--epochs 3 has no effect without --data; the emoji world has --samp"),
        (["--data", "a.json", "--epochs", "3", "--samples", "9"],
         "--samples 9 and --epochs 3 both set the length"),
        (["--data", "a.json", "--no-augment"], "--no-augment has no effect with --data"),
        (["--weights", "bf16-sr", "--no-bf16"], "--no-bf16 has no effect with --weights bf16-sr"),
    ],
)  # fmt: skip
def test_a_flag_without_effect_is_refused_with_the_way_out(
    flags, message, stage2, tmp_path, monkeypatch, capsys
):
    flags = [str(stage2) if word == "S2" else word for word in flags]
    said = refusal(train.main, [*flags, "--out", tmp_path / "out"], monkeypatch, capsys)
    assert message.replace("S2", str(stage2)) in said
    assert not (tmp_path / "out").exists()


def test_flags_that_agree_with_the_checkpoint_or_serve_another_stage_are_taken(stage2, tmp_path):
    given = dict(init=str(stage2), scales=(1,), llm="my/llm")
    assert checkpoint.start_from(given, 3)["clip"] == "my/clip"
    given = {"num_experts": 8, "freeze": "clip", "balance_coef": 0.2, "out": str(tmp_path)}
    settings.check_effects(given, {k: train.resolve(given, k) for k in (1, 2, 3)})


# ------------------------------------------------------------------------------ --init


def test_template_and_picture_mode_are_the_checkpoints_and_what_differs_is_printed(
    stage2, tmp_path, monkeypatch, capsys
):
    small = ["--init", stage2, "--rows", 2, "--samples", 6, "--no-plot", "--out", tmp_path]
    run(monkeypatch, *small)
    said = capsys.readouterr().out
    assert f"from {stage2}: --template mistral_instruct_system, where the preset has" in said
    assert f"from {stage2}: --image-mode square, where the preset has pad" in said
    config = json.loads((tmp_path / "stage3" / "train.json").read_text())["config"]
    assert (config["template"], config["image_mode"]) == ("mistral_instruct_system", "square")
    assert (config["clip"], config["llm"], config["scales"]) == ("my/clip", "my/llm", [1])
    assert (config["lr"], config["row_tokens"]) == (2e-4, 400), "stage 2's are not stage 3's"
    written = read_config(tmp_path / "stage3")
    assert written["nanocumo_template"] == "mistral_instruct_system"
    assert written["image_aspect_ratio"] == "square"
    given = dict(init=str(stage2), template="mistral_instruct", image_mode="pad", lr=1.0)
    assert given.items() <= checkpoint.start_from(given, 3).items(), "a flag wins"


def test_the_same_stage_once_more_keeps_learning_rate_and_row_length(stage2):
    again = checkpoint.start_from({"init": str(stage2)}, 2)
    assert (again["lr"], again["row_tokens"]) == (0.5, 99)


def test_a_stage_1_says_nothing_about_conversations(stage2, capsys):
    state = json.loads((stage2 / "train.json").read_text())
    state["config"] |= {"stage": 1}
    write_json(stage2 / "train.json", state)
    found = checkpoint.start_from({"init": str(stage2)}, 2)
    assert not {"template", "image_mode", "lr"} & found.keys() and not capsys.readouterr().out


def test_captions_leave_the_template_of_a_checkpoint_alone(stage2, tmp_path, monkeypatch):
    small = ["--init", stage2, "--rows", 2, "--samples", 6, "--no-plot", "--out", tmp_path]
    run(monkeypatch, "--stage", 1, *small)
    state = json.loads((tmp_path / "stage1" / "train.json").read_text())["config"]
    assert state["template"] == "plain"
    assert read_config(tmp_path / "stage1")["nanocumo_template"] == "mistral_instruct_system"


@pytest.fixture
def released(tmp_path):
    """The config.json of a released CuMo-7B, without its weights."""
    from cumo import CuMoConfig

    known = memory.KNOWN
    clip, llm = known[PRESETS["mistral-7b"]["clip"]], known[PRESETS["mistral-7b"]["llm"]]
    config = CuMoConfig(clip, llm).to_original() | {"scales": [1, 3]}
    config["vision_config"]["scales"] = [1, 3]
    del config["nanocumo_template"]
    write_json(tmp_path / "cumo-7b" / "config.json", config)
    return tmp_path / "cumo-7b"


def test_a_released_7b_gets_the_papers_table(released, monkeypatch, capsys):
    found = checkpoint.start_from({"init": str(released)}, 3)
    cfg = train.resolve(found, 3)
    assert (cfg.preset, cfg.lr, cfg.row_tokens, cfg.scales) == ("mistral-7b", 4e-6, 4096, (1, 3))
    assert "--preset mistral-7b, where the preset has mini" in capsys.readouterr().out
    flags = ["--init", released, "--preset", "mini"]
    said = refusal(train.main, flags, monkeypatch, capsys)
    assert "--preset mini is not for --init" in said and "a model of preset mistral-7b" in said
    config = read_config(released) | {"intermediate_size": 11008}  # a Llama's, of no preset
    write_json(released / "config.json", config)
    said = refusal(train.main, ["--init", released], monkeypatch, capsys)
    assert "far larger than the miniature" in said and "--preset mistral-7b has those" in said
    assert checkpoint.start_from({"init": str(released), "preset": "mistral-7b"}, 3)["llm"] == ""


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_of_the_presets_are_those_of_their_models(preset):
    clip, llm = PRESETS[preset]["clip"], PRESETS[preset]["llm"]
    known = {Path(name).name: config for name, config in memory.KNOWN.items()}
    read = lambda name, kind: kind.from_hf(read_config(ROOT / name))
    vision = known.get(Path(clip).name) or read(clip, CLIPVisionConfig)
    text = known.get(Path(llm).name) or read(llm, LLMConfig)
    assert preset in checkpoint.fitting_presets(vars(vision), vars(text))


def test_data_check_checks_for_the_checkpoint_as_training_does(
    stage2, tmp_path, monkeypatch, capsys
):
    file = own_data(tmp_path / "pics")
    flags = [file, "--image-folder", file.parent, "--init", stage2]
    monkeypatch.setattr(sys, "argv", ["check", *map(str, flags)])
    check.main()
    said = capsys.readouterr().out
    assert "--template mistral_instruct_system --image-mode square --row-tokens 400" in said


# ------------------------------------------------------------------------------ data


def begin_and_stop(flags, out, monkeypatch):
    """A stage 1 that is interrupted in its second step."""

    class Crash(BaseException):
        pass

    def crash(self, *_):
        if self.step == 1:
            raise Crash
        return step(self, *_)

    step = train.Trainer.train_step
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train.Trainer, "train_step", crash)
        train.train_stage(train.resolve(flags | {"out": str(out)}, 1))


NEW = talk("<image>\nIs it?", "two")
CHANGES = {
    "a record removed": lambda rows: rows[1:],
    "a record more": lambda rows: [*rows, rows[0]],
    "an answer changed": lambda rows: [{**rows[0], "conversations": NEW}, *rows[1:]],
    "a picture renamed": lambda rows: [rows[0] | {"image": "./a.png"}, *rows[1:]],
}  # fmt: skip


@pytest.fixture
def flags(weights, tmp_path):
    """Of a stage 1 on ten records, in several steps."""
    file = own_data(tmp_path / "pics")
    own = dict(data=str(file), image_folder=str(file.parent), plot=False, row_tokens=32, samples=0)
    return weights | own | {"template": "mistral_instruct", "row_tokens": 80, "save_every": 200}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_notices_that_the_data_changed(change, flags, tmp_path, monkeypatch):
    out, file = tmp_path / "out", Path(flags["data"])
    begin_and_stop(flags, out, monkeypatch)
    before = file.read_text()
    file.write_text(json.dumps(CHANGES[change](json.loads(before))))
    count = {"a record removed": "had 10 records, now 9", "a record more": "10 records, now 11"}
    message = (f"{out}/stage1 was begun on other data: .*{count.get(change, 'had other records')}"
               ".*Put the file back.*another --out.*--overwrite")  # fmt: skip
    cfg = train.resolve(flags | {"out": str(out)}, 1)
    with pytest.raises(ValueError, match=message):
        train.train_stage(cfg)
    file.write_text(json.dumps(json.loads(before), indent=3))  # the same records
    assert train.train_stage(cfg)
    file.write_text(json.dumps(CHANGES[change](json.loads(before))))
    with pytest.raises(ValueError, match="was trained on other data"):
        train.train_stage(cfg)
    assert train.train_stage(train.resolve(flags | {"out": str(out), "overwrite": True}, 1))


def test_records_behind_the_limit_do_not_count(flags, tmp_path, monkeypatch):
    begin_and_stop(flags | {"limit": 9}, tmp_path / "out", monkeypatch)
    own_data(tmp_path / "pics", n=12)
    assert train.train_stage(train.resolve(flags | {"out": str(tmp_path / "out"), "limit": 9}, 1))


def test_a_finished_stage_whose_data_is_gone_says_that_it_cannot_compare(flags, tmp_path, capsys):
    cfg = train.resolve(flags | {"out": str(tmp_path / "out")}, 1)
    assert train.train_stage(cfg)
    Path(flags["data"]).unlink()
    assert train.train_stage(cfg)
    assert "whether its data has changed is unknown: " in capsys.readouterr().out


# ------------------------------------------------------------------------------ length


def test_epochs_are_passes_over_the_data(flags, tmp_path):
    cfg = train.resolve(flags | {"out": str(tmp_path), "epochs": 3} | {"samples": 0}, 1)
    train.choose_precision(cfg)
    order = train.Trainer(cfg).order.tolist()
    assert [sorted(order[k : k + 10]) for k in (0, 10, 20)] == [[*range(10)]] * 3


@pytest.mark.parametrize("samples, accumulate", [(7, 1), (40, 2), (48, 3)])
def test_steps_of_a_short_training_are_counted_exactly(samples, accumulate, weights, tmp_path):
    sizes = dict(samples=samples, accumulate=accumulate, out=str(tmp_path), plot=False)
    cfg = train.resolve(weights | sizes, 1)
    train.choose_precision(cfg)
    said = settings.estimated_steps(train.Trainer(cfg))
    assert train.train_stage(cfg)
    assert said == len((tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines())


def test_steps_of_a_long_training_are_estimated(weights, tmp_path):
    cfg = train.resolve(weights | dict(samples=3000, out=str(tmp_path)), 3)
    cfg.stage = 1  # the questions of stage 3, of various lengths, with the weights of stage 1
    train.choose_precision(cfg)
    trainer = train.Trainer(cfg)
    steps = sum(1 for _ in trainer.batches())
    assert settings.estimated_steps(trainer) == pytest.approx(steps, rel=0.05)


def test_a_training_of_a_few_steps_is_called_short_before_it_begins(flags, tmp_path, capsys):
    assert train.train_stage(train.resolve(flags | {"out": str(tmp_path / "out")}, 1))
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("  length ")]
    steps = int(line.split("about ")[1].split()[0])
    assert "10 samples, 1 epochs of 10 records" in line and steps < 10
    assert f"so few steps change little; --epochs {-(-200 // steps)} would make about 200" in said
    assert "=" not in said and len(said.splitlines()) < 20


# ------------------------------------------------------------------------------ disk


def test_a_disk_too_small_is_refused_before_the_first_step(weights, tmp_path, monkeypatch):
    room = type("Usage", (), {"free": 100_000})
    with monkeypatch.context() as patch:
        patch.setattr(resume.shutil, "disk_usage", lambda _: room)
        with pytest.raises(ValueError, match=r"are free on that disk, .* writes up to .*--out on"):
            train.train_stage(train.resolve(weights | dict(out=str(tmp_path / "out")), 1))
        assert not (tmp_path / "out").exists()
        room.free = 10**9
        assert train.train_stage(train.resolve(weights | dict(out=str(tmp_path / "out")), 1))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_size_of_a_resume_point_is_known(stage, weights, tmp_path, monkeypatch):
    sizes, save = [], resume.save_point

    def measured(trainer):
        save(trainer)
        sizes.append((trainer.folder / "resume.pt").stat().st_size)

    monkeypatch.setattr(resume, "save_point", measured)
    for k in range(1, stage + 1):
        cfg = train.resolve(weights | dict(out=str(tmp_path), save_every=200), k)
        plan = train.choose_precision(cfg)
        assert train.train_stage(cfg)
    point, result = resume.sizes_on_disk(plan)
    assert len(sizes) == stage, "one, early, in each stage"
    overhead = 0.3 * point  # the names take room next to a few kilobytes
    assert point <= sizes[-1] <= point + overhead
    written = (tmp_path / f"stage{stage}" / "model.safetensors").stat().st_size
    assert result <= written <= 1.3 * result


def test_a_crash_after_the_first_step_loses_at_most_that(weights, tmp_path, monkeypatch):
    begin_and_stop(weights | dict(save_every=200, plot=False), tmp_path, monkeypatch)
    assert torch.load(tmp_path / "stage1" / "resume.pt", weights_only=True)["step"] == 1


def test_help_comes_in_groups_with_examples(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    said = capsys.readouterr().out
    for title in ("model settings:", "precision settings:", "run settings:", "stage settings:"):
        assert f"\n{title}\n" in said
    assert said.count("\n    python train.py") >= 2 and said.startswith("usage: train.py [--flag")
