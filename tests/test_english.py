"""The part of our English that a machine can hold: banned words, openings, lengths."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(
    file
    for file in ROOT.glob("**/*.py")
    if not {".venv", "out", "weights"} & {*file.relative_to(ROOT).parts}
)
PAGES = [ROOT / "README.md", ROOT / "docs" / "RESULTS.md"]
BANNED = re.compile(
    r"\b(mend|mends|mended|anew|told|lies|beside|likeliest|gives? out|whole numbers?|people|"
    r"afterwards of|for ever|for want of|in all the|no matter|by itself|what is more)\b",
    re.I,
)
OPENINGS = re.compile(r"(which|of|those that|as they|whom|whose|so that it)\b")
FILE_LINES, FUNCTION_LINES = 25, 10


def sentences_of(file):
    """[(line, text)] of the comments, docstrings and errors of a Python file."""
    source = file.read_text(encoding="utf-8")
    found = [
        (token.start[0], token.string.lstrip("# "))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            words = [x for x in ast.walk(node) if isinstance(x, ast.Constant)]
            found += [(x.lineno, x.value) for x in words if isinstance(x.value, str)]
    return found + [(node.body[0].lineno, text) for node, text in docstrings(source)]


def docstrings(source):
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [(node, ast.get_docstring(node)) for node in nodes if ast.get_docstring(node)]


def name(file):
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", CODE, ids=name)
def test_comments_and_docstrings_use_the_words_of_the_field(file):
    if file == Path(__file__):
        return
    bad = [f"line {n}: {BANNED.search(text)[0]!r}" for n, text in sentences_of(file)
           if BANNED.search(text)]  # fmt: skip
    assert not bad, f"{name(file)}: " + "; ".join(bad)


@pytest.mark.parametrize("file", CODE, ids=name)
def test_no_comment_opens_in_the_middle_of_a_sentence(file):
    """A comment that goes on from the comment on the line above is one sentence with it."""
    source = file.read_text(encoding="utf-8")
    lines = {t.start[0]: t.string.lstrip("# ")
             for t in tokenize.generate_tokens(io.StringIO(source).readline)
             if t.type == tokenize.COMMENT}  # fmt: skip
    bad = [f"line {n}: {text:.40}" for n, text in lines.items()
           if OPENINGS.match(text) and n - 1 not in lines]  # fmt: skip
    assert not bad, f"{name(file)}: " + "; ".join(bad)


@pytest.mark.parametrize("file", [f for f in CODE if not name(f).startswith("tests/")], ids=name)
def test_docstrings_have_the_length_of_a_lesson_or_of_a_hint(file):
    source = file.read_text(encoding="utf-8")
    size = len(source.splitlines())
    for node, text in docstrings(source):
        lines = len(text.splitlines())
        if isinstance(node, ast.Module):
            assert lines <= FILE_LINES and (lines <= size / 4 or lines <= 12), f"{lines} lines"
        else:
            limit = FILE_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
            assert lines <= limit, f"{node.name}: {lines} lines"


@pytest.mark.parametrize("file", [f for f in PAGES if f.is_file()], ids=name)
def test_pages_use_the_words_of_the_field(file):
    text = re.sub(r"```.*?```|`[^`]*`|\[[^\]]*\]\([^)]*\)", "", file.read_text("utf-8"), flags=re.S)
    bad = sorted({m[0] for m in BANNED.finditer(text)})
    assert not bad, ", ".join(bad)
