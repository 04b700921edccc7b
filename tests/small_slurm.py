"""A private Slurm for tests: a controller and two nodes on this machine, without systemd, seen by nobody else.

    python tests/small_slurm.py DIRECTORY     # prints "ready"; stops everything when its standard input ends

It needs Debian's packages slurm-wlm and munge, and no root: every daemon runs as whoever calls, with a munge key of its
own and on free ports. Whoever starts it holds the other end of its standard input, so that the daemons and all jobs end
with that process, however it ends. Clients need `SLURM_CONF=DIRECTORY/slurm.conf` and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# names that resolve by themselves, to addresses of this machine
NODES = ("127.0.0.1", "127.0.0.2")
_SEARCH_PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
_START_TIMEOUT_S = 300.0

# `low` jobs are preempted and requeued by `high` ones. cred_expire is what a requeued job waits for before it starts
# again, 5 s being the least. preempt_send_user_signal with a GraceTime: jobs get their --signal before they must go.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
FirstJobId={first_job}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
PlugStackConfig={directory}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=30
KillWait=15
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
NodeName={nodes[0]} NodeHostname={host} NodeAddr={address} Port={ports[1]} CPUs=16 RealMemory=4000
NodeName={nodes[1]} NodeHostname={host} NodeAddr={address} Port={ports[2]} CPUs=16 RealMemory=4000
PartitionName=low Nodes=ALL Default=YES State=UP DefaultTime=10 PriorityTier=1 GraceTime=15
PartitionName=high Nodes=ALL State=UP DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Which of Slurm's and munge's programs are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCH_PATH) is None]


def environment(directory: Path) -> dict[str, str]:
    """The environment of clients and daemons of the cluster in a directory; nothing of an outer Slurm job in it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return {**own, "SLURM_CONF": str(directory / "slurm.conf"), "PATH": _SEARCH_PATH}


def start_node(directory: Path, node: str) -> subprocess.Popen[bytes]:
    """Start a node's daemon, at first or after a failure."""
    return _start(directory, ["slurmd", "-D", "-N", node], SLURMD_NODENAME=node)


def fail_node(directory: Path, node: str) -> None:
    """What a power cut does: the node's daemon and everything that runs on it are gone, and say nothing."""
    _kill_all({f"SLURM_CONF={directory}/slurm.conf", f"SLURMD_NODENAME={node}"})


@contextmanager
def running_cluster(directory: Path) -> Iterator[None]:
    """The daemons, with both nodes idle. Raises RuntimeError with the logs' ends if they do not become so."""
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (directory / name).mkdir(parents=True, exist_ok=True)
    reserved, first_job = _reserve_job_ids()
    _write_configuration(directory, first_job)
    socket_file = directory / "munge.sock"
    files = [f"--{name}-file={directory}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    try:
        _start(directory, ["munged", "--foreground", "--force", f"--socket={socket_file}", *files])
        _wait(socket_file.exists, directory)
        _start(directory, ["slurmctld", "-D"])
        for node in NODES:
            start_node(directory, node)
        _wait(lambda: _idle_nodes(directory) == len(NODES), directory)
        yield
    finally:
        # daemons, jobs, and what jobs started; nobody needs their state again
        while _kill_all({f"SLURM_CONF={directory}/slurm.conf"}):
            time.sleep(0.05)
        reserved.close()


def _reserve_job_ids() -> tuple[socket.socket, int]:
    """The first of a hundred job ids, which no other cluster of this machine has while the socket is open.

    The ranks of a job meet at port 20000 plus its id (slurm/env.sh): jobs of two clusters would meet each other.
    """
    for first in range(0, 10_000, 100):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", 20_000 + first)), first + 1
    raise RuntimeError("all ports of jobs are taken")


def _write_configuration(directory: Path, first_job: int) -> None:
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    (directory / "plugstack.conf").touch()
    host = socket.gethostname().partition(".")[0]
    # daemons listen where the host's name leads: loopback, or a container's own address
    text = _CONFIGURATION.format(
        host=host,
        address=socket.gethostbyname(socket.gethostname()),
        user=_user(),
        directory=directory,
        ports=_free_ports(1 + len(NODES)),
        nodes=NODES,
        first_job=first_job,
    )
    (directory / "slurm.conf").write_text(text)


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _start(directory: Path, command: list[str], **variables: str) -> subprocess.Popen[bytes]:
    with (directory / f"{command[0]}.out").open("ab") as output:
        return subprocess.Popen(
            [str(shutil.which(command[0], path=_SEARCH_PATH)), *command[1:]],
            env=environment(directory) | variables,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _idle_nodes(directory: Path) -> int:
    command = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%t"]
    done = subprocess.run(command, env=environment(directory), capture_output=True, text=True, check=False)
    return done.stdout.split().count("idle")


def _wait(condition: Callable[[], bool], directory: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            logs = sorted([*directory.glob("*.log"), *directory.glob("*.out")])
            ends = [f"{log.name}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs]
            raise RuntimeError(f"Slurm did not start in {_START_TIMEOUT_S:.0f} s\n" + "\n".join(ends))
        time.sleep(0.05)


def _kill_all(variables: set[str]) -> int:
    """SIGKILL every process that was started with these variables in its environment; how many there were."""
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variables <= set((process / "environ").read_bytes().decode(errors="replace").split("\0")):
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
        except OSError:  # ended meanwhile, or not ours
            continue
    return killed


def main() -> None:
    """Run a cluster until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the end of standard input is the one way to stop
    with running_cluster(Path(sys.argv[1]).resolve()):
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
