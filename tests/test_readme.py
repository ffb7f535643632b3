"""What the README says is true: its tables, line counts, commands, links and flags."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
from runs import results

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPONENTS = "mlp_moe clip_moe llm cumo upcycle train sample eval".split()


def test_readme_numbers_are_true():
    for name in results.BLOCKS:
        assert f"<!-- {name} -->" in README, f"the README has no block {name}"
    assert results.rewrite(README) == README, "run `python runs/results.py` and commit"


def test_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) < 350


def test_components_stay_small_enough_to_be_read():
    assert sum(results.count_lines(f"{name}.py") for name in COMPONENTS) < 2400


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+?)(?:#L\d+)?\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("script", ["train", "sample", "eval", "upcycle"])
def test_flags_in_the_readme_exist(script, monkeypatch, capsys):
    flags = {
        flag
        for line in re.findall(rf"python {script}\.py([^`\n]*)", README)
        for flag in re.findall(r"--[a-z][a-z0-9-]+", line.split("#")[0])
    }
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "999")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main()
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert not {flag for flag in flags if flag not in shown}


def test_no_line_of_code_is_wider_than_the_page():
    for file in ROOT.glob("**/*.py"):
        if ".venv" in file.parts:
            continue
        wide = [n for n, line in enumerate(file.read_text().splitlines(), 1) if len(line) > 100]
        assert not wide, f"{file}: lines {wide}"


def test_figures_of_the_benches_are_the_measured_ones():
    text = " ".join(README.split())
    load, tokenizers = (
        json.loads((ROOT / "bench" / f"{name}.json").read_text())["rows"]
        for name in ("load_memory", "tokenizers")
    )
    most = {row["dtype"]: row["ratio"] for row in sorted(load, key=lambda row: row["ratio"])}
    assert f"a load takes {most['float32']:.2f} times the model" in text
    assert f"{most['bfloat16']:.2f} times when float32 files become a bfloat16 model" in text
    every = {row["tokenizer"].split(",")[0]: row for row in tokenizers if row["text"] == "all"}
    ratio = {name: row["ratio"] for name, row in every.items()}
    assert min(ratio.values()) >= 1
    speeds = f"{ratio['Mistral v1']:.2f}, {ratio['tekken']:.1f} and {ratio['SmolLM2']:.1f} to"
    assert f"at {speeds} {ratio['miniature']:.1f} times their speed" in text
    differ = sum(row["texts_that_differ"] for row in every.values())
    assert differ == 0 and "without one difference" in text


def test_figures_of_rounding_and_of_smollm2_are_the_measured_ones():
    text = " ".join(README.split())
    rounding = json.loads((ROOT / "bench" / "rounding.json").read_text())["rows"]
    random = [row["largest_deviation"] for row in rounding if row["weights"] == "bf16-sr"]
    (nearest,) = [row["final_deviation"] for row in rounding if row["weights"] == "nearest"]
    stated = re.search(r"stays within ([\d.]+) % of float32's; plain bf16 falls (\d+) %", text)
    assert len(random) == 2 and max(map(abs, random)) <= float(stated[1]) / 100
    assert round(100 * nearest) == int(stated[2])
    smol = json.loads((ROOT / "bench" / "smol_mini.json").read_text())
    after, blank = (round(100 * smol[k]["exact"]) for k in ("after", "after, blank pictures"))
    assert smol["captions"] == 100
    assert f"names {after} of 100 new pictures exactly, {blank} when they are painted over" in text


@pytest.mark.parametrize("name", ["mlp_moe", "clip_moe", "llm", "cumo"])
def test_each_component_shows_a_worked_example(name):
    done = subprocess.run([sys.executable, f"{name}.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "->" in done.stdout, done.stderr
