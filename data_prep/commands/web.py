"""Commands: images from the web, what became of them, and what failed once more."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from data_prep.commands.options import (
    Commands,
    above_zero,
    add_command,
    add_output,
    add_processes,
    array_slice,
    not_negative,
    positive,
    words,
)
from formats.files import path_argument

if TYPE_CHECKING:
    from data_prep.web.passes import Settings


def add_download(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep download`."""
    modes = ("keep_ratio", "keep_ratio_largest", "center_crop", "border", "no")
    parser = add_command(commands, "download", _download, "the list that ingest wrote -> shards, over HTTP")
    parser.add_argument("urls", type=path_argument, metavar="URLS", help="what `data-prep ingest` wrote")
    add_output(parser)
    parser.add_argument(
        "--image-size", type=positive, default=256, metavar="PX", help="shorter side after scaling down"
    )
    parser.add_argument("--resize-mode", choices=modes, default="keep_ratio", help="how to scale down")
    parser.add_argument("--samples-per-shard", type=positive, default=10_000, metavar="N", help="urls tried per shard")
    parser.add_argument("--blur-column", metavar="NAME", help="column with boxes to blur, as shares or pixels")
    parser.add_argument(
        "--accept-changed", action="store_true", help="keep images whose sha256 is not the one in the list"
    )
    parser.add_argument("--slice", type=array_slice, metavar="I/N", help="only share I (from 0) of N of the shards")
    _add_network(parser)


def add_retry(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep retry`."""
    parser = add_command(commands, "retry", _retry, "try failed urls again, into further shards")
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="what `data-prep download` wrote")
    parser.add_argument(
        "--class",
        dest="classes",
        type=words,
        default=("dns", "connect", "timeout", "429", "5xx"),
        metavar="A,B",
        help="outcomes to try again",
    )
    _add_network(parser)


def add_report(commands: Commands[argparse.ArgumentParser]) -> None:
    """`data-prep report`."""
    parser = add_command(commands, "report", _report, "what became of the urls, as one HTML page")
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="what `data-prep download` wrote")
    parser.add_argument(
        "--output", type=path_argument, metavar="HTML", help="page to write (default: DIR/download.html)"
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network (may change from run to run)")
    group.add_argument(
        "--distributor", choices=("multiprocessing", "pyspark", "ray"), default="multiprocessing", help="who does it"
    )
    add_processes(parser)
    group.add_argument("--threads", type=positive, default=64, metavar="N", help="requests at once, per process")
    group.add_argument("--timeout-s", type=above_zero, default=10, metavar="S", help="limit for one wait")
    group.add_argument("--deadline-s", type=above_zero, default=30, metavar="S", help="limit for a whole request")
    group.add_argument("--min-bytes-per-s", type=not_negative, default=1000, metavar="N", help="give up below this")
    group.add_argument("--max-bytes", type=positive, default=20_000_000, metavar="N", help="largest file")
    group.add_argument("--retries", type=not_negative, default=2, metavar="N", help="further tries per url")
    group.add_argument("--host-connections", type=positive, default=20, metavar="N", help="requests at once to a host")
    group.add_argument("--host-requests-per-s", type=above_zero, default=100, metavar="R", help="to one host")
    group.add_argument(
        "--nameservers", type=words, default=(), metavar="A,B", help="to ask in place of the system's: 1.1.1.1,9.9.9.9"
    )
    group.add_argument(
        "--proxy",
        metavar="URL",
        help="ask through this HTTP proxy; `none`: directly, whatever HTTP_PROXY, HTTPS_PROXY and ALL_PROXY say",
    )
    group.add_argument("--contact", metavar="URL", help="address for complaints, told to every host")
    group.add_argument("--allow-local", action="store_true", help="allow 127.0.0.1 and any port (for tests)")


def _network(options: argparse.Namespace) -> Settings:
    from data_prep.web.addresses import read_proxies
    from data_prep.web.passes import Settings

    return Settings(
        distributor=options.distributor,
        processes=options.processes,
        threads=options.threads,
        timeout_s=options.timeout_s,
        deadline_s=options.deadline_s,
        min_bytes_per_s=options.min_bytes_per_s,
        max_bytes=options.max_bytes,
        retries=options.retries,
        host_connections=options.host_connections,
        host_requests_per_s=options.host_requests_per_s,
        nameservers=options.nameservers,
        proxies=tuple(read_proxies(options.proxy).items()),
        contact=options.contact,
        allow_local=options.allow_local,
    )


def _download(options: argparse.Namespace) -> int:
    from data_prep.web.download import download

    settings = dataclasses.replace(
        _network(options),
        image_size=options.image_size,
        resize_mode=options.resize_mode,
        samples_per_shard=options.samples_per_shard,
        blur_column=options.blur_column,
        accept_changed=options.accept_changed,
    )
    download(options.urls, options.output, settings, options.slice)
    return 0


def _retry(options: argparse.Namespace) -> int:
    from data_prep.web.download import retry

    retry(options.directory, options.classes, _network(options))
    return 0


def _report(options: argparse.Namespace) -> int:
    from data_prep.web.download_report import write_report

    write_report(options.directory, options.output or options.directory / "download.html")
    return 0
