#!/usr/bin/env bash
# Shards, evaluation sets and tokenizers of the studies.
#   prepare.sh DATA FOLDER [SYNTHETIC_PAIRS] [PROCESSES]
# DATA holds flickr8k_{train,val}.parquet, cifar10_{train,test}.parquet, tiny_imagenet_{train,val}.parquet and
# tiny_imagenet_classes.tsv (docs/results.md). Made parts stay. PARTS names some of: flickr cifar tiny synthetic.
# Concepts of Tiny-ImageNet's glosses are connected by WordNet: WORDNET is its folder (Debian's wordnet-base).
set -euo pipefail
data=$1
out=$2
synthetic=${3:-20000}
processes=${4:-2}
mkdir -p "$out"
made() { [ -e "$1" ]; }

printf '%s\n' airplane automobile bird cat deer dog frog horse ship truck >"$out/cifar10_classes.txt"
cat >"$out/cifar10_templates.txt" <<'TEMPLATES'
a photo of a {c}.
a blurry photo of a {c}.
a low resolution photo of the {c}.
a picture of one {c}
a small photo of a {c} in the middle
TEMPLATES

flickr() {
    made "$out/flickr8k" ||
        data-prep pack "$data/flickr8k_val.parquet" --as retrieval --output "$out/flickr8k"
    made "$out/flickr.model" || {
        data-prep pack "$data/flickr8k_train.parquet" --captions each --output "$out/flickr_train" --overwrite
        data-prep verify "$out/flickr_train"
        data-prep tokenizer "$out/flickr_train" --vocab-size 4096 --output "$out/flickr.model"
    }
    made "$out/flickr.concepts.jsonl" ||
        data-prep concepts "$out/flickr_train" --output "$out/flickr.concepts.jsonl"
}
cifar() {
    local labels=(--label-column label --classnames "$out/cifar10_classes.txt" --templates "$out/cifar10_templates.txt")
    made "$out/cifar10/train" || {
        rm -rf "$out/cifar10" "$out/cifar10_made"
        data-prep pack "$data/cifar10_train.parquet" --as classification "${labels[@]}" --output "$out/cifar10_made"
        data-prep pack "$data/cifar10_test.parquet" --as classification "${labels[@]}" --output "$out/cifar10"
        mv "$out/cifar10_made/test" "$out/cifar10/train" # for the linear probe
        rm -r "$out/cifar10_made"
    }
    made "$out/cifar.model" || {
        data-prep pack "$data/cifar10_train.parquet" "${labels[@]}" --output "$out/cifar_train" --overwrite
        data-prep verify "$out/cifar_train"
        data-prep tokenizer "$out/cifar_train" --model-type bpe --vocab-size 512 --output "$out/cifar.model"
    }
}
tiny() {
    made "$out/tiny.model" || {
        python "$(dirname "$0")/tiny_imagenet.py" "$data" "$out"
        data-prep pack "$data/tiny_imagenet_val.parquet" --as classification --label-column label --output "$out/tiny" \
            --classnames "$out/tiny_classes.txt" --templates "$out/tiny_templates.txt" --overwrite
        for pairs in 1500 6000 24000 50000; do
            data-prep pack "$out/tiny_$pairs.parquet" --output "$out/tiny_$pairs" --samples-per-shard 500 --overwrite
            data-prep verify "$out/tiny_$pairs"
            rm "$out/tiny_$pairs.parquet"
        done
        data-prep tokenizer "$out/tiny_50000" --model-type bpe --vocab-size 2048 --output "$out/tiny.model"
    }
    made "$out/tiny.concepts.jsonl" ||
        data-prep concepts "$out/tiny_50000" --output "$out/tiny.concepts.jsonl" \
            --graph "wordnet:${WORDNET:-/usr/share/wordnet}"
}
synthetic() {
    made "$out/synthetic.model" || {
        rm -rf "$out/synthetic"
        data-prep synthetic "$out/synthetic" --train "$synthetic" --validation 1000 --size 64 --processes "$processes"
        data-prep pack "$out/synthetic/train.csv" --output "$out/synthetic_train" --overwrite
        data-prep verify "$out/synthetic_train"
        data-prep tokenizer "$out/synthetic_train" --model-type bpe --vocab-size 1024 --output "$out/synthetic.model"
    }
}
for part in ${PARTS:-flickr cifar tiny synthetic}; do
    "$part" &
done
wait
