"""Running one function over many items in several processes, without ever holding all of the items."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from formats.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int, limit: int | None = None
) -> Iterator[Result]:
    """Give `function(item)` for each item, in the order in which they are finished.

    `limit` is the number of items, if known: more processes are of no use. Raises UserError if a process is killed.
    """
    processes = processes if limit is None else min(processes, limit)
    if processes <= 1:
        yield from map(function, items)
        return
    remaining = iter(items)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_die_with_the_parent) as pool:
        try:
            running = {pool.submit(function, item) for item in itertools.islice(remaining, 2 * processes)}
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    running.update(pool.submit(function, item) for item in itertools.islice(remaining, 1))
                    yield future.result()
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed (out of memory?): use fewer --processes") from error


def _die_with_the_parent() -> None:
    """In a worker: when the parent is killed, stop at once, and write nothing where its successor is at work."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait_for_the_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
