"""The training loop: batches, validation, checkpoints, and the final test log-likelihood."""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ucvae import checkpoint, distributed, results
from ucvae.config import TrainSettings, flatten, require
from ucvae.data.base import ImageData, as_input
from ucvae.device import within_memory
from ucvae.errors import ConfigError, NonFiniteError, OutOfMemoryError, RunError
from ucvae.estimators.base import Estimate, Estimator
from ucvae.estimators.iwae import Iwae
from ucvae.evaluation import importance
from ucvae.evaluation.latent import active_units, reconstruction_grid, sample_grid
from ucvae.evaluation.split import evaluate
from ucvae.evaluation.unfinished import Unfinished
from ucvae.graphs import Replayed
from ucvae.models.vae import VAE
from ucvae.optimizers import LARGEST_RATE
from ucvae.progress import Fact, Progress, Stand
from ucvae.randomness import stream, stream_seed
from ucvae.statistics import ChainCounts, GradientNoise, Means, stacked, total_norm
from ucvae.stopping import Stopped, StopRequest
from ucvae.tracking import Tracker

log = logging.getLogger(__name__)

# Bytes of a generator's state, by the kind of its device.
STATE_SIZES = {"cpu": 5056, "cuda": 16}

# What a run remembers of its best validation, and its result reports.
BEST = ("log_likelihood", "standard_error", "epoch", "num_samples")


class OptimizerState(Enum):
    """What becomes of the optimizer's running averages at a switch."""

    kept = "kept"
    fresh = "fresh"


@dataclass
class Switch:
    """A warm start: the importance-weighted bound first, then the estimator (the paper's Fig 3b).

    Attributes:
        epochs: before the switch; 0 for none.
        num_samples: K of the bound.
        min_weight: samples with a smaller normalised weight are thinned, as
            :class:`~ucvae.estimators.iwae.Iwae` does it; 0 keeps them all.
        optimizer: its state at the switch.
        lr_factor: what the learning rate is multiplied with from the switch on.
    """

    epochs: int = 0
    num_samples: int = 10
    min_weight: float = 0.0
    optimizer: OptimizerState = OptimizerState.kept
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"epochs must be at least 0, got {self.epochs}")
        self.bound()  # refuses what IWAE does
        require(
            0 < self.lr_factor < math.inf,
            f"lr_factor must be positive and finite, got {self.lr_factor}",
        )
        require(
            self.lr_factor <= LARGEST_RATE,
            f"lr_factor must be at most {LARGEST_RATE:g}, got {self.lr_factor}",
        )
        require(
            self.epochs > 0 or self.lr_factor == 1,
            f"lr_factor must be 1 without a switch (epochs = 0), got {self.lr_factor}",
        )

    def bound(self) -> Iwae:
        """The estimator before the switch."""
        return Iwae(self.num_samples, min_weight=self.min_weight)


@dataclass
class Trainer:
    """Settings of the loop.

    Attributes:
        max_epochs: passes over the training images.
        max_seconds: of training, validations, checkpoints and the test not counted; training ends
            after the step that reaches them, or after ``max_epochs``; null for no such limit.
        batch_size: images a step.
        valid_every: epochs between validations; the last epoch is always validated.
        valid_samples: importance samples an image in validation.
        valid_refinements: steps by which a proposal is fitted to each image of it, see
            :func:`ucvae.evaluation.importance.proposals_of`; 0 for the encoder's proposals.
        patience: stop after so many validations without a new best; null for never.
        log_every: steps between lines of metrics, besides the one after each epoch.
        checkpoint_every: steps between checkpoints, besides the one after each epoch.
        cuda_graphs: on a GPU, launch a step as a whole where the estimator's work allows it; the
            numbers are the same.
        switch: a warm start.
    """

    max_epochs: int = 30
    max_seconds: float | None = None
    batch_size: int = 100
    valid_every: int = 5
    valid_samples: int = 100
    valid_refinements: int = 0
    patience: int | None = None
    log_every: int = 50
    checkpoint_every: int = 500
    cuda_graphs: bool = True
    switch: Switch = field(default_factory=Switch)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool):
                least = 0 if name == "valid_refinements" else 1
                require(value >= least, f"{name} must be at least {least}, got {value}")
        require(
            self.max_seconds is None or self.max_seconds > 0,
            f"max_seconds must be positive, got {self.max_seconds}",
        )
        require(
            self.switch.epochs < self.max_epochs,
            f"switch.epochs must be below max_epochs = {self.max_epochs}, got {self.switch.epochs}",
        )

    def without_effect(self) -> dict[str, str]:
        """The settings of a switch that does not come."""
        if self.switch.epochs:
            return {}
        names = ("num_samples", "min_weight", "optimizer")
        return {f"switch.{name}": "switch.epochs=0" for name in names}


def run(
    settings: TrainSettings, data: ImageData, device: torch.device, folder: Path, resume: bool
) -> dict[str, Any]:
    """Train, keep the best checkpoint by validation, and report its test log-likelihood.

    Args:
        settings: what to train, and how.
        data: on the CPU.
        device: where everything runs.
        folder: of the run; it exists.
        resume: go on from ``checkpoints/last.pt``, as if never stopped.

    Returns:
        The content of ``result.json``; of several processes only the leader has it.

    Raises:
        LostProcessError: another process of the run has died.
        NonFiniteError: a quantity became NaN or infinite.
        OutOfMemoryError: what was asked for is too large for the device.
        RunError: the folder cannot be read or written, or holds a run on other data.
        Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    team = distributed.team()
    with StopRequest() as stop, team.watched(folder), within_memory():
        training = Training(settings, data, device, folder, stop)
        if resume:
            training.restore()
        elif settings.start_from is not None:
            training.start_from(settings.start_from)
        if not team.leads:
            training.train()
            return {}
        with Tracker(folder, training.step) as training.tracker:
            training.train()
            return training.finish()


class Training:
    """A run in progress: everything that a checkpoint keeps, and what it is made from."""

    def __init__(
        self,
        settings: TrainSettings,
        data: ImageData,
        device: torch.device,
        folder: Path,
        stop: StopRequest,
    ) -> None:
        self.settings = settings
        self.trainer: Trainer = settings.trainer
        self.estimator = copy.deepcopy(settings.estimator)  # it learns; the settings stay
        self.warm_start = self.trainer.switch.bound()
        self.device = device
        self.folder = folder
        self.stop = stop
        self.data = data.to(device)
        self.team = distributed.team()
        # As it is now, not when the run ends; before it those that the run has been in.
        self.sessions = [results.environment(device, self.team.size)]

        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(stream_seed(settings.seed, "initialization"))
            self.model: VAE = settings.model.build(data.train_mean, data.levels)
        self.model.to(device)
        self.estimator.begin(self.model, len(data.train))
        # Gathered once: to look them up at each step is a part of what a small model's step takes.
        self.parameters = list(self.model.parameters())
        self.parts = {
            part: dict(module.named_parameters())
            for part, module in (("decoder", self.model.decoder), ("encoder", self.model.encoder))
        }
        self.optimizer = settings.optimizer.build(self.parameters)
        self.noise = stream(settings.seed, self.team.purpose("training noise"), device)
        self.team.begin(self.model)

        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps
        self.batch = 0  # finished batches of the current epoch
        self.start: dict[str, Any] | None = None  # the run whose model this one started with
        self.best: dict[str, Any] | None = None
        self.validations_since_best = 0
        self.validation_due = False  # where the run was stopped in one
        self.damaged: str | None = None  # what is wrong with last.pt, until it is replaced
        self.train_seconds = 0.0
        self.wall_seconds = 0.0
        self.started = self.lap_start = time.monotonic()
        self.logged_images, self.logged_seconds = 0, 0.0  # at the last line of metrics
        self.tracker: Tracker  # opened by run(), at the step that the run starts from
        self.replayed: Replayed[Any] | None = None  # a step, where it is launched as a whole
        self.looking = False  # whether each step is looked at for what is not finite

        self.means = Means()
        self.gradient_noise = GradientNoise()
        self.recent_chains = self._no_chains()
        self.epoch_chains = self._no_chains()
        self.last_coupling: dict[str, Any] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    # The loop

    def train(self) -> None:
        """Go on until the last epoch, or until validation has stopped improving."""
        self.logged_images, self.logged_seconds = self._images(), self.train_seconds
        with Progress(self._stand, silent=not self.team.leads) as bar:
            try:
                if self.step == 0:
                    self.save_last()  # whenever the run is killed, it can be taken up
                    if self.start is not None and self.best is None:
                        self._validate(bar)  # it may be the best that there will be
                        self.save_last()
                if self.validation_due:
                    self._finish_epoch(bar, validate=True)
                bar.restart()
                while not (self._done() or self._out_of_patience()):
                    self._train_epoch(bar)
            except NonFiniteError as error:
                if self.team.size > 1:  # which have to take each step together
                    raise
                raise self._located(error) from error
            if self.best is None:  # resumed with limits that it had passed
                self._validate(bar)
        if self._epochs() <= self.trainer.switch.epochs > 0:
            log.warning(
                "all of the training was iwae's: %s was to begin after %d epochs",
                _name(self.estimator),
                self.trainer.switch.epochs,
            )

    def _done(self) -> bool:
        """Whether all the epochs have been trained that were asked for, or all the time."""
        seconds = self.trainer.max_seconds
        out_of_time = seconds is not None and self.train_seconds >= seconds
        return out_of_time or self.epoch >= self.trainer.max_epochs

    def _epochs(self) -> float:
        """Finished epochs; with a fraction where training is, or ended, inside of one."""
        batches = -(-len(self.data.train) // self.trainer.batch_size)
        return round(self.epoch + self.batch / batches, 3) if self.batch else self.epoch

    def _where(self, epoch: float) -> str:
        """How far training is, of all that was asked for."""
        seconds = self.trainer.max_seconds
        if seconds is None:
            return f"epoch {epoch}/{self.trainer.max_epochs}"
        return f"epoch {epoch}, {self.train_seconds:,.0f} of {seconds:,g} s"

    def _train_epoch(self, bar: Progress) -> None:
        self.lap_start = time.monotonic()  # the epoch's bits are a part of its training
        images, batches = self._begin_epoch()
        for batch in batches[self.batch :]:
            if self.team.asked(self.stop):
                self.save_last()
                self.stop.obey()
            self._train_step(images.index_select(0, batch), batch)
            self.batch += 1
            if self.step % self.trainer.log_every == 0:
                self._log_metrics(bar)
            bar.tick()
            if self.batch == len(batches):
                break
            if self.step % self.trainer.checkpoint_every == 0:
                self.save_last()
            self._agreed_lap()
            if self._done():
                self._log_pending(bar)
                self.last_coupling = self.epoch_chains.summary()
                self._finish_epoch(bar, validate=True)
                return
        self._end_epoch(bar)

    def _begin_epoch(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The images of the epoch, and which of them are in each batch."""
        # Drawn from the epoch's own streams: an epoch that is taken up in its middle is the same.
        images = self.data.epoch_images(self._epoch_stream("binarization", self.device))
        order = torch.randperm(len(images), generator=self._epoch_stream("order", "cpu"))
        for group in self.optimizer.param_groups:
            if group["lr"] != self._learning_rate():
                group["lr"] = self._learning_rate()
                self.replayed = None  # the former one is a part of it
        return images, order.to(self.device).split(self.trainer.batch_size)

    def _learning_rate(self) -> float:
        switch = self.trainer.switch
        factor = 1.0 if self.epoch < switch.epochs else switch.lr_factor
        return factor * self.settings.optimizer.learning_rate(self.epoch)

    def _current_estimator(self) -> Estimator:
        return self.warm_start if self.epoch < self.trainer.switch.epochs else self.estimator

    def _train_step(self, images: Tensor, index: Tensor) -> None:
        """A step on images as the data set holds them, of these places in it."""
        if self._may_replay():
            if self.replayed is None:
                self.replayed = Replayed(self._replayed_step, self.noise)
            names, values, gradients = self.replayed(images, index)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.step += 1
            self.means.add_row(self.step, names, values)
            self.gradient_noise.add(self.step, self.parts["decoder"])
            return
        estimate, logged = self._gradient(as_input(images, self.data.levels), index)
        self.step += 1
        self.means.add(self.step, logged)
        self.gradient_noise.add(self.step, self.parts["decoder"])
        if estimate.chains is not None:
            counts = self._no_chains()
            counts.add(estimate.chains)
            self.team.add_up(counts.parts)
            self.recent_chains.take(counts)
            self.epoch_chains.take(counts)
        self.optimizer.step()
        self._current_estimator().adapt(estimate)

    def _may_replay(self) -> bool:
        return (
            self.trainer.cuda_graphs
            and self.device.type == "cuda"
            and self._current_estimator().may_be_replayed()
            and self.team.size == 1
            and not self.looking
        )

    def _replayed_step(
        self, images: Tensor, index: Tensor
    ) -> tuple[tuple[str, ...], Tensor, list[Tensor | None]]:
        """The device's part of a step: what is to be logged by its names, and the gradients."""
        _, logged = self._gradient(as_input(images, self.data.levels), index)
        self.optimizer.step()
        return tuple(logged), stacked(logged), [p.grad for p in self.parameters]

    def _gradient(self, images: Tensor, index: Tensor) -> tuple[Estimate, dict[str, Tensor]]:
        """Give the parameters their gradients; the estimate, and what is to be logged of it."""
        if self.looking:
            _require_finite({"pixels": images, **dict(self.model.named_parameters())})
        estimator = self._current_estimator()
        estimate = self.team.estimate(estimator, self.model, images, self.noise, index)
        for parameter in self.parameters:  # optimizer.zero_grad() takes ten times as long
            parameter.grad = None
        estimate.surrogate.backward()
        values = {}
        for part, parameters in self.parts.items():
            gradients = [p.grad for p in parameters.values() if p.grad is not None]
            if gradients:  # none where a part of the model is fixed
                values[f"train/gradient_norm_{part}"] = total_norm(gradients)
        if estimate.objective is not None:
            values["train/objective"] = estimate.objective
        values |= estimate.diagnostics
        if self.looking:
            _require_finite(values)
        return estimate, values

    def _end_epoch(self, bar: Progress) -> None:
        self._log_pending(bar)
        self._agreed_lap()
        self.epoch += 1
        self.batch = 0
        self.last_coupling = self.epoch_chains.summary()
        if self.last_coupling is not None and self.team.leads:
            self.tracker.histogram(
                "coupling/meeting_time", self.step, self.epoch_chains.histogram.cpu()
            )
        self.epoch_chains = self._no_chains()
        at_switch = self.epoch == self.trainer.switch.epochs
        due = self._done() or at_switch or self.epoch % self.trainer.valid_every == 0
        self._finish_epoch(bar, validate=due)

    def _finish_epoch(self, bar: Progress, validate: bool) -> None:
        """What comes after an epoch's last step, or after the last that there is time for."""
        if validate:
            self._validate(bar)
        if self.batch == 0 and 0 < self.trainer.switch.epochs == self.epoch:
            self._switch()
        self.save_last()

    def _switch(self) -> None:
        """Go over from the warm start to the estimator."""
        log.info("epoch %d: from here on %s", self.epoch + 1, _name(self.estimator))
        self.validations_since_best = 0  # what the one could not improve, the other may
        self.replayed = None
        self.gradient_noise.part()
        if self.trainer.switch.optimizer is OptimizerState.fresh:
            self.optimizer = self.settings.optimizer.build(self.parameters)

    def _validate(self, bar: Progress) -> None:
        """Validate; where the run is asked to stop meanwhile, all of it is made anew afterwards."""
        self.validation_due = False
        stopped = False
        if self.team.leads:
            images = as_input(self.data.valid, self.data.levels)
            try:
                values = self._log_likelihoods(images)
            except Stopped:
                stopped = True
            else:
                self._look_at_validation(images, values, bar)
        found = self.best, self.validations_since_best, stopped
        self.best, self.validations_since_best, stopped = self.team.first(found)
        self.lap_start = time.monotonic()  # no training until now
        if stopped and self.team.asked(self.stop):
            self.validation_due = True
            self.save_last()
            self.stop.obey()

    def _log_likelihoods(self, images: Tensor) -> Tensor:
        """Of validation images ``[N, P]``; may be stopped on the way."""
        return importance.log_likelihood(
            self.model,
            images,
            self.trainer.valid_samples,
            stream(self.settings.seed, "validation", self.device),
            progress=lambda *_: self.stop.obey(),
            refinements=self.trainer.valid_refinements,
        )

    def _look_at_validation(self, images: Tensor, values: Tensor, bar: Progress) -> None:
        value, error = results.mean_and_error(values)
        units = active_units(self.model, images).item()
        self.tracker.scalars(
            self.step,
            self._epochs(),
            {
                "valid/log_likelihood": value,
                "latent/active_units": float(units),
                "time/train_seconds": self.train_seconds,
            },
        )
        shape = self.data.image_shape
        samples = sample_grid(self.model, shape, stream(self.settings.seed, "samples", self.device))
        self.tracker.images("samples", self.step, samples)
        reconstructions = reconstruction_grid(self.model, images[:32], shape)
        self.tracker.images("reconstructions", self.step, reconstructions)
        pace = f", {self._images_per_second():,.0f} images/s" if self.step else ""
        log.info(
            "%s: validation %.2f +- %.2f, %d of %d units active%s",
            self._where(self._epochs()),
            value,
            error,
            units,
            self.model.latent_dim,
            pace,
        )
        bar.facts["valid"] = Fact(f"validation {value:.2f}", f"valid {value:.2f}")
        if self.best is None or value > self.best["log_likelihood"]:
            best = (value, error, self._epochs(), self.trainer.valid_samples)
            self.best = dict(zip(BEST, best, strict=True))
            self.validations_since_best = 0
            best_state = {**self._describe(), "epoch": self._epochs(), "valid": self.best}
            self._save("best.pt", best_state)
        else:
            self.validations_since_best += 1

    def _out_of_patience(self) -> bool:
        patience = self.trainer.patience
        warm = self.epoch < self.trainer.switch.epochs
        return patience is not None and not warm and self.validations_since_best >= patience

    def _log_pending(self, bar: Progress) -> None:
        """Log the steps since the last line, if there are any."""
        if self.means.sums:
            self._log_metrics(bar)

    def _log_metrics(self, bar: Progress) -> None:
        if not self.team.leads:
            return
        values = self.means.flush(self.step)
        for name, share in self.gradient_noise.flush(self.step).items():
            values[f"gradient_noise/{name}"] = share
        self._lap()
        coupling = self.recent_chains.summary()
        if coupling is not None:
            for name, value in coupling["meeting_time"].items():
                values[f"coupling/meeting_time_{name}"] = float(value)
            values["coupling/truncated_fraction"] = coupling["truncated_fraction"]
            values["coupling/decoder_evaluations"] = coupling["decoder_evaluations_per_image"]
            values["coupling/particles"] = coupling["particles_per_image"]
            self.recent_chains = self._no_chains()
        values["time/images_per_s"] = self._images_per_second()
        self.tracker.scalars(self.step, self.epoch, values)
        self._tell(bar, values)

    def _tell(self, bar: Progress, values: dict[str, float]) -> None:
        """Have the bar show the metrics of a line."""
        images, seconds = self._images(), self.train_seconds
        pace = (images - self.logged_images) / max(seconds - self.logged_seconds, 1e-9)
        self.logged_images, self.logged_seconds = images, seconds
        facts = {"pace": Fact(f"{pace:,.0f} images/s", f"{pace:,.0f} images/s")}
        if "train/objective" in values:
            bound = f"{_name(self._current_estimator())} {values['train/objective']:.2f}"
            facts["bound"] = Fact(bound, bound)
        if "train/iwae_bound" in values:
            bound = f"iwae bound {values['train/iwae_bound']:.2f}"
            facts["bound"] = Fact(f"encoder's {bound}", bound)
        if "coupling/meeting_time_p90" in values:
            p90 = f"p90 {values['coupling/meeting_time_p90']:.0f}"
            facts["p90"] = Fact(f"meeting time {p90}", p90)
        if "valid" in bar.facts:
            facts["valid"] = bar.facts["valid"]
        bar.facts = facts

    def _stand(self) -> Stand:
        share = self._images() / (self.trainer.max_epochs * len(self.data.train))
        if self.trainer.max_seconds is not None:
            share = max(share, self.train_seconds / self.trainer.max_seconds)
        place = self._where(min(self.epoch + 1, self.trainer.max_epochs))
        return Stand(place, min(share, 1.0), f", step {self.step}")

    def _images(self) -> int:
        """Images trained on so far, each as often as it came."""
        of_epoch = min(self.batch * self.trainer.batch_size, len(self.data.train))
        return self.epoch * len(self.data.train) + of_epoch

    def _images_per_second(self) -> float:
        return self._images() / max(self.train_seconds, 1e-9)

    def _lap(self) -> None:
        """Count the time since the last lap as training.

        Where what follows is no training, call it only when the device has finished.
        """
        now = time.monotonic()
        self.train_seconds += now - self.lap_start
        self.lap_start = now

    def _agreed_lap(self) -> None:
        """A lap before a decision that depends on the time, for which the leader's clock counts."""
        self._lap()
        if self.trainer.max_seconds is not None:
            self.train_seconds = self.team.first(self.train_seconds)

    # What is not finite

    def _located(self, error: NonFiniteError) -> NonFiniteError:
        """The error, with the step and the image that it began with.

        To look at each step would make the device wait, so this is done afterwards: the steps
        since the last checkpoint are taken again. Where that does not show the fault, as it may not
        on a GPU, which rounds in its own order, the error is as it was.
        """
        log.warning("%s; looking for where it began, from the last checkpoint on", error)
        try:
            with within_memory():  # there is all of it twice
                again = Training(self.settings, self.data, self.device, self.folder, self.stop)
                again.restore()
                found = again._first_fault(self.step + 1)
        except (ConfigError, OutOfMemoryError, RunError) as reason:
            return NonFiniteError(f"{error}; where it began is not known ({reason})")
        if found is None:
            return error
        step, fault, images = found
        told = "" if fault == str(error) else f" ({fault})"
        return NonFiniteError(f"{error}; it began in step {step}{told}, {images}")

    def _first_fault(self, last_step: int) -> tuple[int, str, str] | None:
        """Train on to the first step that shows a fault: its number, the fault, the images."""
        self.looking = True
        while self.step < last_step:
            images, batches = self._begin_epoch()
            for index in batches[self.batch :]:
                batch = images.index_select(0, index)
                step, noise = self.step + 1, self.noise.get_state()
                try:
                    self._train_step(batch, index)
                except NonFiniteError as error:
                    inputs = as_input(batch, self.data.levels)
                    return step, str(error), self._culprits(inputs, index, noise)
                if self.step >= last_step:
                    return None
            self.epoch, self.batch = self.epoch + 1, 0
            if self.epoch == self.trainer.switch.epochs:
                self._switch()
        return None

    def _culprits(self, images: Tensor, index: Tensor, noise: Tensor) -> str:
        """Which images of a batch show the fault by themselves."""
        found = []
        for row, position in enumerate(index.tolist()):
            self.noise.set_state(noise)
            try:
                self._gradient(images[row : row + 1], index[row : row + 1])
            except NonFiniteError:
                found.append(position)
        if len(found) == len(index):
            return "with every image of the batch"
        if not found:
            return "with no image of the batch by itself"
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return f"with image {found[0]} of the training images{more}"

    # The end

    def finish(self) -> dict[str, Any]:
        """Evaluate the best checkpoint on the test split and write ``result.json``."""
        with checkpoint.fitting(self.checkpoints / "best.pt"):
            best = self._load_best()
            self.model.load_state_dict(best["model"])
            # Killed between best.pt and last.pt, a run may have gone on with an earlier record.
            valid = best.get("valid", self.best)
        log.info("testing the checkpoint of epoch %s", best["epoch"])
        unfinished = Unfinished(self.folder / "evaluations")
        test = evaluate(
            self.settings.evaluator,
            self.model,
            self.data,
            "test",
            stream(self.settings.seed, "test", self.device),
            self.stop.obey,
            unfinished,
        )
        study = None
        if self.settings.study is not None:
            study = self.settings.study(
                self.model, self.data, self.settings.seed, self.folder, self.stop.obey
            )
        result = {
            "dataset": self.data.name,
            "binarization": self.data.binarization,
            "split_sha256": self.data.split_sha256,
            "estimator": _name(self.settings.estimator),
            "model": _name(self.settings.model),
            "seed": self.settings.seed,
            "start": self.start,
            **self.sessions[-1],
            "sessions": self.sessions,
            "epochs": self._epochs(),
            "wall_clock_s": self._wall_seconds(),
            "train_s": self.train_seconds,
            "train_images_per_s": self._images_per_second(),
            "valid": valid,
            "test": test.summary,
            "coupling": self.last_coupling,
            "study": study,
            "status": "finished" if self._done() else "early_stopped",
            "config": self.settings.raw,
        }
        self.tracker.hyperparameters(flatten(self.settings.raw), "test/log_likelihood")
        self.tracker.scalars(
            self.step, self.epoch, {"test/log_likelihood": test.summary["log_likelihood"]}
        )
        results.write_log_likelihoods(self.folder, "test", test.values)
        results.write(self.folder / "result.json", result)
        unfinished.remove()
        log.info("%s", results.summary(result, self.folder, self.settings.study))
        return result

    # Checkpoints

    def save_last(self) -> None:
        """Write ``last.pt``: all that is needed to go on as if never stopped."""
        noise, *others = self.team.gather(self.noise.get_state())
        if self.team.leads:
            self._save_state(noise, others)
        self.team.first(None)  # no process ends before the state is saved
        self.lap_start = time.monotonic()  # no training until now

    def _save_state(self, noise: Tensor, others: list[Tensor]) -> None:
        self.means.check(self.step)
        if not total_norm(self.parameters).isfinite():
            raise NonFiniteError(
                f"a parameter became infinite or NaN by step {self.step}; "
                "no checkpoint has taken it in"
            )
        if self.batch:
            self._lap()
        state = {
            **self._describe(),
            "epochs": self._epochs(),
            "optimizer": self.optimizer.state_dict(),
            "estimator": self.estimator.state_dict(),
            "noise": noise,
            "noise_of_others": others,
            "batch": self.batch,
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "validation_due": self.validation_due,
            "sessions": self.sessions,
            "train_seconds": self.train_seconds,
            "wall_seconds": self._wall_seconds(),
            "means": self.means.state_dict(),
            "gradient_noise": self.gradient_noise.state_dict(),
            "recent_chains": self.recent_chains.state_dict(),
            "epoch_chains": self.epoch_chains.state_dict(),
            "last_coupling": self.last_coupling,
        }
        # A damaged file must not take the place of the whole one that the run was taken up from.
        whole = self.damaged is None
        self._save("last.pt", state, checkpoint.previous(self.folder) if whole else None)
        self.damaged = None

    def start_from(self, name: str) -> None:
        """Begin with another run's model, its optimizer's running averages, and its proposals.

        The averages and the proposals that it remembers are those of the latest state. Where the
        optimizer is of another kind, or the checkpoint has none, the averages begin anew; so do the
        proposals where the training images are others, one of the two remembers none, or these did
        not follow the encoder's means and are to do so now.

        Raises:
            RunError: it cannot be read, or its model does not fit this one.
        """
        found: tuple[Path, dict[str, Any], str | None] = Path(name), {}, None
        if self.team.leads:
            found = checkpoint.load_start(name)
            learnt = found[1].get("estimator", {})  # may be large, for estimators that remember
            own = self.estimator.state_dict()
            found[1]["estimator"] = {key: learnt[key] for key in own if key in learnt}
        path, state, fault = self.team.first(found)
        if fault is not None:
            log.warning("%s; starting from %s, the one before it", fault, path.name)
        with checkpoint.fitting(path):
            self.model.load_state_dict(state["model"])
            optimizer = state["config"]["optimizer"]["_target_"]
            kept = "optimizer" in state and optimizer == self.settings.raw["optimizer"]["_target_"]
            if kept:
                now = self.optimizer.state_dict()["param_groups"]
                averages = state["optimizer"]["state"]
                self.optimizer.load_state_dict({"state": averages, "param_groups": now})
            other_images = state["split_sha256"]["train"] != self.data.split_sha256["train"]
            inherited = not other_images and self.estimator.inherit(state["estimator"])
        self.start = {
            "checkpoint": str(path.resolve()),
            # A last checkpoint's "epoch" is what training goes on from: the whole ones.
            "epochs": state.get("epochs", state["epoch"]),
            "averages": "kept" if kept else "fresh",
            "proposals": "kept" if inherited else "fresh",
            "config": state["config"],
            "start": state.get("start"),
        }
        if other_images:
            log.warning("%s was trained on other images than this run will be", path)
        log.info(
            "starting from %s, after %s epochs; the optimizer's running averages are %s%s",
            path,
            self.start["epochs"],
            self.start["averages"],
            ", and the remembered proposals are kept" if inherited else "",
        )

    def restore(self) -> None:
        """Take up ``last.pt``.

        Raises:
            RunError: it cannot be read, or belongs to other data.
        """
        found: tuple[Path, dict[str, Any], str | None] = checkpoint.last(self.folder), {}, None
        if self.team.leads:
            found = checkpoint.load_last(self.folder, split_sha256=dict)
        path, state, self.damaged = self.team.first(found)
        if self.damaged is not None and self.team.leads:
            log.warning("%s; going on from %s, the one before it", self.damaged, path.name)
        checkpoint.require_same_data(
            state["split_sha256"], self.data.name, self.data.split_sha256, self.folder
        )
        with checkpoint.fitting(path):
            self.model.load_state_dict(state["model"])
            # A run may have begun on another device; what the GPU wants is the optimizer's to say.
            for saved, group in zip(
                state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True
            ):
                saved["capturable"] = group["capturable"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.estimator.load_state_dict(state["estimator"])
            for name in (
                "epoch",
                "step",
                "batch",
                "best",
                "validations_since_best",
                "train_seconds",
                "wall_seconds",
                "last_coupling",
            ):
                setattr(self, name, state[name])
            # Unknown to earlier versions:
            self.start = state.get("start")
            self.validation_due = state.get("validation_due", False)
            earlier = state.get("sessions", [])
            self.sessions = [*earlier, *(now for now in self.sessions if now not in earlier[-1:])]
            self._restore_noise([state["noise"], *state.get("noise_of_others", [])])
            self.means.load_state_dict(state["means"], self.device)
            self.gradient_noise.load_state_dict(state["gradient_noise"], self.device)
            self.recent_chains.load_state_dict(state["recent_chains"])
            self.epoch_chains.load_state_dict(state["epoch_chains"])
            if self.best is not None:
                self.best = {name: self.best[name] for name in BEST}
        if self.best is not None and self.team.leads:
            self._load_best()  # now, not after all the training, is the time to miss it
        log.info("going on from epoch %d, step %d", self.epoch, self.step)

    def _restore_noise(self, states: list[Tensor]) -> None:
        """Go on with this process's random numbers; with new ones on another kind of device."""
        state = states[self.team.rank]
        size = len(state) if isinstance(state, Tensor) else None
        if size not in STATE_SIZES.values() or size == STATE_SIZES[self.device.type]:
            self.noise.set_state(state)  # and refuse what is no state
            return
        purpose = self.team.purpose(f"training noise from step {self.step} on")
        self.noise = stream(self.settings.seed, purpose, self.device)
        log.warning(
            "the run was on a device of another kind, whose random numbers %s cannot go on with; "
            "from here on they are others",
            self.device.type,
        )

    def _load_best(self) -> dict[str, Any]:
        try:
            return checkpoint.load(self.checkpoints / "best.pt", model=dict, epoch=int | float)
        except checkpoint.DamagedError as error:
            raise RunError(
                f"{error}; nothing else holds the best model: put back a copy of the file, or "
                "train again in another folder"
            ) from error

    def _describe(self) -> dict[str, Any]:
        return {
            "config": self.settings.raw,
            "dataset": self.data.name,
            "split_sha256": self.data.split_sha256,
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "start": self.start,
        }

    def _save(self, name: str, state: dict[str, Any], previous: Path | None = None) -> None:
        try:
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(
                f"checkpoint: cannot make {self.checkpoints}: {error.strerror}"
            ) from error
        checkpoint.save(self.checkpoints / name, state, previous)

    def _wall_seconds(self) -> float:
        return self.wall_seconds + time.monotonic() - self.started

    def _epoch_stream(self, purpose: str, device: torch.device | str) -> torch.Generator:
        return stream(self.settings.seed, f"{purpose} of epoch {self.epoch}", device)

    def _no_chains(self) -> ChainCounts:
        return ChainCounts(getattr(self.estimator, "max_steps", 0), self.device)


def _require_finite(values: dict[str, Tensor]) -> None:
    """Refuse a NaN or an infinity; waits for the device.

    Raises:
        NonFiniteError: names the first quantity that has one.
    """
    for name, value in values.items():
        if not value.isfinite().all():
            raise NonFiniteError(f"{name} has a NaN or an infinity")


def _name(component: Any) -> str:
    return type(component).__name__.lower()
