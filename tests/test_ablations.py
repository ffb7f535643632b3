"""The ablations: every row is a valid training, is run once, and is shown as measured."""

import json
import re
import shutil
import signal
import sys
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
from refused import refusal
from tiny import ROOT

from clip_moe import CLIPVision
from data.flags import parse
from data.stages import STAGES
from runs import ablations, verdicts
from runs.make import pretrain_clip
from runs.make.pretrain_clip import PretrainCLIPConfig
from train import TrainConfig, resolve


def row(name, seed, seconds=10):
    return {"name": name, "seed": seed, "parameters": 12_000_000, "active_parameters": 8_000_000,
            "cpu_seconds": seconds, "machine": "a machine", "precision": "bf16",
            "commit": "abc"}  # fmt: skip


def content(*rows, questions=6):
    cfg = ablations.AblationConfig(bench="nowhere", questions=questions)
    return ablations.read_results(cfg) | {"rows": list(rows)}


def answers(*shares, questions=6):
    """Answers of a run, packed: of each split of so many questions, the first ones are right."""
    right = np.arange(questions) < np.array(shares)[:, None] * questions
    return verdicts.pack(right, np.where(right, 0.1, 2.0), np.linspace(1, sum(shares), 9))


@pytest.mark.parametrize("name", ablations.RUNS)
def test_flags_of_every_row_are_a_valid_stage_3(name):
    words = ablations.command(ablations.AblationConfig(), name, 1)
    cfg, given = parse(TrainConfig, words[2:])
    cfg = resolve({k: getattr(cfg, k) for k in given}, 3)
    assert cfg.samples == STAGES["mini"][3]["samples"]
    assert cfg.seed == 1 and cfg.out == f"out/ablations/{name}-1"
    scales = "".join(map(str, cfg.scales))
    folder = {"1": "out/weak"}.get(scales, f"out/ablations/scales-1,{scales[-1]}")
    folder = "out/ablations/wide" if name == "b-wide" else folder
    assert cfg.init == folder + ("/stage1" if name == "e-without" else "/stage2")


def test_a_row_differs_from_the_row_compared_with_in_what_the_row_is_about():
    differ = {  # all but the run itself in one flag, or in what makes the two comparable
        "a-scratch": "upcycle scratch balance_coef z_coef", "a-copies": "scratch",
        "a-losses": "balance_coef z_coef", "a-8": "num_experts", "b-clip": "freeze",
        "b-wide": "init", "b-8": "num_experts", "b-scratch": "scratch", "c-llm": "upcycle",
        "d-12": "scales", "d-13": "scales", "f-top4": "top_k", "a-losses/a-dense": "upcycle",
        "b-cumo/b-clip": "upcycle", "b-cumo/e-without": "init", "b-cumo/f-top1": "top_k",
        "b-cumo/b-wide": "upcycle init", "b-clip/g-dense": "upcycle", "b-cumo/g-dense": "upcycle",
        "b-cumo/a-dense": "upcycle freeze"}  # fmt: skip
    used = set()
    for _, _, lines in ablations.GROUPS:
        (first, nothing, *_), *rest = lines
        used.add(first)
        assert nothing == "", "a group begins with its reference"
        for name, against, *_ in rest:
            flags, other = ablations.RUNS[name], ablations.RUNS[against]
            names = {k for k in flags | other if flags.get(k) != other.get(k)}
            pair = f"{name}/{against}"
            assert names == set(differ[pair if pair in differ else name].split()), pair
            used.add(name)
    assert used == set(ablations.RUNS)


def test_rows_are_named_one_by_one_or_by_group():
    assert ablations.chosen_runs("") == list(ablations.RUNS)
    assert ablations.chosen_runs("f-top1,c") == ["b-cumo", "c-llm", "f-top1"]
    with pytest.raises(ValueError, match="--rows 'z': choose from a, b, c"):
        ablations.chosen_runs("a,z")


def test_rows_that_carry_a_verdict_have_five_seeds_and_every_row_three():
    plan = ablations.planned(ablations.AblationConfig())
    seeds = {name: [s for run, s in plan if run == name] for name in ablations.RUNS}
    more = {name for name in seeds if len(seeds[name]) >= 5}
    main = "a-dense a-scratch a-losses b-clip b-wide b-cumo b-scratch d-12 g-dense"
    assert more == set(main.split())
    assert min(map(len, seeds.values())) == 3
    assert [seed for _, seed in plan[:45]] == [k // 9 for k in range(45)], "the verdicts first"
    assert {name for name, _ in plan[:9]} == {name for name, _ in plan[:45]} == more
    assert [seed for _, seed in plan[45:]] == [2, 3, 4] * 8, "the others row by row"
    few = ablations.planned(ablations.AblationConfig(rows="a-dense,a-8,b-cumo", seeds=(7, 1)))
    assert few == [("a-dense", 1), ("b-cumo", 1), ("a-dense", 7), ("b-cumo", 7), ("a-8", 7),
                   ("a-8", 1)]  # fmt: skip


def start(tmp_path, monkeypatch, *flags):
    """Run the command in its own folder, with stages 1 and 2 marked as finished."""
    folders = [f"--{k}={tmp_path / k}" for k in ("demo", "out", "bench")]
    for stage in (1, 2):
        (tmp_path / "demo" / f"stage{stage}").mkdir(parents=True, exist_ok=True)
        state = '{"finished": true, "config": {"clip": "data/mini/weak_clip"}}'
        (tmp_path / "demo" / f"stage{stage}" / "train.json").write_text(state)
        weights = tmp_path / "demo" / f"stage{stage}" / "model.safetensors"
        if not weights.exists():
            weights.write_bytes(b"weights")
    monkeypatch.setattr(
        sys, "argv", ["ablations.py", "--jobs=1", "--questions=40", *folders, *flags]
    )
    ablations.main()
    return json.loads((tmp_path / "bench" / "results.json").read_text())


@pytest.mark.parametrize("flag", ["samples", "questions", "threads"])
def test_sizes_below_one_are_one_line(flag, monkeypatch, capsys):
    said = refusal(ablations.main, [f"--{flag}", "0"], monkeypatch, capsys)
    assert f"--{flag} 0" in said and said.endswith("must be 1 or more")


def test_an_exam_too_short_for_every_type_is_one_line(monkeypatch, capsys):
    assert "--questions 3 must be" in refusal(
        ablations.main, ["--questions", "3"], monkeypatch, capsys
    )


def test_another_clip_than_that_of_the_demo_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "run_training", lambda *_: pytest.fail("trained"))
    said = "^--clip other, but .*stage2 was trained with data/mini/weak_clip; name another"
    with pytest.raises(ValueError, match=said):
        start(tmp_path, monkeypatch, "--clip=other", "--rows=f-top1", "--seeds=0")


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

    def examine(folder, n):
        right = np.arange(3 * n).reshape(3, n) % 2 == 0
        np.savez(folder / "exam.npz", right=right, loss=1.5 - right)
        (folder / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 2}\n{"lm_loss": 1.5}\n')
        return {"parameters": 12, "active_parameters": 8}

    monkeypatch.setattr(ablations, "run_training", train)
    monkeypatch.setattr(ablations, "examine", examine)
    with pytest.raises(SystemExit, match="the same command continues"):
        start(tmp_path, monkeypatch, "--rows=c", "--seeds=0,1")
    assert calls == ["b-cumo-0", "b-cumo-1"]
    found = start(tmp_path, monkeypatch, "--rows=c", "--seeds=0,1")
    assert calls[2:] == ["b-cumo-1", "c-llm-0", "c-llm-1"]
    assert [(r["name"], r["seed"]) for r in found["rows"]] == [
        ("b-cumo", 0), ("b-cumo", 1), ("c-llm", 0), ("c-llm", 1)]  # fmt: skip
    assert found["rows"][0]["cpu_seconds"] == 12.3
    assert start(tmp_path, monkeypatch, "--rows=c-llm", "--seeds=1") == found and len(calls) == 5
    kept = verdicts.read_answers(tmp_path / "bench" / "exam.npz")
    assert sorted(kept) == sorted(f"{r['name']}-{r['seed']}" for r in found["rows"])
    right, loss = verdicts.unpack(kept["c-llm-1"], (3, 40))
    assert kept["c-llm-1"]["training"].tolist() == [2, 1.5]
    assert right[0, :4].tolist() == [True, False] * 2 and loss[0, 1] == pytest.approx(1.5, rel=0.05)
    with pytest.raises(ValueError, match="with --samples 5600, --questions 40, .*; name another"):
        start(tmp_path, monkeypatch, "--samples=64")


def test_the_command_without_flags_continues_the_published_results():
    cfg = ablations.AblationConfig(bench=str(ROOT / "bench" / "ablations"))
    done = [(row["name"], row["seed"]) for row in ablations.read_results(cfg)["rows"]]
    planned = ablations.planned(cfg)[: len(done)]
    assert sorted(done) == sorted(planned), "none is left out, in the order of the plan"
    kept = verdicts.read_answers(ROOT / "bench" / "ablations" / "exam.npz")
    assert sorted(kept) == sorted(f"{name}-{seed}" for name, seed in done)


def test_two_commands_never_train_the_same_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "run_training", lambda *_: pytest.fail("another has it"))
    with ablations.lock(tmp_path / "out" / "f-top1-0") as ours:
        assert ours
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "results.json").write_text(json.dumps(content(questions=40)))
        assert not start(tmp_path, monkeypatch, "--rows=f-top1", "--seeds=0")["rows"]
    assert "not in the table: f-top1-0" in capsys.readouterr().out


def finish(folder):
    for stage in ("stage1", "stage2"):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "train.json").write_text('{"finished": true, "config": {}}')
        (folder / stage / "model.safetensors").write_bytes(stage.encode())


def test_missing_stages_are_trained_first_at_the_scales_of_the_row(tmp_path, monkeypatch):
    calls = []

    def training(words, folder):
        calls.append(words[2:])
        finish(folder)

    monkeypatch.setattr(ablations, "run_training", training)
    monkeypatch.setattr(ablations, "widen", lambda *folders: calls.append(folders))
    cfg = ablations.AblationConfig(clip="a/clip", demo=f"{tmp_path}/demo", out=f"{tmp_path}/runs",
                                   bench=str(tmp_path))  # fmt: skip
    demo, scales = tmp_path / "demo", tmp_path / "runs" / "scales-1,3"
    words = lambda folder: ["--stage", "2", "--out", str(folder), "--clip", "a/clip"]
    crc = "-".join(f"{zlib.crc32(stage):08x}" for stage in (b"stage1", b"stage2"))
    for name in ("b-cumo", "b-wide", "d-13"):
        assert ablations.prepare(cfg, name, 0) == crc
    wide = demo / "stage2", tmp_path / "runs" / "wide" / "stage2"
    assert calls == [words(demo), wide, [*words(scales), "--scales", "1,3"]]


def test_one_table_never_mixes_two_clips(tmp_path):
    cfg = ablations.AblationConfig(bench=str(tmp_path))
    (tmp_path / "results.json").write_text(json.dumps(ablations.read_results(cfg)))
    other = ablations.AblationConfig(bench=str(tmp_path), clip="data/mini/clip")
    with pytest.raises(ValueError, match="--clip data/mini/weak_clip, .*; name another"):
        ablations.read_results(other)


@pytest.mark.parametrize("name", ["b-clip", "b-wide", "e-without"])
def test_rows_that_come_from_other_weights_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "widen", lambda *_: None)
    cfg = ablations.AblationConfig(demo=str(tmp_path / "demo"), bench=str(tmp_path))
    finish(tmp_path / "demo")
    found = content(
        row("b-cumo", 0) | {"start": ablations.prepare(cfg, "b-cumo", 0)}, questions=4000
    )
    (tmp_path / "results.json").write_text(json.dumps(found))
    ablations.prepare(cfg, name, 0)
    (tmp_path / "demo" / "stage2" / "model.safetensors").write_bytes(b"of another machine")
    said = "demo have CRC-32 .*, those of the table's b-cumo-0 .*; get that folder"
    with pytest.raises(ValueError, match=said):
        ablations.prepare(cfg, name, 0)
    ablations.prepare(cfg, name, 1)  # no row of this seed to be compared with


def test_a_table_of_which_every_run_failed_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no disk")

    monkeypatch.setattr(ablations, "train_and_examine", refuse)
    with pytest.raises(ValueError, match="^failed: 1; the first: f-top1, seed 0: no disk"):
        start(tmp_path, monkeypatch, "--rows=f-top1", "--seeds=0")


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def train(cfg, name, seed):
        if name == "f-top1":
            raise ValueError("a gradient is not finite")
        return {"name": name, "seed": seed}

    published = []
    monkeypatch.setattr(ablations, "train_and_examine", train)
    monkeypatch.setattr(ablations, "publish_run", lambda _, run: published.append(run["name"]))
    monkeypatch.setattr(ablations, "draw_ablations", lambda *_: published.append("drawn"))
    with pytest.raises(ValueError, match="failed: 1; the first: f-top1, seed 0: a gradient is not"):
        start(tmp_path, monkeypatch, "--rows=f", "--seeds=0")
    assert published == ["b-cumo", "f-top4", "drawn"]


def test_the_weak_clip_is_the_one_that_its_command_makes(monkeypatch):
    (words,) = re.findall(r"`(runs/make/pretrain_clip.py[^`]+)`", ablations.__doc__)
    given = []
    monkeypatch.setattr(pretrain_clip, "pretrain_clip", given.append)
    monkeypatch.setattr(sys, "argv", words.split())
    pretrain_clip.main()
    weak, strong = (CLIPVision.from_pretrained(ROOT / "data" / "mini" / name).cfg
                    for name in ("weak_clip", "clip"))  # fmt: skip
    assert weak == replace(strong, hidden_dim=given[0].hidden_dim) != strong
    assert given[0].steps < PretrainCLIPConfig.steps, "cut short"


def test_cpu_seconds_of_every_attempt_are_counted_and_a_failure_is_one_line(tmp_path):
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    first = ablations.run_training(["python", "-c", busy], tmp_path / "run")
    assert first >= 0.3
    assert ablations.run_training(["python", "-c", busy], tmp_path / "run") >= first + 0.3
    with pytest.raises(ValueError, match="failed: no such thing .*train.log"):
        ablations.run_training(["python", "-c", "exit('no such thing')"], tmp_path / "run")


def test_block_of_the_page_gives_a_verdict_on_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "FOLDER", tmp_path)
    assert verdicts.ablations_block() == "Not measured yet."
    rows = [row("e-without", 0, 9), row("e-without", 1), row("b-cumo", 0), row("b-cumo", 1, 13),
            row("d-12", 1)]  # fmt: skip
    bad, good = answers(1 / 6, 0, 0), answers(1, 1, 1 / 2)  # the first questions are right
    (tmp_path / "results.json").write_text(json.dumps(content(*rows)))
    runs = {"e-without-0": bad, "e-without-1": bad, "b-cumo-0": good, "b-cumo-1": good}
    verdicts.write_answers(tmp_path / "exam.npz", runs | {"d-12-1": bad})
    lines = verdicts.ablations_block().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    size = 2 + sum(len(group[2]) for group in ablations.GROUPS)
    assert len(tables) == 2 * size
    for part in (tables[:size], tables[size:]):
        assert len({line.count("|") for line in part}) == 1
    verdict, kinds = (i for i, line in enumerate(lines) if "**(e) pre-finetuning" in line)
    assert lines[verdict].endswith("without |  | 5.6 |  |  |  | 1.743 |  |  |")
    assert lines[verdict + 1].startswith("| with | without | 83.3 | +77.8 | +2.2 | confirmed: +")
    assert lines[kinds].endswith("without |  | 16.7 % | 0.0 % |  | 0.0 % | 16.7 | 0.0 | 0.0 | 2 | "
                                 "8.0 / 12.0 | 10 |")  # fmt: skip
    assert "| +3.5 |" in lines[kinds + 1] and lines[kinds + 1].endswith("| 8.0 / 12.0 | 12 |")
    (single,) = (line for line in tables[:size] if line.startswith("| scales 1 and 2 |"))
    assert "| scale 1 | 5.6 | -77.8 | +0.5 | one seed |" in single
    assert "not measured" in lines[verdict - 1], "a row without results yet"
    note = (
        "5 runs; 6 questions a split, after 5,600 samples of stage 3; a machine, bf16, commit abc."
    )
    assert note in lines


def test_picture_is_drawn_from_the_rows_so_far(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("a-dense", 0), row("a-dense", 1), row("a-8", 0), row("a-8", 1), row("b-8", 1)]
    runs = {f"{r['name']}-{r['seed']}": answers(r["seed"], 1, 0.5) for r in rows}
    groups = verdicts.ablations(content(*rows), runs)
    ablations.draw_ablations(groups, tmp_path / "ablations.png")
    assert (tmp_path / "ablations.png").stat().st_size > 10_000


JOB = """
import pathlib, sys, time
assert sys.argv[1:] == ["--rows=c", "--jobs", "0"], sys.argv
try:
    pathlib.Path(__file__).with_name("begun").touch()
    time.sleep({seconds})
except KeyboardInterrupt:
    pathlib.Path(__file__).with_name("stopped").touch()
sys.exit({status!r})
"""


def other_jobs(tmp_path, monkeypatch, failures, seconds=0, status=0):
    """`ablations.other_jobs` of --jobs 2, the other one with work that only takes time."""
    (tmp_path / "job.py").write_text(JOB.format(seconds=seconds, status=status))
    monkeypatch.setattr(ablations, "SCRIPT", tmp_path / "job.py")
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--rows=c"])
    cfg = ablations.AblationConfig(jobs=2, out=str(tmp_path / "out"))
    return ablations.other_jobs(cfg, failures)


def test_the_other_jobs_are_waited_for_and_a_failed_one_is_one_line(tmp_path, monkeypatch):
    failures = []
    with other_jobs(tmp_path, monkeypatch, failures, seconds=0.5):
        pass
    assert (tmp_path / "begun").exists() and not failures
    with other_jobs(tmp_path, monkeypatch, failures, status="no such thing"):
        pass
    assert failures == [f"another job, see {tmp_path}/out/job-1.log: no such thing"]


def test_ctrl_c_stops_the_other_jobs_too(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        with other_jobs(tmp_path, monkeypatch, [], seconds=600):
            until = time.time() + 60
            while not (tmp_path / "begun").exists() and time.time() < until:
                time.sleep(0.02)
            raise KeyboardInterrupt
    assert (tmp_path / "stopped").exists()


def test_a_job_of_another_command_trains_and_writes_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "train_and_examine", lambda cfg, *run: run)
    monkeypatch.setattr(ablations, "publish_run", lambda cfg, run: published.append(run))
    monkeypatch.setattr(ablations, "draw_ablations", lambda *_: pytest.fail("drawn"))
    published, words = [], [f"--out={tmp_path}", f"--bench={tmp_path}", "--jobs=0", "--rows=c"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *words, "--seeds=4"])
    ablations.main()
    assert published == [("b-cumo", 4), ("c-llm", 4)]


@pytest.fixture
def restored_signals():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_ends_the_training_and_the_command(number, tmp_path, monkeypatch, restored_signals):
    ignored = number != signal.SIGHUP  # as behind &; SIGHUP only behind nohup
    signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    child = f"""
import os, pathlib, time
try:
    os.kill(os.getppid(), {int(number)})
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(tmp_path / "stopped")!r}).touch()
"""
    train = lambda *_: ablations.run_training(["python", "-c", child], tmp_path / "run")
    monkeypatch.setattr(ablations, "train_and_examine", train)
    with pytest.raises(SystemExit, match="stopped; the same command continues"):
        start(tmp_path, monkeypatch, "--rows=c-llm", "--seeds=0")
    assert (tmp_path / "stopped").exists() and (tmp_path / "run" / "cpu.json").exists()


def test_a_closed_terminal_is_ignored_behind_nohup(tmp_path, monkeypatch, restored_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    child = "import os; os.kill(os.getppid(), 1); os.kill(os.getpid(), 1)"
    train = lambda *_: ablations.run_training(["python", "-c", child], tmp_path / "run")
    monkeypatch.setattr(ablations, "train_and_examine", train)
    monkeypatch.setattr(ablations, "publish_run", lambda *_: None)
    monkeypatch.setattr(verdicts, "ablations", lambda *_: [])
    monkeypatch.setattr(ablations, "draw_ablations", lambda *_: None)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "results.json").write_text(json.dumps(content(questions=40)))
    start(tmp_path, monkeypatch, "--rows=c-llm", "--seeds=0")
    assert (tmp_path / "run" / "cpu.json").exists()


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
    assert sorted(verdicts.read_answers(tmp_path / "bench" / "exam.npz")) == ["b-cumo-0"]
