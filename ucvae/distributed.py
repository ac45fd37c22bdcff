"""One run in several processes: what each takes of a batch, and what they agree on.

``torchrun`` starts as many processes as there are devices, and each has the whole run: the data,
the model, the optimizer, what the estimator has learnt. Of a batch each takes its own share, in
:class:`~torch.nn.parallel.DistributedDataParallel`, which averages the gradients; what else is
learnt from the estimate is shared here. So all of them hold the same numbers, to the last bit, at
all times. The first process leads: it alone writes, logs, validates and tests.

The loop asks a :class:`Team`. A process that is alone has one too, which shares nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ucvae.device import Place
from ucvae.errors import LostProcessError, UcvaeError
from ucvae.estimators.base import Estimate, Estimator
from ucvae.models.vae import VAE
from ucvae.stopping import Stopped, StopRequest

T = TypeVar("T")

# For what may take long: a download, a validation. That a process has died is noticed all the same,
# by its closed connections.
PATIENCE = datetime.timedelta(days=7)
# Seconds for which a process that fails leaves the word to the leader, which may have failed too.
GRACE = 2.0


class Team:
    """The processes of a run, as the loop sees them: here one that is alone.

    Attributes:
        rank: of this process.
        size: how many there are.
        ordered: whether the leader has told the others what to do.
    """

    rank = 0
    size = 1
    ordered = False

    @property
    def leads(self) -> bool:
        """Whether this process writes, logs, validates and tests."""
        return self.rank == 0

    def purpose(self, name: str) -> str:
        """The name of this process's own random stream; the leader's is that of one alone."""
        return name if self.leads else f"{name} of rank {self.rank}"

    def begin(self, model: VAE) -> None:
        """Get ready to share the gradients of a model, which is on its device."""

    def estimate(
        self,
        estimator: Estimator,
        model: VAE,
        images: Tensor,
        generator: torch.Generator,
        index: Tensor,
    ) -> Estimate:
        """The estimate for a batch, as :class:`~ucvae.estimators.base.Estimator` has it.

        All of it is the whole batch's, but for two parts: the surrogate, whose *gradient* is
        the whole batch's, and the chains, which are those of this process's images with ``ess`` of
        all.
        """
        return estimator(model, images, generator, index)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum whole numbers over the processes, in place."""

    def gather(self, state: Tensor) -> list[Tensor]:
        """The tensors of all processes on the CPU, by rank."""
        return [state]

    def first(self, value: T) -> T:
        """The leader's value, however long it takes."""
        return value

    def order(self, what: Any) -> None:
        """Tell the others what to do; they wait for it in :meth:`first`."""
        self.ordered = True
        self.first(what)

    def asked(self, stop: StopRequest) -> bool:
        """Whether any process was asked to stop; if so, this one is."""
        return stop.asked

    def fall_silent(self) -> None:
        """Let no other process tell why the run has ended, for this one does so."""

    @contextlib.contextmanager
    def watched(self, folder: Path | None = None) -> Iterator[None]:
        """Where there are several, tell of an error, unless another process has done so.

        Args:
            folder: of the run, once it has one.

        Raises:
            LostProcessError: another process has ended before its time.
        """
        yield


class _Processes(Team):
    """Several processes; every method is called by all of them in the same order."""

    def __init__(self, here: Place, tell: Callable[[str], None]) -> None:
        self.rank, self.size = here.rank, here.size
        self._tell = tell
        self._word = _Word(here)
        # Every process is a member, and gets no number in the group's place.
        self._patient: dist.ProcessGroup = dist.new_group(  # type: ignore[assignment]
            backend="gloo", timeout=PATIENCE
        )
        self._sharing: DistributedDataParallel

    def begin(self, model: VAE) -> None:
        device = next(model.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._sharing = DistributedDataParallel(_Share(model))
        # DistributedDataParallel orders the gradients as they come in the first backward pass, and
        # from three processes on sums are rounded by that order: it must not depend on where
        # training is taken up.
        self._sharing(None).backward()
        model.zero_grad()

    def estimate(
        self,
        estimator: Estimator,
        model: VAE,
        images: Tensor,
        generator: torch.Generator,
        index: Tensor,
    ) -> Estimate:
        counts = shares(len(images), self.size)
        own = counts[self.rank]
        start = sum(counts[: self.rank])
        # One without an image of its own borrows the first, and gives it no weight.
        rows = slice(start, start + own) if own else slice(0, 1)
        # The mean over the processes of weighted means over shares is the mean over the batch.
        weight = own * self.size / len(images)
        surrogate = self._sharing(estimator, weight, images[rows], generator, index[rows])
        estimate = self._sharing.module.estimate
        return self._pool(estimate, weight, counts, surrogate)

    def _pool(
        self, estimate: Estimate, weight: float, counts: list[int], surrogate: Tensor
    ) -> Estimate:
        own = counts[self.rank]
        chains, objective = estimate.chains, estimate.objective
        means = dict(estimate.diagnostics)
        if objective is not None:
            means["objective"] = objective
        if chains is not None:
            means |= {"ess": chains.ess, "acceptance": chains.acceptance}
        means = self._mean(means, weight)
        if objective is not None:
            objective = means.pop("objective")
        if chains is not None:
            chains = _each(chains, lambda part: part if own or not part.ndim else part[:0])
            own_means = {name: means.pop(name) for name in ("ess", "acceptance")}
            chains = chains._replace(**own_means)
        lesson = estimate.lesson
        if lesson is not None:
            lesson = _each(lesson, lambda rows: self._join(rows[:own], counts))
        return Estimate(surrogate, objective, means, chains, lesson)

    def _mean(self, values: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
        """Weighted means of 0-dim tensors over the processes."""
        if not values:
            return {}
        parts = torch.stack([value.detach().double() for value in values.values()])
        parts = parts * (weight / self.size) if weight else torch.zeros_like(parts)
        dist.all_reduce(parts)
        return {
            name: mean.to(value.dtype)
            for (name, value), mean in zip(values.items(), parts, strict=True)
        }

    def _join(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all processes, of which each has as many as ``counts`` says."""
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        sums = flat.split([tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, state: Tensor) -> list[Tensor]:
        state = state.cpu()
        states = [torch.empty_like(state) for _ in range(self.size)]
        dist.all_gather(states, state)
        return states

    def first(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._patient)
        return values[0]

    def asked(self, stop: StopRequest) -> bool:
        number = torch.tensor(stop.number or 0)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        if not number:
            return False  # though a signal may have come meanwhile: of that the others do not know
        stop.number = int(number)
        return True

    @contextlib.contextmanager
    def watched(self, folder: Path | None = None) -> Iterator[None]:
        # Told here and not by the command: when one process has ended, torchrun ends the others.
        try:
            yield
        except UcvaeError as error:
            self.tell(error)
            raise
        except RuntimeError as error:
            if not _is_lost(error):
                self.fall_silent()
                raise
            message = "another process of the run has died, or cannot be reached any more"
            if folder is not None and (folder / "checkpoints" / "last.pt").is_file():
                message += (
                    f"; go on with {self.size} processes again by ucvae-train "
                    f"resume={shlex.quote(str(folder))}"
                )
            lost = LostProcessError(message)
            self.tell(lost)
            raise lost from error
        except Stopped:  # all of them are, and the leader tells
            if not self.leads:
                self._word.wait()
            raise
        except BaseException:
            self.fall_silent()
            raise

    def tell(self, error: UcvaeError) -> None:
        """Tell of an error, unless it has been told; what ails all, the leader tells."""
        if not error.told:
            if not self.leads:
                self._word.wait()
            text = str(error) if self.leads else f"rank {self.rank}: {error}"
            told = self._word.take(text)
            if told == text or (self.leads and not isinstance(error, LostProcessError)):
                self._tell(text)
            else:
                error.args = (told,)  # for the log
            error.told = True

    def fall_silent(self) -> None:
        self._word.take(f"see what rank {self.rank} has told")


class _Share(nn.Module):
    """A process's part of the surrogate, in the form that DistributedDataParallel takes."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model
        self.estimate: Estimate

    def forward(self, estimator: Estimator | None, weight: float = 0, *batch: Any) -> Tensor:
        """The estimator's surrogate, ``weight`` times; without one something flat."""
        if estimator is None:
            return 0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
        self.estimate = estimator(self.model, *batch)
        return weight * self.estimate.surrogate


def shares(count: int, size: int) -> list[int]:
    """How many of ``count`` images each of ``size`` processes takes: the first ones one more.

    >>> shares(7, 3)
    [3, 2, 2]
    """
    return [count // size + (rank < count % size) for rank in range(size)]


def _each(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same NamedTuples with all tensors in them changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if not hasattr(tree, "_fields"):
        raise TypeError(f"a lesson must be of tensors in NamedTuples, got {type(tree).__name__}")
    return type(tree)(*(_each(part, change) for part in tree))


# Coming together, and falling apart


class _Word:
    """Why a run has ended; one process of it gets to tell.

    It is kept by the store at which the processes have met.
    """

    def __init__(self, here: Place) -> None:
        # torchrun keeps one store for all attempts of a run that it starts again.
        self._key = f"ucvae/word/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # The module does not list what it has of this name.
        self._store = dist.TCPStore(host, port, is_master=False)  # type: ignore[attr-defined]

    def take(self, text: str) -> str:
        """What is told: the text of the process that has come first."""
        try:
            return self._store.compare_set(self._key, "", text).decode()
        except RuntimeError:  # without torchrun, the store ends with the first process
            return text

    def wait(self) -> None:
        """Give another process some time to come first."""
        end = time.monotonic() + GRACE
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < end and not self._store.check([self._key]):
                time.sleep(0.05)


def _is_lost(error: RuntimeError) -> bool:
    """Whether another process is the reason: what gloo raises has no type of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


_team = Team()


def team() -> Team:
    """The team that this process is in."""
    return _team


@contextlib.contextmanager
def joined(here: Place, tell: Callable[[str], None]) -> Iterator[_Processes]:
    """Meet the other processes of the run, where the environment says.

    Args:
        here: this process among them.
        tell: prints an error for the user.

    Raises:
        LostProcessError: they do not come, or the place cannot be reached.
    """
    global _team
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        _team = _Processes(here, tell)
    except RuntimeError as error:
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise LostProcessError(
            f"rank {here.rank}: the {here.size} processes of the run have not met at {meeting}: "
            f"{reason}"
        ) from error
    try:
        yield _team
    finally:
        _team = Team()
        dist.destroy_process_group()
