#!/usr/bin/env bash
# The whole path on one machine, without a GPU or the internet: draw pairs, serve them on 127.0.0.1, download them as
# if from the web, train a tiny CLIP with cluster masking on two ranks, evaluate it on held-out data, write a report.
#   demo.sh [DIRECTORY]     default: demo_run (must not exist yet)
set -euo pipefail
out=${1:-demo_run}
here=$(cd "$(dirname "$0")/.." && pwd)
export DS_ACCELERATOR=cpu

if [ -e "$out" ]; then
    echo "error: $out exists: remove it, or name another directory" >&2
    exit 2
fi
mkdir -p "$out"
step() { printf '\n== %s\n' "$*"; }
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

step "1/8 draw image-caption pairs and evaluation sets"
data-prep synthetic "$out/web" --train 10000 --validation 1000 --size 64 --base-url "http://127.0.0.1:$port"

step "2/8 serve them on 127.0.0.1:$port"
python "$here/examples/serve.py" "$out/web" "$port" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT

step "3/8 ingest the url list"
data-prep ingest "$out/web/train.tsv" --output "$out/urls.parquet"

step "4/8 download it into shards, with a page about what became of the urls"
data-prep download "$out/urls.parquet" --output "$out/shards" --samples-per-shard 500 --resize-mode no \
    --allow-local --host-requests-per-s 10000
data-prep report "$out/shards"
kill $server

step "5/8 verify the shards, train a tokenizer on their captions"
data-prep verify "$out/shards"
data-prep tokenizer "$out/shards" --output "$out/tokenizer.model" --model-type bpe --vocab-size 1024

step "6/8 train, cluster masking at 50 %, two ranks under the deepspeed launcher"
deepspeed -q --num_accelerators 2 --master_port "$port" "$here/pipeline/train.py" --recipe demo \
    data.train="$out/shards" data.tokenizer="$out/tokenizer.model" train.output="$out/run"

step "7/8 evaluate on held-out data"
python "$here/pipeline/evaluate.py" --checkpoint "$out/run" --output "$out/run/evaluation" \
    --data "$out"/web/eval/{zeroshot,zeroshot_heldout,retrieval,composition}

step "8/8 report"
python "$here/pipeline/report.py" "$out/run" --images "$out/web/eval/retrieval" --output "$out/report"
