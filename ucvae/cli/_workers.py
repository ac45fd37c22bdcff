"""What the jobs of a sweep share on one machine: its cores and its GPUs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ucvae.cli import _runs
from ucvae.device import gpus

log = logging.getLogger(__name__)

# In the sweep's folder: for each machine a file for each GPU, locked by the job that has it.
FOLDER = ".gpus"


def count() -> int:
    """Return how many jobs run at full speed at a time: a GPU each, or the threads each is given.

    Jobs on the CPU get one thread, or the ``OMP_NUM_THREADS`` that the environment asks for.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")
    wanted = int(threads) if threads.isdecimal() else 1
    return gpus() or max(1, cores() // max(1, wanted))


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_threads(launcher: Mapping[str, Any]) -> None:
    """Use as many threads as the launcher gives a job, where the environment says nothing.

    Joblib sets the environment of its workers itself.
    """
    threads = launcher.get("cpus_per_task")
    if threads and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(threads)


@contextlib.contextmanager
def device(name: str, sweep: Path, job: int) -> Iterator[str]:
    """Deal out a GPU: no two jobs of a sweep get the same one while another is free.

    Args:
        name: the ``device`` key. A GPU is dealt out where any is asked for.
        sweep: the folder of the sweep.
        job: its number, by which GPUs are dealt out where files cannot be locked.

    Yields:
        The device that the job is to use, until it ends.
    """
    number = gpus() if name in ("auto", "cuda") else 0
    if number <= 1:
        yield name
        return
    folder = sweep / FOLDER / platform.node()  # the folder may be shared by machines
    folder.mkdir(parents=True, exist_ok=True)
    for place in itertools.count():  # on a GPU that has `others` jobs, where none has fewer
        others, gpu = divmod(place, number)
        with (folder / f"{gpu}.{others}").open("a") as file:
            try:
                dealt = _runs.lock(file)
            except OSError as error:
                gpu, dealt = job % number, True
                log.warning(
                    "GPUs are dealt out by the number of the job: %s", error.strerror or error
                )
            if dealt:
                yield f"cuda:{gpu}"
                return
