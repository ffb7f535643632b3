#!/usr/bin/env bash
# How fast, how large, beside whom: everything that bench/speed.py measures, twenty minutes on two idle cores, more where
# llama.cpp has to be built. Needs a finished demo (runs/demo.sh) for the miniature. Arguments go to bench/speed.py: moe decode
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
.venv/bin/pip install --quiet --disable-pip-version-check -e ".[bench,convert]"
runs/smollm2.sh
.venv/bin/python bench/speed.py "$@"
.venv/bin/python runs/results.py
