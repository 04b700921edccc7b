from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.lists import exact_duplicates
from data_prep.lists.exact_duplicates import BUCKETS, DuplicateMask, digests, sorted_records

KEYS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), max_size=4)


def marked(parts: list[list[str]], mask: DuplicateMask | None = None) -> tuple[list[list[bool]], DuplicateMask]:
    mask = mask or DuplicateMask([len(keys) for keys in parts])
    packed = [sorted_records(digests(pa.chunked_array([pa.array(keys, pa.string())]))) for keys in parts]
    mask.mark([buckets for _, buckets in packed], lambda number: io.BytesIO(packed[number][0].tobytes()))
    return [mask.part(number).tolist() for number in range(len(parts))], mask


def marked_slowly(parts: list[list[str]], already: list[list[bool]] | None = None) -> list[list[bool]]:
    seen: set[str] = set()
    result = []
    for number, keys in enumerate(parts):
        row_marks = []
        for row, key in enumerate(keys):
            dropped = bool(already and already[number][row])
            row_marks.append(dropped or key in seen)
            if not dropped:
                seen.add(key)
        result.append(row_marks)
    return result


@settings(deadline=None)
@given(KEYS)
def test_equals_a_set(parts: list[list[str]]) -> None:
    got, mask = marked(parts)
    assert got == marked_slowly(parts)
    assert mask.marked() == sum(map(sum, got))


@settings(deadline=None)
@given(KEYS, st.data())
def test_a_second_key_leaves_out_what_the_first_one_dropped(first: list[list[str]], data: st.DataObject) -> None:
    second = [data.draw(st.lists(st.sampled_from("xyz"), min_size=len(p), max_size=len(p))) for p in first]
    after_first, mask = marked(first)
    after_second, _ = marked(second, mask)
    assert after_second == marked_slowly(second, after_first)


def test_many_passes_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    parts = [[str(value) for value in rng.integers(0, 3000, 2000)] for _ in range(3)]
    one_pass, _ = marked(parts)
    monkeypatch.setattr(exact_duplicates, "RECORDS_PER_PASS", 50)
    many_passes, _ = marked(parts)
    assert one_pass == many_passes == marked_slowly(parts)


def test_digests_that_share_64_bits_are_told_apart() -> None:
    high_low = np.array([[5, 1], [5, 2], [5, 1], [5, 2], [2**64 - 1, 0], [0, 0], [5, 3]], np.uint64)
    records, buckets = sorted_records(high_low)
    assert buckets[0] == 0
    assert buckets[BUCKETS] == len(high_low)
    mask = DuplicateMask([len(high_low)])
    mask.mark([buckets], lambda _: io.BytesIO(records.tobytes()))
    assert mask.part(0).tolist() == [False, False, True, True, False, False, False]
