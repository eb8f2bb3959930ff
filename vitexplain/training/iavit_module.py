"""The training loop of IA-ViT, on Lightning; imported where Lightning is known to be there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..randomness import begin_at
from .diffmask_state import read_training_state, write_training_state
from .iavit_learners import InterpreterLearner
from .iavit_settings import IAViTSettings
from .trained_model import undecayed

_SPREAD = 1_000_003  # a prime, so that steps of neighbouring seeds draw different dropout
_MOMENTUM = 0.9


class IAViTModule(lightning.LightningModule):
    """One step a batch; now and then an evaluation, whose lowest loss decides which weights are kept.

    Args:
        learner: what is trained.
        validation: batches to evaluate on, iterated anew each time.
        state: file that an interrupted training can go on from; written before each evaluation.
        identity: what the file is good for: model, settings, data.

    Attributes:
        step: steps done.
        history: an entry each evaluation: mean training loss since the one before, and figures on `validation`.
        best: figures and weights of the best evaluation; None before the first whose loss is a number.
    """

    def __init__(
        self, learner: InterpreterLearner, validation: Iterable[Any], state: Path, identity: dict[str, Any]
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learner, self.validation = learner, validation
        self.state, self.identity = state, identity
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._recent: list[float] = []
        self._resumed: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps are made, and evaluated."""
        return self.step == self.learner.settings.steps and not self._recent

    def resume(self) -> None:
        """Goes on from the file, once training starts.

        Raises:
            CheckpointError: the file is broken, or of another model, other settings or other data.
        """
        self._resumed = read_training_state(self.state, self.identity)
        self.step = self._resumed["step"]

    def configure_optimizers(self) -> Any:
        settings = self.learner.settings
        groups = parameter_groups(self.learner, settings)
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups) if settings.optimiser == "adamw" else torch.optim.SGD(groups, momentum=_MOMENTUM)
        )
        return [optimizer], [one_cycle(optimizer, settings)]

    def on_fit_start(self) -> None:
        if self._resumed is not None:
            self.learner.load_state_dict(self._resumed["learner"])
            self._optimizer.load_state_dict(self._resumed["optimizer"])
            self._schedule.load_state_dict(self._resumed["schedule"])
            self.history, self.best = self._resumed["history"], self._resumed["best"]
            self._recent = self._resumed["recent"]
            self._resumed = None
        self.learner.train()
        if self._recent:  # what was saved is not evaluated yet
            self._evaluate()

    def training_step(self, batch: Any, _: int) -> None:
        settings = self.learner.settings
        begin_at(settings.seed * _SPREAD + self.step, self.device)  # dropout is then a function of the step
        objective = self.learner.objective(batch)
        self._optimizer.zero_grad(set_to_none=True)
        self.manual_backward(objective.loss)
        nn.utils.clip_grad_norm_(self.learner.parameters(), settings.gradient_clip)
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        self._recent.append(objective.loss.item())
        if self.step % settings.evaluate_every == 0 or self.step == settings.steps:
            self._save()  # first, so that an evaluation that fails costs no steps
            self._evaluate()
            shown = {name: self.history[-1][name] for name in ("loss", "agreement")}
            self.log_dict(shown, prog_bar=True, logger=False)

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.learner.eval()
        found = mean_figures(self.learner, self.validation, self.device)
        self.learner.train()
        entry = {"step": self.step, "training_loss": sum(self._recent) / len(self._recent), **found}
        self._recent.clear()
        self.history.append(entry)
        if math.isfinite(entry["loss"]) and (self.best is None or entry["loss"] < self.best["figures"]["loss"]):
            weights = {name: each.detach().cpu().clone() for name, each in self.learner.state_dict().items()}
            self.best = {"figures": entry, "weights": weights}
        for logger in self.loggers:
            logger.log_metrics({name: value for name, value in entry.items() if name != "step"}, step=self.step)

    def _save(self) -> None:
        kept = {
            "learner": self.learner.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "history": self.history,
            "best": self.best,
            "recent": self._recent,
            "step": self.step,
        }
        write_training_state(self.state, self.identity, kept)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        wrapped: Any = self.optimizers()
        optimizer: torch.optim.Optimizer = wrapped.optimizer
        return optimizer

    @property
    def _schedule(self) -> Any:
        return self.lr_schedulers()


def one_cycle(optimizer: torch.optim.Optimizer, settings: IAViTSettings) -> torch.optim.lr_scheduler.OneCycleLR:
    """The rate of each group rises to its own over the first `warmup_share` of the steps, and falls to nearly none."""
    share, total = settings.warmup_share, settings.steps + 1
    if share * total == 1:  # the rise would end at the first step: OneCycleLR divides by its length, which is then 0
        share *= 1 - 1e-9
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=total, pct_start=share, cycle_momentum=False
    )


def mean_figures(learner: InterpreterLearner, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Mean figures of an objective over all images of some batches."""
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        moved = type(batch)(*(each.to(device) for each in batch))
        size = len(moved[0])
        count += size
        for name, value in learner.objective(moved).figures().items():
            sums[name] = sums.get(name, 0.0) + size * value
    return {name: value / count for name, value in sums.items()}


def parameter_groups(learner: nn.Module, settings: IAViTSettings) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay; those of the interpreter may have a rate of their own."""
    spared = undecayed(learner)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        own = settings.interpreter_rate if name.startswith("interpreter.") else 0.0
        key = (own or settings.learning_rate, 0.0 if name in spared else settings.weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def numbered(batches: Dataset[Any], first: int, settings: IAViTSettings) -> DataLoader[Any]:
    """A loader of the batches of a training from number `first` on."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, settings.steps),
        num_workers=settings.workers,
        multiprocessing_context="spawn" if settings.workers else None,
        generator=torch.Generator(),  # the loader draws a seed, which must not move the user's random state
    )
