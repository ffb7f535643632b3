"""A dataclass as a command line: every field is a flag, its comment is the help.

    @dataclass
    class Config:
        lr: float = 1e-3  # peak learning rate
        compile: bool = True  # torch.compile the blocks

    cfg, given = parse(Config)      # --lr 1e-4 --no-compile; `given` are the names set by the user

A mistyped flag exits with the nearest name, a mistyped value with what is allowed.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest flag."""

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--\S+)", message)
        if unknown:
            flag = unknown[1].split("=")[0]
            flags = [f for action in self._actions for f in action.option_strings if f.startswith("--")]
            near = difflib.get_close_matches(flag, flags, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            message = f"unknown flag {flag}; {hint}"
        self.exit(2, f"{self.prog}: {message}\n")


def help_lines(cls):
    """field name -> the comment behind it in the source."""
    return dict(re.findall(r"^\s+(\w+):[^#\n]*# (.+)$", inspect.getsource(cls), re.M))


def parse(cls, argv=None, description=""):
    """Read `argv` into (instance of the dataclass `cls`, set of the field names that were given).

    Types come from the annotations: bool becomes `--x / --no-x`, a tuple takes comma-separated integers.
    """
    parser = Parser(description=description, allow_abbrev=False)
    comments = help_lines(cls)
    for field in dataclasses.fields(cls):
        flag = "--" + field.name.replace("_", "-")
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{comments.get(field.name, '')} [{shown}]".replace("%", "%%")
        options = dict(dest=field.name, default=argparse.SUPPRESS, help=text)
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif field.type is tuple:
            parser.add_argument(flag, type=integers, metavar="N,N", **options)
        else:
            parser.add_argument(flag, type=field.type, metavar=field.type.__name__.upper(), **options)
    given = vars(parser.parse_args(argv))
    return cls(**given), set(given)


def integers(text):
    return tuple(int(n) for n in text.split(","))


def run(main):
    """Call `main()`; a ValueError is the user's to mend: one line, exit status 1, no traceback."""
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
