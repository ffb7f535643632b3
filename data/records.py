"""Records in a JSON file too large for memory: only their places are kept.

    [{"id": "a", ...}, {"id": "b", ...}, ...]
     ^1            ^512 ^514          ^803     ->  places  1 512 514 803 ...

The JSON of the paper's third stage has 1.6 million records in 2.7 GB. As Python objects they would
take some 15 GB in every process; their places take 26 MB. So the file is read once in pieces, which
finds every error in its JSON, and each record is read again when it is used.
"""

import json
import os
import pathlib
import re
import stat
from array import array
from io import TextIOWrapper
from itertools import islice

from tqdm import tqdm

PIECE = 1 << 18  # characters that are parsed at a time
LONGEST = 16  # no JSON number, literal or escape that counts here is longer
BLANK = re.compile(r"[ \t\n\r]*")
ID = re.compile(r'"id"\s*:\s*("[^"\n]*"|\d+)')
CONVERT = "write its rows as LLaVA JSON and its pictures as files"
OTHER_KINDS = {  # how a file begins that is no JSON: what it is, and the way out
    b"PAR1": f"a Parquet file; {CONVERT}",
    b"ARROW1": f"an Arrow file; {CONVERT}",
    b"\xff\xff\xff\xff": f"an Arrow stream; {CONVERT}",
    b"\x1f\x8b": "a gzip archive; unpack it with gunzip, or tar xzf",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive; unpack it with unzstd",
    b"\xfd7zXZ": "an xz archive; unpack it with unxz, or tar xJf",
    b"BZh": "a bzip2 archive; unpack it with bunzip2, or tar xjf",
    b"PK\x03\x04": "a zip archive; unpack it with unzip",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
    b"<": "a web page or XML; download the file itself",
}


def progress(records, total=None):
    """`records`, with a bar if they take longer than 2 seconds; of several processes (torchrun sets
    RANK), the first one has it."""
    other = os.environ.get("RANK", "0") != "0"
    return tqdm(records, "records", total, leave=False, unit="record", delay=2, disable=other)


def check_kind(path, head):
    """ValueError with the way out for the first 300 bytes of a file of another kind."""
    kinds = [kind for begins, kind in OTHER_KINDS.items() if head.startswith(begins)]
    if head[257:262] == b"ustar":
        kinds = ["a tar archive; unpack it with tar xf"]
    if kinds:
        raise ValueError(f"{path}: is {kinds[0]}; only a JSON or JSONL file is read")


def json_error(where, error, before="", said=""):
    """The ValueError, one line that starts with `where`, for what reading JSON has raised.
    before: the text in front of the error; said: the error with its place, if not `error`'s own."""
    if isinstance(error, RecursionError):
        return ValueError(f"{where}: is nested too deeply to be a list of samples")
    if not isinstance(error, json.JSONDecodeError):
        return ValueError(f"{where}: holds a number with too many digits")
    hint = "; name it .jsonl if each line is a sample" if error.msg == "Extra data" else ""
    ids = ID.findall(before)
    hint += f"; the last id before it is {ids[-1]:.60}" if ids else ""
    return ValueError(f"{where}: is not valid JSON ({said or error}){hint}")


def parse_json(text, where):
    """The value of a JSON text. ValueError, one line that starts with `where`, if it has none."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise json_error(where, error, text[: getattr(error, "pos", 0)]) from None


class Text:
    """A JSON text that is read in pieces; `text[at:]` is what has been read and not parsed."""

    def __init__(self, path, file):
        self.path, self.file = path, TextIOWrapper(file, "utf-8", newline="")
        self.text, self.at, self.ended = self.file.read(PIECE), 0, False
        self.line, self.column, self.last_id = 1, 0, ""  # the place of text[0], the id before it
        self.counted = self.byte = 0  # text[counted] is this byte of the file
        self.at = int(self.text.startswith("\ufeff"))  # the byte order mark

    def place(self):
        """Where text[at] is in the file, in bytes."""
        self.byte += len(self.text[self.counted : self.at].encode())
        self.counted = self.at
        return self.byte

    def read_on(self):
        """Replace what has been parsed by the next piece of the file."""
        self.place()
        done, rest = self.text[: self.at], self.text[self.at :]
        self.line += done.count("\n")
        self.column = len(done) - done.rfind("\n") - 1 + ("\n" not in done) * self.column
        self.last_id = [self.last_id, *(found[0] for found in ID.finditer(done))][-1]
        more = self.file.read(max(PIECE, len(rest)))
        self.text, self.at, self.counted, self.ended = rest + more, 0, 0, not more

    def next(self):
        """The next character that is no blank, or "" at the end."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def value(self):
        """The next value. One that reaches the end of `text` is parsed again with more of it."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST
                if self.ended or not cut:
                    raise self.fault(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:
                raise json_error(self.path, error) from None
            else:
                if self.ended or end < len(self.text) - LONGEST:
                    self.at = end
                    return value
            self.read_on()

    def fault(self, message, at):
        """The error `message` about text[at]."""
        before = self.text[:at]
        column = at - before.rfind("\n") + ("\n" not in before) * self.column
        line = self.line + before.count("\n")
        said = f"{message}: line {line} column {column}"
        error = json.JSONDecodeError(message, self.text, at)
        return json_error(self.path, error, self.last_id + before, said)

    def places(self):
        """Yields (start, end), in bytes, of each item of a JSON list."""
        if self.next() != "[":
            kind = type(self.value()).__name__
            if self.next():
                raise self.fault("Extra data", self.at)
            raise ValueError(f"{self.path}: holds a {kind}, not a list of samples")
        self.at += 1
        mark = self.next() if self.next() == "]" else ","
        while mark == ",":
            self.next()
            start, _ = self.place(), self.value()
            yield start, self.place()
            mark = self.next()
            self.at += mark == ","
        if mark != "]":
            raise self.fault("Expecting ',' delimiter", self.at)
        self.at += 1
        if self.next():
            raise self.fault("Extra data", self.at)


def places_of_lines(path, file):
    """Yields (start, end), in bytes, of each line of a JSONL file that is not blank."""
    end = 0
    for n, line in enumerate(file, start=1):
        start, end, text = end, end + len(line), str(line, "utf-8-sig")
        if n == 1 and text.lstrip().startswith("["):
            raise ValueError(f"{path}: holds a JSON list; name it .json")
        if text.strip():
            parse_json(text, f"{path}, line {n}")
            yield start, end


class Records:
    """The records of a .json list or a .jsonl file, or (limit) the first of them.

    ValueError, with the line, if the file has none; in `[k]` if it has changed since then.
    """

    def __init__(self, path, limit=0):
        self.path, self.places = pathlib.Path(path), array("q")
        with self.open() as file:
            self.stamp = self.stamp_of(file)
            check_kind(path, file.read(300))
            file.seek(0)
            lines = self.path.suffix == ".jsonl"
            try:
                places = places_of_lines(path, file) if lines else Text(path, file).places()
                for place in progress(islice(places, limit or None)):
                    self.places.extend(place)
            except UnicodeDecodeError:
                raise ValueError(f"{path}: is not UTF-8 text; only a JSON or JSONL file is "
                                 "read") from None  # fmt: skip

    def open(self):
        try:
            return open(self.path, "rb")
        except IsADirectoryError:
            raise ValueError(f"{self.path}: is a folder; only a JSON or JSONL file is read. Of a "
                             f"folder of Hugging Face datasets, {CONVERT}") from None  # fmt: skip
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror}); only a JSON or "
                             "JSONL file is read") from None  # fmt: skip

    def stamp_of(self, file):
        """What changes when somebody writes to the file."""
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{self.path}: can be read only once; save it as a file first")
        return about.st_size, about.st_mtime_ns

    def __len__(self):
        return len(self.places) // 2

    def __getitem__(self, k):
        start, end = self.places[2 * k], self.places[2 * k + 1]
        with self.open() as file:
            if self.stamp_of(file) != self.stamp:
                raise ValueError(f"{self.path}: was changed while it was in use; put it back as it "
                                 "was, then the same command continues")  # fmt: skip
            file.seek(start)
            return json.loads(str(file.read(end - start), "utf-8-sig"))
