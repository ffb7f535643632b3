"""Run the tests in the environment of this Python, and record the outcome.

    PYTHON tests/campaigns/platforms.py --out bench/faults.json     # once for each environment

The record names the versions, and which packages of the extras are missing: tests that need one
must be skipped, not fail.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
from data.weights import write_json
from runs.results import commit, machine

RUNTIME = ("torch", "numpy", "pillow", "tiktoken", "safetensors", "tqdm")
EXTRAS = ("matplotlib", "huggingface_hub", "gguf", "gradio", "lmms-eval", "hypothesis",
          "transformers", "sentencepiece", "mistral-common")  # fmt: skip


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", help="JSON file whose `platforms` get the counts")
    parser.add_argument("words", nargs="*", help="more arguments for pytest, after --")
    args = parser.parse_args()
    parallel = ["-n", "2", "--dist", "loadfile"] if version("pytest-xdist") else []
    command = ["-m", "pytest", "-q", *parallel, *args.words]
    start = time.time()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-5000:], done.stderr[-2000:])
    last = done.stdout.strip().splitlines()[-1]
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|skipped|failed|error)", last)}
    versions = {"python": platform.python_version()} | {name: version(name) for name in RUNTIME}
    there = [name for name in EXTRAS if version(name)]
    name = ", ".join(f"{k} {v}" for k, v in versions.items())
    found = {"command": f"python {' '.join(command)}", "commit": commit(), "machine": machine(),
             "system": platform.platform(), "versions": versions, "extras": there,
             "missing": [name for name in EXTRAS if name not in there],
             "passed": counts.get("passed", 0), "skipped": counts.get("skipped", 0),
             "failed": counts.get("failed", 0) + counts.get("error", 0),
             "seconds": round(time.time() - start)}  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.out:
        name += f"; {len(there)} packages of the extras"
        file = Path(args.out)
        content = json.loads(file.read_text()) if file.is_file() else {}
        platforms = content.get("platforms", {}) | {name: found}
        write_json(file, content | {"platforms": platforms})
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
