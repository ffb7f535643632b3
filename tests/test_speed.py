"""bench/speed.py: a missing package is one line, results in the repository are not overwritten."""

import json
import subprocess
import sys

from tiny import ROOT

LACKING = """
import importlib.util as util, runpy, sys
find, missing = util.find_spec, {"transformers", "mistral_common"}
util.find_spec = lambda name, *more: None if name in missing else find(name, *more)
sys.argv, sys.path[0] = ["speed.py", *sys.argv[1:]], "bench"
runpy.run_path("bench/speed.py", run_name="__main__")
"""
FAKE = """
import pathlib, sys
sys.path.insert(0, "")
from bench import speed
root, *words = sys.argv[1:]
speed.ROOT, sys.argv = pathlib.Path(root), ["speed.py", *words]
speed.conditions = lambda: {"machine": "a box", "threads": 1, "precision": "torch.float32",
                         "torch": "2", "commit": speed.ROOT.joinpath("commit").read_text()}
one = lambda name: lambda runs: [speed.row(name, "a case", {"ours": [1.0], "loop": [2.0]})]
speed.SECTIONS = {name: one(name) for name in ("scale", "start")}
speed.draw_ratios = lambda *_: None
speed.main()
"""


def python(code, *words):
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip


def test_sections_without_their_packages_are_named_in_one_line():
    done = python(LACKING, "moe", "scale", "tokenizer")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert 'error: mistral_common, transformers missing: pip install ".[bench]"' in done.stderr
    assert "sections that run without: start scale memory" in done.stderr


def test_results_go_to_out_unless_told_otherwise(tmp_path):
    (tmp_path / "bench").mkdir()
    tracked = tmp_path / "bench" / "a-box-float32.json"
    tracked.write_text('{"rows": []}')
    for commit, words in (("old", ["scale", "start"]), ("new", ["scale"])):
        (tmp_path / "commit").write_text(commit)
        done = python(FAKE, tmp_path, *words)
        assert done.returncode == 0, done.stderr
        head, columns, first, *_ = done.stdout.splitlines()
        assert head == f"a box, 1 threads, torch.float32, torch 2, commit {commit}"
        assert columns.split() == "section case median of each contestant (times ours)".split()
        assert first.split()[:5] == ["scale", "a", "case", "ours", "1000.0"]
    assert tracked.read_text() == '{"rows": []}'
    content = json.loads((tmp_path / "out" / "bench" / "a-box-float32.json").read_text())
    commits = {name: about["commit"] for name, about in content["sections"].items()}
    assert commits == {"start": "old", "scale": "new"} and len(content["rows"]) == 2
    python(FAKE, tmp_path, "scale", "--publish")
    assert len(json.loads(tracked.read_text())["rows"]) == 1
