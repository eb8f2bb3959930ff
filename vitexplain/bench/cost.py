"""What an explanation costs: seconds an image, beside a plain forward measured at the same moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import Tensor

from ..method import Method
from ..metrics.batches import explain_quietly
from ..metrics.predictor import Predictor
from ..subject import Subject

MOST_IMAGES = 8
"""Images in the batch that is timed."""

_REPEATS = 5
_ENOUGH_SECONDS = 1.0


def measure_cost(method: Method, subject: Subject, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Times a method alone on one batch, after a first call that does not count.

    Args:
        method: the method.
        subject: the model.
        inputs: (B, 3, H, W).
        targets: (B,).

    Returns:
        ``seconds`` an image for an explanation, ``forward_seconds`` for a forward pass without a graph, and
        ``images``, how many there were in the batch; medians of up to five calls.
    """
    predictor = Predictor(subject.adapter, subject.preprocessing, len(inputs))
    forward = _median_seconds(lambda: predictor.logits(inputs).cpu())
    explanation = _median_seconds(lambda: explain_quietly([method], subject, inputs, targets)[0].scores.cpu())
    return {
        "seconds": explanation / len(inputs),
        "forward_seconds": forward / len(inputs),
        "images": float(len(inputs)),
    }


def _median_seconds(call: Callable[[], Tensor]) -> float:
    """Of calls whose result is brought to the CPU, so that nothing is left running on a device."""
    call()
    seconds: list[float] = []
    while len(seconds) < _REPEATS and sum(seconds) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
