"""Lists of uids that name a subset, as DataComp publishes them: too long for a set of strings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import UserError

_HEX_UID = re.compile(r"[0-9a-fA-F]{32}")


class UidList:
    """How often each uid is listed, in 16 bytes each: a uid of 32 hex digits is those 128 bits, another its hash."""

    def __init__(self, halves_N2: npt.NDArray[np.uint64]) -> None:
        order = np.lexsort((halves_N2[:, 1], halves_N2[:, 0]))
        self._high_N = np.ascontiguousarray(halves_N2[order, 0])
        self._low_N = np.ascontiguousarray(halves_N2[order, 1])

    def count(self, uid: str) -> int:
        """How often the list has `uid`."""
        high, low = _halves(uid)
        wanted = np.uint64(high)
        first, last = np.searchsorted(self._high_N, wanted, "left"), np.searchsorted(self._high_N, wanted, "right")
        return int(np.count_nonzero(self._low_N[first:last] == np.uint64(low)))


def read_uids(path: Path) -> UidList:
    """Read one uid per line, or a .npy as DataComp writes it (two unsigned 64-bit halves, or strings).

    Raises UserError for a file that is neither or is empty.
    """
    try:
        if path.suffix == ".npy":
            halves_N2 = _from_npy(np.load(path, allow_pickle=False))
        else:
            with path.open(encoding="utf-8-sig") as stream:
                halves_N2 = _from_texts(line.strip() for line in stream if line.strip())
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a list of uids: {error}") from error
    if not len(halves_N2):
        raise UserError(f"{path} has no uids")
    return UidList(halves_N2)


def _from_npy(array_N: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    names = array_N.dtype.names
    if array_N.ndim == 1 and names is not None and len(names) == 2:
        return np.stack([array_N[name].astype(np.uint64) for name in names], 1)
    if array_N.ndim == 1 and array_N.dtype.kind in "US":
        return _from_texts(text.decode() if isinstance(text, bytes) else str(text) for text in array_N.tolist())
    raise ValueError(f"an array of {array_N.dtype}, {array_N.ndim}-dimensional; two 64-bit halves or strings expected")


def _from_texts(uids: Iterable[str]) -> npt.NDArray[np.uint64]:
    def numbers() -> Iterator[int]:
        for uid in uids:
            yield from _halves(uid)

    return np.fromiter(numbers(), np.uint64).reshape(-1, 2)


def _halves(uid: str) -> tuple[int, int]:
    number = int(uid, 16) if _HEX_UID.fullmatch(uid) else _hash(uid)
    return number >> 64, number & (2**64 - 1)


def _hash(uid: str) -> int:
    return int.from_bytes(hashlib.blake2b(uid.encode("utf-8", "replace"), digest_size=16).digest(), "big")
