"""Weights on disk: reading, writing, and putting each tensor where it belongs.

A public model is a directory in Hugging Face's layout: a `config.json` and its tensors in one of
three forms, looked for in this order:

    model.safetensors                         one file
    model.safetensors.index.json              a large model: {"weight_map": {tensor name: shard}}
      + model-00001-of-00003.safetensors ...
    pytorch_model.bin (or its .index.json)    an old model: a pickle, opened with weights_only=True,
                                              so it can hold tensors but run no code

A model describes itself as {public name: view of a parameter}. Saving reads these views, and
`load_into` writes through them. It is strict: missing, unexpected and misshapen names are collected
into one error. `fill` loads a whole model: it compares names and shapes with the files' headers
before it allocates memory, then copies one tensor at a time. A tensor that already has the
parameter's dtype is memory-mapped instead of copied: its pages are read at first use and copied
when training first writes to them. Files are mapped again every 16 MiB, because pages that have
been read stay in memory while the map is open. Loading so takes the memory of the parameters plus
one tensor (bench/load_memory.py).

Files are written under another name, flushed to disk, then renamed, so a reader finds the old file
or the new one. A sharded save removes its index first and writes it last: an interrupted save reads
as "no weights here", never as a mixture of two models.
"""

import hashlib
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # LoRA
STAGE_FILES = {  # file of the original's first two stages -> prefix that its names lack
    "mm_projector.bin": "model.mm_projector.",
    "clip.bin": "model.vision_tower.",
}
HEADER_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
                "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "I32": torch.int32}  # fmt: skip
MAPPED_AT_ONCE = 2**24  # bytes of a file that are read before it is mapped again


def read_config(path: str | Path, name: str = "config.json", default: dict | None = None) -> dict:
    """The config.json of a model directory, or of the directory of a weight file; or another JSON
    file of it, with the `default` if it is not there."""
    folder = _existing(path)
    file = (folder if folder.is_dir() else folder.parent) / name
    if default is not None and not file.is_file():
        return default
    if not file.is_file():
        raise ValueError(f"no config.json in {file.parent}: is this a model directory?")
    return _read_json(file)


def fingerprint(path: str | Path) -> str:
    """16 letters that change when the name, size or modification time of the config, the tokenizer
    or a weight file in a folder changes. No file is read."""
    folder = _existing(path) if Path(path).is_dir() else Path(path).parent
    kinds = "config.json", "tokenizer*", "tekken.json", "*.safetensors", "*.bin"
    files = sorted(file for kind in kinds for file in folder.glob(kind))
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def read_tensors(path: str | Path, headers: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs of a model directory or of one weight file, a shard at a time.

    With `headers` no values are read: tensors of safetensors are then on the meta device.
    """
    path = _existing(path)
    if path.is_dir():
        adapters = [name for name in ADAPTERS if (path / name).is_file()]
        if adapters:
            raise ValueError(f"{path} holds {adapters[0]}, which would be ignored: merge the "
                             "adapter into the weights (peft: merge_and_unload), or remove "
                             "it")  # fmt: skip
        found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise ValueError(f"no weights in {path}: expected one of {', '.join(WEIGHT_FILES)}")
        path = found[0]
    if not path.name.endswith(".index.json"):
        return _read_file(path, headers)
    shard_of, missing = shards_of(path)
    folder, shards = path.parent, sorted(set(shard_of.values()))
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards: "
            f"{', '.join(missing)}; the download is incomplete"
        )
    return (pair for shard in shards for pair in _read_shard(folder / shard, shard_of, headers))


def shards_of(index: Path) -> tuple[dict[str, str], list[str]]:
    """{tensor name: shard} of an index file, and the missing shards; both empty for a file of
    weights."""
    if not index.name.endswith(".index.json"):
        return {}, []
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(f, str) for f in shard_of.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        # a plain name, never a path: an index must not open files elsewhere on the disk
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise ValueError(f"{index} points outside its folder: {shard!r}")
    return shard_of, [shard for shard in shards if not (index.parent / shard).is_file()]


def read_stage_files(path: str | Path, headers: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs of the files that the original's first two stages write.

    They are newer than the shards: loaded last, they replace the shards' values.
    """
    for file, prefix in STAGE_FILES.items():
        if (Path(path) / file).is_file():
            for name, tensor in _read_file(Path(path) / file, headers):
                yield prefix + name.split("mm_projector.")[-1], tensor


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], max_shard_bytes: float = 5e9
) -> None:
    """Write model.safetensors, or numbered shards and their index when it would grow too big."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > max_shard_bytes and shards[-1]:
            shards, size = shards + [{}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    count = len(shards)
    files = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    )
    for file, shard in zip(files, shards):
        copies = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        aside = folder / (file + ".partial")
        try:
            save_file(copies, aside, {"format": "pt"})
        except SafetensorError as error:  # safetensors' error when the disk is full
            for half in folder.glob("model*.safetensors.partial"):  # also of earlier shards
                half.unlink()
            raise OSError(f"{aside} cannot be written ({error}); is the disk full?") from None
        aside.chmod(0o644)  # save_file lets only its owner read
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if count > 1:
        whole.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
    for file in files:
        publish(folder / file)
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        shard_of = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": shard_of})
    else:
        index.unlink(missing_ok=True)
    for old in folder.glob("model-*-of-*.safetensors"):  # shards of an earlier save
        if old.name not in files:
            old.unlink()


def check_folder(path: str | Path) -> None:
    """ValueError unless the folder of --out can be written at `path`; nothing is created."""
    place = Path(path).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    why = "Permission denied" if place.is_dir() else "File exists"
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--out {path} cannot be written ({why}); name another folder")


def make_folder(path: str | Path) -> Path:
    """The folder of --out at `path`, created if needed. ValueError if it cannot be written to."""
    check_folder(path)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written ({error.strerror}); name another "
                         "folder") from None  # fmt: skip
    return Path(path)


def write_json(file: str | Path, content: dict) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_name(file.name + ".partial").write_text(json.dumps(content, indent=2) + "\n")
    publish(file)


def copy_into(folder: str | Path, file: str | Path) -> None:
    """Copy a file atomically: a reader sees the old file or the new one."""
    copy = Path(folder) / Path(file).name
    shutil.copy(file, copy.with_name(copy.name + ".partial"))
    publish(copy)


@torch.no_grad()
def load_into(
    targets: dict[str, Tensor],
    tensors: dict | Iterable[tuple[str, Tensor]],
    skip: Callable[[str], bool] = lambda name: False,
    source: str = "checkpoint",
    mapped: bool = False,
) -> None:
    """Copy each tensor into the target of its name, casting as needed; every mismatch is an error.

    `targets` are parameters or views of them, so the copies change the model; targets on the meta
    device are only compared. With `mapped`, a parameter of the tensor's dtype uses the tensor's own
    memory. Names for which `skip` is true are ignored. ValueError lists missing, unexpected and
    misshapen names; the model is then partly overwritten and must not be used.
    """
    missing, unexpected, misshapen, taken = dict.fromkeys(targets), [], [], set()
    for name, tensor in tensors.items() if isinstance(tensors, dict) else tensors:
        if name in targets:
            missing.pop(name, None)
            if not tensor.is_floating_point() or tensor.element_size() == 1:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{source}: {name} is {kind}, and so quantised; only float32, "
                                 "float16 and bfloat16 are read, so take the model that it was "
                                 "made from")  # fmt: skip
            if tensor.shape == targets[name].shape:
                if mapped and _can_take(targets[name], tensor, taken):
                    targets[name].data = tensor
                    taken.add(tensor.data_ptr())
                elif not targets[name].is_meta:
                    targets[name].copy_(tensor)
            else:
                misshapen.append(
                    f"{name} is {list(tensor.shape)} instead of {list(targets[name].shape)}"
                )
        elif not skip(name):
            unexpected.append(name)
    kinds = {"missing": list(missing), "unexpected": unexpected, "wrong shape": misshapen}
    problems = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(f"{source} does not fit this model; " + "; ".join(problems))


class NoDraws(TorchFunctionMode):
    """Skips `nn.init.normal_`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not nn.init.normal_:
            return function(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules built here are on the meta device: shapes without memory. No values are drawn, since
    `normal_` on this device imports PyTorch's compiler, which takes more than a second."""
    with torch.device("meta"), NoDraws():
        yield


def fill(
    model: nn.Module,
    read: Callable[[bool], Iterator[tuple[str, Tensor]]],
    device: torch.device | str | None = None,
    skip: Callable[[str], bool] = lambda name: False,
    source: str = "checkpoint",
) -> nn.Module:
    """Load a model that was built `on_meta`, and return it on `device` (None: CPU).

    `read(headers)` yields its tensors, as `read_tensors` does. ValueError as in `load_into`, raised
    from the headers alone, before any memory is allocated.
    """
    load_into(model.public_state_dict(), read(True), skip, source)
    # as `to_empty`, whose `empty_like` imports the compiler, see `on_meta`
    model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device or "cpu"))
    load_into(model.public_state_dict(keep_vars=True), read(False), skip, source, mapped=True)
    return model


def _can_take(target: Tensor, tensor: Tensor, taken: set[int]) -> bool:
    """Whether a parameter may use this tensor's memory, which no other parameter may share."""
    return (isinstance(target, nn.Parameter) and target.device == tensor.device
            and target.dtype == tensor.dtype and tensor.is_contiguous()
            and tensor.nbytes == tensor.untyped_storage().nbytes()
            and tensor.data_ptr() not in taken)  # fmt: skip


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return path


def check_fetched(file: Path) -> None:
    """ValueError for a Git LFS pointer or a web page in place of a file."""
    with open(file, "rb") as opened:
        start = opened.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: is a Git LFS pointer, not the file itself; `git lfs pull` "
                         "fetches it")  # fmt: skip
    if start.startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{file}: is a web page, not the file itself; download it again, as with "
                         "`hf download`")  # fmt: skip


def _read_json(file: Path) -> dict:
    check_fetched(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def _read_file(file: Path, headers: bool = False) -> Iterator[tuple[str, Tensor]]:
    done = 0
    while tensors := _map_file(file, done, headers):  # replaces the last map, freeing its pages
        yield from tensors.items()
        done += len(tensors)


def _map_file(file: Path, start: int, headers: bool) -> dict[str, Tensor]:
    """The next MAPPED_AT_ONCE bytes of tensors, from the `start`-th; none is read before use."""
    check_fetched(file)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())[start:]
                if headers:
                    slices = {name: opened.get_slice(name) for name in names}
                    return {name: torch.empty(view.get_shape(), device="meta",
                                              dtype=HEADER_TYPES.get(view.get_dtype(), torch.uint8))
                            for name, view in slices.items()}  # fmt: skip
                return _first_of((name, opened.get_tensor(name)) for name in names)
        # files older than torch 1.6 are no zip archives and cannot be mapped
        mapped = zipfile.is_zipfile(file)
        with warnings.catch_warnings(action="ignore"):  # on unusual pickles, PyTorch gives advice
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}); fetch it again") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).split("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's advice would let it run code
            reason = "it is damaged, or holds more than tensors; take safetensors instead"
        raise ValueError(f"{file} cannot be read as weights ({reason})") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        and tensor.device.type == "cpu" for name, tensor in content.items()
    ):  # fmt: skip
        raise ValueError(f"{file} cannot be read as weights (it holds no tensors by name)")
    rest = list(content.items())[start:]
    return _first_of(rest) if mapped else dict(rest)


def _first_of(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    tensors, size = {}, 0
    for name, tensor in pairs:
        tensors[name] = tensor
        size += tensor.nbytes
        if size >= MAPPED_AT_ONCE:
            break
    return tensors


def _read_shard(file: Path, shard_of: dict, headers: bool) -> Iterator[tuple[str, Tensor]]:
    promised = {name for name, shard in shard_of.items() if shard == file.name}
    for name, tensor in _read_file(file, headers):
        if name in promised:
            promised.remove(name)
            yield name, tensor
    if promised:
        raise ValueError(f"{file} lacks what its index promises: {', '.join(sorted(promised))}")


def check_zip(file: Path) -> None:
    """BadZipFile if a checksum in a file of torch.save is wrong; torch.load does not check it."""
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is damaged")


def sync(file: Path) -> None:
    """Flush what was written to a file to the disk."""
    with open(file, "rb+") as written:
        os.fsync(written.fileno())


def publish(file: Path) -> None:
    """Flush `file`.partial to the disk, then rename it, which is atomic."""
    partial = file.with_name(file.name + ".partial")
    sync(partial)
    os.replace(partial, file)
    if os.name == "posix":  # a new name is on the disk only after its folder is flushed
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
