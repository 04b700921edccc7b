#!/usr/bin/env bash
# Make a virtual environment with the libraries that exports and evaluations are checked against: setup.sh DIR
# Separate, because the project depends on none of them. PYTHON chooses the interpreter, PIP_OPTIONS goes to pip.
set -euo pipefail
directory=${1:?usage: setup.sh DIR}
read -ra pip_options <<<"${PIP_OPTIONS:-}"
pip() { "$directory/bin/python" -m pip install -q --disable-pip-version-check "${pip_options[@]}" "$@"; }

[ -x "$directory/bin/python" ] || "${PYTHON:-python3}" -m venv "$directory"
pip 'torch==2.13.0'
# --no-deps: what these would bring along is not needed to build and load models
pip --no-deps 'torchvision==0.28.0' 'timm>=1.0.17,<2' 'open_clip_torch>=3.2,<4' 'clip-benchmark>=1.6,<2'
pip ftfy regex 'huggingface_hub>=1,<2' safetensors tqdm pillow 'transformers>=5,<6' 'webdataset<2' requests scikit-learn pandas pycocoevalcap

# torchvision has no CPU build of its own; the CUDA one imports where two operators are declared beforehand
site=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cat >"$site/torchvision_cpu.py" <<'PYTHON'
"""Import before torchvision, or open_clip, which imports it: makes it importable where torch is a CPU build."""

import torch

if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PYTHON

"$directory/bin/python" - <<'PYTHON'
import torchvision_cpu
import clip_benchmark, open_clip, torch, transformers
print(f"peers ready: open_clip {open_clip.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
PYTHON
