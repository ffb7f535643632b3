"""The shape of the project: what stands where, how long it is, and that imports point down."""

import ast
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = "mlp_moe clip_moe llm cumo upcycle train sample eval".split()
TOP = {*(f"{name}.py" for name in FILES), "README.md", "LICENSE", "pyproject.toml",
       "requirements.txt", "cat.jpg", "dog.jpg", "owl.jpg", "open.jpg", "price.jpg", "chart.jpg",
       "data", "engine", "extras", "bench", "docs", "runs", "tests", ".ci",
       ".gitignore"}  # fmt: skip
FLOORS = [  # each imports from its own floor and those before it
    ["data"],
    ["mlp_moe"],
    ["clip_moe", "llm"],
    ["cumo"],
    ["upcycle", "engine"],
    ["sample"],
    ["extras", "train", "eval"],
    ["runs", "bench"],
    ["tests"],
]
FLOOR_OF = {name: k for k, names in enumerate(FLOORS) for name in names}
TRACKED = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT,
                         capture_output=True, text=True).stdout.split("\n")  # fmt: skip
CODE = [ROOT / name for name in TRACKED if name.endswith(".py") and (ROOT / name).is_file()]
PRODUCT = [file for file in CODE if file.relative_to(ROOT).parts[0] != "tests"]


def name_of(file):
    return str(file.relative_to(ROOT))


def place_of(file):
    """The file or folder at the top that holds it."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(file):
    """[(line, module of this project at the top, whether it stands at the top of the file)]"""
    tree, found = ast.parse(file.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        else:
            continue
        at_top = node.col_offset == 0
        found += [(node.lineno, name.split(".")[0], at_top) for name in modules]
    return [row for row in found if row[1] in FLOOR_OF]


def test_the_top_level_is_what_a_reader_opens_and_nothing_else():
    assert {name.split("/")[0] for name in TRACKED if name} == TOP


def test_eight_files_are_the_whole_of_cumo():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in FILES}
    assert sum(lines.values()) <= 2150, lines
    assert max(lines.values()) <= 450, lines


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_functions_fit_on_a_screen(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name}: line {node.lineno}"


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_imports_point_down(file):
    place = place_of(file)
    up = [f"line {line}: {module}" for line, module, at_top in imports_of(file)
          if FLOOR_OF[module] > FLOOR_OF[place]
          and not (place == "sample" and module == "extras" and not at_top)]  # fmt: skip
    assert not up, f"{name_of(file)} imports from above: {up}"


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_the_product_imports_no_test(file):
    own = {path.stem for path in (ROOT / "tests").glob("*.py")}
    modules = {line.split()[1].split(".")[0] for line in file.read_text().splitlines()
               if line.lstrip().startswith(("import ", "from "))}  # fmt: skip
    assert not modules & own


@pytest.mark.parametrize("name", ["train", "sample", "eval"])
def test_extras_are_imported_under_a_flag_only(name):
    file = ROOT / f"{name}.py"
    assert not [row for row in imports_of(file) if row[1] == "extras" and row[2]]


def test_the_model_files_know_nothing_of_what_makes_them_fast():
    for name in ("mlp_moe", "clip_moe", "llm", "cumo", "upcycle"):
        assert not [row for row in imports_of(ROOT / f"{name}.py") if row[1] == "engine"], name
        assert "ctypes" not in (ROOT / f"{name}.py").read_text()


def test_pip_installs_dependencies_and_nothing_else():
    """Modules called `data` or `train` in site-packages would break other projects' imports."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup == {"py-modules": [], "packages": []}
