#!/usr/bin/env bash
# All of CuMo in miniature: set up .venv, train three stages, evaluate, ask about a picture. The training takes
# ten minutes on two CPU cores, longer without bf16. All results go to out/. Flags go to train.py: runs/demo.sh --seed 1
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/venv.sh
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt ".[plot]"

.venv/bin/python train.py "$@"
[ -f out/stage3/config.json ] || exit # trained into another --out, or only --stage 1 or 2
.venv/bin/python eval.py
.venv/bin/python sample.py --image cat.jpg
.venv/bin/python sample.py --image cat.jpg --image dog.jpg --ask "Which picture has the cat?"
.venv/bin/python sample.py --image open.jpg --ask "What does the sign say?"
