"""Three stages on models of a few thousand parameters: what is trained, resumed, refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from refused import refusal
from safetensors.torch import load_file

import train
from clip_moe import CLIPVision, CLIPVisionConfig
from data.weights import write_json, write_tensors
from llm import LLM, LLMConfig

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "data" / "mini" / "llm" / "tokenizer.json"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Flags that start a run from tiny random CLIP and LLM directories."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    clip = CLIPVision(
        CLIPVisionConfig(image_size=64, patch_size=16, dim=32, hidden_dim=48, n_layers=3, n_heads=2)
    )
    llm = LLM(LLMConfig(1024, dim=32, hidden_dim=48, n_layers=2, n_heads=2, n_kv_heads=1))
    for name, model, config in (("clip", clip, clip.cfg), ("llm", llm, llm.cfg)):
        write_tensors(folder / name, model.original_state_dict())
        write_json(folder / name / "config.json", config.to_hf())
    shutil.copy(TOKENIZER, folder / "llm")
    sizes = dict(samples=40, rows=2, row_tokens=256, accumulate=1, save_every=3)
    return dict(clip=str(folder / "clip"), llm=str(folder / "llm"), **sizes)


def run_stages(weights, out, *stages, **options):
    for stage in stages:
        assert train.train_stage(train.resolve(weights | dict(out=str(out)) | options, stage))


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run_stages(weights, out, 1, 2, 3)
    return out


def command(weights, out, *more):
    flags = [
        f for k, v in (weights | {"out": out}).items() for f in (f"--{k.replace('_', '-')}", v)
    ]
    return [sys.executable, str(ROOT / "train.py"), *map(str, flags), *more]


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


def test_nothing_to_learn_is_said_and_not_called_finished(weights, tmp_path):
    with pytest.raises(ValueError, match="none of the 3 samples holds an answer"):
        run_stages(weights, tmp_path, 1, samples=3, row_tokens=19)
    assert not json.loads((tmp_path / "stage1" / "train.json").read_text())["finished"]


def test_prerequisites_of_another_model_are_refused(weights, finished, monkeypatch):
    go = command(weights | dict(seed=9), finished, "--stage", "3")
    monkeypatch.setattr(sys, "argv", go[1:])
    with pytest.raises(ValueError, match="stage1 was made with another.* seed was 0, now 9"):
        train.main()


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decay, rest = train.param_groups(model, train.TrainConfig(weight_decay=0.1))
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
    flags = {"preset": "smol-mini", "clip": str(ROOT / "data" / "mini" / "clip")}
    with pytest.raises(ValueError, match="SmolLM2.* is not there; data/convert_smollm2.py makes"):
        train.train_stage(train.resolve(flags, 1))


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


def test_metrics_and_configuration_are_kept(finished):
    rows = [json.loads(x) for x in (finished / "stage3" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (
        rows[-1]["samples"] == 40 and {"lm_loss", "clip_balance", "mlp_z", "lr"} <= rows[0].keys()
    )
    state = json.loads((finished / "stage3" / "train.json").read_text())
    assert state["finished"] and state["config"]["upcycle"] == "clip,mlp"
    assert not (finished / "stage3" / "resume.pt").exists()


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

    def interrupted(self, batches):
        self.stop = self.step == 3
        return step(self, batches)

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


def test_ctrl_c_saves_and_the_same_command_continues(weights, finished, tmp_path):
    go = command(weights | dict(samples=4000), tmp_path, "--stage", "1")
    process = subprocess.Popen(go, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "stage1" / "metrics.jsonl"
    deadline = time.time() + 60
    while not (log.is_file() and (tmp_path / "stage1" / "resume.pt").is_file()):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command continues" in output
    assert not json.loads((tmp_path / "stage1" / "train.json").read_text())["finished"]


def test_stage_3_runs_what_it_needs_and_says_so(weights, tmp_path, monkeypatch, capsys):
    small = {k: stage | dict(samples=6) for k, stage in train.STAGES["mini"].items()}
    monkeypatch.setitem(train.STAGES, "mini", small)
    go = command({k: weights[k] for k in ("clip", "llm")}, tmp_path, "--stage", "3")
    monkeypatch.setattr(sys, "argv", go[1:])
    train.main()
    said = capsys.readouterr().out
    assert "stage 3 needs stage 1, which is not there yet" in said
    assert all((tmp_path / f"stage{k}" / "model.safetensors").is_file() for k in (1, 2, 3))
    train.main()
    assert "needs" not in capsys.readouterr().out.replace(said, "")


def test_own_data_goes_the_same_way(weights, finished, tmp_path):
    Image.new("RGB", (80, 50), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "What color?\n<image>"}, {"from": "gpt", "value": "red"}]
    samples = [{"id": str(i), "image": "red.png", "conversations": turns} for i in range(5)]
    samples.append({"id": "text", "conversations": [turns[0] | {"value": "Hello?"}, turns[1]]})
    (tmp_path / "mine.json").write_text(json.dumps(samples))
    own = dict(data=str(tmp_path / "mine.json"), image_folder=str(tmp_path), samples=12)
    run_stages(weights, tmp_path, 3, init=str(finished / "stage2"), **own)
    state = json.loads((tmp_path / "stage3" / "train.json").read_text())
    assert state["samples"] == 12


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
        (["--rows", "0"], "--rows 0"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--template", "foo"], "choose from plain"),
    ],
)
def test_bad_flags_get_one_line(flags, message, weights, finished, tmp_path, monkeypatch, capsys):
    flags = [str(finished / "stage2") if flag == "STAGE2" else flag for flag in flags]
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
