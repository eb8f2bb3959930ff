"""How well a model and its interpreter name images, how far they agree, and how evenly they treat two groups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import load_examples
from ..data.example import Example
from ..errors import InputError
from ..models import adapt
from ..models.adapter import ModelAdapter
from ..preprocessing import Preprocessing
from .checkpoint import load_interpreter
from .trunk import read_frozen


@dataclass(frozen=True, eq=False)
class Answers:
    """What was answered for n images.

    Attributes:
        names: of the images, in the order of the rows below; unreadable ones are left out.
        labels: (n,) int64, first label of each.
        predicted: (n,) int64, the model's class.
        imitated: (n,) int64, the interpreter's.
    """

    names: tuple[str, ...]
    labels: Tensor
    predicted: Tensor
    imitated: Tensor

    @property
    def predictor_accuracy(self) -> float:
        """Share of images whose label the model names."""
        return (self.predicted == self.labels).double().mean().item()

    @property
    def interpreter_accuracy(self) -> float:
        """Share of images whose label the interpreter names."""
        return (self.imitated == self.labels).double().mean().item()

    @property
    def agreement(self) -> float:
        """Share of images for which both name the same class."""
        return (self.imitated == self.predicted).double().mean().item()


def answers(
    model: nn.Module | ModelAdapter,
    checkpoint: str | os.PathLike[str],
    examples: Sequence[Example],
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
) -> Answers:
    """Asks a model and its interpreter for the class of images.

    Args:
        model: the model; it is borrowed.
        checkpoint: the interpreter's file.
        examples: with labels.
        preprocessing: how pictures become the model's input.
        batch_size: images in a forward pass.

    Raises:
        CheckpointError: the checkpoint is broken, or belongs to another model.
        InputError: an example has no label, or none can be read.
    """
    adapter = adapt(model)
    names: list[str] = []
    rows: list[Tensor] = []
    for batch in load_examples(examples, preprocessing, batch_size=batch_size):
        if not all(batch.labels):
            raise InputError("found examples without a label, expected one in each that is measured")
        reading = read_frozen(adapter, batch.inputs, attention=False)
        interpreter = load_interpreter(checkpoint, adapter, reading.tokens.device, reading.tokens.dtype)
        with torch.no_grad():
            imitated = interpreter(reading.tokens).logits.argmax(1).cpu()
        labels = torch.tensor([labels[0] for labels in batch.labels])
        names += batch.names
        rows.append(torch.stack([labels, reading.logits.argmax(1).cpu(), imitated]))
    return Answers(tuple(names), *torch.cat(rows, 1))


@dataclass(frozen=True)
class Fairness:
    """How far two groups are treated alike; every difference is absolute, in [0, 1], and 0 is even treatment.

    Attributes:
        accuracy_gap: between the groups' accuracies.
        demographic_parity: between their shares of positive predictions.
        equal_opportunity: between their true positive rates. The published notebook calls this demographic parity, and
            computes it with labels and predictions swapped, so that it is a difference of precisions there.
        equalised_odds: half the difference of true positive rates plus half that of false positive rates.
        balanced_accuracy: mean of true positive and true negative rates of both groups; higher is better.
    """

    accuracy_gap: float
    demographic_parity: float
    equal_opportunity: float
    equalised_odds: float
    balanced_accuracy: float


def fairness(predicted: Tensor, labels: Tensor, group: Tensor, *, positive: int = 1) -> Fairness:
    """Compares the two groups of a sensitive attribute, as the paper does for hair colour and gender on CelebA.

    Args:
        predicted: (n,) classes predicted.
        labels: (n,) true classes.
        group: (n,) bool, or 0 and 1: which group an image belongs to.
        positive: the class that counts as positive; all others are negative.

    Raises:
        InputError: other shapes, other groups than two, or a group without positive or without negative labels.
    """
    if not predicted.shape == labels.shape == group.shape or labels.ndim != 1:
        raise InputError(
            f"found predictions {tuple(predicted.shape)}, labels {tuple(labels.shape)} and groups "
            f"{tuple(group.shape)}, expected (n,) each"
        )
    groups = set(group.tolist())
    if not groups <= {0, 1}:
        raise InputError(f"found the groups {sorted(groups)}, expected 0 and 1")
    rates = [_rates(predicted[group == each] == positive, labels[group == each] == positive) for each in (0, 1)]
    accuracy, positives, true_positives, false_positives = (
        abs(first - second) for first, second in zip(*rates, strict=True)
    )
    balanced = sum(rate[2] + 1 - rate[3] for rate in rates) / 4
    return Fairness(accuracy, positives, true_positives, (true_positives + false_positives) / 2, balanced)


def _rates(predicted: Tensor, actual: Tensor) -> tuple[float, float, float, float]:
    """Accuracy, share of positive predictions, true positive and false positive rate."""
    if not actual.any() or actual.all():
        raise InputError("found a group without positive or without negative labels, expected both in each group")
    parts = (predicted == actual, predicted, predicted[actual], predicted[~actual])
    accuracy, positives, true_positives, false_positives = (part.double().mean().item() for part in parts)
    return accuracy, positives, true_positives, false_positives
