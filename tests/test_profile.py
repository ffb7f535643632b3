"""--profile: a table and a trace of three steps, and the same weights as without."""

import gzip
import json

import pytest
import torch
from test_train import run_stages

from data.weights import read_tensors
from engine import profile


def test_a_profile_is_written_and_changes_nothing(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile, "BEFORE", 1)
    plain, recorded = (tmp_path / name for name in ("plain", "recorded"))
    run_stages(weights, plain, 1, row_tokens=64)
    run_stages(weights, recorded, 1, row_tokens=64, profile=True)
    shown, folder = capsys.readouterr().out, recorded / "stage1"
    assert f"profile of steps 2 to 4 -> {folder}/profile.txt, profile.json.gz" in shown
    assert "ms a step  share   calls  operator" in shown and "aten::" in shown
    table = (folder / "profile.txt").read_text()  # on a busy machine the top ten differ
    assert "Self CPU" in table and "aten::addmm" in table
    trace = json.loads(gzip.decompress((folder / "profile.json.gz").read_bytes()))
    steps = [e for e in trace["traceEvents"] if e["name"].startswith("Optimizer.step#")]
    assert len(steps) == profile.RECORDED
    ours, theirs = (dict(read_tensors(f / "stage1")) for f in (plain, recorded))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not (plain / "stage1" / "profile.txt").exists()


@pytest.mark.parametrize("before", [1, 60])
def test_a_stage_too_short_for_a_profile_says_so(before, weights, tmp_path, capsys, monkeypatch):
    """It ends while steps are recorded, or before."""
    monkeypatch.setattr(profile, "BEFORE", before)
    monkeypatch.setattr(profile, "RECORDED", 60)
    run_stages(weights, tmp_path, 1, samples=10, profile=True)
    assert f"no profile: it needs {before + 60} steps, and there were only " in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "stage1" / "profile.txt").exists()
