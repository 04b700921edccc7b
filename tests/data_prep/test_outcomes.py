from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.outcomes import classify, count_outcomes, print_outcomes


@pytest.mark.parametrize(
    ("message", "outcome"),
    [
        ("<urlopen error [Errno -2] Name or service not known>", "dns"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("<urlopen error [Errno -5] No address associated with hostname>", "dns"),
        ("<urlopen error [Errno 8] nodename nor servname provided, or not known>", "dns"),
        ("<urlopen error [Errno 111] Connection refused>", "connect"),
        ("[Errno 104] Connection reset by peer", "connect"),
        ("<urlopen error [Errno 113] No route to host>", "connect"),
        ("<urlopen error [Errno 101] Network is unreachable>", "connect"),
        ("Remote end closed connection without response", "connect"),
        ("IncompleteRead(1000 bytes read, 500 more expected)", "connect"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error _ssl.c:983: The handshake operation timed out>", "timeout"),
        ("<urlopen error [Errno 110] Connection timed out>", "timeout"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: expired>", "tls"),
        ("HTTP Error 404: Not Found", "http 4xx"),
        ("HTTP Error 429: Too Many Requests", "http 4xx"),
        ("HTTP Error 408: Request Timeout", "http 4xx"),
        ("HTTP Error 503: Service Unavailable", "http 5xx"),
        ("HTTP Error 504: Gateway Timeout", "http 5xx"),
        ("Use of image disallowed by X-Robots-Tag directive", "opt-out"),
        ("hash mismatch", "other"),
        (None, "other"),
    ],
)
def test_messages_of_urllib_fall_into_their_class(message: str | None, outcome: str) -> None:
    assert classify("failed_to_download", message) == outcome


def test_status_goes_before_the_message() -> None:
    assert classify("success", None) == "ok"
    assert classify("failed_to_resize", "Image decoding error") == "decode/resize"


def test_outcomes_are_summed_over_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard, messages in enumerate(
        [["a: Connection refused", None], ["b: Connection refused", "dns: getaddrinfo failed"]]
    ):
        status = ["success" if message is None else "failed_to_download" for message in messages]
        pq.write_table(
            pa.table({"status": status, "error_message": pa.array(messages, pa.string())}),
            tmp_path / f"{shard}.parquet",
        )
    counts = count_outcomes(sorted(tmp_path.glob("*.parquet")))
    assert counts == Counter({"connect": 2, "ok": 1, "dns": 1})
    print_outcomes(counts)
    printed = capsys.readouterr().out
    assert "50.0%" in printed
    assert "advice: 25% of the host names" in printed


def test_a_few_dead_hosts_need_no_advice(capsys: pytest.CaptureFixture[str]) -> None:
    print_outcomes(Counter({"ok": 91, "dns": 9}))
    assert "advice" not in capsys.readouterr().out
