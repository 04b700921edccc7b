"""Drawing many scenes on several processes: results in order, progress with an estimate of the time left."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from data_prep.synthetic.drawing import draw_jpeg
from data_prep.synthetic.scenes import Scene

BLOCK = 250  # pictures that a process draws at a time

Job = TypeVar("Job")
Result = TypeVar("Result")


class Studio:
    """Processes that draw, and one progress bar over all the pictures of a corpus. A context manager."""

    def __init__(self, size: int, processes: int, pictures: int) -> None:
        self.size = size
        self._progress = tqdm(total=pictures, unit=" pictures", smoothing=0.05)
        # fresh interpreters: forking would copy whatever threads and locks the caller has
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(processes, context) if processes > 1 else None

    def draw(self, scenes: Sequence[Scene]) -> Iterator[bytes]:
        """Give the JPEG of each scene, in order."""
        blocks = [scenes[start : start + BLOCK] for start in range(0, len(scenes), BLOCK)]
        return self.run(partial(_draw_block, self.size), blocks)

    def run(self, work: Callable[[Job], list[Result]], jobs: Sequence[Job]) -> Iterator[Result]:
        """Do `work`, one result per picture, for each of `jobs` on any process; give all results in order."""
        blocks = map(work, jobs) if self._executor is None else self._executor.map(work, jobs)
        for results in blocks:
            self._progress.update(len(results))
            yield from results

    def __enter__(self) -> Studio:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._progress.close()


def _draw_block(size: int, scenes: Sequence[Scene]) -> list[bytes]:
    return [draw_jpeg(scene, size) for scene in scenes]
