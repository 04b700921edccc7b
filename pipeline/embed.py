"""Features of all pictures of a shard directory, an array for each shard: what `data-prep clusters` groups by meaning.

Whole, or as slices of an array of jobs. Started again, it computes what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from formats.embeddings import EmbeddingsHeader, claim_folder
from formats.files import location_argument, path_argument
from formats.manifest import Manifest, Shard, read_manifest
from formats.programs import add_launcher_argument, run, whole
from pipeline.data.shard_cache import ShardCache, default_directory
from pipeline.evaluation.features import FeatureEncoder
from pipeline.evaluation.jobs import Slice
from pipeline.evaluation.shard_features import ImageEmbedder, embed_shards, unfinished
from pipeline.foreign.dinov2 import is_dinov2, read_dinov2
from pipeline.inference import load_any_model
from pipeline.ranks import Ranks, explain_lost_peers, init_ranks

# A rank that has less to do, because much was there already, waits for the others.
_PATIENCE = timedelta(days=7)
_LOG_FILE_REFRESH_S = 10.0


def main(argv: Sequence[str]) -> int:
    """Embed as the arguments say; returns the exit code. Raises UserError for everything that does not fit."""
    arguments = _parser().parse_args(argv)
    manifest = read_manifest(arguments.data)
    with explain_lost_peers("the arrays of finished shards are kept"):
        ranks = init_ranks(_PATIENCE)
        embedder = ranks.together(
            lambda: _load(arguments.checkpoint, ranks, arguments.workers, arguments.tokenizer, arguments.model)
        )
        header = EmbeddingsHeader(
            embedder.name, embedder.weights_sha256, manifest.sha256, embedder.width, manifest.num_samples
        )
        ranks.from_main(lambda: claim_folder(arguments.output, header))

        def embed_share() -> int:
            share = [manifest.shards[number] for number in arguments.slice.share(len(manifest.shards), ranks)]
            left = [share[number] for number in unfinished(arguments.output, share, embedder.width)]
            cache = ShardCache(default_directory(), arguments.cache_gib << 30)
            size, threads = arguments.batch_size, arguments.workers
            with _progress(left, ranks) as progress:
                return embed_shards(embedder, left, cache, arguments.output, size, threads, progress.update)

        undecodable = ranks.together(embed_share)
        total_undecodable = sum(ranks.gather_objects(undecodable))
    if ranks.is_main:
        _report(manifest, arguments.output, embedder.width, total_undecodable)
    return 0


def _load(checkpoint: str, ranks: Ranks, workers: int, tokenizer: str | None, name: str | None) -> ImageEmbedder:
    if is_dinov2(Path(checkpoint)):
        model = read_dinov2(Path(checkpoint), ranks.device)

        def encode(images_3SS: list[Tensor]) -> Tensor:
            images_BCHW = torch.stack(images_3SS).to(ranks.device)
            return model.encode_image(model.preprocessing.normalize(images_BCHW))

        return ImageEmbedder(model.name, checkpoint, model.sha256, model.width, model.preprocessing, encode)
    clip = load_any_model(checkpoint, ranks.device, tokenizer, name)
    encoder = FeatureEncoder(clip.identity, clip.clip, clip.tokenizer, clip.preprocessing, ranks, workers)
    return ImageEmbedder(
        clip.name,
        clip.checkpoint,
        clip.weights_sha256,
        clip.clip.config.embed_dim,
        clip.preprocessing,
        encoder.encode_images,
    )


def _progress(left: Sequence[Shard], ranks: Ranks) -> tqdm[NoReturn]:
    return tqdm(
        total=sum(shard.samples for shard in left),
        desc="embed" if ranks.world_size == 1 else "embed, rank 0's share",
        unit="",
        disable=not (ranks.is_main and left),
        mininterval=0.2 if sys.stderr.isatty() else _LOG_FILE_REFRESH_S,
    )


def _report(manifest: Manifest, output: Path, width: int, undecodable: int) -> None:
    if undecodable:
        print(f"{undecodable:,} pictures do not decode: their rows are NaN, they will be in no cluster", flush=True)
    if left := unfinished(output, manifest.shards, width):
        print(f"{output}: {len(left):,} of {len(manifest.shards):,} shards are still to be embedded by other slices")
    else:
        print(f"{output}: features of {manifest.num_samples:,} pictures in {len(manifest.shards):,} shards")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="embed.py",
        description="Features of all pictures of a shard directory.",
        epilog="example: deepspeed pipeline/embed.py --checkpoint runs/demo --data shards --output embeddings",
    )
    parser.add_argument(
        "--checkpoint",
        type=location_argument,
        required=True,
        metavar="MODEL",
        help="a run, a checkpoint, a model of open_clip or transformers, also DINOv2",
    )
    parser.add_argument(
        "--data", type=location_argument, required=True, metavar="DIR", help="verified shard directory, local or remote"
    )
    parser.add_argument(
        "--output", type=path_argument, required=True, metavar="DIR", help="where the arrays are written"
    )
    parser.add_argument(
        "--slice",
        type=Slice.parse,
        default=Slice(),
        metavar="I/N",
        help="embed only part I of N (from 0) of the shards, e.g. in a job array",
    )
    parser.add_argument(
        "--batch-size", type=whole, default=256, metavar="N", help="images at once (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=whole,
        default=min(16, len(os.sched_getaffinity(0))),
        metavar="N",
        help="image decoding threads per rank (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-gib", type=whole, default=64, metavar="N", help="of $TMPDIR for remote shards (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer", type=location_argument, metavar="FILE", help="of open_clip's models (default: clip-bpe)"
    )
    parser.add_argument("--model", metavar="NAME", help="what an open_clip file without a configuration is: ViT-B-16 …")
    add_launcher_argument(parser)
    return parser


if __name__ == "__main__":
    run(main)
