"""What IA-ViT trains: the interpreter on readings of a frozen model, or both together; free of any framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..iavit.interpreter import Interpreter
from ..iavit.losses import attention_regulariser, simulation_loss
from ..iavit.trunk import TrunkReading, read_on_graph
from ..models.adapter import ModelAdapter
from .iavit_settings import IAViTSettings


class LabelledImages(NamedTuple):
    """A batch for training both.

    Attributes:
        images: (B, channels, H, W), normalised.
        classes: (B,) int64.
    """

    images: Tensor
    classes: Tensor


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a batch and its parts, each (); None for what needs labels where there are none.

    Attributes:
        loss: to be minimised.
        simulation: T² KL of the interpreter from the model, not weighted.
        regularisation: R, not weighted.
        agreement: share of images for which model and interpreter name the same class.
        classification: CE(o, y).
        predictor_right: share of images whose class the model names.
        interpreter_right: the same of the interpreter.
    """

    loss: Tensor
    simulation: Tensor
    regularisation: Tensor
    agreement: Tensor
    classification: Tensor | None = None
    predictor_right: Tensor | None = None
    interpreter_right: Tensor | None = None

    def figures(self) -> dict[str, float]:
        """What there is, as numbers."""
        return {name: float(value.detach()) for name, value in vars(self).items() if value is not None}


class InterpreterLearner(nn.Module):
    """An interpreter that learns from readings of a frozen model.

    Args:
        interpreter: what is trained.
        settings: the recipe.
    """

    def __init__(self, interpreter: Interpreter, settings: IAViTSettings) -> None:
        super().__init__()
        self.interpreter, self.settings = interpreter, settings

    def objective(self, batch: TrunkReading) -> Objective:
        """The terms without labels."""
        return self.terms(batch, None)

    def terms(self, reading: TrunkReading, classes: Tensor | None) -> Objective:
        """All terms.

        Args:
            reading: of the model.
            classes: (B,) labels; None leaves their terms out.
        """
        settings = self.settings
        found = self.interpreter(reading.tokens)
        simulation = simulation_loss(
            found.logits, reading.logits, temperature=settings.temperature, detach_teacher=settings.detach_teacher
        )
        reg = settings.reg if settings.reads_attention else "none"
        regularisation = attention_regulariser(reg, reading.received, found.received)
        loss = settings.simulation_weight * simulation + settings.reg_weight * regularisation
        predicted, imitated = reading.logits.argmax(1), found.logits.argmax(1)
        agreement = (predicted == imitated).float().mean()
        if classes is None:
            return Objective(loss, simulation, regularisation, agreement)
        classification, imitation = (
            F.cross_entropy(logits, classes, label_smoothing=settings.label_smoothing)
            for logits in (reading.logits, found.logits)
        )
        loss = loss + classification + settings.imitation_weight * imitation
        right = [(each == classes).float().mean() for each in (predicted, imitated)]
        return Objective(loss, simulation, regularisation, agreement, classification, *right)


class JointLearner(InterpreterLearner):
    """A model and its interpreter that learn together.

    Args:
        adapter: the model's.
        interpreter: reads it.
        settings: the recipe.
    """

    def __init__(self, adapter: ModelAdapter, interpreter: Interpreter, settings: IAViTSettings) -> None:
        super().__init__(interpreter, settings)
        self.adapter, self.model = adapter, adapter.model

    def objective(self, batch: LabelledImages) -> Objective:  # type: ignore[override]
        """All terms, of images with labels."""
        reading = read_on_graph(self.adapter, batch.images, attention=self.settings.reads_attention)
        return self.terms(reading, batch.classes)
