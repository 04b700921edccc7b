"""What can become of a url: the classes of outcomes, their table, and advice when one is too frequent."""

from __future__ import annotations

import dataclasses
from collections import Counter

from data_prep.console import print_table

OK = "ok"
DNS = "dns"
CONNECT = "connect"
TLS = "tls"
TIMEOUT = "timeout"
THROTTLED = "429"
CLIENT_ERROR = "4xx"
SERVER_ERROR = "5xx"
TOO_LARGE = "too-large"
DECODE = "decode"
OPT_OUT = "opt-out"
HASH = "hash"
REFUSED = "refused"
OTHER = "other"

MEANING = {
    OK: "image and caption in a shard",
    DNS: "host name not found",
    CONNECT: "refused, reset or cut off",
    TLS: "certificate or handshake",
    TIMEOUT: "no answer in time, or too slow",
    THROTTLED: "the host asks for fewer requests",
    CLIENT_ERROR: "gone or forbidden",
    SERVER_ERROR: "server error",
    TOO_LARGE: "more bytes or pixels than the limits",
    DECODE: "not an image, a damaged one, or a thin strip",
    OPT_OUT: "the site asks not to be used (robots.txt, X-Robots-Tag)",
    HASH: "not the image that the list was made from",
    REFUSED: "an address that no public image has",
    OTHER: "see error_message in the shard's .parquet",
}
# what may be different next time; the rest of an answer is final
TRANSIENT = (DNS, CONNECT, TIMEOUT, THROTTLED, SERVER_ERROR)

ADVICE = {
    DNS: (
        0.10,
        "more names are not found than dead links explain: your resolver is overloaded; "
        "use others (--nameservers 1.1.1.1,9.9.9.9) or fewer --threads",
    ),
    CONNECT: (0.15, "connections fail: check the network, or use fewer --threads"),
    TLS: (0.10, "certificates are refused: check the clock and the system's root certificates (ca-certificates)"),
    TIMEOUT: (0.10, "the line may be full: use fewer --threads or --processes, or a longer --deadline-s"),
    THROTTLED: (0.02, "hosts feel pressed: lower --host-requests-per-s and --host-connections"),
    HASH: (0.10, "many images changed since the list was made; --accept-changed keeps them"),
    REFUSED: (0.01, "the list points at private addresses or unusual ports: is it the list you meant?"),
}


@dataclasses.dataclass(eq=False)
class FetchError(Exception):
    """Why a url gave no sample: a class of outcome and a line for the ledger.

    `retryable` says whether the same request may succeed soon; `retry_after_s` is when the server said so itself.
    """

    outcome: str
    message: str
    http_status: int | None = None
    retryable: bool = False
    retry_after_s: float | None = None
    elapsed_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.outcome}: {self.message}"


def advice_for(counts: Counter[str]) -> list[str]:
    """One line for each class whose share of the urls is above its limit."""
    total = max(counts.total(), 1)
    return [
        f"{outcome} is {counts[outcome] / total:.0%} of the urls: {advice}"
        + (f"; then data-prep retry --class {outcome}" if outcome in TRANSIENT else "")
        for outcome, (limit, advice) in ADVICE.items()
        if counts[outcome] > limit * total
    ]


def print_outcomes(counts: Counter[str]) -> None:
    """Print the table of classes, and advice where a class is too frequent."""
    total = max(counts.total(), 1)
    rows = [
        (outcome, f"{counts[outcome]:,}", f"{counts[outcome] / total:.1%}", meaning)
        for outcome, meaning in MEANING.items()
        if counts[outcome] or outcome == OK
    ]
    print_table(("outcome", "urls", "share", ""), rows)
    for line in advice_for(counts):
        print(f"advice: {line}")
