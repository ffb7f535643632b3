"""Records stay in their file: found in pieces, in little memory, every fault named by its line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from given import given, settings, st

from data import records
from data.llava import LlavaData
from data.records import Records
from engine.resume import records_of

ROOT = Path(__file__).parents[1]
TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


def save(folder, text, name="data.json"):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
forms = [{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), items=st.lists(values, max_size=9), piece=st.integers(1, 99))
def test_a_list_read_in_pieces_is_what_json_reads(data, items, piece, tmp_path_factory):
    text = json.dumps(items, **data.draw(st.sampled_from(forms)))
    text = data.draw(st.sampled_from(["", "\ufeff", " \n"])) + text.replace(
        "\n", data.draw(st.sampled_from(["\n", "\r\n"])))  # fmt: skip
    file = save(tmp_path_factory.getbasetemp(), text, "pieces.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PIECE", piece)
        found = Records(file)
    assert [found[k] for k in range(len(found))] == items and len(found) == len(items)
    assert list(Records(file, limit=2)) == items[:2]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), items=st.lists(values, max_size=4), piece=st.integers(1, 99))
def test_a_text_that_is_no_json_is_refused_and_only_that(data, items, piece, tmp_path_factory):
    text = json.dumps(items, indent=data.draw(st.sampled_from([None, 1])))
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.sampled_from(["", ",", "]", '"', "1", "}", "x", "\n"])) + (
        text[at + data.draw(st.integers(0, 2)) :])  # fmt: skip
    file = save(tmp_path_factory.getbasetemp(), text, "pieces.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PIECE", piece)
        try:
            wanted = json.loads(text)
            assert isinstance(wanted, list), "another kind of error"
        except (ValueError, AssertionError):
            with pytest.raises(ValueError, match="pieces.json: (is not valid JSON|holds a )"):
                Records(file)
        else:
            assert list(Records(file)) == wanted


@pytest.mark.parametrize("piece", [7, 40, 1 << 18])
def test_the_place_of_an_error_is_that_in_the_file(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE", piece)
    one = json.dumps([{"id": f"é{k}"} for k in range(9)], ensure_ascii=False)
    for text in (one.replace('"é7"', "é7"), one.replace(', {"id": "é5"', '\n\n {"id": "é5"'),
                 one[:-1], one[:-5], one + " 1", one[:-1] + "\n ] ]"):  # fmt: skip
        with pytest.raises(json.JSONDecodeError) as theirs:
            json.loads(text)
        with pytest.raises(ValueError) as ours:
            Records(save(tmp_path, text))
        said = f"{theirs.value.msg}: line {theirs.value.lineno} column {theirs.value.colno}"
        assert f"is not valid JSON ({said})" in str(ours.value)
        assert '; the last id before it is "é' in str(ours.value)


BIG = [{"id": k, "conversations": TURNS, "more": "text " * 300} for k in range(12_000)]


MEASURE = """
import os, sys
from data.llava import LlavaData

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if name in line)

for file in sys.argv[1:]:  # each in a process of its own, with one import of torch for all
    if not (child := os.fork()):
        before = kib("VmRSS")
        data = LlavaData(file)
        assert len(data) == 12_000 and data[11_999]["id"] == "11999"
        print(kib("VmHWM") - before)
        sys.exit()
    os.waitpid(child, 0)
"""


def test_two_processes_use_less_memory_than_the_file(tmp_path):
    """One emoji made Python hold 4 bytes a character: 96 MB took 522 MB in each process."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("reads the memory of a process as Linux shows it")
    BIG[5]["more"] += "\U0001f600"
    lines = [json.dumps(record, ensure_ascii=False) for record in BIG]
    texts = {"big.json": f"[{', '.join(lines)}]", "big.jsonl": "\n".join(lines)}
    files = [save(tmp_path, text, name) for name, text in texts.items()]
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, files)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)  # fmt: skip
    for file, used in zip(files, done.stdout.split(), strict=True):
        assert 2 * 1024 * int(used) < file.stat().st_size, (file, used)


def test_a_file_changed_while_it_is_in_use_is_never_read_wrong(tmp_path):
    rows = [{"id": k, "conversations": TURNS} for k in range(3)]
    file = save(tmp_path, json.dumps(rows))
    data = LlavaData(file)
    hashed = records_of(data)
    assert data[2]["id"] == "2" and hashed["records"] == 3
    save(tmp_path, json.dumps(rows[::-1]))
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match="data.json: was changed while it was in use; put it back"):
        data[2]
    file.unlink()
    with pytest.raises(ValueError, match="data.json: cannot be read"):
        data[2]


def test_the_hash_of_records_does_not_depend_on_how_they_are_stored(tmp_path):
    """The value is that of versions that kept the records in memory: no resume is refused."""
    rows = [{"id": 1, "conversations": TURNS}, {"id": "é", "conversations": [TURNS[0]]},
            {"conversations": TURNS, "id": "\U0001f600"}]  # fmt: skip
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for file in (save(tmp_path, json.dumps(rows, indent=2)), save(tmp_path, lines, "data.jsonl")):
        assert records_of(LlavaData(file)) == {"records": 2, "sha256": "8846436ea4e5c9c4"}


def tar(head=b""):
    return head + bytes(257 - len(head)) + b"ustar\x0000" + bytes(300)


@pytest.mark.parametrize("name, content, complaint", [
    ("a.parquet", b"PAR1\x15\x04", "is a Parquet file; write its rows as LLaVA JSON and its pict"),
    ("a.json", b"PAR1\x15\x04", "is a Parquet file"),
    ("a.arrow", b"ARROW1\0\0", "is an Arrow file; write its rows"),
    ("a.arrow", b"\xff\xff\xff\xff\x10", "is an Arrow stream; write its rows"),
    ("a.json.gz", b"\x1f\x8b\x08\0", "is a gzip archive; unpack it with gunzip, or tar xzf"),
    ("a.tar", tar(b"data.json"), "is a tar archive; unpack it with tar xf"),
    ("a.zip", b"PK\x03\x04", "is a zip archive; unpack it with unzip"),
    ("a.json.zst", b"\x28\xb5\x2f\xfd\0", "is a Zstandard archive"),
    ("a.json", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer; fetch"),
    ("a.json", b"<!doctype html>", "is a web page or XML; download the file itself"),
    ("a.jsonl", b' [{"id": 1}]', "holds a JSON list; name it .json"),
    ("a.json", b'{"id": 1}\n{"id": 2}', "name it .jsonl if each line is a sample"),
    ("a.json", '{"id": 1}'.encode("utf-16"), "is not UTF-8 text"),
])  # fmt: skip
def test_a_file_of_another_kind_is_named_with_the_way_out(name, content, complaint, tmp_path):
    file = save(tmp_path, content, name)
    with pytest.raises(ValueError) as caught:
        LlavaData(file)
    assert str(caught.value).startswith(f"{file}: {complaint}") or complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_pipe_are_named_with_the_way_out(tmp_path):
    save(tmp_path, "{}", "dataset_info.json")
    with pytest.raises(ValueError, match="is a folder; only a JSON .* folder of Hugging Face"):
        LlavaData(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    reader = os.open(tmp_path / "pipe.json", os.O_RDWR)  # else opening it would wait
    with pytest.raises(ValueError, match="pipe.json: can be read only once; save it as a file"):
        LlavaData(tmp_path / "pipe.json")
    os.close(reader)
