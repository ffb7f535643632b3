#!/usr/bin/env bash
# CuMo-7B as in the paper: public weights, the data of three stages, three trainings.
#
# The full run has not been made with this code yet. Its parts are tested on small inputs (tests/),
# the downloads and the full size are not: expect to fix something. Read data/MIXTURE.md first:
# sources, sizes, and licences that together allow research only.
#
#     LAST=1 LIMIT=5000 runs/cumo_7b.sh    # first try: stage 1 on 5,000 samples, a 45 GB download
#     LIMIT=5000 runs/cumo_7b.sh           # every stage on 5,000 samples
#     runs/cumo_7b.sh                      # everything, on one GPU
#     GPUS=4 runs/cumo_7b.sh               # on four GPUs of one machine
#
#     LAST=3               the last stage to get data for and to train
#     LIMIT=N              samples a stage; saves time, not disk: they come from the whole mixture
#     GPUS=1               GPUs of this machine. With more than one, a batch has one row for each, and
#                          a step adds up fewer batches, so that it sees about as many rows
#     DATA=mixture         folder of the data, OUT=out/cumo_7b of the results; 680 GB together
#     SKIP_MISSING=1       train without the records whose pictures are missing, and print how many
#     CHECK=1              open every picture before training (hours) instead of looking for its file
#     IGNORE_DISK=1        continue although the disk seems too small
#
# Flags of the script go to every train.py. To continue after an interruption, run the same command:
# files are downloaded once, and a finished stage is not trained again.
set -euo pipefail
cd "$(dirname "$0")/.."
LAST=${LAST:-3} DATA=${DATA:-mixture} OUT=${OUT:-out/cumo_7b} GPUS=${GPUS:-1}
mistral=weights/Mistral-7B-Instruct-v0.2 clip=weights/clip-vit-large-patch14-336
fail() { echo "$*" >&2 && exit 1; }
case $LAST in 1 | 2 | 3) ;; *) fail "LAST=$LAST: choose 1, 2 or 3" ;; esac
for program in python3 wget unzip; do
  command -v $program >/dev/null || fail "please install $program"
done

# Downloads: the first stage that needs it, MB, folder in $DATA, a data set of the hub (or a URL) and
# its file, an option of unzip. Archives are unpacked into the folder and deleted.
sources=(
  "1   181 llava/llava_pretrain        liuhaotian/LLaVA-Pretrain blip_laion_cc_sbu_558k.json"
  "1 27400 llava/llava_pretrain/images liuhaotian/LLaVA-Pretrain images.zip"
  "2  1664 jsons                       shi-labs/CuMo_dataset cumo_pft_allava.json"
  "2 36300 ALLaVA/allava_vflan/images  Vision-Flan/vision-flan_191-task_1k image_191-task_1k.zip"
  "3  2713 jsons                       shi-labs/CuMo_dataset cumo_vit_1649K.json"
  "3 19300 coco     http://images.cocodataset.org/zips train2017.zip"
  "3 21811 gqa      https://downloads.cs.stanford.edu/nlp/data/gqa images.zip"
  "3  7070 textvqa  https://dl.fbaipublicfiles.com/textvqa/images train_val_images.zip"
  "3  9732 vg       https://cs.stanford.edu/people/rak248/VG_100K_2 images.zip"
  "3  5472 vg       https://cs.stanford.edu/people/rak248/VG_100K_2 images2.zip"
)
for i in {0..9}; do  # -j: without the folders inside the archive, as in ALLaVA's own script
  chunk="FreedomIntelligence/ALLaVA-4V allava_laion/image_chunks/images_$i.zip"
  sources+=("2 9228 ALLaVA/allava_laion/images $chunk -j")
done
# Stage 3 also needs these, which are behind forms, logins or Google Drive: MB (0: not stated) and
# folder in $DATA. data/MIXTURE.md names the sources.
by_hand=("8890 ocr_vqa" "19700 sam" "126 share_textvqa" "185 wikiart" "103 web-celebrity"
         "227 web-landmark" "2000 gpt4v-dataset" "0 docvqa" "41200 syndog-en" "875 chartqa"
         "6500 dvqa" "0 ai2d" "1420 infovqa")

# ---------------------------------------------------------------- disk space
marker() { echo "$DATA/.done/${1//\//_}_${2//\//_}"; }  # exists once a file is fetched and unpacked

mkdir -p "$DATA/.done"
training=(0 92000 303000 358000)  # MB of checkpoints and three resume points, in float32
need=${training[LAST]}
[ -f $mistral/model-00003-of-00003.safetensors ] || need=$((need + 16500))
for line in "${sources[@]}"; do
  read -r stage mb _ from file _ <<<"$line"
  if ((stage <= LAST)) && [ ! -f "$(marker "$from" "$file")" ]; then need=$((need + mb)); fi
done
for line in "${by_hand[@]}"; do
  read -r mb folder <<<"$line"
  if ((LAST == 3)) && [ ! -d "$DATA/$folder" ]; then need=$((need + mb)); fi
done
room=$(df --output=avail -B 1000000 "$DATA" | tail -1)
echo "up to $(((need + 999) / 1000)) GB are needed, and $((room / 1000)) GB are free"
((room >= need)) || [ -n "${IGNORE_DISK:-}" ] ||
  fail "the disk is too small: use another (DATA, OUT), fewer stages (LAST), or IGNORE_DISK=1"

# ---------------------------------------------------------------- programs and weights
source runs/venv.sh
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt ".[plot]" \
  "huggingface_hub>=0.34"
launch=(.venv/bin/python)
((GPUS == 1)) || launch=(.venv/bin/torchrun "--nproc_per_node=$GPUS")

# If the hub asks for a login: .venv/bin/hf auth login
.venv/bin/hf download openai/clip-vit-large-patch14-336 config.json pytorch_model.bin \
  --local-dir $clip
.venv/bin/hf download mistralai/Mistral-7B-Instruct-v0.2 config.json tokenizer.model \
  tokenizer_config.json model.safetensors.index.json model-0000{1,2,3}-of-00003.safetensors \
  --local-dir $mistral
.venv/bin/python train.py --preset mistral-7b --stage "$LAST" --estimate "$@"  # will it fit?

# ---------------------------------------------------------------- data
fetch() {  # fetch FOLDER FROM FILE [UNZIP'S OPTION]; continues an interrupted download
  local path=$1/$3
  if [ -f "$(marker "$2" "$3")" ]; then return; fi
  mkdir -p "$1"
  case $2 in
    http*) wget --continue --directory-prefix "$1" "$2/$3" ;;
    *) .venv/bin/hf download "$2" "$3" --repo-type dataset --local-dir "$1" ;;
  esac
  if [[ $path == *.zip ]]; then
    unzip -q -o ${4:+"$4"} "$path" -d "$1"
    rm "$path"
  fi
  touch "$(marker "$2" "$3")"
}

for line in "${sources[@]}"; do
  read -r stage _ folder from file option <<<"$line"
  if ((stage <= LAST)); then fetch "$DATA/$folder" "$from" "$file" "$option"; fi
done
for line in "${by_hand[@]}"; do
  read -r _ folder <<<"$line"
  if ((LAST == 3)) && [ ! -d "$DATA/$folder" ]; then
    echo "stage 3 needs $DATA/$folder; get it by hand, as in data/MIXTURE.md"
  fi
done

present() {  # present JSON FOLDER KEPT: check that pictures exist; write records that do to KEPT
  .venv/bin/python - "$@" <<'PYTHON'
import json
import sys
from pathlib import Path

source, folder, target = sys.argv[1:]
kept, absent = [], {}
for record in json.loads(Path(source).read_text(encoding="utf-8")):
    names = record.get("image") or []
    names = names if isinstance(names, list) else [names]
    lost = [name for name in names if not Path(folder, name).is_file()]
    if lost:
        absent.setdefault(lost[0].split("/")[0], []).append(lost[0])
    else:
        kept.append(record)
print(f"{source}: {len(kept):,} records have their pictures")
for top, names in sorted(absent.items()):
    print(f"  records without their picture in {folder}/{top}: {len(names):,}, as {names[0]}")
if target:
    partial = Path(target + ".partial")
    partial.write_text(json.dumps(kept), encoding="utf-8")
    partial.replace(target)
elif absent:
    sys.exit("get the pictures (data/MIXTURE.md), or train without these records: SKIP_MISSING=1")
PYTHON
}

# ---------------------------------------------------------------- the three stages
finished() { grep -qs '"finished": true' "$OUT/stage$1/train.json"; }

train() {  # train STAGE JSON IMAGE_FOLDER [FLAGS]
  local stage=$1 json=$2 folder=$3 kept="" rows batch=()
  if finished "$stage"; then echo "stage $stage is finished" && return; fi
  [ -z "${SKIP_MISSING:-}" ] || kept=${json%.json}_present.json
  if [ ! -f "$kept" ]; then present "$json" "$folder" "$kept"; fi
  if [ -n "${CHECK:-}" ]; then
    .venv/bin/python -m data.check "${kept:-$json}" --image-folder "$folder" \
      --preset mistral-7b --stage "$stage" ${LIMIT:+--limit "$LIMIT"}
  fi
  if ((GPUS > 1)); then  # one row a GPU; rounded, a step keeps the rows of one GPU
    rows=$((stage == 1 ? 80 : 28))
    batch=(--rows "$GPUS" --accumulate $(((rows + GPUS / 2) / GPUS)))
  fi
  "${launch[@]}" train.py --preset mistral-7b --stage "$stage" --data "${kept:-$json}" \
    --image-folder "$folder" --out "$OUT" ${LIMIT:+--limit "$LIMIT"} "${batch[@]}" "${@:4}"
  finished "$stage" || exit 130  # Ctrl-C
}

# 1: train the connector on captions. 2: train everything on long captions. 3: upcycle CLIP and the
# connector to four experts, and train everything on questions and answers.
llava=$DATA/llava/llava_pretrain
train 1 "$llava/blip_laion_cc_sbu_558k.json" "$llava/images" "$@"
((LAST < 2)) || train 2 "$DATA/jsons/cumo_pft_allava.json" "$DATA" "$@"
((LAST < 3)) || train 3 "$DATA/jsons/cumo_vit_1649K.json" "$DATA" "$@"

.venv/bin/python sample.py --model "$OUT/stage$LAST" --image cat.jpg --ask "What is this?"
