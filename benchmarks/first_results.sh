#!/usr/bin/env bash
# First results on real photographs: Flickr8k retrieval and CIFAR-10 zero-shot with none, random and cluster masking,
# equal samples seen. About half an hour on two CPU cores. Rerun after an interruption, it goes on where it stopped.
#   first_results.sh DATA OUTPUT     DATA holds flickr8k_{train,val}.parquet and cifar10_{train,test}.parquet
set -euo pipefail
data=$1
out=$2
here=$(cd "$(dirname "$0")/.." && pwd)
export DS_ACCELERATOR=cpu
mkdir -p "$out"

cat >"$out/cifar10_classes.txt" <<'CLASSES'
airplane
automobile
bird
cat
deer
dog
frog
horse
ship
truck
CLASSES
cat >"$out/cifar10_templates.txt" <<'TEMPLATES'
a photo of a {c}.
a blurry photo of a {c}.
a low resolution photo of the {c}.
a picture of one {c}
a small photo of a {c} in the middle
TEMPLATES

made() { [ -e "$1" ]; }
made "$out/flickr_train/dataset.json" || {
    data-prep pack "$data/flickr8k_train.parquet" --captions each --output "$out/flickr_train" --overwrite
    data-prep verify "$out/flickr_train"
}
made "$out/flickr8k/dataset.json" || data-prep pack "$data/flickr8k_val.parquet" --as retrieval --output "$out/flickr8k"
made "$out/flickr.model" || data-prep tokenizer "$out/flickr_train" --vocab-size 4096 --output "$out/flickr.model"
labels=(--label-column label --classnames "$out/cifar10_classes.txt" --templates "$out/cifar10_templates.txt")
made "$out/cifar_train/dataset.json" || {
    data-prep pack "$data/cifar10_train.parquet" "${labels[@]}" --output "$out/cifar_train" --overwrite
    data-prep verify "$out/cifar_train"
}
made "$out/cifar10/dataset.json" ||
    data-prep pack "$data/cifar10_test.parquet" --as classification "${labels[@]}" --output "$out/cifar10"
made "$out/cifar.model" ||
    data-prep tokenizer "$out/cifar_train" --model-type bpe --vocab-size 512 --output "$out/cifar.model"

# train NAME SHARDS TOKENIZER EVALUATION_SET section.key=value …
train() {
    local run=$out/runs/$1 shards=$2 tokenizer=$3 set=$4
    shift 4
    deepspeed -q --num_accelerators 2 --master_port 29517 "$here/pipeline/train.py" --recipe tiny_cpu \
        data.train="$shards" data.tokenizer="$tokenizer" train.output="$run" train.keep_checkpoints=9 "$@"
    for checkpoint in "$run"/checkpoints/step_*; do
        python "$here/pipeline/evaluate.py" --checkpoint "$checkpoint" --data "$set" --output "$run/evaluation"
    done
}
for strategy in none random cluster; do
    train "flickr_$strategy" "$out/flickr_train" "$out/flickr.model" "$out/flickr8k" masking.strategy=$strategy \
        model.name=ViT-tiny-16 model.image_size=144 train.max_steps=600 train.save_every_steps=300
    train "cifar_$strategy" "$out/cifar_train" "$out/cifar.model" "$out/cifar10" masking.strategy=$strategy \
        model.name=ViT-nano-8 train.max_steps=600 train.save_every_steps=300
done
python "$here/pipeline/report.py" "$out"/runs/flickr_{none,random,cluster} --images "$out/flickr8k" --output "$out/report_flickr"
python "$here/pipeline/report.py" "$out"/runs/cifar_{none,random,cluster} --images "$out/cifar10" --output "$out/report_cifar"
python "$here/benchmarks/first_results_table.py" "$out"
