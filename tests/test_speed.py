"""bench/speed.py: a missing package is one line, results in the repository are not overwritten."""

import importlib.util
import json
import runpy
import sys

import pytest
from refused import refusal
from tiny import ROOT


@pytest.fixture
def speed(tmp_path, monkeypatch):
    """bench/speed.py in a folder of its own, with two sections that take no time."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # it replaces the first
    from bench import speed

    one = lambda name: lambda runs: [speed.row(name, "a case", {"ours": [1.0], "loop": [2.0]})]
    about = {"machine": "a box", "threads": 1, "precision": "torch.float32", "torch": "2"}
    commit = lambda: {"commit": (tmp_path / "commit").read_text()}
    fakes = dict(ROOT=tmp_path, conditions=lambda: about | commit(), draw_ratios=lambda *_: None,
                 SECTIONS={name: one(name) for name in ("scale", "start")})  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(speed, name, fake)

    def start(*words):
        monkeypatch.setattr(sys, "argv", ["speed.py", *words])
        speed.main()

    return start


def test_sections_without_their_packages_are_named_in_one_line(monkeypatch, capsys):
    find, missing = importlib.util.find_spec, {"transformers", "mistral_common"}
    lacking = lambda name, *more: None if name in missing else find(name, *more)
    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    script = lambda: runpy.run_path(str(ROOT / "bench" / "speed.py"), run_name="__main__")
    line = refusal(script, ["moe", "scale", "tokenizer"], monkeypatch, capsys)
    assert 'error: mistral_common, transformers missing: pip install ".[bench]"' in line
    assert "sections that run without: start scale memory" in line


def test_results_go_to_out_unless_told_otherwise(speed, tmp_path, capsys):
    (tmp_path / "bench").mkdir()
    tracked = tmp_path / "bench" / "a-box-float32.json"
    tracked.write_text('{"rows": []}')
    for commit, words in (("old", ["scale", "start"]), ("new", ["scale"])):
        (tmp_path / "commit").write_text(commit)
        speed(*words)
        head, columns, first, *_ = capsys.readouterr().out.splitlines()
        assert head == f"a box, 1 threads, torch.float32, torch 2, commit {commit}"
        assert columns.split() == "section case median of each contestant (times ours)".split()
        assert first.split()[:5] == ["scale", "a", "case", "ours", "1000.0"]
    assert tracked.read_text() == '{"rows": []}'
    content = json.loads((tmp_path / "out" / "bench" / "a-box-float32.json").read_text())
    commits = {name: about["commit"] for name, about in content["sections"].items()}
    assert commits == {"start": "old", "scale": "new"} and len(content["rows"]) == 2
    speed("scale", "--publish")
    assert len(json.loads(tracked.read_text())["rows"]) == 1
