"""A Slurm cluster of one node, this machine, from Debian's packages, for the length of a test.

Everything is in one folder, and on the loopback address alone; nothing of the system's own Slurm or
MUNGE is used. ``python -m tests.slurm.cluster FOLDER`` starts one to play with.
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
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
SECONDS = 60  # until the node is there


def missing() -> str | None:
    """Say why no cluster can be started here; None if one can."""
    absent = [name for name in (*DAEMONS, "sbatch", "sinfo") if _find(name) is None]
    if absent:
        return f"no {', '.join(absent)} here; apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd runs jobs as root only"
    return None


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons and wait for the node.

    Args:
        folder: for all their files; empty.

    Yields:
        What the environment of Slurm's commands needs.

    Raises:
        RuntimeError: the node does not come up; with the end of the daemons' logs.
    """
    environment = {"SLURM_CONF": str(_configure(folder))}
    munge = ("--foreground", "--force", "--num-threads=1")
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
    files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    options = [f"--{option}={folder / name}" for option, name in files.items()]
    commands = [
        [_find("munged"), *munge, *options],
        [_find("slurmctld"), "-D"],
        [_find("slurmd"), "-D"],
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in zip(DAEMONS, commands, strict=True):
            with (folder / f"{name}.out").open("wb") as output:
                started.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **environment},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            if name == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: _node_is_idle(environment), folder)
        yield environment
    finally:
        for process in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _configure(folder: Path) -> Path:
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    cpus = len(os.sched_getaffinity(0))
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": "root",
        "SlurmctldPort": _free_port(),
        "SlurmdPort": _free_port(),
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",  # no control groups, no systemd
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "AccountingStorageType": "accounting_storage/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "SlurmdParameters": "config_overrides",
        "MinJobAge": 3600,
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines.append(f"NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN")
    lines.append(f"PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP")
    path = folder / "slurm.conf"
    path.write_text("\n".join([*lines, ""]))
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _node_is_idle(environment: dict[str, str]) -> bool:
    command = ["sinfo", "--noheader", "--format=%T"]
    found = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return found.stdout.strip() == "idle"


def _wait(ready, folder: Path) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        if time.monotonic() > end:
            logs = [f"{p.name}: {p.read_text()[-600:]}" for p in sorted(folder.glob("*.out"))]
            raise RuntimeError("no Slurm node came up\n" + "\n".join(logs))
        time.sleep(0.2)


if __name__ == "__main__":
    with cluster(Path(sys.argv[1]).resolve()) as variables:
        print(*(f"export {name}={value}" for name, value in variables.items()), sep="\n")
        signal.pause()
