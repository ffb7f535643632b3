"""From the name of a model to the local folder with its files.

    local_folder("mistralai/Mistral-7B-Instruct-v0.2")  ->  Path

uses the first of these that is complete. `find_model` also takes a folder of stages, such as out:
its furthest finished stage.

    the name itself           a local folder or file; data/mini/... is also found next to the code
    weights/<last part>       where `hf download NAME --local-dir weights/...` puts it, in the
                              working folder or next to the code
    the Hugging Face cache    where other programs have downloaded it; read without their package
    a download                into that cache, through `huggingface_hub`, if it is installed

The cache is a plain folder tree in `$HF_HUB_CACHE`, or `$HF_HOME/hub`, or
`~/.cache/huggingface/hub`:

    models--mistralai--Mistral-7B-Instruct-v0.2/
        refs/main                   the commit of "main" at the last download
        snapshots/<commit>/...      its files, as links into blobs/; unfinished files are missing

Only the files that we read are downloaded: the config, the tokenizer, and one copy of the weights,
safetensors if possible. `HF_HUB_OFFLINE=1` forbids downloads.
"""

import os
import re
import sys
from pathlib import Path

from data.weights import STAGE_FILES, WEIGHT_FILES, shards_of

ROOT = Path(__file__).resolve().parents[1]  # the checkout, with the shipped data/mini
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tekken.json")
NEAR_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja")  # fmt: skip
CONFIGS = ("config.json", "preprocessor_config.json")
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")
DOWNLOADED = {  # `want` -> the files to download, and more of them if these have no weights
    "model": ((*CONFIGS, *TOKENIZERS, *NEAR_TOKENIZERS, *SAFETENSORS, *STAGE_FILES), PICKLES),
    "config": (CONFIGS, ()),
    "tokenizer": ((*TOKENIZERS, *NEAR_TOKENIZERS), ()),
}  # fmt: skip


STAGES = ("stage3", "stage2", "stage1")  # what train.py writes into its --out, the last one first


def find_model(name: str | Path = "", out: str | Path = "out") -> Path:
    """The local folder of a model. A folder of stages (`out`, if there is no name) means its
    furthest finished stage. ValueError, with the way out, when there is none."""
    folder = Path(name or out)
    finished = finished_stages(folder)
    if finished and not has_config(folder):
        begun = [folder / stage for stage in STAGES if (folder / stage / "train.json").is_file()]
        if begun and begun[0] not in finished:
            print(f"{begun[0]} is not finished; this is {finished[0]}", file=sys.stderr)
        return finished[0]
    if name:
        return local_folder(name)
    reason = why_no_model(folder) or f"no trained model in {folder}/; `python train.py` makes one"
    raise ValueError(f"{reason}; --model DIR names another")


def local_folder(name: str | Path, want: str = "model") -> Path:
    """The local folder of a model, downloaded if necessary; `want`: "model", "config", "tokenizer".

    A `Path` is always local, a `str` may also be a name on the hub such as "org/model".
    ValueError, with the command that downloads the files, if they cannot be found.
    """
    path, text = Path(name), str(name)
    reason = why_no_model(path) if text else ""
    if text and path.exists() and not reason:
        return path
    if path.parts[:2] == ("data", "mini") and ".." not in path.parts and (ROOT / path).exists():
        return ROOT / path  # shipped with the code, for scripts started from another folder
    if reason:
        raise ValueError(reason)
    part = r"\w[\w.-]*"  # the hub's own rule; such a name cannot leave the cache's folder
    named = re.fullmatch(f"{part}/{part}", text, re.ASCII) and isinstance(name, str)
    if not named or ".." in text or "--" in text:
        raise ValueError(f"{text!r} does not exist; give a local folder, or a name on the hub "
                         "with one slash, as in `hf download org/model`")  # fmt: skip
    return fetched(name, want) or cached(name, want) or download(name, want)


def fetched(name: str, want: str) -> Path | None:
    """weights/<last part of the name>, in the working folder or next to the code, if complete."""
    local = Path("weights") / Path(name).name
    return next((folder for folder in (local, ROOT / local) if is_complete(folder, want)), None)


def has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def finished_stages(folder: Path) -> list[Path]:
    return [folder / stage for stage in STAGES if has_config(folder / stage)]


def is_training(folder: Path) -> bool:
    """Whether `folder` is one where train.py writes its stages."""
    return str(folder) == "out" or any((folder / stage).is_dir() for stage in STAGES)


def why_no_model(path: Path) -> str:
    """Why there is no model in `path`, and the command that helps, if `path` belongs to a training
    of train.py; "" for any other path, and for a model."""
    where = "" if str(path.parent) == "out" else f" --out {path.parent}"
    command = f"`python train.py --stage {path.name[-1:]}{where}`"
    ready = " or ".join(map(str, finished_stages(path)))
    if has_config(path) or path.is_file():
        return ""
    state = path / "train.json"
    if state.is_file() and '"finished": true' in state.read_text(errors="replace"):
        again = command[:-1] + " --overwrite`"
        return f"{path} has no config.json; copy it again, or {again} trains it again"
    if state.is_file():
        return f"{path} is not finished; {command}, with the flags it began with, continues it"
    if ready:
        return f"{path} is no model but the folder of a training; name {ready}"
    if path.exists() and not is_training(path):
        return ""
    near = ROOT / path  # for scripts started from another folder
    if finished_stages(near) or has_config(near) and is_training(near.parent):
        return f"{path} is not in this folder; it is {near}"
    if is_training(path):
        return f"no trained model in {path}/; `python train.py` makes one"
    if path.name in STAGES:
        return f"{path} does not exist; {command} makes it"
    if not is_training(path.parent) and not re.fullmatch(r"stage\d+", path.name):
        return ""
    models = sorted(found.name for found in path.parent.glob("*") if has_config(found))
    there = ", ".join(models) or "no model; `python train.py` makes stage1, stage2 and stage3"
    return f"{path} does not exist; {path.parent}/ has {there}"


def cache_folder() -> Path:
    """Where Hugging Face's programs keep their downloads."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(home) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def cached(name: str, want: str) -> Path | None:
    """The snapshot of `name` in the cache; None if any wanted file is missing."""
    folder = cache_folder() / ("models--" + name.replace("/", "--"))
    ref = folder / "refs" / "main"
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    snapshot = folder / "snapshots" / commit
    return snapshot if commit.isalnum() and is_complete(snapshot, want) else None


def is_complete(folder: Path, want: str) -> bool:
    """Whether `folder` holds the wanted files, with every shard that an index of weights names."""
    if want == "tokenizer":
        return any((folder / file).is_file() for file in TOKENIZERS)
    if not (folder / "config.json").is_file():
        return False
    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    return want == "config" or weights is not None and not shards_of(weights)[1]


def download(name: str, want: str) -> Path:
    """Download `name` into the cache. ValueError, with what to do instead, if that fails."""
    file = "config.json " if want == "config" else ""
    advice = f"fetch it with `hf download {name} {file}--local-dir weights/{Path(name).name}`"
    missing = f"{name!r} is no local folder and not completely in {cache_folder()}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(f"{missing}, and HF_HUB_OFFLINE forbids downloads; {advice}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{missing}; {advice} (`pip install huggingface_hub`)") from None
    first, instead = DOWNLOADED[want]
    for patterns in (first, first + instead):
        try:  # continues an interrupted download
            found = snapshot_download(name, allow_patterns=patterns, cache_dir=cache_folder())
        except Exception as error:  # many types, all with a message
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{missing}, and could not be downloaded ({reason:.200}); "
                             f"{advice}") from None  # fmt: skip
        if is_complete(Path(found), want):
            return Path(found)
    raise ValueError(
        f"{name!r} was downloaded, but {found} holds no complete {want}: is it a model?"
    )
