"""Three stages on models of a few thousand parameters: what is trained, resumed, refused."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from refused import refusal
from safetensors.torch import load_file
from tiny import command

import data.weights
import train
from data import hub
from data.stages import STAGES
from engine import fsdp, resume
from engine.optim import param_groups

ROOT = Path(__file__).parents[1]


def run_stages(weights, out, *stages, **options):
    for stage in stages:
        assert train.train_stage(train.resolve(weights | dict(out=str(out)) | options, stage))


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run_stages(weights, out, 1, 2, 3, plot=True)
    return out


def test_learning_rate_warms_up_then_follows_a_cosine_to_zero():
    cfg = train.TrainConfig(lr=2.0, warmup=0.1)
    rates = [train.lr_at(i / 100, cfg) for i in range(101)]
    assert rates[0] < 0.05 and max(rates) == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_a_stage_of_one_step_still_learns(weights, finished, tmp_path):
    small = dict(samples=2, save_every=9, init=str(finished / "stage1"))
    run_stages(weights, tmp_path, 2, **small)
    moved, _, _ = changed(finished / "stage1", tmp_path / "stage2")
    assert moved


def test_nothing_to_learn_is_said_before_anything_is_written(weights, tmp_path):
    with pytest.raises(ValueError, match="none of the 3 samples can be used; .* do not fit in"):
        run_stages(weights, tmp_path, 1, samples=3, row_tokens=19)
    assert not any(tmp_path.iterdir())


def own_records(folder, n, text="red"):
    """A LLaVA file of `n` records, each with a picture."""
    turns = [{"from": "human", "value": "What color?\n<image>"}, {"from": "gpt", "value": text}]
    for i in range(n):
        Image.new("RGB", (80, 50), "red").save(folder / f"{i}.png")
    records = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(n)]
    (folder / "mine.json").write_text(json.dumps(records))
    return str(folder / "mine.json")


@pytest.mark.parametrize("usable", range(0, 60, 20))
def test_one_usable_record_among_many_is_enough(usable, weights, tmp_path):
    file = Path(own_records(tmp_path, 60, "red " * 500))
    records = json.loads(file.read_text())
    records[usable]["conversations"][1] = {"from": "gpt", "value": "red"}
    file.write_text(json.dumps(records))
    run_stages(weights, tmp_path, 1, data=str(file), image_folder=str(tmp_path), samples=60)


@pytest.mark.parametrize("flag", ["data", "val"])
def test_pictures_that_all_cannot_be_read_cost_nothing_and_can_be_repaired(
    flag, weights, finished, tmp_path
):
    shutil.copytree(finished / "stage1", tmp_path / "out" / "stage1")
    file = own_records(tmp_path, 4)
    for picture in tmp_path.glob("*.png"):
        picture.write_bytes(b"")
    used = dict(image_folder=str(tmp_path), samples=4, overwrite=True) | {flag: file}
    with pytest.raises(ValueError, match="0.png: is no image|1.png|2.png|3.png") as error:
        run_stages(weights, tmp_path / "out", 1, **used)
    assert "\n" not in str(error.value)
    assert not changed(finished / "stage1", tmp_path / "out" / "stage1")[0], "nothing was deleted"
    own_records(tmp_path, 4)
    run_stages(weights, tmp_path / "out", 1, **used)


@pytest.mark.parametrize("flag, said", [
    ("data", "none of the 4 samples .*again with --overwrite"),
    ("val", "mine.json: none of its records can be used any more"),
])  # fmt: skip
def test_pictures_that_break_after_the_first_look_are_one_error_and_not_for_ever(
    flag, said, weights, tmp_path, monkeypatch
):
    file, out = own_records(tmp_path, 4), tmp_path / "out"
    used = dict(image_folder=str(tmp_path), samples=4) | {flag: file}
    open_stage = resume.open_stage

    def broken(*args):
        open_stage(*args)
        for picture in tmp_path.glob("*.png"):
            picture.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(resume, "open_stage", broken)
        with pytest.raises(ValueError, match=said):
            run_stages(weights, out, 1, **used)
    assert not json.loads((out / "stage1" / "train.json").read_text())["finished"]
    own_records(tmp_path, 4)
    run_stages(weights, out, 1, overwrite=True, **used)


# ------------------------------------------------------------------------------- two at once


def test_two_trainings_into_one_folder_are_refused(weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out"
    go = lambda folder: command(weights, folder, "--stage", "1")[2:]
    with resume.alone(out, "cpu"):
        said = refusal(train.main, go(out), monkeypatch, capsys)
        assert said.endswith(
            f"another training writes into {out}; let it end, or name another --out"
        )
        assert not any(out.iterdir())
        monkeypatch.setattr(sys, "argv", ["train.py", *go(tmp_path / "other")])
        train.main()
    assert not (tmp_path / "new").exists(), "nothing was trained there"
    monkeypatch.setattr(sys, "argv", ["train.py", *go(out)])
    train.main()
    assert (out / "stage1" / "model.safetensors").is_file()
    out.chmod(0o555)
    train.main()
    assert "stage 1: finished in" in capsys.readouterr().out, "said of a read-only folder, too"
    out.chmod(0o755)


def test_a_killed_training_leaves_no_lock(weights, tmp_path):
    go = command(weights | dict(samples=4000), tmp_path, "--stage", "1")
    process = subprocess.Popen(go, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (tmp_path / "stage1" / "resume.pt").is_file():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    held = pytest.raises(ValueError, match="another training writes into")
    with held, resume.alone(tmp_path, "cpu"):
        pytest.fail("it is training")
    process.kill()
    process.wait()
    with resume.alone(tmp_path, "cpu"):
        pass


def test_prerequisites_of_another_model_are_refused(weights, finished, monkeypatch):
    go = command(weights | dict(seed=9), finished, "--stage", "3")
    monkeypatch.setattr(sys, "argv", go[1:])
    with pytest.raises(ValueError, match="stage1 was made with another.* seed was 0, now 9"):
        train.main()


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decay, rest = param_groups(model, weight_decay=0.1)
    assert [p.dim() for p in decay["params"]] == [2] and decay["weight_decay"] == 0.1
    assert [p.dim() for p in rest["params"]] == [1, 1, 1] and rest["weight_decay"] == 0


def test_flags_win_over_the_stage_table_and_the_table_over_defaults():
    assert train.resolve({}, 1).template == "plain" and train.resolve({}, 3).template != "plain"
    assert train.resolve({"lr": 5.0}, 2).lr == 5.0
    assert train.resolve({"lr": 5.0}, 2, target=False).lr != 5.0, (
        "lr belongs to the stage asked for"
    )
    assert train.resolve({"seed": 5}, 2, target=False).seed == 5, "the seed belongs to all stages"
    assert train.resolve({"preset": "mistral-7b"}, 3).lr == 4e-6  # paper, Table 6
    for preset in ("smol", "smol-mini"):
        templates = [train.resolve({"preset": preset}, stage).template for stage in (1, 2, 3)]
        assert templates == ["plain", "chatml", "chatml"]


def test_preset_whose_weights_are_not_there_says_what_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "ROOT", tmp_path / "checkout")
    flags = {"preset": "smol-mini", "clip": str(ROOT / "data" / "mini" / "clip")}
    with pytest.raises(ValueError, match="SmolLM2.* is missing; runs/smollm2.sh makes"):
        train.train_stage(train.resolve(flags, 1))
    folder = tmp_path / "checkout" / "weights" / "SmolLM2-135M-Instruct"  # next to the code
    shutil.copytree(ROOT / "data" / "mini" / "llm", folder)
    assert train.stage_plan(train.resolve(flags, 1)).parameters


def changed(a, b):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return {name for name in a if name in b and not torch.equal(a[name], b[name])}, set(a), set(b)


def test_stage_1_trains_the_connector_alone(weights, finished):
    one = load_file(finished / "stage1" / "model.safetensors")
    llm = load_file(Path(weights["llm"]) / "model.safetensors")
    clip = load_file(Path(weights["clip"]) / "model.safetensors")
    assert all(torch.equal(one[name], tensor) for name, tensor in llm.items())
    assert all(
        torch.equal(one[f"model.vision_tower.{name}"], tensor) for name, tensor in clip.items()
    )


def test_stage_2_trains_everything_that_has_a_gradient(finished):
    moved, names, _ = changed(finished / "stage1", finished / "stage2")
    still = names - moved
    assert still and all("encoder.layers.2." in name for name in still)  # CLIP's unused last layer


def test_stage_3_is_sparse_and_trains_every_expert(finished):
    _, two, three = changed(finished / "stage2", finished / "stage3")
    config = json.loads((finished / "stage3" / "config.json").read_text())
    assert config["clip_smoe"] and config["mlp_smoe"] and config["num_experts"] == 4
    dense = load_file(finished / "stage2" / "model.safetensors")
    sparse = load_file(finished / "stage3" / "model.safetensors")
    experts = [name for name in sparse if re.search(r"experts\.\d\..*weight", name)]
    parts = ("model.mm_projector.", "model.vision_tower.")
    assert all(any(name.startswith(part) for name in experts) for part in parts)
    unused = f"layers.{config['vision_config']['num_hidden_layers'] - 1}."  # nobody sees its output
    for name in experts:
        origin = re.sub(r"experts\.\d\.", "mlp." if "vision" in name else "", name)
        assert torch.equal(sparse[name], dense[origin]) == (unused in name), name
    assert "model.mm_projector.gate.weight" in three - two


def test_frozen_parts_stay_as_they_are_and_the_others_learn(weights, finished, tmp_path):
    for stage, freeze in ((2, "clip"), (3, "clip,llm"), (3, "mlp")):
        out = tmp_path / f"{stage}-{freeze}"
        upcycled = "clip,mlp" if freeze == "mlp" else "mlp"
        options = dict(init=str(finished / f"stage{stage - 1}"), samples=12, upcycle=upcycled)
        run_stages(weights, out, stage, freeze=freeze, **options)
        moved, _, _ = changed(finished / f"stage{stage - 1}", out / f"stage{stage}")
        seen = {"clip": "model.vision_tower.", "llm": "model.layers."}
        for part, prefix in seen.items():
            assert any(name.startswith(prefix) for name in moved) == (part not in freeze), freeze
    dense = load_file(finished / "stage2" / "model.safetensors")
    sparse = load_file(out / "stage3" / "model.safetensors")  # the frozen, upcycled connector
    for name, copy in sparse.items():
        if name.startswith("model.mm_projector.experts."):
            assert torch.equal(copy, dense[re.sub(r"experts\.\d\.", "", name)])


def test_frozen_parts_take_no_memory_for_moments(weights):
    cfg = train.resolve(weights | dict(freeze="llm"), 2)
    frozen, whole = (
        train.stage_plan(train.resolve(weights | f, 2)) for f in ({"freeze": "llm"}, {})
    )
    assert train.trained_modules(cfg) == ["vision", "connector"]
    assert frozen.parameters == whole.parameters and frozen.learning < whole.learning


def test_stages_from_before_a_flag_existed_are_still_finished(weights, finished, tmp_path):
    shutil.copytree(finished / "stage1", tmp_path / "stage1")
    file = tmp_path / "stage1" / "train.json"
    state = json.loads(file.read_text())
    del state["config"]["freeze"]
    state["config"]["scratch"] = False  # as it was written once
    file.write_text(json.dumps(state))
    run_stages(weights, tmp_path, 1)
    with pytest.raises(ValueError, match="freeze was None, now 'clip'"):
        run_stages(weights, tmp_path, 1, freeze="clip")


def test_metrics_and_configuration_are_kept(finished):
    rows = [json.loads(x) for x in (finished / "stage3" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (
        rows[-1]["samples"] == 40 and {"lm_loss", "clip_balance", "mlp_z", "lr"} <= rows[0].keys()
    )
    state = json.loads((finished / "stage3" / "train.json").read_text())
    assert state["finished"] and state["config"]["upcycle"] == "clip,mlp"
    assert not (finished / "stage3" / "resume.pt").exists()
    drawn = [file.name for file in sorted((finished / "stage3").glob("*.png"))]
    assert drawn == (["experts.png", "loss.png"] if find_spec("matplotlib") else [])


def test_a_finished_stage_is_not_trained_again(weights, finished, capsys):
    before = (finished / "stage3" / "model.safetensors").stat().st_mtime_ns
    run_stages(weights, finished, 3)
    assert "finished" in capsys.readouterr().out
    assert (finished / "stage3" / "model.safetensors").stat().st_mtime_ns == before


def test_another_configuration_is_refused_by_name(weights, finished):
    with pytest.raises(ValueError, match=r"lr was 0\.\d+, now 0\.5.*--overwrite"):
        run_stages(weights, finished, 3, lr=0.5)
    with pytest.raises(ValueError, match="num_experts was 4, now 8"):
        run_stages(weights, finished, 3, num_experts=8)


def test_resume_is_bit_exact(weights, finished, tmp_path):
    for stage in (1, 2):
        shutil.copytree(finished / f"stage{stage}", tmp_path / f"stage{stage}")
    cfg = train.resolve(weights | dict(out=str(tmp_path)), 3)
    step = train.Trainer.train_step

    def interrupted(self, *args):
        self.stop = self.step == 3
        return step(self, *args)

    train.Trainer.train_step = interrupted
    try:
        assert not train.train_stage(cfg)
    finally:
        train.Trainer.train_step = step
    assert (tmp_path / "stage3" / "resume.pt").is_file()
    assert train.train_stage(cfg)
    moved, names, others = changed(finished / "stage3", tmp_path / "stage3")
    assert names == others and not moved
    losses = [
        [
            json.loads(line)["loss"]
            for line in (out / "stage3/metrics.jsonl").read_text().splitlines()
        ]
        for out in (finished, tmp_path)
    ]
    assert losses[0] == losses[1]


class Crash(BaseException):
    """The plug is pulled."""


def crash_in(monkeypatch, owner, name, when, half=None):
    """The `when`-th call of owner.name ends in a Crash, before it (or `half` of it) is done."""
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def crashing(*args, **options):
        if next(calls) == when:
            if half:
                half(*args)
            raise Crash
        return original(*args, **options)

    monkeypatch.setattr(owner, name, crashing)


def half_a_file(state, file):
    Path(file).write_bytes(b"PK" + bytes(1000))


FAULTS = {  # where the plug is pulled while a resume point or the checkpoint is written
    "half of a resume point": lambda m: crash_in(m, torch, "save", 2, half_a_file),
    "a resume point written, not in place": lambda m: crash_in(m, resume, "publish", 2),
    "the older one just moved": lambda m: crash_in(m, data.weights.os, "fsync", 5),
    "the final checkpoint half written": lambda m: crash_in(m, train.CuMo, "save_pretrained", 1),
    "the final checkpoint not called so": lambda m: crash_in(m, resume, "write_json", 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_plug_may_be_pulled_while_files_are_written(fault, weights, finished, tmp_path):
    options = dict(out=str(tmp_path), init=str(finished / "stage1"), save_every=2)
    cfg = train.resolve(weights | options, 2)
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(Crash):
            train.train_stage(cfg)
    assert not json.loads((tmp_path / "stage2" / "train.json").read_text())["finished"]
    assert train.train_stage(cfg)
    moved, names, others = changed(finished / "stage2", tmp_path / "stage2")
    assert names == others and not moved
    assert losses_of(tmp_path / "stage2") == losses_of(finished / "stage2")
    assert not list((tmp_path / "stage2").glob("resume*"))


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def test_a_damaged_resume_point_gives_way_to_the_one_before(
    weights, finished, tmp_path, monkeypatch, capsys
):
    options = dict(out=str(tmp_path), init=str(finished / "stage1"), save_every=2)
    cfg = train.resolve(weights | options, 2)
    with pytest.MonkeyPatch.context() as patch:
        crash_in(patch, train.CuMo, "save_pretrained", 1)
        with pytest.raises(Crash):
            train.train_stage(cfg)
    newest, older = (tmp_path / "stage2" / name for name in resume.RESUME)
    content = bytearray(newest.read_bytes())
    weight = torch.load(newest)["model"]["llm.model.embed_tokens.weight"]
    content[content.index(weight.numpy().tobytes()) + 100] ^= 1  # one bit
    newest.write_bytes(content)
    assert older.is_file() and train.train_stage(cfg)
    assert "resume.pt cannot be read" in capsys.readouterr().out
    assert not changed(finished / "stage2", tmp_path / "stage2")[0]
    assert losses_of(tmp_path / "stage2") == losses_of(finished / "stage2")


@pytest.mark.parametrize("fault", ["cut", "bit"])
def test_a_damaged_stage_is_not_built_upon(fault, weights, finished, tmp_path):
    shutil.copytree(finished / "stage1", tmp_path / "stage1")
    file = tmp_path / "stage1" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if fault == "bit" else content[:-4])
    with pytest.raises(ValueError, match=f"{file} is not what its stage wrote .*CRC-32"):
        run_stages(weights, tmp_path, 2)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "stage1" / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing: copy it again, or train it"):
            run_stages(weights, tmp_path, 1)
        with pytest.raises(ValueError, match="is missing|no config.json"):
            run_stages(weights, tmp_path, 2)
        shutil.copy(finished / "stage1" / name, tmp_path / "stage1")
    for content in ("", "{}", '{"crc32": 5}'):  # a model from elsewhere
        (tmp_path / "stage1" / "train.json").write_text(content)
        resume.refuse_changed_weights(tmp_path / "stage1")


def test_any_bit_of_a_resume_point_is_told_or_is_not_read(weights, finished, tmp_path):
    """Among the flips are those that make of the archive one packed by another method."""
    cfg = train.resolve(weights | dict(out=str(tmp_path), init=str(finished / "stage1")), 2)
    with pytest.MonkeyPatch.context() as patch:
        crash_in(patch, train.CuMo, "save_pretrained", 1)
        with pytest.raises(Crash):
            train.train_stage(cfg)
    newest, older = (tmp_path / "stage2" / name for name in resume.RESUME)
    whole, state = newest.read_bytes(), torch.load(newest)
    shutil.copy(newest, older)
    train.choose_precision(cfg)
    trainer = train.Trainer(cfg)
    end = whole.rindex(b"PK\1\2")  # the directory's last entry: its 11th byte is the method
    for place in (end + 10, end + 12, end + 20, end + 46, end, len(whole) - 10, 100, 2000):
        content = bytearray(whole)
        content[place] ^= 8
        newest.write_bytes(content)
        resume.load_point(trainer)
        assert trainer.step == state["step"]
        for name, weight in trainer.model.state_dict().items():
            assert torch.equal(weight, state["model"][name])


def test_a_stage_that_was_cut_off_while_it_began_can_begin_again(weights, finished, tmp_path):
    options = dict(out=str(tmp_path), init=str(finished / "stage1"))
    cfg = train.resolve(weights | options, 2)
    with pytest.MonkeyPatch.context() as patch:
        crash_in(patch, data.weights.os, "fsync", 1)  # train.json is written, not in place
        with pytest.raises(Crash):
            train.train_stage(cfg)
    assert [file.name for file in (tmp_path / "stage2").iterdir()] == ["train.json.partial"]
    assert train.train_stage(cfg)
    (tmp_path / "stage2" / "train.json").write_text("damaged")
    with pytest.raises(ValueError, match="damaged; --overwrite begins the stage again"):
        train.train_stage(cfg)
    with pytest.MonkeyPatch.context() as patch:
        crash_in(patch, resume.shutil, "rmtree", 2)  # the earlier stage is not removed yet
        cfg.overwrite = True
        with pytest.raises(Crash):
            train.train_stage(cfg)
    cfg.overwrite = False
    assert train.train_stage(cfg)
    assert not changed(finished / "stage2", tmp_path / "stage2")[0]


def test_steps_are_not_lost_with_a_disk_that_is_full_at_resume(weights, finished, tmp_path):
    options = dict(out=str(tmp_path), init=str(finished / "stage1"), save_every=2)
    cfg = train.resolve(weights | options, 2)
    with pytest.MonkeyPatch.context() as patch:
        crash_in(patch, train.Trainer, "train_step", 4)
        with pytest.raises(Crash):
            train.train_stage(cfg)
    log = tmp_path / "stage2" / "metrics.jsonl"
    before = log.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        crash_in(patch, resume.os, "truncate", 1)
        with pytest.raises(Crash):
            train.train_stage(cfg)
    assert log.read_bytes() == before and before.count(b"\n") == 3
    assert train.train_stage(cfg)
    assert losses_of(tmp_path / "stage2") == losses_of(finished / "stage2")


def test_a_full_disk_is_named_and_the_resume_point_before_is_good(weights, finished, tmp_path):
    resource = pytest.importorskip("resource")
    options = dict(out=str(tmp_path), init=str(finished / "stage1"), save_every=2)
    cfg = train.resolve(weights | options, 2)
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), torch.save
    calls = iter(range(9))

    def save_to_a_full_disk(state, file):
        if next(calls) == 1:  # the second one: no file may grow past 100 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save(state, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save_to_a_full_disk)
        try:
            with pytest.raises(ValueError, match="resume.pt cannot be written.* disk full.*contin"):
                train.train_stage(cfg)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in (tmp_path / "stage2").glob("resume*")] == ["resume.pt"]
    assert train.train_stage(cfg)
    assert not changed(finished / "stage2", tmp_path / "stage2")[0]
    assert losses_of(tmp_path / "stage2") == losses_of(finished / "stage2")


def test_losses_are_the_same_with_and_without_recomputing(weights, finished, tmp_path):
    for recompute in ("none", "3", "all"):
        out = tmp_path / recompute
        shutil.copytree(finished / "stage2", out / "stage2")
        options = dict(init=str(out / "stage2"), upcycle="clip,mlp,llm", recompute=recompute)
        run_stages(weights, out, 3, **options)
    none, *others = (losses_of(tmp_path / name / "stage3") for name in ("none", "3", "all"))
    assert all(losses == pytest.approx(none, rel=1e-6) for losses in others)


def test_compiled_blocks_are_not_compiled_again_after_two_steps(weights, finished, tmp_path):
    original = torch.nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(  # only the tracing is counted
            torch.nn.Module, "compile", lambda m, **o: original(m, backend="eager", **o)
        )
        cfg = train.resolve(
            weights | dict(out=str(tmp_path), init=str(finished / "stage2"), compile=True), 3
        )
        train.choose_precision(cfg)
        trainer = train.Trainer(cfg)
        trainer.model.train()
        batches = trainer.batches()
        images = []
        for step in range(6):
            with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
                before = trainer.used
                assert math.isfinite(trainer.train_step([next(batches)])["loss"])
                images.append(trainer.used - before)
    assert len(set(images)) > 1, "the number of images must change, or nothing is tested"


@pytest.mark.parametrize(
    "precision",
    [pytest.param(("bf16-master", "bf16"), marks=pytest.mark.slow), ("bf16-sr", "bf16")],
)
def test_low_precision_trains_and_resumes_bit_exactly(precision, weights, finished, tmp_path):
    options = dict(zip(("weights", "moments"), precision), init=str(finished / "stage2"))
    options |= dict(samples=20, save_every=1, lr=1e-3)  # few: not every CPU multiplies bf16
    for out in ("calm", "stopped"):
        cfg = train.resolve(weights | options | dict(out=str(tmp_path / out)), 3)
        if out == "stopped":
            with pytest.MonkeyPatch.context() as patch:
                crash_in(patch, train.Trainer, "train_step", 3)
                with pytest.raises(Crash):
                    train.train_stage(cfg)
        assert train.train_stage(cfg)
    calm, stopped = (tmp_path / out / "stage3" for out in ("calm", "stopped"))
    moved, names, others = changed(calm, stopped)
    assert names == others and not moved and losses_of(calm) == losses_of(stopped)
    assert losses_of(calm)[-1] < losses_of(calm)[0]
    dtypes = {w.dtype for w in load_file(calm / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


def test_metrics_go_to_wandb_too(weights, tmp_path, monkeypatch):
    rows = []

    class Run:
        def log(self, metrics, step):
            rows.append((step, metrics["loss"]))

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        run_stages(weights, tmp_path, 1, wandb=True)
    fake = types.SimpleNamespace(init=lambda **options: Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_stages(weights, tmp_path, 1, wandb=True)
    assert [loss for _, loss in rows] == losses_of(tmp_path / "stage1")
    assert [step for step, _ in rows] == list(range(1, len(rows) + 1))


def test_a_gradient_that_is_not_finite_names_the_samples(weights, finished, tmp_path):
    def spoil(grad):
        return grad * torch.nan

    cfg = train.resolve(weights | dict(out=str(tmp_path), init=str(finished / "stage1")), 2)
    train.choose_precision(cfg)
    trainer = train.Trainer(cfg)
    next(trainer.model.parameters()).register_hook(spoil)
    used = train.Trainer(cfg).train_step([next(trainer.batches())])["samples"]
    names = ", ".join(f"train-describe-0-{i}" for i in trainer.order[:used].tolist())
    with pytest.raises(ValueError, match=f"not finite in the step of samples {names}; correct"):
        trainer.train_step([next(trainer.batches())])


def test_ctrl_c_saves_and_the_same_command_continues(weights, finished, tmp_path):
    go = command(weights | dict(samples=4000), tmp_path, "--stage", "1")
    process = subprocess.Popen(go, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "stage1" / "metrics.jsonl"
    deadline = time.time() + 300
    while not (log.is_file() and (tmp_path / "stage1" / "resume.pt").is_file()):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "to continue: " in output
    state = json.loads((tmp_path / "stage1" / "train.json").read_text())
    assert not state["finished"]
    steps = len(losses_of(tmp_path / "stage1"))
    cfg = train.resolve(weights | dict(samples=4000, out=str(tmp_path)), 1)
    assert state["config"]["samples"] == 4000 and 0 < steps < 400
    train.choose_precision(cfg)
    trainer = train.Trainer(cfg)
    resume.load_point(trainer)
    assert trainer.step == steps, "it goes on after the last step of the log"


def test_a_second_ctrl_c_does_not_cut_the_last_save(weights, tmp_path, monkeypatch, capsys):
    def interrupted(original):
        def call(trainer, *args):
            os.kill(os.getpid(), signal.SIGINT)
            return original(trainer, *args)

        return call

    for owner, name in ((train.Trainer, "train_step"), (resume, "save_point")):
        monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    monkeypatch.setattr(sys, "argv", command(weights, tmp_path, "--stage", "1")[1:])
    with pytest.raises(SystemExit, match="130"):
        train.main()
    assert "to continue: " in capsys.readouterr().out
    assert torch.load(tmp_path / "stage1" / "resume.pt", weights_only=True)["step"] == 1


def test_the_command_that_continues_is_printed_as_it_must_be_typed(
    weights, tmp_path, monkeypatch, capsys
):
    step = train.Trainer.train_step
    monkeypatch.setattr(train.Trainer, "train_step",
                        lambda *x: (os.kill(os.getpid(), signal.SIGINT), step(*x))[1])  # fmt: skip
    argv = command(weights, tmp_path, "--stage", "1")[1:]
    monkeypatch.setattr(sys, "argv", [*argv, "--overwrite"])
    with pytest.raises(SystemExit, match="130"):
        train.main()
    assert f"to continue: python {shlex.join(argv)}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "ranks, here, start",
    [("1", "1", "python"), ("2", "2", "torchrun --nproc_per_node=2"),
     ("4", "2", "torchrun --nnodes=2 ... --nproc_per_node=2")],
)  # fmt: skip
def test_several_processes_continue_with_torchrun(monkeypatch, ranks, here, start):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert fsdp.launcher() == start


def test_a_stage_that_begins_again_outdates_those_that_started_from_it(
    weights, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    run_stages(weights, out, 2, overwrite=True)
    said = capsys.readouterr().out
    assert f"{out / 'stage3'} started from the stage that begins again" in said
    assert "stage1 started" not in said
    states = [json.loads((out / f"stage{k}" / "train.json").read_text()) for k in (1, 2, 3)]
    assert [state["finished"] for state in states] == [True, True, False]
    run_stages(weights, out, 3)
    assert "stage 3: finished in" in capsys.readouterr().out, "trained, not skipped"
    run_stages(weights, tmp_path / "own", 3, init=str(finished / "stage2"))
    shutil.copytree(out / "stage2", tmp_path / "own" / "stage2")
    run_stages(weights, tmp_path / "own", 2, overwrite=True, init=str(out / "stage1"))
    state = json.loads((tmp_path / "own" / "stage3" / "train.json").read_text())
    assert state["finished"], "it started from another folder"


def test_stage_3_runs_what_it_needs_and_says_so(weights, tmp_path, monkeypatch, capsys):
    small = {k: stage | dict(samples=6) for k, stage in STAGES["mini"].items()}
    monkeypatch.setitem(STAGES, "mini", small)
    go = command({k: weights[k] for k in ("clip", "llm", "plot")}, tmp_path, "--stage", "3")
    monkeypatch.setattr(sys, "argv", go[1:])
    train.main()
    said = capsys.readouterr().out
    assert "stage 3 needs stage 1, which is not finished" in said
    assert all((tmp_path / f"stage{k}" / "model.safetensors").is_file() for k in (1, 2, 3))
    train.main()
    assert "needs" not in capsys.readouterr().out.replace(said, "")


def test_own_data_goes_the_same_way(weights, finished, tmp_path):
    file = Path(own_records(tmp_path, 5))
    samples = json.loads(file.read_text())
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "red"}]
    samples.append({"id": "text", "conversations": turns})
    file.write_text(json.dumps(samples))
    own = dict(data=str(file), image_folder=str(tmp_path), samples=12)
    run_stages(weights, tmp_path, 3, init=str(finished / "stage2"), **own)
    state = json.loads((tmp_path / "stage3" / "train.json").read_text())
    assert state["samples"] == 12


def test_a_stage_that_saved_nothing_takes_other_flags(weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "stage1").mkdir()
    state = {"finished": False, "config": {"rows": 4000}}
    (tmp_path / "stage1" / "train.json").write_text(json.dumps(state))
    run_stages(weights, tmp_path, 1)
    assert json.loads((tmp_path / "stage1" / "train.json").read_text())["finished"]
    (tmp_path / "stage1" / "train.json").write_text('{"finished": true')
    with pytest.raises(ValueError, match="train.json is damaged; --overwrite begins"):
        run_stages(weights, tmp_path, 1)


def test_memory_that_cannot_be_had_is_one_line_on_a_cpu_too(weights, tmp_path, monkeypatch):
    def too_much(self, wandb):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train.Trainer, "loop", too_much)
    with pytest.raises(ValueError, match="out of memory on cpu; the estimate was .*What"):
        run_stages(weights, tmp_path, 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stag", "3"], "did you mean --stage?"),
        (["--preset", "huge"], "choose from mini, smol"),
        (["--stage", "4"], "choose 1, 2, 3"),
        (["--clip", "nowhere"], "hf download"),
        (["--data", "nowhere.json"], "nowhere.json"),
        (
            ["--upcycle", "clip,mpl", "--stage", "3", "--init", "STAGE2"],
            "choose from clip, mlp, llm",
        ),
        (["--freeze", "clp"], "--freeze 'clp' is unknown; choose from clip, mlp, llm"),
        (["--freeze", "llm,clip,mlp"], "--freeze llm,clip,mlp leaves nothing to learn"),
        (["--scratch", "llm", "--stage", "3"], "--scratch 'llm' is unknown; choose from clip, mlp"),
        (["--rows", "0"], "--rows 0"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--device", "meta"], "--device meta: this machine has no such device"),
        (["--device", "hpu"], "--device hpu: this machine has no such device"),
        (["--llm", "CLIP"], "model_type 'clip_vision_model' is not one of"),
        (["--clip", "LLM"], "this is no CLIP vision config: it has model_type 'mistral'"),
        (["--template", "foo"], "choose from plain"),
        (["--rows", "999999999"], "GB, and this machine has"),
        (["--seed", "-1"], "an integer from 0 to 2^63"),
        (["--lr", "1e400"], "--lr inf must be finite"),
        (
            ["--out", "CLIP/config.json"],
            "config.json cannot be written (File exists); name another",
        ),
        (["--clip-grad", "0"], "--clip-grad 0.0 must be above 0"),
        (["--balance-coef", "-1"], "--balance-coef -1.0 must be 0 or more"),
        (["--workers", "5000"], "--workers 5000 are too many for this machine; take up to"),
    ],
)
def test_bad_flags_get_one_line(flags, message, weights, finished, tmp_path, monkeypatch, capsys):
    known = {"STAGE2": finished / "stage2", "CLIP": weights["clip"], "LLM": weights["llm"]}
    for name, folder in known.items():
        flags = [flag.replace(name, str(folder)) for flag in flags]
    keep = {k: v for k, v in weights.items() if f"--{k}" not in flags}
    given = command(keep, tmp_path, *flags)[2:]
    assert message in refusal(train.main, given, monkeypatch, capsys)
    assert not any(tmp_path.iterdir()), "nothing may be left behind"


def test_bf16_is_the_default_only_where_the_cpu_has_it(monkeypatch):
    for ability, expected in (({"avx512_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=ability: a, raising=False)
        assert train.resolve({"device": "cpu"}, 1).bf16 is expected
        assert train.resolve({"device": "cpu", "bf16": not expected}, 1).bf16 is not expected
    assert train.resolve({"device": "cuda"}, 1).bf16


def test_a_slash_at_the_end_of_a_path_makes_no_other_configuration():
    state = {"config": {"init": "out/stage2", "data": "", "lr": 0.1}}
    assert resume.differences({"init": "out/stage2/", "data": None, "lr": 0.1}, state) == []
    assert len(resume.differences({"init": "out/stage1/", "lr": 0.2}, state)) == 2
