"""The error line of a command, run in this process: that saves 3 seconds for each command."""

import sys
from importlib.util import find_spec

import pytest

from data.flags import run

knows_kinds = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib's formats")


def refusal(main, flags, monkeypatch, capsys):
    """Run `main`, which must exit with an error -> its one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        run(main)
    printed = capsys.readouterr().err
    code = end.value.code  # a string is printed by Python, with status 1
    lines = [line for line in (code if isinstance(code, str) else printed).splitlines() if line]
    assert code != 0 and len(lines) == 1, (code, printed)
    return lines[0]
