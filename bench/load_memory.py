"""Peak memory of loading, divided by the bytes of the loaded model.

    python bench/load_memory.py        # writes bench/load_memory.json

A random Mistral of 400 MB in float32 is written in six shards, as safetensors or as pickles, and
loaded in a new process. A ratio of 1.0 is the model and nothing else.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from data.weights import read_tensors, write_json, write_tensors
from engine.memory import peak_memory
from llm import LLM, LLMConfig

CONFIG = LLMConfig(vocab_size=8192, dim=512, hidden_dim=2048, n_layers=24, n_heads=8, n_kv_heads=2)
LIMIT = 1.1  # largest ratio that passes


def write(folder, form):
    """Write the model into `folder` in float32, in shards."""
    torch.manual_seed(0)
    llm = LLM(CONFIG)
    write_tensors(folder, llm.public_state_dict(), max_shard_bytes=80e6)
    write_json(folder / "config.json", llm.cfg.to_hf())
    if form == "pickle":
        index = folder / "model.safetensors.index.json"
        shard_of = json.loads(index.read_text())["weight_map"]
        tensors = {name: tensor.clone() for name, tensor in read_tensors(folder)}
        for shard in set(shard_of.values()):
            mine = {name: tensors[name] for name in shard_of if shard_of[name] == shard}
            torch.save(mine, folder / shard.replace("safetensors", "bin"))
            (folder / shard).unlink()
        renamed = {name: shard.replace("safetensors", "bin") for name, shard in shard_of.items()}
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": renamed})
        index.unlink()


def resident():
    """Bytes of this process in memory now, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def load(folder, dtype):
    """Load the model once and print the memory it took. Run this in a new process."""
    with tempfile.TemporaryDirectory() as tiny:  # loads 75 MB of PyTorch's own code
        LLM(replace(CONFIG, vocab_size=8, dim=64, hidden_dim=8, n_layers=1)).save_pretrained(tiny)
        LLM.from_pretrained(tiny)
    before = resident()
    llm = LLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for p in llm.parameters():  # mapped files enter memory when they are read
        p.detach().flatten()[:: 4096 // p.itemsize].sum()
    grown = peak_memory("cpu") - before
    size = sum(p.nbytes for p in llm.parameters())
    print(json.dumps({"model_mb": round(size / 1e6, 1), "ratio": round(grown / size, 3)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", nargs="*", help="FOLDER DTYPE: load only this one, here")
    if model := parser.parse_args().model:
        return load(*model)
    rows = []
    for form in ("safetensors", "pickle"):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), form)
            shards = len([*Path(folder).glob("*-of-*")])
            for dtype in ("float32", "bfloat16"):
                command = [sys.executable, __file__, folder, dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                row = {"form": form, "shards": shards, "file_dtype": "float32", "dtype": dtype}
                rows.append(row | json.loads(done.stdout))
                print(rows[-1])
    content = {"command": "python bench/load_memory.py", "torch": torch.__version__,
               "machine": platform.machine(), "limit": LIMIT, "rows": rows}  # fmt: skip
    write_json(ROOT / "bench" / "load_memory.json", content)
    if max(row["ratio"] for row in rows) > LIMIT:
        sys.exit(f"error: a load took more than {LIMIT} times its model")


if __name__ == "__main__":
    main()
