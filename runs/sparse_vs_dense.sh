#!/usr/bin/env bash
# Stage 3 dense and sparse from the same stage 2, same data and steps, three seeds each: 15 to 40
# minutes on two cores. Needs a finished demo (runs/demo.sh) in out/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
for seed in 0 1 2; do
  for upcycle in none clip,mlp; do
    name=$([ $upcycle = none ] && echo dense || echo sparse)
    out=out/sparse_vs_dense/$name-$seed
    $python train.py --stage 3 --init out/stage2 --upcycle $upcycle --seed $seed \
      --out $out
    [ -f $out/stage3/config.json ] || exit # interrupted; the same command continues
    [ -f $out/eval.json ] || $python eval.py --model $out/stage3 --out $out --n 800
  done
done
$python runs/results.py --collect-sparse out/sparse_vs_dense
