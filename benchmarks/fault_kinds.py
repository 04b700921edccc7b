"""What goes wrong in a run, at a random moment: ranks, workers, launchers, disks, checkpoints, data."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_trials import SAVE_EVERY_STEPS, Run, wait_until


def kill_all_ranks(run: Run) -> None:
    """As a machine that loses power."""
    run.wait_for_a_moment()
    run.signal(signal.SIGKILL, *run.ranks)


def kill_one_rank(run: Run) -> None:
    """As the system does when memory runs out."""
    run.wait_for_a_moment()
    run.signal(signal.SIGKILL, run.random.choice(run.ranks))


def kill_while_saving(run: Run) -> None:
    """Both ranks or one of them."""
    run.wait_for_a_save()
    run.signal(signal.SIGKILL, *run.random.choice([run.ranks, run.ranks[:1], run.ranks[1:]]))


def terminate_one_rank(run: Run) -> None:
    """Asks the run to stop."""
    run.wait_for_a_moment()
    run.signal(signal.SIGTERM, run.random.choice(run.ranks))


def kill_a_loader_worker(run: Run) -> None:
    """Needs data.workers=1."""
    run.wait_for_a_moment()
    rank = run.random.choice(run.ranks)
    workers = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    run.signal(signal.SIGKILL, int(run.random.choice(workers)))


def terminate_the_launcher(run: Run) -> None:
    """What a user does who takes the launcher for the run."""
    run.wait_for_a_moment()
    run.signal(signal.SIGTERM, run.launcher or 0)


def kill_the_launcher(run: Run) -> None:
    """Its ranks are not told."""
    run.wait_for_a_moment()
    run.signal(signal.SIGKILL, run.launcher or 0)


def damage_the_newest_checkpoint(run: Run) -> None:
    """Kill the run after its second checkpoint; then a random file of the newest is cut, gone, or has another bit."""
    run.wait_for_a_moment(first=2 * SAVE_EVERY_STEPS + 2)
    run.signal(signal.SIGKILL, *run.ranks)
    wait_until(run.is_over)
    file = run.random.choice(sorted(run.newest_checkpoint().iterdir()))
    content = bytearray(file.read_bytes())
    damage = run.random.choice(["cut", "missing", "a bit flipped"])
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: run.random.randrange(len(content))])
    else:
        content[run.random.randrange(len(content))] ^= 1 << run.random.randrange(8)
        file.write_bytes(content)
    run.notes.append(damage)


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A file system of its own, of 24 MB. Needs root."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def fill_the_disk(run: Run) -> None:
    """To the last block; the run needs a `small_disk`."""
    run.wait_for_a_moment()
    with (run.directory / "filler").open("wb", buffering=0) as filler:
        while True:
            try:
                filler.write(bytes(4096))
            except OSError:
                return


def empty_the_disk(run: Run) -> None:
    """There is room again."""
    (run.directory / "filler").unlink()


class OwnShards:
    """A run's own copy of the data, of which a shard vanishes and comes back."""

    def __init__(self, shards: Path, run: Run) -> None:
        self.directory = run.directory.with_name(f"{run.directory.name}_shards")
        shutil.copytree(shards, self.directory)
        self._hidden = run.random.choice(sorted(self.directory.glob("*.tar")))

    def hide_one(self, run: Run) -> None:
        """It has another name."""
        run.wait_for_a_moment()
        self._hidden.rename(self._hidden.with_suffix(".gone"))

    def give_back(self, run: Run) -> None:
        """It has its name again."""
        self._hidden.with_suffix(".gone").rename(self._hidden)
