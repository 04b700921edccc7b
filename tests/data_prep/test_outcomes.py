from __future__ import annotations

from collections import Counter

import pytest

from data_prep.web.ledger import ADVICE, MEANING, TRANSIENT, advice_for, print_outcomes


def test_the_table_has_shares_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    print_outcomes(Counter({"ok": 2, "dns": 1, "4xx": 1}))
    printed = capsys.readouterr().out
    assert "50.0%" in printed
    assert "advice: dns is 25% of the urls" in printed
    assert "--nameservers" in printed
    assert "data-prep retry --class dns" in printed
    assert "timeout" not in printed


def test_a_few_dead_hosts_need_no_advice() -> None:
    assert advice_for(Counter({"ok": 91, "dns": 9})) == []


def test_only_what_may_change_is_advised_to_be_retried() -> None:
    (line,) = advice_for(Counter({"ok": 1, "hash": 1}))
    assert "retry" not in line


def test_every_class_has_a_meaning() -> None:
    assert set(ADVICE) | set(TRANSIENT) <= set(MEANING)
