"""How to download: the choices of `data-prep download` and `data-prep retry`."""

from __future__ import annotations

import dataclasses

# these decide what the shards hold and may not change between the runs of one download
FIXED = ("samples_per_shard", "image_size", "resize_mode", "blur_column", "accept_changed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to download. Limits per host are for the whole machine and are divided among the processes."""

    image_size: int = 256
    resize_mode: str = "keep_ratio"
    samples_per_shard: int = 10_000
    blur_column: str | None = None  # boxes [left, top, right, bottom] to blur, as shares of width and height
    accept_changed: bool = False  # keep images whose sha256 is not the one in the list

    distributor: str = "multiprocessing"
    processes: int = 1
    threads: int = 64  # requests at once, per process
    timeout_s: float = 10.0  # for one wait: a name, a connection, the next bytes
    deadline_s: float = 30.0  # for a whole request, redirects included
    min_bytes_per_s: int = 1000
    max_bytes: int = 20_000_000
    retries: int = 2
    host_connections: int = 20
    host_requests_per_s: float = 100.0
    nameservers: tuple[str, ...] = ()  # empty: those of the system
    contact: str | None = None
    allow_local: bool = False
