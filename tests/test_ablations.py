"""The ablations: every row is a valid training, is run once, and is shown as measured."""

import json
import shutil
import sys

import pytest
from refused import refusal
from tiny import ROOT

from data.flags import parse
from runs import ablations, results
from train import TrainConfig, resolve


def row(name, seed, *percent, seconds=10):
    shares = dict(zip(results.SPLITS, (p / 100 for p in percent)))
    return {"name": name, "seed": seed, "accuracy": shares, "parameters": 12_000_000,
            "active_parameters": 8_000_000, "cpu_seconds": seconds, "machine": "a machine",
            "precision": "bf16"}  # fmt: skip


def content(*rows):
    cfg = ablations.AblationConfig(bench="nowhere")
    return ablations.read_results(cfg) | {"rows": list(rows)}


@pytest.mark.parametrize("name", ablations.RUNS)
def test_flags_of_every_row_are_a_valid_stage_3(name):
    words = ablations.command(ablations.AblationConfig(), name, 1)
    cfg, given = parse(TrainConfig, words[2:])
    cfg = resolve({k: getattr(cfg, k) for k in given}, 3)
    assert cfg.samples == 1600 and cfg.seed == 1 and cfg.out == f"out/ablations/{name}-1"
    scales = "".join(map(str, cfg.scales))
    assert cfg.init == {"1": "out"}.get(scales, f"out/ablations/scales-1,{scales[-1]}") + (
        "/stage1" if name == "e-without" else "/stage2"
    )


def test_rows_of_a_group_differ_only_in_the_flags_of_the_group():
    differ = {"a": "upcycle scratch balance_coef z_coef num_experts",
              "b": "freeze upcycle scratch num_experts", "c": "upcycle", "d": "scales",
              "e": "init", "f": "top_k"}  # fmt: skip
    used = set()
    for group, _, lines in ablations.GROUPS:
        flags = [ablations.RUNS[name] for name, *_ in lines]
        names = {k for f in flags for k in f if any(f.get(k) != other.get(k) for other in flags)}
        assert names == set(differ[group].split()), group
        used.update(name for name, *_ in lines)
    assert used == set(ablations.RUNS)


def test_rows_are_named_one_by_one_or_by_group():
    assert ablations.chosen_runs("") == list(ablations.RUNS)
    assert ablations.chosen_runs("f-top1,c") == ["b-cumo", "c-llm", "f-top1"]
    with pytest.raises(ValueError, match="--rows 'g': choose from a, b, c"):
        ablations.chosen_runs("a,g")


def start(tmp_path, monkeypatch, *flags):
    """Run the command in its own folder, with stages 1 and 2 marked as finished."""
    folders = [f"--{k}={tmp_path / k}" for k in ("demo", "out", "bench")]
    for stage in (1, 2):
        (tmp_path / "demo" / f"stage{stage}").mkdir(parents=True, exist_ok=True)
        state = '{"finished": true, "config": {}}'
        (tmp_path / "demo" / f"stage{stage}" / "train.json").write_text(state)
    monkeypatch.setattr(sys, "argv", ["ablations.py", *folders, *flags])
    ablations.main()
    return json.loads((tmp_path / "bench" / "results.json").read_text())


@pytest.mark.parametrize("flag", ["samples", "questions", "threads"])
def test_sizes_below_one_are_one_line(flag, monkeypatch, capsys):
    said = refusal(ablations.main, [f"--{flag}", "0"], monkeypatch, capsys)
    assert f"--{flag} 0" in said and said.endswith("must be 1 or more")


def test_finished_runs_are_kept_and_an_interrupted_one_is_run_again(tmp_path, monkeypatch):
    calls, plug = [], iter([0, 1, 0, 0, 0])  # the second training is interrupted

    def train(words, folder):
        calls.append(folder.name)
        if next(plug):
            raise KeyboardInterrupt
        (folder / "stage3").mkdir(parents=True)
        state = {"finished": True, "config": {"bf16": True}}
        (folder / "stage3" / "train.json").write_text(json.dumps(state))
        return 12.34

    measured = {k: v for k, v in row("", 0, 90, 80, 70).items() if "a" in k and k != "name"}
    monkeypatch.setattr(ablations, "run_training", train)
    monkeypatch.setattr(ablations, "examine", lambda folder, questions: measured)
    with pytest.raises(SystemExit, match="the same command continues"):
        start(tmp_path, monkeypatch, "--rows=c", "--seeds=0,1")
    assert calls == ["b-cumo-0", "c-llm-0"]
    found = start(tmp_path, monkeypatch, "--rows=c", "--seeds=0,1")
    assert calls[2:] == ["c-llm-0", "b-cumo-1", "c-llm-1"]
    assert [(r["name"], r["seed"]) for r in found["rows"]] == [
        ("b-cumo", 0), ("b-cumo", 1), ("c-llm", 0), ("c-llm", 1)]  # fmt: skip
    assert found["rows"][0]["groups"] == list("bcdef") and found["rows"][0]["cpu_seconds"] == 12.3
    assert start(tmp_path, monkeypatch, "--rows=c-llm", "--seeds=1") == found and len(calls) == 5
    with pytest.raises(ValueError, match="of 1600 samples and 400 questions; name another"):
        start(tmp_path, monkeypatch, "--samples=64")


def test_the_command_without_flags_continues_the_published_results():
    cfg = ablations.AblationConfig(bench=str(ROOT / "bench" / "ablations"))
    assert len(ablations.read_results(cfg)["rows"]) == 3 * len(ablations.RUNS)


def test_two_commands_never_train_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "run_training", lambda *_: pytest.fail("another has it"))
    with ablations.lock(tmp_path / "out" / "f-top1-0") as ours:
        assert ours
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "results.json").write_text(json.dumps(content()))
        assert not start(tmp_path, monkeypatch, "--rows=f-top1", "--seeds=0")["rows"]


def test_missing_stages_are_trained_first_at_the_scales_of_the_row(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablations, "run_training", lambda words, _: calls.append(words))
    cfg = ablations.AblationConfig(demo=str(tmp_path), out=str(tmp_path))
    with pytest.raises(ValueError, match="was interrupted"):
        ablations.train_and_examine(cfg, "d-13", 0)
    folder = str(tmp_path / "scales-1,3")
    assert calls[0][2:] == ["--stage", "2", "--out", folder, "--scales", "1,3"]
    assert calls[1][2:6] == ["--stage", "3", "--init", f"{folder}/stage2"]


def test_cpu_seconds_of_every_attempt_are_counted_and_a_failure_is_one_line(tmp_path):
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    first = ablations.run_training(["python", "-c", busy], tmp_path / "run")
    assert first >= 0.3
    assert ablations.run_training(["python", "-c", busy], tmp_path / "run") >= first + 0.3
    with pytest.raises(ValueError, match="failed: no such thing .*train.log"):
        ablations.run_training(["python", "-c", "exit('no such thing')"], tmp_path / "run")


def test_differences_smaller_than_the_spread_of_the_seeds_are_called_so():
    def remark(first, second):
        rows = [row("e-without", s, x, x, x) for s, x in enumerate(first)]
        rows += [row("b-cumo", s, x, x, x) for s, x in enumerate(second)]
        (group,) = (g for g in results.ablations(content(*rows)) if g["group"] == "e")
        assert group["rows"][0]["remark"] == "", "the first row is compared with nothing"
        return group["rows"][1]["remark"]

    assert remark([80, 82], [81, 83]) == "within the spread"  # 1 of 2
    assert remark([80, 80], [82, 85]) == ""  # 3.5 of 3
    assert remark([85, 80], [80, 79]) == "within the spread", "the first row's spread counts too"
    assert remark([80, 80], [80.5, 80.5]) == "", "equal seeds have no spread"
    assert remark([80], [81]) == "one seed"
    assert remark([], [81]) == ""


def test_block_of_the_readme_shows_every_row_with_its_spread_and_the_papers(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.ablations_block() == "Not measured yet."
    rows = [row("e-without", 0, 50, 40, 30, seconds=9), row("e-without", 1, 52, 41, 30),
            row("b-cumo", 0, 90, 85, 60), row("b-cumo", 1, 91, 86, 60, seconds=13)]  # fmt: skip
    (tmp_path / "bench" / "ablations").mkdir(parents=True)
    file = tmp_path / "bench" / "ablations" / "results.json"
    file.write_text(json.dumps(content(*rows)))
    lines = results.ablations_block().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + sum(len(group[2]) for group in ablations.GROUPS)
    at = next(i for i, line in enumerate(lines) if "**(e) pre-finetuning" in line)
    assert lines[at : at + 2] == [
        "| **(e) pre-finetuning (stage 2)**: without | 51.0 (50.0 to 52.0) | 40.5 (40.0 to 41.0) | "
        "30.0 (30.0 to 30.0) |  |  | 8.0 / 12.0 | 10 |",
        "| with | 90.5 (90.0 to 91.0) | 85.5 (85.0 to 86.0) | 60.0 (60.0 to 60.0) | +38.2 | +2.2 | "
        "8.0 / 12.0 | 12 |",
    ]
    assert "400 questions a split" in lines[-1] and "of 2 seeds; a machine, bf16" in lines[-1]
    assert "not measured" in lines[at - 1], "a row without results yet"


def test_picture_is_drawn_from_the_rows_so_far(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("a-dense", 0, 80, 80, 80), row("a-8", 0, 81, 79, 83), row("b-8", 1, 9, 9, 9)]
    ablations.draw_ablations(results.ablations(content(*rows)), tmp_path / "ablations.png")
    assert (tmp_path / "ablations.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_tiny_run_is_trained_and_examined(tmp_path, monkeypatch):
    flags = ["--rows=b-cumo", "--seeds=0", "--samples=16", "--questions=16"]
    for stage in (1, 2):
        made = ROOT / "out" / f"stage{stage}"
        if not (made / "train.json").is_file():
            pytest.skip("needs a finished demo in out/")
        shutil.copytree(made, tmp_path / "demo" / f"stage{stage}")
    found = start(tmp_path, monkeypatch, *flags)
    (only,) = found["rows"]
    assert 0 < only["active_parameters"] < only["parameters"] and only["cpu_seconds"] > 1
    assert all(0 <= share <= 1 for share in only["accuracy"].values())
