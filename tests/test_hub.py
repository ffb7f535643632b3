"""Names of models: local folders first, then the cache, then a download or one clear error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_cumo

from cumo import CuMo
from data import hub
from data.hub import local_folder
from data.weights import write_json, write_tensors
from llm import LLM

ROOT = Path(__file__).resolve().parents[1]
NAME, COMMIT = "org/tiny-1.5", "0123456789abcdef"


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """An empty cache, an empty working folder, and no access to the hub."""
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails


@pytest.fixture
def snapshot(tmp_path):
    """A model in the cache as huggingface_hub stores it: links to blobs."""
    return fill_cache(tmp_path / "cache")


def fill_cache(cache):
    folder = cache / "models--org--tiny-1.5"
    snapshot = folder / "snapshots" / COMMIT
    model = tiny_cumo().llm
    write_tensors(snapshot, model.public_state_dict(), max_shard_bytes=30_000)
    write_json(snapshot / "config.json", model.cfg.to_hf())
    (folder / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(folder / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{i}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


class Hub:
    """A stand-in for huggingface_hub: writes the requested ones of a list of files."""

    def __init__(self, folder, files):
        self.folder, self.files, self.asked = folder, files, []

    def snapshot_download(self, name, allow_patterns, cache_dir):
        from fnmatch import fnmatch

        assert name == NAME and cache_dir == hub.cache_folder()
        self.folder.mkdir(exist_ok=True)
        for file, content in self.files.items():
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                self.asked.append(file)
                (self.folder / file).write_text(content)
        return str(self.folder)


@pytest.fixture
def with_hub(tmp_path, monkeypatch):
    def install(*files):
        index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
        fake = Hub(tmp_path / "fetched", {file: index for file in files})
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
        return fake

    return install


def test_a_local_folder_comes_first(snapshot, tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    assert local_folder(NAME).samefile(tmp_path / NAME)


@pytest.mark.parametrize("name", ["data/mini/llm", "data/mini/clip"])
def test_a_shipped_model_is_found_from_any_folder_and_an_own_one_comes_first(name, tmp_path):
    assert local_folder(name) == local_folder(Path(name)) == ROOT / name
    (tmp_path / name).mkdir(parents=True)
    assert local_folder(name).samefile(tmp_path / name)


@pytest.mark.parametrize("name", ["data/mini/../../docs", "docs", "data/emoji", "data/mini/gone"])
def test_only_shipped_models_are_found_next_to_the_code(name):
    with pytest.raises(ValueError, match="does not exist|hf download"):
        local_folder(name)


def test_weights_next_to_the_code_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "ROOT", tmp_path / "checkout")
    folder = tmp_path / "checkout" / "weights" / "tiny-1.5"
    tiny_cumo().llm.save_pretrained(folder)
    assert local_folder(NAME) == local_folder("weights/tiny-1.5") == folder
    tiny_cumo().llm.save_pretrained(tmp_path / "weights" / "tiny-1.5")
    assert local_folder(NAME).samefile(tmp_path / "weights" / "tiny-1.5")


COMMANDS = [
    ["train.py", "--estimate", "--stage", "1"],
    *([f"{name}.py"] for name in ("mlp_moe", "clip_moe", "llm", "cumo")),
    ["-m", "data.check", "my.json"],
    ["-c", "from data.world import World; print(World('train', 'ask', 1)[0]['id'])"],
    ["runs/make/train_tokenizer.py", "--help"],
    ["runs/make/pretrain_llm.py", "--help"],
    ["runs/make/pretrain_clip.py", "--help"],
    ["runs/make/make_atlas.py", "--help"],
    ["runs/make/convert_smollm2.py", "--help"],
]
START = """
import json, os, runpy, sys
import torch  # once for all commands; the project's own modules are imported by each

root, commands = sys.argv[1], json.loads(sys.argv[2])
for k, (kind, *rest) in enumerate(commands):
    if not (child := os.fork()):
        os.dup2(os.open(f"{k}.out", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open(f"{k}.err", os.O_CREAT | os.O_WRONLY), 2)
        script = os.path.join(root, kind)
        sys.path[0] = root if kind in ("-m", "-c") else os.path.dirname(script)  # as Python does
        sys.argv = rest if kind in ("-m", "-c") else [script, *rest]
        if kind == "-c":
            exec(rest[0], {"__name__": "__main__"})
        elif kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_scripts_start_from_any_folder(tmp_path):
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "my.json").write_text(json.dumps([{"id": 1, "conversations": turns}]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [sys.executable, "-c", START, str(ROOT), json.dumps(COMMANDS)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True)
    for k, (command, status) in enumerate(zip(COMMANDS, done.stdout.split(), strict=True)):
        shown, errors = ((tmp_path / f"{k}.{end}").read_text() for end in ("out", "err"))
        assert status == "0" and shown, (command, errors)


def test_the_folder_the_advice_names_is_found(snapshot, tmp_path):
    folder = tmp_path / "weights" / "tiny-1.5"
    tiny_cumo().llm.save_pretrained(folder)
    assert local_folder(NAME).samefile(folder)
    assert LLM.from_pretrained(NAME).cfg == tiny_cumo().llm.cfg


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_where_hugging_face_has_it(variable, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    below = {"HF_HUB_CACHE": ".", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    cache = tmp_path / "elsewhere" / below.get(variable, ".cache/huggingface/hub")
    snapshot = fill_cache(cache)
    assert local_folder(NAME).samefile(snapshot)
    assert LLM.from_pretrained(NAME).cfg == tiny_cumo().llm.cfg


@pytest.mark.parametrize("lost", ["config.json", "model-00002-of", "index.json"])
def test_a_cached_model_that_is_not_whole_is_not_used(snapshot, lost):
    (file,) = (file for file in snapshot.iterdir() if lost in file.name)
    file.resolve().unlink()  # the blob; its link is now broken, as after an interrupted download
    with pytest.raises(ValueError, match=r"not completely in .*`hf download org/tiny-1.5"):
        local_folder(NAME)


def test_only_what_is_wanted_has_to_be_there(snapshot):
    assert local_folder(NAME, "config") == snapshot
    with pytest.raises(ValueError, match="not completely in"):
        local_folder(NAME, "tokenizer")
    (snapshot / "tokenizer.model").write_text("")
    assert local_folder(NAME, "tokenizer") == snapshot


def test_a_ref_cannot_lead_out_of_the_cache(snapshot, tmp_path):
    tiny_cumo().llm.save_pretrained(tmp_path / "secret")
    (snapshot.parents[1] / "refs" / "main").write_text("../../../secret")
    with pytest.raises(ValueError, match="hf download"):
        local_folder(NAME)


def test_only_the_files_needed_are_fetched(with_hub):
    read = ["config.json", "tokenizer.model", "model.safetensors.index.json"]
    read += ["model-00001-of-00001.safetensors"]
    fake = with_hub(*read, "consolidated.safetensors", "pytorch_model.bin", "flax_model.msgpack",
                    "onnx/model.safetensors", "model.fp16.safetensors", "run.py")  # fmt: skip
    assert local_folder(NAME) == fake.folder
    assert sorted(fake.asked) == sorted(read)


def test_a_pickle_is_fetched_only_where_there_are_no_safetensors(with_hub):
    fake = with_hub("config.json", "pytorch_model.bin", "tf_model.h5")
    assert local_folder(NAME) == fake.folder
    assert set(fake.asked) == {"config.json", "pytorch_model.bin"}


@pytest.mark.parametrize("want", ["config", "tokenizer"])
def test_a_config_or_tokenizer_comes_without_the_weights(with_hub, want):
    fake = with_hub("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    assert local_folder(NAME, want) == fake.folder
    assert "model.safetensors" not in fake.asked and want in " ".join(fake.asked)


def test_a_download_that_brings_no_model_is_told(with_hub):
    with_hub("config.json", "README.md")
    with pytest.raises(ValueError, match="holds no complete model"):
        local_folder(NAME)


def test_offline_means_no_download(with_hub, monkeypatch):
    fake = with_hub("config.json", "model.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids downloads"):
        local_folder(NAME)
    assert not fake.asked


def test_a_failed_download_is_one_line_with_the_way_out(with_hub, monkeypatch):
    fake = with_hub()

    def fail(*_, **options):
        raise ConnectionError("404\nnot found")

    monkeypatch.setattr(fake, "snapshot_download", fail)
    with pytest.raises(ValueError) as error:
        CuMo.from_pretrained(NAME)
    words = "404 not found", "hf download org/tiny-1.5 --local-dir weights/tiny-1.5"
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "name", ["", "nowhere", "../secret", "a/../b", "a\\b", "a/b/c", "/a/b", "a/b\n", "-a/b", "a//b"]
)
def test_what_is_neither_a_folder_nor_a_name_is_refused(name, with_hub):
    fake = with_hub("config.json", "model.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        local_folder(name)
    assert not fake.asked


def test_a_path_is_never_taken_for_a_name(tmp_path, snapshot):
    with pytest.raises(ValueError, match="does not exist"):
        local_folder(Path(NAME))


def test_our_names_are_what_huggingface_hub_asks_for(monkeypatch):
    """The fake above has the arguments of the real function."""
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    hub = pytest.importorskip("huggingface_hub")
    import inspect

    asked = inspect.signature(hub.snapshot_download).parameters
    assert {"allow_patterns", "cache_dir"} <= asked.keys()
