"""`compare`: one capture a model serves all methods and classes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..api import load_model
from ..errors import ExplanationWarning, OptionError, TargetError, UnsupportedModelError
from ..explainer import explain_with
from ..files import as_text
from ..method import Method
from ..models.adapter import ModelAdapter
from ..models.labels import class_index
from ..registry import create_method
from ..subject import Subject
from ..targets import ScoreFunction, Target
from .comparison import Comparison

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..subject import Images, Model

    Class: TypeAlias = "int | str"
    Classes: TypeAlias = "Class | Sequence[Class] | Sequence[Sequence[Class]] | Tensor | np.ndarray"
    Targets: TypeAlias = "Classes | tuple[Classes, Classes] | ScoreFunction | None"

METHODS = ("contributions", "rollout", "gradcam", "tokentm")
"""What is compared where no methods are named."""


def compare(
    model: Model | Sequence[Model] | Mapping[str, Model],
    images: Images,
    methods: Sequence[str | Method] | Mapping[str, str | Method] = METHODS,
    targets: Targets = None,
    *,
    top: int = 1,
    batch_size: int | None = None,
) -> Comparison:
    """Explains images by several methods, for several classes, on one model or several.

    A batch costs one forward a model and one backward a class, whatever the number of methods.

    Args:
        model: one or several, or by own labels in a mapping: modules, adapters, subjects, what `load_model` returned,
            or names that it takes.
        images: files, PIL images, uint8 arrays (H, W, 3) or a list of these, where the models' preprocessing is known;
            or a normalised tensor (B, 3, H, W).
        methods: names, or configured methods; by own labels in a mapping.
        targets: the classes explained, by index or name: one for all images, a list for all images, or B×K of them
            (nested lists or a tensor), K an image. None for the most probable classes of each image and model. A
            contrast is a tuple ``(a, b)`` of two such, a against b; or a function of the logits (B, C) to scores (B,).
            Contrasts and functions have no probability that deletion, insertion and SaCo could follow.
        top: how many of the most probable classes are explained, where `targets` is None.
        batch_size: images at a time; as many as pay by default. Halved where memory does not suffice.

    Raises:
        UnknownNameError: no such model, method or class.
        TargetError: the classes do not fit the images or the model, or are named and its labels are not known.
        OptionError: no model, no methods, two of one label, or `top` below 1.
        InputError: an image cannot be read, or does not fit the model.
        UnsupportedModelError: no method works on a model; where only some do not, or do not explain contrasts or
            functions, the comparison says why.
    """
    subjects, model_names = _models(model)
    chosen = _methods(methods)
    if top < 1:
        raise OptionError(f"found top={top}, expected a whole number >= 1")
    explanations: dict[tuple[str, str], Explanation] = {}
    refusals: dict[tuple[str, str], str] = {}
    against: dict[str, Tensor] = {}
    names: list[str] = []
    for label, subject in subjects.items():
        inputs = subject.prepare(images)
        names = _image_names(images, len(inputs))
        target = _target(targets, subject, inputs, top)
        found, refused = _explain(chosen, subject, inputs, target, batch_size)
        explanations |= {(label, method): each for method, each in found.items()}
        refusals |= {(label, method): reason for method, reason in refused.items()}
        if isinstance(target, tuple):
            against[label] = cast("Tensor", target[1]).to(next(iter(found.values())).logits.device)
    return Comparison(subjects, chosen, explanations, refusals, names, model_names, against)


def _models(given: Model | Sequence[Model] | Mapping[str, Model]) -> tuple[dict[str, Subject], dict[str, str]]:
    """Subjects by label, and the name that each goes by.

    Raises:
        OptionError: there are none.
    """
    listed: list[Any] = [given]
    if isinstance(given, list | tuple):
        listed = list(given)
    elif isinstance(given, Mapping):
        listed = list(given.values())
    pairs = [_subject(each) for each in listed]
    names = [name for name, _ in pairs]
    numbered = [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names, 1)]
    labels = list(given) if isinstance(given, Mapping) else numbered
    if not labels:
        raise OptionError("found no models, expected at least one")
    return {label: each for label, (_, each) in zip(labels, pairs, strict=True)}, dict(zip(labels, names, strict=True))


def _subject(given: Model) -> tuple[str, Subject]:
    """A model and the name it goes by."""
    if isinstance(given, str):
        given = load_model(given)
    subject = Subject.of(given)
    name = None if isinstance(given, nn.Module | ModelAdapter | Subject) else getattr(given, "name", None)
    return name or type(subject.adapter.model).__name__, subject


def _methods(given: Sequence[str | Method] | Mapping[str, str | Method]) -> dict[str, Method]:
    from ..metrics.evaluation import label_of

    listed: Iterable[str | Method] = [given] if isinstance(given, str | Method) else given
    values = list(listed.values()) if isinstance(listed, Mapping) else list(listed)
    chosen = [create_method(each) if isinstance(each, str) else each for each in values]
    labels = list(listed) if isinstance(listed, Mapping) else [label_of(each) for each in chosen]
    if not chosen or len(set(labels)) < len(labels):
        raise OptionError(f"found the methods {labels}, expected at least one, and each once")
    return dict(zip(labels, chosen, strict=True))


def _target(given: Targets, subject: Subject, inputs: Tensor, top: int) -> Target:
    """What one model explains, as `explain_with` takes it: None for the predicted class, classes (B, K), two sides of a
    contrast (B, K), or a function.

    Raises:
        TargetError: of no accepted form, or of another number of images.
        UnknownNameError: no class has this name.
    """
    if given is None:
        return None if top == 1 else _most_probable(subject, inputs, top)
    if callable(given) and not isinstance(given, Tensor):
        return given
    if isinstance(given, tuple):
        if len(given) != 2 or any(side is None or isinstance(side, tuple) or callable(side) for side in given):
            raise TargetError(f"found the tuple {given!r}, expected a list of classes, or a contrast: a pair (a, b)")
        ours, theirs = (_classes(side, subject, inputs) for side in given)
        return ours, theirs
    return _classes(given, subject, inputs)


def _classes(given: Any, subject: Subject, inputs: Tensor) -> Tensor:
    """Classes (B, K) of one model; errors as for `_target`."""
    if isinstance(given, Tensor | np.ndarray):
        if given.ndim == 1:
            raise TargetError(
                f"found a target of shape {tuple(given.shape)}, which may mean one class an image or classes of all "
                "images: pass (B, 1) for the one, or a list for the other"
            )
        return _rows(given.tolist() if given.ndim else [[given.item()]] * len(inputs), len(inputs))
    listed: Sequence[Any] = [given] if isinstance(given, int | str) else given
    nested = bool(listed) and all(isinstance(row, list | tuple) for row in listed)
    rows = listed if nested else [listed] * len(inputs)
    return _rows([[class_index(each, subject.labels) for each in row] for row in rows], len(inputs))


def _rows(rows: Sequence[Sequence[Any]], images: int) -> Tensor:
    lengths = sorted({len(row) for row in rows})
    if len(rows) != images or len(lengths) != 1 or not lengths[0]:
        raise TargetError(
            f"found classes for {len(rows)} images, {lengths} an image, expected {images} rows of the same length, at "
            "least 1"
        )
    return torch.tensor(rows)


def _most_probable(subject: Subject, inputs: Tensor, top: int) -> Tensor:
    from ..metrics.predictor import Predictor

    logits = Predictor.of(subject).logits(inputs)
    if top > logits.shape[1]:
        raise TargetError(f"found top={top}, expected at most {logits.shape[1]}: the model has that many classes")
    return logits.topk(top, dim=1).indices


def _explain(
    methods: Mapping[str, Method], subject: Subject, inputs: Tensor, target: Target, batch_size: int | None
) -> tuple[dict[str, Explanation], dict[str, str]]:
    """Explanations, and reasons why there are none, by label of the method.

    Raises:
        UnsupportedModelError: no method works on the model.
    """
    try:
        found = explain_with(list(methods.values()), subject, inputs, target, batch_size=batch_size)
        return {label: _with_targets(each) for label, each in zip(methods, found, strict=True)}, {}
    except (UnsupportedModelError, TargetError) as error:
        of_classes = target is None or isinstance(target, Tensor)
        if len(methods) == 1 or (of_classes and isinstance(error, TargetError)):
            raise
    explanations: dict[str, Explanation] = {}
    refusals: dict[str, TargetError | UnsupportedModelError] = {}
    for label, method in methods.items():
        try:
            (alone,) = explain_with([method], subject, inputs, target, batch_size=batch_size)
            explanations[label] = _with_targets(alone)
        except (UnsupportedModelError, TargetError) as error:
            refusals[label] = error
    if not explanations:
        first = next(iter(refusals.values()))
        if isinstance(first, TargetError):
            raise first
        raise UnsupportedModelError(f"none of {', '.join(methods)} works on this model: {first}")
    for label, reason in refusals.items():
        warnings.warn(f"{label} is left out: {reason}", ExplanationWarning, stacklevel=4)
    return explanations, {label: str(reason) for label, reason in refusals.items()}


def _with_targets(explanation: Explanation) -> Explanation:
    """The same with an axis of targets, also where there is one an image."""
    if explanation.scores.ndim == 4:
        return explanation
    return replace(
        explanation,
        scores=explanation.scores[:, None],
        targets=None if explanation.targets is None else explanation.targets[:, None],
        diagnostics={name: value[:, None] for name, value in explanation.diagnostics.items()},
    )


def _image_names(images: Images, count: int) -> list[str]:
    listed: Any = images if isinstance(images, list | tuple) else [images]
    if isinstance(images, Tensor) or len(listed) != count:
        return [f"image {number}" for number in range(1, count + 1)]
    paths = [each if isinstance(each, str | os.PathLike) else getattr(each, "filename", "") for each in listed]
    return [as_text(os.path.basename(os.fspath(path))) or f"image {number}" for number, path in enumerate(paths, 1)]
