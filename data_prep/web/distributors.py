"""Sending shards to workers: the processes of this machine, or img2dataset's Spark and Ray distributors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.util import find_spec

from data_prep.web.shard_worker import ShardWorker, Task
from formats.errors import UserError

MULTIPROCESSING = "multiprocessing"
DISTRIBUTORS = {MULTIPROCESSING: None, "pyspark": "pyspark", "ray": "ray"}  # and the package it needs
SHARDS_PER_SPARK_JOB = 1000


def check_distributor(name: str) -> None:
    """Raise UserError when the package of a distributor is not installed."""
    package = DISTRIBUTORS[name]
    if package and find_spec(package) is None:
        raise UserError(f"--distributor {name} needs the package {package}: pip install 'cluster-clip[{name}]'")


def distribute(name: str, worker: ShardWorker, tasks: Sequence[Task], processes: int) -> None:
    """Run `worker` on every task. What fails is said in the log, and the shard is missing afterwards."""
    if name == MULTIPROCESSING:
        _on_this_machine(worker, tasks, processes)
        return
    os.environ.update(NO_ALBUMENTATIONS_UPDATE="1", WANDB_MODE="disabled")
    from img2dataset.distributor import pyspark_distributor, ray_distributor

    run = {"pyspark": pyspark_distributor, "ray": ray_distributor}[name]
    run(processes, worker, tasks, SHARDS_PER_SPARK_JOB, 1)


def _on_this_machine(worker: ShardWorker, tasks: Sequence[Task], processes: int) -> None:
    # unlike a multiprocessing.Pool, this one notices when a worker is killed, and ends instead of waiting for it
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        pending: set[Future[tuple[bool, Task]]] = set()
        for task in tasks:
            if len(pending) == 2 * processes:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
            pending.add(pool.submit(worker, task))
        for future in pending:
            future.result()
