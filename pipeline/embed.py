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

from tqdm import tqdm

from formats.embeddings import EmbeddingsHeader, claim_folder
from formats.files import location_argument, path_argument
from formats.manifest import Manifest, read_manifest
from formats.programs import add_launcher_argument, run, whole
from pipeline.data.shard_cache import ShardCache, default_directory
from pipeline.evaluation.features import FeatureEncoder
from pipeline.evaluation.jobs import Slice
from pipeline.evaluation.shard_features import embed_shards, unfinished
from pipeline.inference import load_any_model
from pipeline.ranks import explain_lost_peers, init_ranks

# A rank that has less to do, because much was there already, waits for the others.
_PATIENCE = timedelta(days=7)
_LOG_FILE_REFRESH_S = 10.0


def main(argv: Sequence[str]) -> int:
    """Embed as the arguments say; returns the exit code. Raises UserError for everything that does not fit."""
    arguments = _parser().parse_args(argv)
    manifest = read_manifest(arguments.data)
    with explain_lost_peers("the arrays of finished shards are kept"):
        ranks = init_ranks(_PATIENCE)

        def load() -> FeatureEncoder:
            model = load_any_model(arguments.checkpoint, ranks.device, arguments.tokenizer, arguments.model)
            return FeatureEncoder(
                model.identity, model.clip, model.tokenizer, model.preprocessing, ranks, arguments.workers
            )

        encoder = ranks.together(load)
        ranks.from_main(lambda: claim_folder(arguments.output, _header(encoder, manifest)))
        cache = ShardCache(default_directory(), int(arguments.cache_gib * 2**30))
        undecodable = ranks.together(
            lambda: _embed_share(encoder, manifest, cache, arguments.slice, arguments.output, arguments.batch_size)
        )
        total_undecodable = sum(ranks.gather_objects(undecodable))
    if ranks.is_main:
        _report(manifest, arguments.output, encoder.clip.config.embed_dim, total_undecodable)
    return 0


def _header(encoder: FeatureEncoder, manifest: Manifest) -> EmbeddingsHeader:
    width = encoder.clip.config.embed_dim
    return EmbeddingsHeader(
        encoder.model.name, encoder.model.weights_sha256, manifest.sha256, width, manifest.num_samples
    )


def _embed_share(
    encoder: FeatureEncoder, manifest: Manifest, cache: ShardCache, part: Slice, output: Path, batch_size: int
) -> int:
    """Embed what is unfinished of this slice's and rank's shards; how many of their pictures do not decode."""
    ranks = encoder.ranks
    share = [manifest.shards[number] for number in part.share(len(manifest.shards), ranks)]
    left = [share[number] for number in unfinished(output, share, encoder.clip.config.embed_dim)]
    with tqdm(
        total=sum(shard.samples for shard in left),
        desc="embed" if ranks.world_size == 1 else "embed, rank 0's share",
        unit="",
        disable=not (ranks.is_main and left),
        mininterval=0.2 if sys.stderr.isatty() else _LOG_FILE_REFRESH_S,
    ) as progress:
        return embed_shards(encoder, left, cache, output, batch_size, progress.update)


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
        help="a run, a checkpoint, a model of open_clip or transformers",
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
