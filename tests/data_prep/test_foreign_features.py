"""Features in clip-retrieval's layout: each row goes to its picture, and what does not fit is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_shards import make_shards, picture

from data_prep.__main__ import main
from formats.embeddings import open_embeddings
from formats.manifest import read_manifest

SIZES = [6, 5]
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards") / "shards"
    directory.mkdir()
    return make_shards(directory, SIZES)


def write_foreign(folder: Path, numbers: list[int], rows_MD: npt.NDArray[np.float32], cuts: tuple[int, ...]) -> Path:
    """Rows of the pictures of these numbers, in files that are cut there."""
    for kind in ("img_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for file, part in enumerate(np.split(np.arange(len(numbers)), cuts)):
        of_file = [numbers[place] for place in part]
        columns = {
            "image_path": [f"{number:09d}" for number in of_file],
            "caption": ["a cat"] * len(of_file),
            "sha256": [hashlib.sha256(picture(number)).hexdigest() for number in of_file],
        }
        pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{file}.parquet")
        np.save(folder / "img_emb" / f"img_emb_{file}.npy", rows_MD[part])
    return folder


def take(folder: Path, shards: Path, output: Path, *more: str) -> int:
    return main(["embeddings", str(folder), f"--shards={shards}", f"--output={output}", "--processes=1", *more])


@pytest.mark.parametrize("by", ["key", "sha256"])
def test_rows_go_to_their_pictures(tmp_path: Path, shards: Path, by: str) -> None:
    rng = np.random.default_rng(0)
    # in no order, with some of other pictures between them; in more files than ten, whose names sort otherwise
    numbers = rng.permutation(TOTAL + 4).tolist()
    rows_MD = rng.normal(size=(len(numbers), 3)).astype(np.float32)
    rows_MD[numbers.index(2)] = 0
    folder = write_foreign(tmp_path / "foreign", numbers, rows_MD, tuple(range(1, 13)))
    assert take(folder, shards, tmp_path / "embeddings", f"--by={by}", "--model=theirs") == 0
    manifest = read_manifest(shards)
    embeddings = open_embeddings(tmp_path / "embeddings", manifest)
    assert embeddings.header["model"] == "theirs"
    taken_ND = np.concatenate([embeddings.rows(shard) for shard in manifest.shards])
    for number in range(TOTAL):
        row_D = rows_MD[numbers.index(number)]
        expected_D = np.full(3, np.nan) if number == 2 else row_D / np.linalg.norm(row_D)
        np.testing.assert_allclose(taken_ND[number], expected_D, atol=1e-3)


def test_what_does_not_fit_is_one_line(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_MD = np.ones((TOTAL, 3), np.float32)
    lacking = write_foreign(tmp_path / "lacking", list(range(TOTAL - 1)), rows_MD, ())
    twice = write_foreign(tmp_path / "twice", [*range(TOTAL - 1), 0], rows_MD, ())
    short = write_foreign(tmp_path / "short", list(range(TOTAL)), rows_MD, (4,))
    np.save(short / "img_emb" / "img_emb_1.npy", rows_MD[:2])
    unnamed = write_foreign(tmp_path / "unnamed", list(range(TOTAL)), rows_MD, ())
    (unnamed / "metadata" / "metadata_0.parquet").unlink()
    damaged = write_foreign(tmp_path / "damaged", list(range(TOTAL)), rows_MD, ())
    (damaged / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1 and no more")
    other = write_foreign(tmp_path / "other", list(range(TOTAL)), rows_MD, ())
    pq.write_table(pa.table({"url": ["x"] * TOTAL}), other / "metadata" / "metadata_0.parquet")
    for folder, expected in (
        (lacking, "no features for 1 of 11 samples (one is 000000010 in 00001.tar)"),
        (twice, "1 keys more than once"),
        (short, "has 7 rows and"),
        (unnamed, "metadata_0.parquet is missing"),
        (damaged, "metadata_0.parquet cannot be used"),
        (other, "has no column image_path or key"),
        (tmp_path, "holds no img_emb/img_emb_0.npy"),
    ):
        assert take(folder, shards, tmp_path / "embeddings") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert expected in error
