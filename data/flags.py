"""A dataclass as a command line: every field is a flag, its comment is the help.

    @dataclass
    class Config:
        lr: float = 1e-3  # peak learning rate
        compile: bool = True  # torch.compile the blocks

    cfg, given = parse(Config)      # --lr 1e-4 --no-compile; `given` are the names set by the user

A field without a default is a positional argument: `python -m data.check my.json`. A mistyped flag
exits with the nearest name, a wrong value with what is expected. --help lists the fields of a base
class as a group of their own, under its name and docstring, and ends with the examples of the
description: its lines that start with "    python ".
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import shlex
import sys
import typing

import torch

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that says what to do; exit status 2."""

    def flags(self):
        return [f for action in self._actions for f in action.option_strings if f != "-h"]

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.about_unknown(unknown))
        words = [word.split("=")[0] for word in (sys.argv[1:] if args is None else args)]
        for action in self._actions:
            given = [word for word in words if word in action.option_strings]
            if len(given) > 1 and action.nargs != "+":
                print(f"{self.prog}: {' '.join(given)}: only the last one counts", file=sys.stderr)
        return found

    def about_unknown(self, words):
        """What to say about words that belong to no flag: a typo, or `sample.py cat.jpg`."""
        word, all_words, flags = words[0], " ".join(words), self.flags()
        if word.startswith("-"):
            flag = word.split("=")[0]
            near = difflib.get_close_matches(flag.replace("_", "-"), flags, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            return f"unknown flag {flag}; {hint}"
        if "--image" in flags and word.lower().endswith(PICTURES):
            return f"{word!r} belongs to no flag; did you mean --image {shlex.quote(word)}?"
        if "--ask" in flags and all_words.endswith("?"):
            return f'{all_words!r} belongs to no flag; did you mean --ask "{all_words}"?'
        return (f"{word!r} belongs to no flag; a switch takes no value, write it --name or "
                "--no-name")  # fmt: skip

    def error(self, message):
        message = re.sub(r": ignored explicit .*", " is a switch and takes no value", message)
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")


def converter(convert, expected):
    """A `type` for argparse whose errors say what is `expected`."""

    def read(text):
        try:
            value = convert(text)
        except ValueError:
            value = float("nan")
        if value != value:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return read


def seed(text):
    if not 0 <= int(text) < 2**63:
        raise ValueError
    return int(text)


def path(text):
    """A text, or a path in the home folder: the shell leaves ~ in --out=~/x as it is."""
    return os.path.expanduser(text) if text.startswith("~/") else text


READ = {
    "seed": converter(seed, "an integer from 0 to 2^63 - 1"),
    int: converter(int, "an integer"),
    float: converter(float, "a number"),
    tuple: converter(lambda text: tuple(map(int, text.split(","))), "integers such as 1,3"),
    "ask": str,
    "image": path,
    str: path,
}


def help_lines(cls):
    """field name -> the comment behind it in the source, of `cls` and of those it inherits from."""
    sources = [inspect.getsource(c) for c in cls.__mro__ if dataclasses.is_dataclass(c)]
    return dict(re.findall(r"^\s+(\w+):[^#\n]*# (.+)$", "\n".join(sources), re.M))


def group_of(cls, parser):
    """{field name: its group in `parser`} for the fields that `cls` inherits from its bases."""
    groups = {}
    for base in reversed(cls.__mro__[1:]):
        if dataclasses.is_dataclass(base):
            title = re.sub(r"(?<!^)([A-Z])", r" \1", base.__name__).lower()
            group = parser.add_argument_group(title, inspect.getdoc(base))
            groups |= dict.fromkeys(base.__annotations__, group)
    return groups


def parse(cls, argv=None, description=""):
    """Read `argv` into (instance of the dataclass `cls`, set of the field names that were given).

    A bool (or bool | None) becomes `--x / --no-x`, a tuple comma-separated integers, a
    tuple[str, ...] one or more words (`--x a b`, or `--x a --x b`); int, float and str are read as
    such.
    """
    summary, *more = description.split("\n")
    examples = "\n".join(line for line in more if line.startswith("    python "))
    parser = Parser(description=summary, allow_abbrev=False,
                    epilog=examples and "examples:\n" + examples,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    comments, types, groups = help_lines(cls), typing.get_type_hints(cls), group_of(cls, parser)
    if groups:  # argparse's own would name all flags, without their groups
        parser.usage = "%(prog)s [--flag VALUE ...]"
    for field in dataclasses.fields(cls):
        assert field.name in comments, f"{cls.__name__}.{field.name} has no comment to be its help"
        flag, kind, default = "--" + field.name.replace("_", "-"), types[field.name], field.default
        if default is dataclasses.MISSING:
            parser.add_argument(field.name, type=READ[kind], help=comments[field.name])
            continue
        text = f"{comments[field.name]} [{shown(default)}]".replace("%", "%%")
        group = groups.get(field.name, parser)
        options = dict(dest=field.name, default=argparse.SUPPRESS, help=text)
        if kind in (bool, bool | None):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif kind == tuple[str, ...]:
            read = READ.get(field.name, str)
            group.add_argument(flag, nargs="+", action="extend", type=read, metavar="STR",
                               **options)  # fmt: skip
        else:
            metavar = "N,N" if kind is tuple else kind.__name__.upper()
            read = READ.get(field.name, READ[kind])
            group.add_argument(flag, type=read, metavar=metavar, **options)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    return cls(**given), set(given)


def as_flag(name, value):
    """A setting as it is typed: `--row-tokens 256`, `--no-compile`."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shown(value)}"


def shown(value):
    """A value as it is typed: (1, 3) as 1,3."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def unescape(text):
    r"""A text from the command line with \n, \t and \\ as in Python."""
    known = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: known[found[1]], text)


def check_choice(flag, value, choices):
    """ValueError unless `value` is one of the `choices`."""
    if value not in choices:
        raise ValueError(
            f"--{flag} {value!r} is unknown; choose from {', '.join(str(x) for x in choices if x)}"
        )


def check_numbers(cfg, above_0=(), counts=(), infinite=()):
    """ValueError for a number in `cfg` below 0; for one in `above_0` or `counts` that is not above
    0 or not 1 or more; for an infinite one, unless in `infinite`."""
    for field in dataclasses.fields(cfg):
        name, value = field.name, getattr(cfg, field.name)
        if type(value) not in (int, float):
            continue
        least = "above 0" if name in above_0 else "1 or more" if name in counts else "0 or more"
        good = value > 0 if name in above_0 else value >= (name in counts)
        if good and value == math.inf and name not in infinite:
            good, least = False, "finite"
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be {least}")


OPTIONS = {  # option of an answer -> (whether a value is valid, which values are)
    "max_new_tokens": (lambda n: n > 0, "1 or more"),
    "temperature": (lambda t: 0 <= t < math.inf, "0 or more, and finite"),
    "top_p": (lambda p: 0 < p <= 1, "above 0 and up to 1"),
    "top_k": (lambda k: k is None or k > 0, "1 or more"),
    "context": (lambda n: n > 0, "1 or more"),
    "stop": (lambda texts: "" not in texts, "texts that are not empty"),
}


def check_options(named="--{} {}", **options):
    """ValueError, with its flag or `named`, for an invalid value of `OPTIONS`."""
    for name, value in options.items():
        valid, wanted = OPTIONS.get(name, (lambda value: True, ""))
        if not valid(value):
            name = name.replace("_", "-") if named.startswith("--") else name
            raise ValueError(f"{named.format(name, value)} must be {wanted}")


def check_device(name):
    """ValueError unless this machine has the device called `name`, and it can compute."""
    try:
        float(torch.zeros(1, device=name))
    except Exception:  # each kind of device that is not there raises its own type
        raise ValueError(f"--device {name}: this machine has no such device; try cpu") from None


def run(main):
    """Call `main()`. ValueError and OSError end in one line and exit status 1, no traceback; Ctrl-C
    ends in one line, and a reader of stdout that has left (`| head`) in none."""
    try:
        main()
        if sys.stdout:  # None if it was closed
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's own flush at the end fails again
        sys.exit(141)  # as a program that SIGPIPE ends
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split("\n")))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
