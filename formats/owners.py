"""One owner at a time for a directory that many nodes see; a second process is told who it is.

No lock of the system is used, since not every cluster's file system has one that other nodes see. A file in the
directory names the owner, who touches it every few seconds:

* In a free directory it is made with O_EXCL: of several processes one succeeds.
* An owner that has ended without removing it is followed: at once if it was a process of this machine, or an earlier
  start of the same Slurm job; else after its file was not touched for STALE_S. No clocks of two machines are compared.
* Whoever follows writes its name over the other's, waits for SETTLE_S and is the owner if it still stands there; so of
  several that follow at once one does (Fischer's algorithm).
* An owner taken for dead, one that was suspended or cut off from its file server, finds the other's name when it wakes,
  and leaves within TOUCH_S.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from formats.errors import UserError
from formats.files import to_json, write_atomically

OWNER = "owner.json"
TOUCH_S = 5.0
STALE_S = 30.0
SETTLE_S = 1.0
ENDING_S = 2.0  # a process that was just killed has memory to give back
_LOOK_S = 0.5
_KINDS = {"int": int, "str": str}


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, wherever it runs.

    machine: boot and process namespace, in which `pid` and `started` (ticks of that boot) name one process
    job, restart: of Slurm; empty and 0 outside it
    """

    pid: int
    started: int
    machine: str
    host: str
    job: str
    restart: int
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            machine=f"{boot} {Path('/proc/self/ns/pid').readlink()}",
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}{f', job {self.job},' * bool(self.job)} since {self.since}"

    def is_before(self, other: Owner) -> bool:
        """Whether this is an earlier start of a job that Slurm has queued again, which it does once all of it ended."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart


@contextlib.contextmanager
def owning(directory: Path, doing: str, otherwise: str) -> Iterator[None]:
    """Own a directory, which is made if need be, until the block ends.

    doing, otherwise: for who comes second: `DIRECTORY is being trained` by …: `choose another train.output`

    Raises UserError that names the owner if there is one; then nothing was changed.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    file, me, ended = directory / OWNER, Owner.this_process(), threading.Event()
    _take(file, me, doing, otherwise)
    keeper = threading.Thread(target=_keep, args=(file, me, ended), daemon=True, name="owner")
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        with contextlib.suppress(OSError):  # the directory may be gone, or the disk
            if _read(file) == me:
                file.unlink()
            if is_new:
                directory.rmdir()  # if nothing came of it


def _take(file: Path, me: Owner, doing: str, otherwise: str) -> None:
    while not _create(file, me):
        owner = _read(file)
        if owner is None:  # one that is just being written, or damaged
            time.sleep(SETTLE_S)
            owner = _read(file)
        if owner is not None and not _has_ended(owner, me, file):
            raise UserError(f"{file.parent} {doing} by {owner}: wait until it has ended, or {otherwise}")
        write_atomically(file, _text(me))
        time.sleep(SETTLE_S)
        if _read(file) == me:
            return


def _create(file: Path, me: Owner) -> bool:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write(_text(me))
    return True


def _has_ended(owner: Owner, me: Owner, file: Path) -> bool:
    if owner.is_before(me):
        return True
    if owner.machine == me.machine:
        end_s = time.monotonic() + ENDING_S
        while (is_alive := _is_alive(owner)) and time.monotonic() < end_s:
            time.sleep(_LOOK_S / 10)
        if is_alive is not None:
            return not is_alive
    print(f"{file.parent} belonged to {owner}: looking for signs of life, up to {STALE_S:.0f} s", flush=True)
    seen, end_s = _touched_ns(file), time.monotonic() + STALE_S
    while time.monotonic() < end_s:
        time.sleep(_LOOK_S)
        if _touched_ns(file) != seen:
            return False
    return True


def _keep(file: Path, me: Owner, ended: threading.Event) -> None:
    """Show that this process lives; end it if another one has taken the directory."""
    while not ended.wait(TOUCH_S):
        try:
            if not file.exists():  # somebody has tidied up
                _create(file, me)
            owner = _read(file)
            if owner == me:
                os.utime(file)
        except OSError:  # the file server is away: for the others, too
            continue
        if owner is not None and owner != me:
            text = f"error: {file.parent} was taken over by {owner}, which saw no sign of life of this process"
            print(f"{text}: it ends, so that no two write there", file=sys.stderr, flush=True)
            os._exit(UserError.exit_code)


def _text(owner: Owner) -> str:
    return to_json(dataclasses.asdict(owner)) + "\n"


def _read(file: Path) -> Owner | None:
    """Who the file names; None if it names nobody. Opened afresh, which is when NFS asks its server."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return Owner(**{name: _KINDS[kind](fields[name]) for name, kind in Owner.__annotations__.items()})
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _touched_ns(file: Path) -> int:
    try:
        with file.open("rb") as stream:  # not Path.stat, which NFS may answer from what it remembers
            return os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _is_alive(owner: Owner) -> bool | None:
    """Whether a process of this machine runs; None if the system hides that, it being another user's."""
    try:
        os.kill(owner.pid, 0)
    except PermissionError:
        started = _started(owner.pid)
        return None if started is None else started == owner.started
    except (ProcessLookupError, OverflowError):
        return False
    return _started(owner.pid) == owner.started


def _started(pid: int) -> int | None:
    """When a process of this machine began, in ticks since boot; None if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
