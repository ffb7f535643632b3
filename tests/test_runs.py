"""runs/*.sh are executable documentation: they parse, their flags exist, finished work is kept."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT

from data.check import CheckConfig
from data.flags import parse
from data.packing import check_rows
from data.stages import PAPER
from eval import EvalConfig
from sample import SampleConfig
from train import TrainConfig, resolve

SCRIPTS = sorted(ROOT.glob("runs/*.sh"))
CONFIGS = {"train.py": TrainConfig, "eval.py": EvalConfig, "sample.py": SampleConfig,
           "-m data.check": CheckConfig}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_is_executable(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_in_the_scripts_exist(script):
    for line in script.read_text().replace("\\\n", " ").splitlines():
        for program, cls in CONFIGS.items():
            _, found, arguments = line.partition(f"{program} ")
            flags = set(re.findall(r"--([a-z][a-z-]*)", arguments)) if found else set()
            fields = {field.name.replace("_", "-") for field in dataclasses.fields(cls)}
            assert {flag.removeprefix("no-") for flag in flags} <= fields, line


STUB = """#!/usr/bin/env bash
# Stub for python, hf, wget and so on: logs its command, and leaves the files that they leave.
name=${0##*/} all=$* last="${@: -1}"
echo "$name $all" >>calls
after() { sed -E "s/.* --?$1 ([^ ]+).*/\\1/" <<<" $all "; }
case "$name $all" in
  "python -c "*) exec PYTHON -I -S "$@" ;;  # which version it is
  "python - "*) exec PYTHON -I -S "$@" ;;  # the script's own Python; it needs no package
  df*) printf 'Avail\\n137000\\n' ;;  # MB
  wget*) touch "$(after directory-prefix)/${last##*/}" ;;
  unzip*) touch "$(after d)/a.jpg" ;;
  *--repo-type*)
    file=$(after local-dir)/$3
    mkdir -p "${file%/*}"
    case $file in *llava_pretrain*) image=a ;; *) image=coco/b ;; esac
    echo '[{"image": "'$image'.jpg"}, {"id": 1}]' >"$file" ;;
  *'--out '*)
    folder=$(after out)/stage$(after stage)
    mkdir -p "$folder"
    echo '"finished": true' >"$folder/train.json" ;;
esac
""".replace("PYTHON", sys.executable)


@pytest.fixture
def cumo_7b(tmp_path):
    """Run cumo_7b.sh in a copy whose programs are stubs -> (the process, the commands it ran)."""
    for folder in ("runs", "bin", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for script in ("cumo_7b.sh", "venv.sh"):
        shutil.copy(ROOT / "runs" / script, tmp_path / "runs")
    (tmp_path / "data").symlink_to(ROOT / "data")
    programs = ["bin/wget", "bin/unzip", "bin/df"]
    programs += [f".venv/bin/{name}" for name in ("python", "pip", "hf", "torchrun")]
    for name in programs:
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)

    def run(*flags, **settings):
        (tmp_path / "calls").write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(["runs/cumo_7b.sh", *flags], cwd=tmp_path, text=True,
                              env={"PATH": path, "IGNORE_DISK": "1", **settings},
                              capture_output=True)  # fmt: skip
        return done, (tmp_path / "calls").read_text().splitlines()

    return run


def test_first_try_fetches_and_trains_stage_1_alone(cumo_7b):
    done, calls = cumo_7b(LAST="1", LIMIT="5000")
    assert done.returncode == 0, done.stderr
    assert sum("--repo-type dataset" in call for call in calls) == 2  # JSON and pictures
    trained = [call for call in calls if "--out " in call]
    assert len(trained) == 1 and trained[0].startswith("python train.py --preset mistral-7b")
    assert trained[0].endswith("--stage 1 --data mixture/llava/llava_pretrain/"
                               "blip_laion_cc_sbu_558k.json --image-folder mixture/llava/"
                               "llava_pretrain/images --out out/cumo_7b --limit 5000")  # fmt: skip


def test_second_run_fetches_and_trains_only_what_is_missing(cumo_7b):
    assert cumo_7b(LAST="1")[0].returncode == 0
    done, calls = cumo_7b("--lr", "1e-6", SKIP_MISSING="1", GPUS="4")
    assert done.returncode == 0, done.stderr
    fetched = [call for call in calls if "--repo-type dataset" in call or call.startswith("wget")]
    assert len(fetched) == 18 and not any("LLaVA-Pretrain" in call for call in fetched)
    trained = [call for call in calls if "--out " in call]
    assert [re.search(r"--stage (\d)", call)[1] for call in trained] == ["2", "3"]
    assert all(call.startswith("torchrun --nproc_per_node=4 train.py") for call in trained)
    assert all("_present.json" in call and call.endswith("--lr 1e-6") for call in trained)
    assert cumo_7b()[0].returncode == 0
    assert not any("--out " in call or "--repo-type" in call for call in cumo_7b()[1])


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_every_stage_can_be_shared_by_n_gpus_and_keeps_the_size_of_a_step(cumo_7b, n):
    done, calls = cumo_7b(SKIP_MISSING="1", GPUS=str(n))
    assert done.returncode == 0, done.stderr
    trained = [call.split("train.py ")[1].split() for call in calls if "--out " in call]
    assert len(trained) == 3
    for stage, words in enumerate(trained, 1):
        cfg, given = parse(TrainConfig, words)
        cfg = resolve({name: getattr(cfg, name) for name in given}, stage)
        check_rows(cfg.rows, n)
        alone = PAPER[stage]["rows"] * PAPER[stage]["accumulate"]
        assert 0.8 < cfg.rows * cfg.accumulate / alone < 1.2


def test_missing_pictures_stop_it_and_are_named(cumo_7b):
    done, calls = cumo_7b(LAST="2")
    assert done.returncode == 1
    assert "records without their picture in mixture/coco: 1, as coco/b.jpg" in done.stdout
    assert "SKIP_MISSING=1" in done.stderr and sum("--out " in call for call in calls) == 1


def test_too_small_a_disk_stops_it_before_the_first_download(cumo_7b):
    done, calls = cumo_7b(IGNORE_DISK="", LAST="2")
    assert done.returncode == 1 and [call.split()[0] for call in calls] == ["df"]
    assert done.stdout == "up to 478 GB are needed, and 137 GB are free\n"
    assert cumo_7b(IGNORE_DISK="", LAST="1")[0].returncode == 0


def test_the_disk_sizes_in_the_readme_and_the_mixture_are_the_scripts(cumo_7b):
    readme, mixture = (ROOT / name for name in ("README.md", "data/MIXTURE.md"))
    needs = [
        re.search(r"\d+ GB", cumo_7b(IGNORE_DISK="", LAST=last)[0].stdout)[0] for last in "321"
    ]
    assert f"| together | {' | '.join(reversed(needs))} |" in mixture.read_text()
    assert needs[0] in readme.read_text() and needs[2] in readme.read_text()


def python(file, version):
    """Write a stub of Python that says it is this version and makes empty environments."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"""#!/usr/bin/env bash
case "$1 $2" in
  "-c "*) echo {version} ;;
  "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && ln -s python .venv/bin/pip ;;
  *) echo "$0 $*" >>calls ;;
esac
""")
    file.chmod(0o755)


@pytest.fixture
def demo(tmp_path):
    """Run demo.sh where python3 has a version and .venv another one -> (status, stderr, calls)."""

    def run(here, there=None, **settings):
        for script in ("demo.sh", "venv.sh"):
            (tmp_path / "runs").mkdir(exist_ok=True)
            shutil.copy(ROOT / "runs" / script, tmp_path / "runs")
        python(tmp_path / "bin" / "python3", here)
        if there:
            python(tmp_path / ".venv" / "bin" / "python", there)
            (tmp_path / ".venv" / "bin" / "pip").symlink_to("python")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(["runs/demo.sh"], cwd=tmp_path, text=True, capture_output=True,
                              env={"PATH": path, **settings})  # fmt: skip
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.is_file() else []

    return run


@pytest.mark.parametrize("here, there, said", [
    ("3.10", None, "python3 is Python 3.10, and 3.11 or newer is needed: install one, then"),
    ("", None, "python3 is not there, and 3.11 or newer is needed"),
    ("3.12", "3.10", ".venv has Python 3.10, and 3.11 or newer is needed: remove .venv, then run"),
    ("3.12", "", ".venv has no working Python, and 3.11 or newer is needed: remove .venv"),
])  # fmt: skip
def test_an_old_python_is_refused_in_one_line_before_anything_is_installed(here, there, said, demo):
    done, calls = demo(here, there or " " if there is not None else None)
    assert done.returncode == 1 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert not calls and not done.stdout


def test_a_venv_of_another_python_is_used_but_not_silently(demo):
    done, calls = demo("3.12", "3.11")
    assert done.stderr == "using .venv, which has Python 3.11 (python3 is 3.12)\n"
    assert any("pip install" in call for call in calls)


def test_a_venv_that_cannot_be_what_the_user_wants_is_refused(demo):
    done, calls = demo("3.12", "3.11", PYTHON="python3")
    assert done.stderr.startswith(".venv has Python 3.11, not the 3.12 of PYTHON=python3: remove")
    assert done.returncode == 1 and not calls


@pytest.mark.parametrize("there", [None, "3.13"])
def test_a_new_python_makes_or_takes_a_venv_in_silence(there, demo):
    done, calls = demo("3.13", there)
    assert done.stderr == "" and "pip install" in calls[0] and "train.py" in calls[1]
