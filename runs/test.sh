#!/usr/bin/env bash
# Set up .venv (once) and run the tests, two files at a time. Arguments go to pytest: runs/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/venv.sh
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt ".[test]"
.venv/bin/python -m pytest -q -n 2 --dist loadfile "$@"
