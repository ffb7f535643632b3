#!/usr/bin/env bash
# The first ten minutes on a card, in order of value: tests, the miniature, CuMo-7B with random weights, generation, races.
# Needs no network: Python with torch 2.11 or newer, numpy, pillow, tiktoken, safetensors, tqdm and pytest.
#
#     bench/gpu.sh                              about ten minutes -> out/gpu/
#     BUDGET=1200 OUT=results bench/gpu.sh      more time, another folder
#     STEPS="tests bf16" bench/gpu.sh           some of it
#
# Each step has a limit in seconds, stops there alone, and never stops the next one. summary.txt says how each ended,
# results.jsonl has the numbers, NAME.log what a step printed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-out/gpu} budget=${BUDGET:-600}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
mkdir -p "$out"
: >"$out/summary.txt"
export PYTHONUNBUFFERED=1

step() {  # step NAME LIMIT COMMAND...
  local name=$1 limit=$2 left=$((budget - SECONDS)) begin=$SECONDS
  shift 2
  case " ${STEPS:-$name} " in *" $name "*) ;; *) return ;; esac
  ((limit < left)) || limit=$left
  if ((limit < 10)); then
    echo "$name: not begun, no time is left" | tee -a "$out/summary.txt"
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  ((status != 124 && status != 137)) || status="$status (stopped after $limit s)"
  echo "$name: status $status, $((SECONDS - begin)) s: $(tail -n 1 "$out/$name.log" | cut -c 1-300)" |
    tee -a "$out/summary.txt"
}

full() {  # full NAME LIMIT ARGUMENTS... of bench/full_size.py
  step "$1" "$2" "$python" bench/full_size.py "${@:3}" ${SMALL:-} --out "$out/$1" --into "$out/results.jsonl"
}

step card 20 nvidia-smi
step tests 200 "$python" -m pytest -q --maxfail=5 --durations=10 tests/test_cuda.py
step mini 120 "$python" train.py --device cuda --samples 400 --overwrite --no-plot --out "$out/mini"
full stage3 180 train --stage 3 --profile
full bf16 90 generate
full int8 90 generate --quant int8
full eager 60 generate --no-compile
full stage1 90 train --stage 1
full batch8 90 generate --batch 8
full batch8_int8 120 generate --batch 8 --quant int8
full eager8 60 generate --no-compile --batch 8
races=scale  # the race of sparse blocks has transformers' among its runners
"$python" -c 'import transformers' 2>/dev/null && races="moe scale"
step races 120 "$python" bench/speed.py $races --runs 3
rm -rf "$out"/mini/stage?/*.safetensors "$out"/mini/stage?/resume*.pt  # results are small
cat "$out/summary.txt"
