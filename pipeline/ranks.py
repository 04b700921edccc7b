"""Which process this is among all, on which device, and the few collectives that are not DeepSpeed's.

N, M rows on this rank and on all ranks, D columns
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from formats.errors import UserError, describe_os_error
from formats.owners import owning


@dataclass(frozen=True)
class PendingMaximum:
    """A maximum over ranks that is being computed; `values` are on the host once `done` says so."""

    values: Tensor
    done: dist.Work | torch.cuda.Event | None

    def read(self) -> list[int]:
        """The maximum. Waits for what was asked of the device before it was started, and for no more."""
        if isinstance(self.done, torch.cuda.Event):
            self.done.synchronize()
        elif self.done is not None:
            self.done.wait()
        return [int(value) for value in self.values]


T = TypeVar("T")
LOADER_DEATH_NOTICE_S = 1.0
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
MEETING_PATIENCE = timedelta(minutes=10)  # imports from a file system that all nodes load at once take their time


class PeerLostError(UserError):
    """Another rank, or a loader process, ended while this rank needed it; EX_UNAVAILABLE of sysexits.h."""

    exit_code = 69


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world_size`, `local_rank` on its node, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a small tensor, the same on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Synchronises with the host."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def start_maximum(self, values: Sequence[int]) -> PendingMaximum:
        """Begin to find the largest of each value on any rank, without waiting for it."""
        on_host = torch.tensor(values)
        if self.world_size == 1:
            return PendingMaximum(on_host, None)
        if self.device.type == "cpu":
            return PendingMaximum(on_host, dist.all_reduce(on_host, op=dist.ReduceOp.MAX, async_op=True))
        on_host = on_host.pin_memory()
        on_device = on_host.to(self.device, non_blocking=True)
        dist.all_reduce(on_device, op=dist.ReduceOp.MAX)  # on NCCL's stream, and this one waits for it
        on_host.copy_(on_device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return PendingMaximum(on_host, copied)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on this rank's device with those of the main rank."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def broadcast_sha256(self, sha256: str) -> str:
        """The main rank's hex digest, or empty string."""
        digest = torch.tensor(list(bytes.fromhex(sha256).ljust(32, b"\0")), dtype=torch.uint8, device=self.device)
        self.broadcast([digest])
        return bytes(digest.tolist()).hex() if digest.any() else ""

    def gather_objects(self, value: T) -> list[T]:
        """A small value of each rank, in rank order, on all. They are pickled: of this program's own making only."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main rank makes, on all ranks. Its UserError or OSError is raised on all, so that none waits."""
        made: tuple[Any, str] = (None, "")
        if self.is_main:
            try:
                made = (make(), "")
            except UserError as error:
                made = (None, str(error))
            except OSError as error:
                made = (None, describe_os_error(error) or str(error))
        result, error_text = self.gather_objects(made)[0]
        if error_text:
            raise UserError(error_text)
        return cast(T, result)

    def together(self, work: Callable[[], T]) -> T:
        """What each rank makes by itself. If one meets a UserError or OSError, all raise (collective; `work` is not).

        A rank that left alone would keep the others waiting.
        """
        made, failure = None, None
        try:
            made = work()
        except UserError as error:
            failure = error
        except OSError as error:
            failure = UserError(describe_os_error(error) or str(error))
        if self.any(failure is not None):
            raise failure or UserError("another rank could not do its share: its message says why")
        return cast(T, made)

    @contextlib.contextmanager
    def owning(self, directory: Path, doing: str, otherwise: str) -> Iterator[None]:
        """The main rank owns a directory for all of them until the block ends (formats.owners.owning)."""
        with contextlib.ExitStack() as held:
            self.from_main(lambda: held.enter_context(owning(directory, doing, otherwise)))
            yield

    def gather_rows(self, rows_ND: Tensor) -> Tensor:
        """Rows of all ranks in rank order, [N, D] -> [M, D]; ranks may hold different numbers of rows. No gradient."""
        if self.world_size == 1:
            return rows_ND
        counts = [torch.zeros(1, dtype=torch.long, device=rows_ND.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([rows_ND.shape[0]], device=rows_ND.device))
        sizes = [int(count) for count in counts]
        padded = rows_ND.new_zeros(max(sizes), *rows_ND.shape[1:])
        padded[: rows_ND.shape[0]] = rows_ND
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


@contextlib.contextmanager
def explain_lost_peers(kept: str = "the last checkpoint is intact") -> Iterator[None]:
    """The error of a rank whose peer, or loader process, has ended becomes a PeerLostError that says what is `kept`."""
    try:
        try:
            yield
        except (OSError, EOFError):
            # torch hands tensors over by a socket: that of a loader process just killed breaks before the signal of
            # its end, from which torch raises the error below, gets here
            time.sleep(LOADER_DEATH_NOTICE_S)
            raise
    except RuntimeError as error:
        if is_of_lost_peer(error):
            raise PeerLostError(
                "another rank ended or cannot be reached, see its output for why; "
                f"{kept} ({str(error).splitlines()[0][:200]})"
            ) from error
        if "DataLoader worker" in str(error):  # torch raises it wherever the main thread is
            raise PeerLostError(
                f"a loader process was killed, as the system does when memory runs out ({str(error).splitlines()[0]}); "
                f"{kept}; fewer data.workers need less memory"
            ) from error
        raise


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _environment_from_launcher() -> None:
    """Complete torch's variables: `deepspeed` and `torchrun` set them, `srun` has its own, plain python none."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        if int(os.environ["WORLD_SIZE"]) > 1 and "MASTER_ADDR" not in os.environ:
            raise UserError(
                "under srun with several tasks, export MASTER_ADDR (the first node) and MASTER_PORT before srun; "
                "slurm/train.sbatch shows how"
            )
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ and os.environ["WORLD_SIZE"] != "1":
        raise UserError("MASTER_PORT is not set: export the same free port on every rank")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}={os.environ[name]!r} in the environment is no number: a launcher sets it")


def _meet(rank: int, world_size: int) -> Any:
    """Where ranks find each other: the main one listens at MASTER_PORT.

    Raises UserError if it cannot, PeerLostError on others, and on all if one does not come.
    """
    if world_size == 1:  # nobody to meet: a port that is free now could be taken by the time it is listened at
        return dist.HashStore()  # type: ignore[attr-defined]
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    # in a thread, to be left behind: torch waits without end for a stranger's program that listens there in silence
    met: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_rendezvous, args=(rank, world_size, met), daemon=True).start()
    try:
        found = met.get(timeout=MEETING_PATIENCE.total_seconds() + 1)
    except queue.Empty:
        found = dist.DistError(f"no answer within {MEETING_PATIENCE}")
    if not isinstance(found, Exception):
        return found
    if not isinstance(found, dist.DistError):
        raise found
    reason = str(found).splitlines()[0][:200]
    if rank > 0:
        raise PeerLostError(
            f"rank {rank} could not reach rank 0 at {address}:{port}, see its output for why ({reason})"
        ) from found
    if "EADDRINUSE" in reason:
        raise UserError(f"port {port} is taken on {address}: choose another MASTER_PORT for all ranks") from found
    if isinstance(found, dist.DistNetworkError):
        raise UserError(f"rank 0 cannot listen at port {port}: choose another MASTER_PORT ({reason})") from found
    raise PeerLostError(f"not all {world_size} ranks came to {address}:{port} ({reason})") from found


def _rendezvous(rank: int, world_size: int, met: queue.SimpleQueue[Any]) -> None:
    try:
        rendezvous = dist.rendezvous("env://", rank, world_size, timeout=MEETING_PATIENCE)  # type: ignore[attr-defined]
        met.put(next(rendezvous)[0])
    except Exception as error:
        met.put(error)


def init_ranks(patience: timedelta | None = None) -> Ranks:
    """Join the other processes started by `deepspeed`, `torchrun` or `srun`; a plain process is a world of one.

    `patience`: how long a rank waits for others in a collective, where the backend's 10 or 30 minutes are too short.
    """
    _environment_from_launcher()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    # DeepSpeed's own variable: a machine with a GPU can still run several ranks on its CPU
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        keep_freed_memory()
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if not dist.is_initialized():
        device_id = device if device.type == "cuda" else None  # tells NCCL which GPU is this rank's before first use
        store = _meet(rank, world_size)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, device_id=device_id, timeout=patience
        )
    return Ranks(rank, local_rank, world_size, device)


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees for what it makes next, where its libc is glibc.

    Which gives large tensors back to the kernel, and has it map and clear their pages once more in every step: with
    ViT-B/16 and 16 pairs that was a quarter of the time (benchmarks/trainer_step.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def part_ranks(ranks: Ranks) -> None:
    """End what the processes did together: from here on each is on its own, and may leave. Collective."""
    if ranks.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
