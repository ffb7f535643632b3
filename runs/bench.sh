#!/usr/bin/env bash
# Everything that bench/speed.py measures: speed and memory, ours and that of other libraries. Twenty minutes on two idle
# cores, more if llama.cpp has to be built. Needs a finished demo (runs/demo.sh). Arguments go to bench/speed.py: moe decode
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/venv.sh
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt ".[bench,convert]"
runs/smollm2.sh
.venv/bin/python bench/speed.py --publish "$@"
.venv/bin/python runs/results.py
