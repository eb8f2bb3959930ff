"""What a model makes of each image: its prediction, the class to be explained, and whether the image takes part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import InputError
from .store import Columns

_KINDS: dict[str, Any] = {
    "image": object,
    "failure": object,
    "used": bool,
    "prediction": np.int64,
    "probability": np.float64,
    "target": np.int64,
    "target_probability": np.float64,
    "label": np.int64,
}


def predict(
    names: Sequence[str],
    failures: Mapping[str, str],
    labels: Mapping[str, Sequence[int]],
    logits: Tensor,
    *,
    target: str,
    only_correct: bool,
) -> Columns:
    """One row an image.

    Args:
        names: of all images.
        failures: why some could not be read, by name.
        labels: of the n others the classes that count as right, by name, in the order of the logits.
        logits: (n, C).
        target: ``"predicted"`` or ``"label"``.
        only_correct: whether images whose prediction is not among their classes take no part.

    Returns:
        ``image``; ``failure``, why it could not be used (empty where it could); ``used``; ``prediction`` and ``target``
        with ``probability`` and ``target_probability``; ``label``, the most probable of the image's own classes.
        Classes are -1 and probabilities NaN where unknown.

    Raises:
        InputError: an image's class is none of the model's.
    """
    known = dict(zip(labels, logits.double().softmax(1).cpu(), strict=True))
    rows = [
        _row(name, labels[name], known[name], target, only_correct) if name in known else _failed(name, failures[name])
        for name in names
    ]
    return {key: np.array([row[key] for row in rows], kind) for key, kind in _KINDS.items()}


def unread(predictions: Columns) -> npt.NDArray[np.bool_]:
    """Which of the images of `predict` could not be read at all."""
    found: npt.NDArray[np.bool_] = (predictions["failure"] != "") & (predictions["prediction"] < 0)
    return found


def _row(name: str, labels: Sequence[int], probabilities: Tensor, target: str, only_correct: bool) -> dict[str, object]:
    outside = [label for label in labels if not 0 <= label < len(probabilities)]
    if outside:
        raise InputError(
            f"the image {name!r} is of class {outside[0]}, expected 0 to {len(probabilities) - 1}: the model has "
            f"{len(probabilities)} classes; say what they are called with 'labels', or choose data of these classes"
        )
    prediction = int(probabilities.argmax())
    label = max(labels, key=lambda each: float(probabilities[each]), default=-1)
    explained = prediction if target == "predicted" else label
    needed = only_correct or target == "label"
    return {
        "image": name,
        "failure": "its class is not known" if needed and label < 0 else "",
        "used": explained >= 0 and (not only_correct or prediction in labels),
        "prediction": prediction,
        "probability": float(probabilities[prediction]),
        "target": explained,
        "target_probability": float(probabilities[explained]) if explained >= 0 else np.nan,
        "label": label,
    }


def _failed(name: str, reason: str) -> dict[str, object]:
    unknown = {"prediction": -1, "probability": np.nan, "target": -1, "target_probability": np.nan, "label": -1}
    return {"image": name, "failure": " ".join(reason.split()), "used": False, **unknown}
