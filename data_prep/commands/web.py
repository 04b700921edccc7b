"""Commands: downloads."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.commands.options import Commands, add_command, add_output, add_processes, not_negative, positive


def add_download(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep download`."""
    modes = ("keep_ratio", "keep_ratio_largest", "center_crop", "border", "no")
    parser = add_command(commands, "download", _download, "canonical parquet -> shards, over HTTP")
    parser.add_argument("urls", type=Path, metavar="PARQUET", help="what `data-prep ingest` wrote")
    add_output(parser)
    parser.add_argument(
        "--image-size", type=positive, default=256, metavar="PX", help="shorter side after scaling down"
    )
    parser.add_argument("--resize-mode", choices=modes, default="keep_ratio", help="how to scale down")
    parser.add_argument("--samples-per-shard", type=positive, default=10_000, metavar="N", help="urls tried per shard")
    add_processes(parser)
    parser.add_argument("--threads", type=positive, default=64, metavar="N", help="requests per process")
    parser.add_argument("--timeout-s", type=positive, default=10, metavar="S", help="limit per network wait")
    parser.add_argument("--retries", type=not_negative, default=2, metavar="N", help="further tries per url")


def _download(options: argparse.Namespace) -> int:
    from data_prep.download import Settings, download

    settings = Settings(
        image_size=options.image_size,
        resize_mode=options.resize_mode,
        samples_per_shard=options.samples_per_shard,
        processes=options.processes,
        threads=options.threads,
        timeout_s=options.timeout_s,
        retries=options.retries,
    )
    download(options.urls, options.output, settings)
    return 0
