#!/usr/bin/env bash
# Balanced data on what `make demo` made: its pictures embedded by its model, clustered, given rates, and a tiny CLIP trained
# on them. A few minutes on two cores, without a GPU or the internet.
#   balance.sh [DIRECTORY]     default: demo_run; writes into DIRECTORY/balanced (must not exist yet)
set -euo pipefail
demo=${1:-demo_run}
here=$(cd "$(dirname "$0")/.." && pwd)
out=$demo/balanced
export DS_ACCELERATOR=cpu

if [ ! -d "$demo/run" ]; then
    echo "error: $demo/run does not exist: run make demo first, or name the directory where it wrote" >&2
    exit 2
fi
if [ -e "$out" ]; then
    echo "error: $out exists: remove it" >&2
    exit 2
fi
step() { printf '\n== %s\n' "$*"; }

step "1/4 embed the pictures with the model that the demo trained"
python "$here/pipeline/embed.py" --checkpoint "$demo/run" --data "$demo/shards" --output "$out/embeddings"

step "2/4 cluster them by what they show"
data-prep clusters "$out/embeddings" --shards "$demo/shards" --clusters 300 --merge-similarity 0.95 --output "$out/clusters"

step "3/4 rates: half of the samples in an epoch, of large clusters fewer"
data-prep balance "$out/clusters" --alpha 0.2 --keep 0.5 --output "$out/rates"

step "4/4 train for two epochs of them"
python "$here/pipeline/train.py" --recipe demo data.train="$demo/shards" data.tokenizer="$demo/tokenizer.model" \
    data.balance="$out/rates" train.epochs=2 train.output="$out/run"

printf '\nlook at %s\n' "$out/clusters/clusters.html"
