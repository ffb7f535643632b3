"""Checkpoints that are damaged, lie or attack: one clear line, nothing half-loaded, no code run."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from refused import refusal
from safetensors.torch import load_file, save_file
from tiny import tiny_cumo

import sample
from cumo import CuMo
from data.weights import write_json, write_tensors

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    tiny_cumo(experts=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, *words):
    with pytest.raises((ValueError, OSError)) as error:
        CuMo.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def change(folder, part=None, **fields):
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(fields)
    (folder / "config.json").write_text(json.dumps(config))


# -------------------------------------------------------------------------------- configs that lie


@pytest.mark.parametrize("value", [-1, 0, 1.5, "32", None, True, [32], 2**40, 10**30], ids=str)
@pytest.mark.parametrize("part", [None, "vision_config"])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_size_that_is_none_is_refused_by_name(folder, part, field, value):
    change(folder, part, **{field: value})
    ours = {"hidden_size": "dim", "num_hidden_layers": "n_layers"}.get(field, "hidden_dim")
    refused(folder, f"{ours}={value!r}", "an integer from 1 to")


@pytest.mark.parametrize(
    "field, value",
    [
        ("rope_theta", "10000"),
        ("rope_theta", 10**30),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "false"),
        ("sliding_window", -4),
        ("num_attention_heads", 0),
        ("num_key_value_heads", "2"),
        ("rope_parameters", "default"),
        ("nanocumo_mlp_experts", -4),
        ("vision_config", [1]),
        ("vision_config", {"image_size": 24, "patch_size": 0}),
    ],
    ids=str,
)
def test_other_fields_that_lie_are_refused(folder, field, value):
    change(folder, **{field: value})
    refused(folder)


@pytest.mark.parametrize("scales", [3, "1,3", [], [1.5], [True], [0], [[1]]], ids=str)
def test_scales_that_are_none_are_refused(folder, scales):
    change(folder, "vision_config", scales=scales)
    refused(folder, "scales=", "such as (1, 3)")


def test_a_size_the_weights_do_not_have_takes_no_memory(folder):
    """A model of 2**20 x 2**20 matrices would be 4 TB each; the weights are looked at first."""
    change(folder, hidden_size=2**20, intermediate_size=2**20)
    refused(folder, "model.embed_tokens.weight is [97, 32] instead of [97, 1048576]")


DEEP = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '"x"', "\0", "[" * 100_000, DEEP])
def test_a_config_that_is_no_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, "config.json")


def test_a_config_that_is_no_text_is_refused(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refused(folder, "config.json")


# --------------------------------------------------------------------------- files that are damaged


@pytest.mark.parametrize("form", ["safetensors", "pickle", "old pickle"])
def test_damaged_bytes_never_raise_anything_else(folder, form):
    """Cut, overwritten and inserted bytes, mostly in the header: loaded or one line, no third."""
    file = folder / "model.safetensors"
    if form != "safetensors":
        weights, file = load_file(file), folder / "pytorch_model.bin"
        (folder / "model.safetensors").unlink()
        torch.save(weights, file, _use_new_zipfile_serialization=form == "pickle")
    whole, seeded, told = file.read_bytes(), random.Random(0), 0
    for attempt in range(40):
        damaged = bytearray(whole)
        place = seeded.randrange(8000)
        if attempt % 4 == 0:
            damaged = damaged[: seeded.randrange(len(whole))]
        elif attempt % 4 == 1:
            damaged[place:place] = seeded.randbytes(20)
        else:
            damaged[place] = seeded.randrange(256)
        file.write_bytes(damaged)
        try:
            CuMo.from_pretrained(folder)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            told += 1
    assert told > 20


def test_a_lost_shard_or_one_that_points_elsewhere_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    write_tensors(folder, weights, max_shard_bytes=60_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = sorted(folder.glob("*-of-*"))[1]
    kept = lost.read_bytes()
    lost.unlink()
    refused(folder, f"lacks 1 of {len(set(index['weight_map'].values()))} shards", lost.name)
    (folder.parent / "x.safetensors").write_bytes(kept)
    shard_of = index["weight_map"].items()
    moved = {name: "../x.safetensors" if shard == lost.name else shard for name, shard in shard_of}
    write_json(folder / "model.safetensors.index.json", {"weight_map": moved})
    refused(folder, "points outside its folder: '../x.safetensors'")
    for outside in ("../../x", "/etc/passwd", "..", "sub/x", "sub\\x", ""):
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"weight": outside}})
        refused(folder, f"points outside its folder: {outside!r}")
    (folder / "model.safetensors.index.json").write_text(DEEP)
    refused(folder, "model.safetensors.index.json is not valid JSON")


def test_a_file_where_a_folder_should_be_and_the_other_way_round(folder, tmp_path):
    (tmp_path / "file").write_text("no model")
    refused(tmp_path / "file", "no config.json")
    refused(str(tmp_path / "file"), "no config.json")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "no weights in")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, "no config.json")


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        {"weight": [1.0]},
        {5: torch.ones(1)},
        {"state_dict": {"weight": torch.ones(1)}},
        {"weight": torch.ones(2, 2).to_sparse()},
        {"weight": torch.ones(1, device="meta")},
        torch.ones(3),
        None,
    ],
    ids=["list", "numbers", "numbered", "nested", "sparse", "meta", "tensor", "nothing"],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "clip.bin"])
def test_a_pickle_without_plain_tensors_by_name_is_refused(folder, content, name):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    torch.save(content, folder / name)
    refused(folder, name, "holds no tensors by name")


# ------------------------------------------------------------------------------- files that attack


class Attack:
    """Pickled, it is the command to make a file called `canary`."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin", "clip.bin"])
def test_no_code_in_a_pickle_is_run(folder, tmp_path, name, zipped):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    attack = {"model.norm.weight": Attack(canary)}
    torch.save(attack, folder / name, _use_new_zipfile_serialization=zipped)
    refused(folder, name, "cannot be read as weights")
    assert not canary.exists()
    torch.load(folder / name, weights_only=False)  # the attack is a real one
    assert canary.exists()


def test_python_files_beside_the_weights_are_not_imported(folder, tmp_path):
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')"
    for name in ("modeling_cumo.py", "configuration_cumo.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(code)
    change(folder, auto_map={"AutoModel": "modeling_cumo.CuMo"}, trust_remote_code=True)
    CuMo.from_pretrained(folder)
    assert not canary.exists()


# ---------------------------------------------------------------------------------- what users see


def test_the_command_line_says_it_in_one_line(folder, monkeypatch, capsys):
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    said = refusal(sample.main, ["--ask", "What?", "--model", folder], monkeypatch, capsys)
    assert "model.safetensors is damaged or incomplete" in said
