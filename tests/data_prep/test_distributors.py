"""Spark and Ray, in local mode and for real, fill shards as the processes of one machine do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from download_helpers import ledger, samples, write_urls
from make_images import encoded
from small_web import Page, SmallWeb

from data_prep.web.download import Settings, download
from formats.errors import UserError


@pytest.fixture(scope="module")
def web() -> Iterator[SmallWeb]:
    with SmallWeb() as server:
        server.pages = {f"/{index}.jpg": Page(encoded(index)) for index in range(11)}
        yield server


def result_of(web: SmallWeb, folder: Path, distributor: str) -> tuple[dict, dict]:
    """What the shards and what the ledger hold, without what differs from run to run."""
    urls = write_urls(folder / "urls.parquet", [web.url(f"/{index}.jpg") for index in range(12)])
    settings = Settings(samples_per_shard=4, processes=2, allow_local=True, distributor=distributor)
    assert download(urls, folder / distributor, settings) == {"ok": 11, "4xx": 1}
    found = {
        uid: (caption, image.tobytes(), metadata["key"], metadata["sha256"])
        for uid, (image, caption, metadata) in samples(folder / distributor).items()
    }
    return found, {url: (row["class"], row["key"]) for url, row in ledger(folder / distributor).items()}


@pytest.mark.slow
@pytest.mark.parametrize("distributor", ["pyspark", "ray"])
def test_a_cluster_gives_the_shards_of_one_machine(tmp_path: Path, web: SmallWeb, distributor: str) -> None:
    if find_spec(distributor) is None:
        pytest.skip(f"pip install 'cluster-clip[{distributor}]'")
    assert result_of(web, tmp_path, distributor) == result_of(web, tmp_path, "multiprocessing")


@pytest.mark.parametrize("distributor", ["pyspark", "ray"])
def test_an_absent_cluster_is_named(tmp_path: Path, distributor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.web.processes.find_spec", lambda _: None)
    urls = write_urls(tmp_path / "urls.parquet", ["http://127.0.0.1/1.jpg"])
    with pytest.raises(UserError, match=rf"pip install 'cluster-clip\[{distributor}\]'"):
        download(urls, tmp_path / "shards", Settings(distributor=distributor))
    assert not (tmp_path / "shards").exists()


def test_a_download_on_this_machine_imports_nothing_that_img2dataset_brings() -> None:
    """albumentations would ask the network for updates; pandas and wandb are large."""
    code = "import sys, data_prep.web.processes; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "aiohttp" in imported
    assert not imported & {"img2dataset", "albumentations", "pandas", "wandb", "matplotlib"}
