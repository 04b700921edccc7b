"""What became of each url: img2dataset's messages sorted into a few classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from data_prep.console import print_table

OK = "ok"
DNS = "dns"
OTHER = "other"
MANY_DNS_FAILURES = 0.10

# the first pattern that occurs in the message decides
_PATTERNS = (
    ("opt-out", r"X-Robots-Tag"),
    ("http 4xx", r"HTTP Error 4\d\d"),
    ("http 5xx", r"HTTP Error 5\d\d"),
    ("timeout", r"timed out|timeout"),
    (DNS, r"Name or service not known|name resolution|nodename nor servname|getaddrinfo|No address associated"),
    ("tls", r"SSL|TLS|certificate"),
    (
        "connect",
        r"Connection (refused|reset|aborted)|No route to host|unreachable|Remote end closed|IncompleteRead"
        r"|Broken pipe",
    ),
)  # fmt: skip
_MEANING = {
    OK: "image and caption in a shard",
    DNS: "host name not found",
    "connect": "refused, reset or cut off",
    "tls": "certificate or handshake",
    "timeout": "no answer in time",
    "http 4xx": "gone or forbidden",
    "http 5xx": "server error",
    "opt-out": "the site asks not to be used for training",
    "decode/resize": "not an image, or a damaged one",
    OTHER: "see error_message in the shard's .parquet",
}


def classify(status: str, message: str | None) -> str:
    """The class of one url's outcome, from img2dataset's `status` and `error_message` columns."""
    if status == "success":
        return OK
    if status == "failed_to_resize":
        return "decode/resize"
    return next((name for name, pattern in _PATTERNS if re.search(pattern, message or "")), OTHER)


def count_outcomes(shard_tables: Sequence[Path]) -> Counter[str]:
    """Count the classes over the `NNNNN.parquet` files that img2dataset writes next to the shards."""
    counts: Counter[str] = Counter()
    for path in shard_tables:
        table = pq.read_table(path, columns=["status", "error_message"])
        for row in table.group_by(["status", "error_message"]).aggregate([([], "count_all")]).to_pylist():
            counts[classify(row["status"], row["error_message"])] += row["count_all"]
    return counts


def print_outcomes(counts: Counter[str]) -> None:
    """Print the table of classes, and advice when host names fail in masses."""
    total = max(sum(counts.values()), 1)
    rows = [
        (name, f"{counts[name]:,}", f"{counts[name] / total:.1%}", meaning)
        for name, meaning in _MEANING.items()
        if counts[name] or name == OK
    ]
    print_table(("outcome", "urls", "share", ""), rows)
    if counts[DNS] > MANY_DNS_FAILURES * total:
        print(
            f"advice: {counts[DNS] / total:.0%} of the host names were not found, more than dead links explain: "
            "your resolver is overloaded; run a local one (knot-resolver, bind9) or use fewer --threads"
        )
