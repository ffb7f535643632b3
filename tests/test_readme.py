"""What the README says is true: its tables, line counts, commands, links and flags."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "runs"))
import results  # noqa: E402

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
def test_flags_in_the_readme_exist(script):
    flags = {
        flag
        for line in re.findall(rf"python {script}\.py(.*)", README)
        for flag in re.findall(r"--[a-z][a-z0-9-]+", line.split("#")[0])
    }
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert not {flag for flag in flags if flag not in done.stdout}


def test_no_line_of_code_is_wider_than_the_page():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        wide = [n for n, line in enumerate(file.read_text().splitlines(), 1) if len(line) > 100]
        assert not wide, f"{file}: lines {wide}"
