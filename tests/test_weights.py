"""Weights on disk: every form is read, every damage is named, and no reader sees half a save."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_cumo
from torch import nn

from cumo import CuMo
from data import weights
from data.tokenizer import Tokenizer
from data.weights import load_into, read_config, read_tensors, write_json, write_tensors


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(10, 10) for i in range(5)}  # 400 bytes each


def assert_same(path, tensors):
    read = dict(read_tensors(path))
    assert list(sorted(read)) == sorted(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("max_shard_bytes, files", [(5e9, 1), (800, 3), (1, 5)])
def test_what_is_written_is_read(tmp_path, tensors, max_shard_bytes, files):
    write_tensors(tmp_path, tensors, max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    assert not list(tmp_path.glob("*.partial"))
    assert_same(tmp_path, tensors)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_index_is_the_one_transformers_writes(tmp_path, tensors):
    write_tensors(tmp_path, tensors, 800)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"]["layer.4.weight"] == "model-00003-of-00003.safetensors"


@pytest.mark.parametrize("first, second", [(800, 5e9), (5e9, 800), (1, 800)])
def test_a_new_save_replaces_the_old_one_of_another_form(tmp_path, tensors, first, second):
    write_tensors(tmp_path, tensors, first)
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    write_tensors(tmp_path, newer, second)
    assert_same(tmp_path, newer)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if second > 2000 else 3)


@pytest.mark.parametrize("max_shard_bytes", [5e9, 800])
def test_a_save_that_dies_while_writing_leaves_the_old_one(
    tmp_path, tensors, max_shard_bytes, monkeypatch
):
    write_tensors(tmp_path, tensors, max_shard_bytes)

    def full(copies, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        write_tensors(tmp_path, {"other": torch.ones(3)}, max_shard_bytes)
    assert_same(tmp_path, tensors)


def test_a_save_that_dies_between_renames_reads_as_no_weights(tmp_path, tensors, monkeypatch):
    write_tensors(tmp_path, tensors, 800)
    publish, calls = weights.publish, []

    def die_at_second(file):
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt
        publish(file)

    monkeypatch.setattr(weights, "publish", die_at_second)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path, {name: tensor + 1 for name, tensor in tensors.items()}, 800)
    with pytest.raises(ValueError, match="no weights in"):
        read_tensors(tmp_path)


def test_views_and_transposes_are_written_as_they_look(tmp_path):
    stack = torch.randn(3, 4, 5)
    views = {f"experts.{e}": stack[e].T for e in range(3)}
    write_tensors(tmp_path, views)
    assert_same(tmp_path, views)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickled_weights_are_read(tmp_path, tensors, zipped):
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same(tmp_path, tensors)
    assert_same(tmp_path / "pytorch_model.bin", tensors)


def test_pickled_shards_are_read(tmp_path, tensors):
    shard_of = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        torch.save({n: t for n, t in tensors.items() if shard_of[n] == shard}, tmp_path / shard)
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": shard_of})
    assert_same(tmp_path, tensors)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_pickle_can_run_no_code(tmp_path, capsys):
    torch.save({"weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        dict(read_tensors(tmp_path))
    assert "code ran" not in capsys.readouterr().out


def test_safetensors_come_before_pickles(tmp_path, tensors):
    torch.save({"stale": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    write_tensors(tmp_path, tensors)
    assert_same(tmp_path, tensors)


def test_missing_files_are_named_at_once(tmp_path, tensors):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no weights in .*model\.safetensors"):
        read_tensors(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_config(tmp_path)
    write_tensors(tmp_path, tensors, 800)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 shards: model-00002-of-00003\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0, 5, 300])
def test_a_truncated_file_is_named(tmp_path, tensors, name, keep):
    save_file(tensors, tmp_path / name) if "safe" in name else torch.save(tensors, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=name) as error:
        dict(read_tensors(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a\\b", "..", ""])
def test_an_index_cannot_point_outside_its_folder(tmp_path, shard):
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"weight": shard}})
    with pytest.raises(ValueError, match="outside its folder"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        read_tensors(tmp_path)


def test_a_shard_without_a_promised_tensor_is_named(tmp_path, tensors):
    write_tensors(tmp_path, tensors, 800)
    save_file({"layer.0.weight": torch.ones(10, 10)}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"00001-of-00003\S+ lacks .* promises: layer\.1\.weight"):
        dict(read_tensors(tmp_path))


def test_config_is_found_beside_a_weight_file(tmp_path, tensors):
    write_json(tmp_path / "config.json", {"dim": 4})
    write_tensors(tmp_path, tensors)
    assert read_config(tmp_path) == read_config(tmp_path / "model.safetensors") == {"dim": 4}


def test_load_into_writes_through_views_and_casts():
    stack = torch.zeros(2, 3, 4)
    given = {"a": torch.ones(4, 3), "b": torch.ones(3, 4).double()}
    load_into({"a": stack[0].T, "b": stack[1]}, given)
    assert (stack == 1).all()


def test_load_into_lists_every_mismatch_in_one_error():
    targets = {name: torch.zeros(2) for name in ("here", "missing", "misshapen")}
    given = [
        ("here", torch.ones(2)),
        ("extra", torch.ones(2)),
        ("misshapen", torch.ones(3)),
        ("skipped", torch.ones(1)),
    ]
    with pytest.raises(
        ValueError,
        match=r"^it does not fit this model; missing: missing; "
        r"unexpected: extra; wrong shape: misshapen is \[3\] instead of \[2\]$",
    ):
        load_into(targets, given, skip=lambda name: name == "skipped", source="it")


def test_a_mapped_model_is_its_own(tmp_path):
    """Training it changes neither the file nor a second model; saving it over itself is safe."""
    tiny_cumo(experts=4, seed=1).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    before = file.read_bytes()
    model, other = CuMo.from_pretrained(tmp_path), CuMo.from_pretrained(tmp_path)
    at = {p.data_ptr() for p in model.parameters()}
    assert len(at) == len([*model.parameters()]), "two parameters share memory"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert file.read_bytes() == before
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q + 1, rtol=0, atol=0, msg=name)
    model.save_pretrained(tmp_path)
    for p, q in zip(CuMo.from_pretrained(tmp_path).parameters(), model.parameters()):
        assert torch.equal(p, q)


def test_what_a_pickle_shares_is_not_shared_by_the_model(tmp_path):
    """Two names of one storage, a transposed one, and a part of one are copied."""
    torch.manual_seed(0)
    shared = torch.randn(4, 4)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": shared, "b": shared, "c": shared.T, "d": shared[:2]}, file)
    shapes = {"a": (4, 4), "b": (4, 4), "c": (4, 4), "d": (2, 4)}
    model = nn.ParameterDict({name: nn.Parameter(torch.empty(s)) for name, s in shapes.items()})
    load_into(dict(model.items()), read_tensors(file), mapped=True)
    with torch.no_grad():
        model["a"].zero_()
    for name, wanted in {"b": shared, "c": shared.T, "d": shared[:2]}.items():
        assert torch.equal(model[name], wanted), name


def test_a_full_disk_leaves_no_shard_behind(tmp_path, tensors, monkeypatch):
    written = []

    def full(copies, file, metadata):
        if written:
            raise weights.SafetensorError("No space left on device")
        written.append(file)
        save_file(copies, file, metadata)

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="is the disk full"):
        write_tensors(tmp_path, tensors, 800)
    assert not [*tmp_path.iterdir()]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 9976576152\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>model.safetensors</title></head></html>"


@pytest.mark.parametrize("content, words", [(POINTER, "is a Git LFS pointer.*`git lfs pull`"),
                                            (PAGE, "is a web page, .* download it again"),
                                            (PAGE.lower(), "is a web page")])  # fmt: skip
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json",
                                  "model.safetensors.index.json", "tokenizer.json",
                                  "tokenizer.model", "tekken.json"])  # fmt: skip
def test_what_is_not_the_file_itself_is_said_so(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {words}") as error:
        if name == "config.json":
            read_config(tmp_path)
        elif name.startswith("t"):
            Tokenizer.from_pretrained(tmp_path)
        else:
            dict(read_tensors(tmp_path))
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("content", [b"nonsense", b"\x80\x02garbage", pickle.dumps(Evil())])
def test_no_error_advises_to_let_a_pickle_run_code(content, tmp_path, tensors):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    torch.save({"weight": Evil()}, tmp_path / "other.bin")
    for file in (tmp_path, tmp_path / "other.bin"):
        with pytest.raises(
            ValueError, match="cannot be read as weights .*(safetensors|Error)"
        ) as e:
            dict(read_tensors(file))
        assert "weights_only" not in str(e.value) and "torch.load" not in str(e.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_not_passed_over(name, tmp_path, tensors):
    write_tensors(tmp_path, tensors)
    save_file(tensors, tmp_path / name)
    with pytest.raises(ValueError, match=f"holds {name}, .* merge the adapter"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_quantised_weights_without_their_scales_are_refused(kind, name, tmp_path):
    model = tiny_cumo()
    model.save_pretrained(tmp_path)
    found = {k: v.contiguous() for k, v in model.public_state_dict().items()}
    wrong = "model.layers.1.mlp.up_proj.weight"
    found[wrong] = torch.ones(found[wrong].shape).to(getattr(torch, kind))
    (tmp_path / "model.safetensors").unlink()
    save = save_file if name.startswith("model") else torch.save
    save({k: v.clone() for k, v in found.items()}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{wrong} is {kind}, and so quantised") as error:
        CuMo.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_in_config_json_is_no_error(tmp_path):
    (tmp_path / "config.json").write_text('{"dim": 4}', encoding="utf-8-sig")
    assert read_config(tmp_path) == {"dim": 4}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_any_protocol_brings_none_of_the_advice_of_pytorch(
    protocol, tmp_path, recwarn, capsys
):
    tensors = {"a": torch.arange(6.0).view(2, 3)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    if protocol < 4:
        assert_same(tmp_path, tensors)
    else:
        with pytest.raises(ValueError, match=r"cannot be read as weights \(.*safetensors instead"):
            dict(read_tensors(tmp_path))
    assert not recwarn.list and capsys.readouterr() == ("", "")
