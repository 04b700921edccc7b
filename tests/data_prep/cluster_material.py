"""Shards whose pictures have made-up features of known groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from make_shards import make_shards

GROUPS, WIDTH = 5, 16


def groups_of(samples: int) -> npt.NDArray[np.int64]:
    """Of which group each sample is: half are of group 0, a quarter of group 1, …"""
    rng = np.random.default_rng(1)
    return np.minimum(rng.geometric(0.5, samples) - 1, GROUPS - 1)


def features_of(group_n: npt.NDArray[np.int64], noise: float = 0.05) -> npt.NDArray[np.float16]:
    """Features [n, D], of groups at right angles to each other; of any length."""
    rng = np.random.default_rng(2)
    rows_nD = np.eye(GROUPS, WIDTH)[group_n] + noise * rng.normal(size=(len(group_n), WIDTH))
    return (rows_nD * rng.uniform(0.5, 3, (len(group_n), 1))).astype(np.float16)


def make_features(directory: Path, sizes: list[int], nan_rows: tuple[int, ...] = ()) -> tuple[Path, Path]:
    """(shards, embeddings); the rows `nan_rows` have no features."""
    shards, embeddings = directory / "shards", directory / "embeddings"
    shards.mkdir(parents=True)
    embeddings.mkdir()
    make_shards(shards, sizes)
    rows_ND = features_of(groups_of(sum(sizes)))
    rows_ND[list(nan_rows)] = np.nan
    for number, part_nD in enumerate(np.split(rows_ND, np.cumsum(sizes)[:-1])):
        np.save(embeddings / f"{number:05d}.npy", part_nD)
    return shards, embeddings
