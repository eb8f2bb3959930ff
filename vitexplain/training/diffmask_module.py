"""The training loop of the gates, on Lightning; imported where Lightning is known to be there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from ..errors import InputError
from .diffmask_learner import DiffMaskLearner
from .diffmask_state import read_training_state, write_training_state
from .lookahead import Lookahead
from .picture_batches import PictureBatches

_LOG_EVERY = 10


class Batches:
    """The batches of a training, over and over, from the step on that the module has reached.

    Args:
        images: batches; iterated again from the start whenever they end.
        module: says where training stands and when it is over.
    """

    def __init__(self, images: Iterable[Any], module: DiffMaskModule) -> None:
        self.images, self.module = images, module

    def __iter__(self) -> Iterator[Tensor]:
        rank, devices = self.module.global_rank, self.module.trainer.world_size
        skip, images = self.module.step * devices, self.images
        ahead = images.endless(skip) if isinstance(images, PictureBatches) else islice(_repeated(images), skip, None)
        for index, batch in enumerate(ahead):
            if self.module.finished:
                return
            if index % devices == rank:
                yield images_of(batch)


class DiffMaskModule(lightning.LightningModule):
    """One step a batch: gates and replacement by Adam, then one multiplier by ascent; now and then an evaluation.

    Args:
        learner: what is trained.
        validation: batches to evaluate on, the same on every device.
        state: file that training can go on from; written at each evaluation.
        identity: what the file is good for: data, model and settings.
    """

    def __init__(
        self, learner: DiffMaskLearner, validation: Sequence[Tensor], state: Path, identity: dict[str, Any]
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learner, self.validation = learner, validation
        self.state, self.identity = state, identity
        self.resumed: dict[str, Any] | None = None
        self.step = 0
        self.started_at = 0
        self.without_progress = 0
        self.finished = False
        self.collapsed = False
        self.history: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Goes on from the file, once training starts.

        Raises:
            CheckpointError: the file is broken, or of another model, other settings or other data.
        """
        self.resumed = read_training_state(self.state, self.identity)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings, gates = self.learner.settings, self.learner.gates
        optimizer = torch.optim.Adam(
            [
                {"params": list(gates.gates.parameters()), "rate": settings.learning_rate},
                {"params": [gates.replacement], "rate": settings.replacement_rate},
            ]
        )
        return optimizer

    def on_fit_start(self) -> None:
        self.learner.masked.adapter.model.to(self.device)
        self._multiplier_optimizer = self.learner.multiplier_optimizer()
        self._lookaheads = self._fresh_lookaheads()
        if self.resumed is not None:
            self._restore(self.resumed)
            self.resumed = None

    def training_step(self, images: Tensor, _: int) -> None:
        if self.finished:  # a batch that was fetched before training was over
            return
        settings = self.learner.settings
        optimizer: Any = self.optimizers()
        found = self.learner.masked.read(images)
        objective = self.learner.objective(found, self.step, rank=self.global_rank)
        share = settings.rate_share(self.step - self.started_at, settings.steps - self.started_at)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(objective.loss)
        optimizer.step()
        for lookahead in self._lookaheads[:1]:
            lookahead.step()
        self.learner.stepped()
        if settings.redraw_for_multiplier:
            with torch.no_grad():
                objective = self.learner.objective(found, self.step, draw=1, rank=self.global_rank)
        violation = self._mean(objective.violation)
        self.learner.ascend(self._multiplier_optimizer, objective.depth, violation)
        for lookahead in self._lookaheads[1:]:
            lookahead.step()
        self.step += 1
        if self.step % _LOG_EVERY == 0:
            figures = {"divergence_soft": violation.item() + settings.margin, "kept_soft": objective.kept.item()}
            self._log({**figures, "depth": float(objective.depth), "learning_rate_share": share})
        if self.step % settings.evaluate_every == 0 or self.step >= settings.steps:
            self._evaluate(optimizer)

    def _evaluate(self, optimizer: Any) -> None:
        learner, settings = self.learner, self.learner.settings
        evaluation = self._of_first(learner.evaluate([batch.to(self.device) for batch in self.validation]))
        multipliers = [each.item() for each in learner.multipliers.parameters()]
        figures = dataclasses.asdict(evaluation)
        self.history.append(
            {
                "step": self.step,
                **figures,
                "multiplier": sum(multipliers) / len(multipliers),
                "restarts": learner.restarts,
            }
        )
        self._log({**figures, **{f"multiplier_{index}": value for index, value in enumerate(multipliers)}})
        self.log_dict({"kept": evaluation.kept, "divergence": evaluation.divergence}, prog_bar=True, logger=False)
        self.without_progress = 0 if learner.offer(evaluation, self.step) else self.without_progress + 1
        if learner.collapsed(evaluation):
            if learner.restarts < settings.restarts:
                self._restart(optimizer)
            else:
                self.collapsed = settings.restarts > 0
        out_of_patience = bool(settings.patience) and self.without_progress >= settings.patience
        self.finished = self.step >= settings.steps or self.collapsed or out_of_patience
        if self.trainer.is_global_zero:
            write_training_state(self.state, self.identity, self._state(optimizer))

    def _restart(self, optimizer: Any) -> None:
        self.learner.restart()
        weights = self._of_first({name: each.cpu() for name, each in self.learner.gates.state_dict().items()})
        self.learner.gates.load_state_dict(weights)
        self.started_at, self.without_progress = self.step, 0
        optimizer.optimizer.state.clear()
        self._multiplier_optimizer = self.learner.multiplier_optimizer()
        self._lookaheads = self._fresh_lookaheads()

    def _fresh_lookaheads(self) -> list[Lookahead]:
        """Slow weights of gates and multipliers, as these are now; none where the settings want none."""
        if not self.learner.settings.lookahead:
            return []
        return [Lookahead(self.learner.gates.parameters()), Lookahead(self.learner.multipliers.parameters())]

    def _state(self, optimizer: Any) -> dict[str, Any]:
        return {
            "learner": self.learner.state_dict(),
            "optimizer": optimizer.optimizer.state_dict(),
            "multiplier_optimizer": self._multiplier_optimizer.state_dict(),
            "lookaheads": [each.state_dict() for each in self._lookaheads],
            "best": self.learner.best,
            "restarts": self.learner.restarts,
            "masked_at_start": self.learner.masked_at_start,
            "steps_at_limit": self.learner.steps_at_limit,
            "step": self.step,
            "started_at": self.started_at,
            "without_progress": self.without_progress,
            "finished": self.finished and self.step < self.learner.settings.steps,
            "history": self.history,
        }

    def _restore(self, kept: dict[str, Any]) -> None:
        optimizer: Any = self.optimizers()
        self.learner.load_state_dict(kept["learner"])
        optimizer.optimizer.load_state_dict(kept["optimizer"])
        self._multiplier_optimizer.load_state_dict(kept["multiplier_optimizer"])
        for lookahead, state in zip(self._lookaheads, kept["lookaheads"], strict=True):
            lookahead.load_state_dict(state)
        self.learner.best, self.learner.restarts = kept["best"], kept["restarts"]
        self.learner.masked_at_start = kept["masked_at_start"]
        self.learner.steps_at_limit = kept.get("steps_at_limit", 0)  # older files do not have it
        self.step, self.started_at = kept["step"], kept["started_at"]
        self.without_progress, self.history = kept["without_progress"], kept["history"]
        self.finished = kept["finished"] or self.step >= self.learner.settings.steps

    def _mean(self, value: Tensor) -> Tensor:
        """Over all devices."""
        return value if self.trainer.world_size == 1 else self.trainer.strategy.reduce(value, reduce_op="mean")

    def _of_first(self, value: Any) -> Any:
        """What the first device found: all have to decide the same."""
        return value if self.trainer.world_size == 1 else self.trainer.strategy.broadcast(value)

    def _log(self, figures: dict[str, float]) -> None:
        if self.trainer.is_global_zero:
            for logger in self.loggers:
                logger.log_metrics(figures, step=self.step)


def images_of(batch: Any) -> Tensor:
    """The images (B, channels, H, W) of what a loader gives: they themselves, or the first of a tuple.

    Raises:
        InputError: it is neither.
    """
    images = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"found a batch of {found}, expected normalised images (B, channels, H, W), or a tuple that begins "
            "with them"
        )
    return images


def _repeated(images: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for batch in images:
            count += 1
            yield batch
        if not count:
            raise InputError("the images ended before training did; expected batches that can be iterated again")
