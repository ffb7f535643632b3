"""What a command prints when it refuses: run in this process, which is 3 seconds faster."""

import sys
from importlib.util import find_spec

import pytest

from data.flags import run

knows_kinds = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs its kinds of pictures")


def refusal(main, flags, monkeypatch, capsys):
    """The one line on stderr with which `main` exits, not with status 0."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        run(main)
    printed = capsys.readouterr().err
    code = end.value.code  # a text is printed by Python, with status 1
    lines = [line for line in (code if isinstance(code, str) else printed).splitlines() if line]
    assert code != 0 and len(lines) == 1, (code, printed)
    return lines[0]
