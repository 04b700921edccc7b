#!/usr/bin/env bash
# Make the pictures masking_*.jpg of docs/masking.md from the synthetic corpus: a few minutes on two CPU cores, most of
# them for the 200 steps of the model through which `attentive` looks.
#   make_masking.sh [DIRECTORY]     for what is made on the way; default: masking_pictures (must not exist yet)
set -euo pipefail
work=${1:-masking_pictures}
images=$(cd "$(dirname "$0")" && pwd)
pipeline=$images/../../pipeline
export DS_ACCELERATOR=cpu

mkdir "$work"
data-prep synthetic "$work/corpus" --train 2400 --validation 200 --size 224
data-prep pack "$work/corpus/train.csv" --output "$work/shards"
data-prep verify "$work/shards"
data-prep tokenizer "$work/shards" --output "$work/tokenizer.model" --model-type bpe --vocab-size 1024
python "$pipeline/train.py" --recipe tiny_cpu model.name=ViT-tiny-16 masking.strategy=random \
    masking.target_mask_ratio=0.75 data.train="$work/shards" data.tokenizer="$work/tokenizer.model" \
    optimizer.warmup_steps=20 train.max_steps=200 train.global_batch_size=32 train.micro_batch_size=32 \
    train.output="$work/run"

mkdir "$work/chosen"
for number in 025 041 151; do
    cp "$work/corpus/validation/images/00/000$number.jpg" "$work/chosen"
done
preview() { python "$pipeline/mask_preview.py" "$work/chosen" "$@"; }
preview --strategies random,block,grid,cluster,pgs,attentive,cluster-reference --checkpoint "$work/run" --show masks \
    --output "$images/masking_strategies.jpg"
preview --strategies cluster --show steps --output "$images/masking_cluster.jpg"
preview --strategies cluster masking.similarity=raw --show steps --output "$images/masking_raw.jpg"
preview --strategies pgs --show steps --output "$images/masking_pgs.jpg"
