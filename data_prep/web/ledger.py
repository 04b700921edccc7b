"""What became of every url: the classes of outcomes, and the ledger that holds them, one parquet beside each shard."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.console import print_table
from data_prep.web.passes import Pass, read_passes, read_statistics, shard_name
from formats.errors import UserError
from formats.files import replacing

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
FORGOTTEN = "forgotten"

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
    FORGOTTEN: "taken out by `data-prep forget`: never asked for again",
}
# what may be different next time; the rest of an answer is final
TRANSIENT = (DNS, CONNECT, TIMEOUT, THROTTLED, SERVER_ERROR)
RETRIABLE = tuple(name for name in MEANING if name not in (OK, FORGOTTEN))

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

    def __post_init__(self) -> None:
        self.message = readable(self.message)

    def __str__(self) -> str:
        return f"{self.outcome}: {self.message}"


MESSAGE_CHARACTERS = 300
RETRY_LISTS = "retry_*.parquet"
# columns that a url list brings along and that mean something else here: the published size and hash
LISTED_HASH = "listed_sha256"
_NOT_CARRIED = ("width", "height", "sha256", LISTED_HASH)
COLUMNS = pa.schema(
    {
        LISTED_HASH: pa.string(),
        "key": pa.string(),  # of the sample, unique in the directory
        "shard": pa.string(),
        "status": pa.string(),  # img2dataset's word for `class`
        "class": pa.string(),
        "error_message": pa.string(),
        "http_status": pa.int16(),
        "attempt": pa.int16(),  # 1: download, 2: first `retry`, …
        "tries": pa.int16(),  # requests in this attempt
        "elapsed_s": pa.float32(),  # of the last of them
        "bytes": pa.int64(),  # of the file on the web
        "sha256": pa.string(),  # likewise
        "width": pa.int32(),  # of the picture in the shard
        "height": pa.int32(),
        "original_width": pa.int32(),
        "original_height": pa.int32(),
    }
)


def readable(text: str) -> str:
    """Text from outside as one line that every file can hold; bytes that are no UTF-8 are taken for Latin-1."""
    try:
        raw = text.encode("utf-8", "surrogateescape")  # what aiohttp makes of bytes
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "replace")
    try:
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError:
        decoded = raw.decode("latin-1")
    return "".join(character if character.isprintable() else " " for character in decoded)[:MESSAGE_CHARACTERS]


def carried_columns(schema: pa.Schema) -> list[str]:
    """The columns of a url list that go into the ledger and into the samples' json."""
    return [name for name in schema.names if name not in _NOT_CARRIED and name not in COLUMNS.names]


def write_ledger(path: Path, listed: pa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what became of each row of a list: its carried columns, as they are, then `COLUMNS`."""
    table = listed.select(carried_columns(listed.schema))
    for name, column in zip(COLUMNS.names, pa.Table.from_pylist(rows, COLUMNS).columns, strict=True):
        table = table.append_column(COLUMNS.field(name), column)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def count_outcomes(directory: Path) -> Counter[str]:
    """The last outcome of every url, counted by class."""
    passes = read_passes(directory)
    counts: Counter[str] = Counter()
    for one in passes:
        for shard in one.numbers:
            outcomes = read_statistics(directory, shard).get("outcomes", {})
            counts.update({name: count for name, count in outcomes.items() if _is_last(one, name, passes)})
    return +counts


def last_outcomes(directory: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The ledger shard by shard, without the rows that a later pass tried again."""
    passes = read_passes(directory)
    for one in passes:
        for shard in one.numbers:
            path = directory / f"{shard_name(shard)}.parquet"
            if path.exists():
                table = _read_ledger(path, [*columns, "class"] if columns else None)
                last = [name for name in pc.unique(table["class"]).to_pylist() if _is_last(one, name, passes)]
                yield table.filter(pc.is_in(table["class"], pa.array(last, pa.string())))


def _read_ledger(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        statistics = path.with_name(f"{path.stem}_stats.json").name
        raise UserError(
            f"{path} is damaged: delete {statistics}, and the same download makes its shard anew"
        ) from error


def img2dataset_status(outcome: str) -> str:
    """The word that img2dataset has for a class."""
    if outcome == OK:
        return "success"
    return "failed_to_resize" if outcome in (DECODE, TOO_LARGE) else "failed_to_download"


def _is_last(one: Pass, outcome: str, passes: Sequence[Pass]) -> bool:
    # a retry takes every url whose last outcome is of its classes: no url needs to be looked up
    return not any(outcome in later.classes for later in passes if later.attempt > one.attempt)


def forget_rows(directory: Path, is_named: Callable[[str, Sequence[str]], bool]) -> int:
    """Blank the address, caption and hashes of rows that `is_named` (url, hashes); returns how many.

    In the ledgers of all shards, and in the lists of what a retry was to fetch. The row itself stays, so that counts
    still add up; it is never tried again.
    """
    blanked = 0
    for path in (*sorted(directory.glob("[0-9]*.parquet")), *sorted(directory.glob(RETRY_LISTS))):
        table = _read_ledger(path)
        if "url" not in table.column_names:
            continue
        hash_columns = [name for name in ("sha256", LISTED_HASH) if name in table.column_names]
        rows = table.select(["url", *hash_columns]).to_pylist()
        named = [is_named(row["url"], [row[name] for name in hash_columns if row[name]]) for row in rows]
        if any(named):
            with replacing(path) as temporary:
                pq.write_table(_blank(table, pa.array(named), hash_columns), temporary, compression="zstd")
            blanked += sum(named)
    return blanked


def _blank(table: pa.Table, named: pa.Array, hash_columns: Sequence[str]) -> pa.Table:
    blanks: dict[str, str | None] = {"url": "", "caption": "", **dict.fromkeys(hash_columns)}
    if "error_message" in table.column_names:
        blanks["error_message"] = FORGOTTEN
    for name, blank in blanks.items():
        if name in table.column_names:
            column = pc.if_else(named, pa.scalar(blank, table.schema.field(name).type), table[name])
            table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    return table


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
