"""From the name of a model to the folder its files lie in.

    local_folder("mistralai/Mistral-7B-Instruct-v0.2")  ->  Path

tries, in this order, and takes the first that is complete:

    the name itself           a folder (or file) of this machine
    weights/<last part>       where `hf download NAME --local-dir weights/...` puts it
    the Hugging Face cache    where other programs have downloaded it, read without their package
    a download                through `huggingface_hub`, if it is installed, into that cache

The cache is a plain folder tree, `$HF_HUB_CACHE`, else `$HF_HOME/hub`, else
`~/.cache/huggingface/hub`:

    models--mistralai--Mistral-7B-Instruct-v0.2/
        refs/main                   the commit that "main" meant at the last download
        snapshots/<commit>/...      its files, as links into blobs/; what is not whole is not there

Only what we read is fetched: the config, the tokenizer, and one copy of the weights, in safetensors
if there is one. `HF_HUB_OFFLINE=1` forbids the network.
"""

import os
import re
from pathlib import Path

from data.weights import STAGE_FILES, WEIGHT_FILES, shards_of

TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tekken.json")
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")
FETCHED = {  # what is wanted -> the files to download, and those to take if they bring no weights
    "model": (("config.json", "tokenizer_config.json", *TOKENIZERS, *SAFETENSORS, *STAGE_FILES),
              PICKLES),
    "config": (("config.json",), ()),
    "tokenizer": (("tokenizer_config.json", *TOKENIZERS), ()),
}  # fmt: skip


def local_folder(name: str | Path, want: str = "model") -> Path:
    """The local folder of a model, fetched if need be; `want` is "model", "config" or "tokenizer".

    A `Path` is always a place on this machine, a `str` may also be a name such as "org/model".
    ValueError, with the command that fetches the files, when they are nowhere to be had.
    """
    path, text = Path(name), str(name)
    if text and path.exists():
        return path
    part = r"\w[\w.-]*"  # as the hub itself has it, and no way out of the cache's folder
    named = re.fullmatch(f"{part}/{part}", text, re.ASCII) and isinstance(name, str)
    if not named or ".." in text or "--" in text:
        raise ValueError(f"{text!r} does not exist; give a local folder, or a name of the hub "
                         "with one slash, as in `hf download org/model`")  # fmt: skip
    local = Path("weights") / path.name
    found = local if is_complete(local, want) else cached(name, want)
    return found or download(name, want, local)


def cache_folder() -> Path:
    """Where every program of Hugging Face's keeps its downloads."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(home) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def cached(name: str, want: str) -> Path | None:
    """The snapshot of `name` in the cache, None unless all that is wanted is there."""
    folder = cache_folder() / ("models--" + name.replace("/", "--"))
    ref = folder / "refs" / "main"
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    snapshot = folder / "snapshots" / commit
    return snapshot if commit.isalnum() and is_complete(snapshot, want) else None


def is_complete(folder: Path, want: str) -> bool:
    """Whether `folder` holds what is wanted; of weights, every shard that their index names."""
    if want == "tokenizer":
        return any((folder / file).is_file() for file in TOKENIZERS)
    if not (folder / "config.json").is_file():
        return False
    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    return want == "config" or weights is not None and not shards_of(weights)[1]


def download(name: str, want: str, local: Path) -> Path:
    """Fetch `name` into the cache. ValueError with the way out where that cannot be done."""
    file = "config.json " if want == "config" else ""
    advice = f"fetch it with `hf download {name} {file}--local-dir {local}`"
    missing = f"{name!r} is no local folder and not (whole) in {cache_folder()}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(f"{missing}, and HF_HUB_OFFLINE forbids the network; {advice}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{missing}; {advice} (`pip install huggingface_hub`)") from None
    first, instead = FETCHED[want]
    for patterns in (first, first + instead):
        try:  # goes on where an interrupted download ended
            found = snapshot_download(name, allow_patterns=patterns, cache_dir=cache_folder())
        except Exception as error:  # theirs are of many kinds; each has a message
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{missing}, and could not be fetched ({reason:.200}); "
                             f"{advice}") from None  # fmt: skip
        if is_complete(Path(found), want):
            return Path(found)
    raise ValueError(f"{name!r} was fetched, but {found} holds no complete {want}: is it a model?")
