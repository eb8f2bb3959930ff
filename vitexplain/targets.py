"""Targets: which output of the model is explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from .errors import TargetError

ScoreFunction: TypeAlias = Callable[[Tensor], Tensor]
"""Maps logits (B, C) to one score an image (B,)."""

Target: TypeAlias = (
    "int | str | Sequence[int | str] | Sequence[Sequence[int | str]] | np.ndarray | Tensor | ScoreFunction | "
    "tuple[object, object] | None"
)
"""What a user may pass: None (arg-max class); an int; a list or (B,) tensor, one class an image; a (B, K) tensor
or nested list, K classes an image; a callable; a pair ``(a, b)``, class a against class b (each an int or (B,)).
Wherever there is an int, a class's name will do, if the model's labels are known."""

FORMS = (
    "None (the predicted class), a class index, B indices (one an image), B×K indices, a pair (a, b) for a against b, "
    "or a function of the logits (B, C) that returns B scores; for an index, a class's name where labels are known"
)


@dataclass(frozen=True, eq=False)
class ResolvedTarget:
    """Targets of one batch, checked against its logits.

    Attributes:
        classes: (B, K) int64 classes explained; None for a callable.
        against: (B, K) classes they are contrasted with, or None.
        function: the callable, or None.
        single: one target an image was asked for, so results have no K axis.
    """

    classes: Tensor | None
    against: Tensor | None
    function: ScoreFunction | None
    single: bool

    @property
    def count(self) -> int:
        """K, the number of targets an image."""
        return 1 if self.classes is None else self.classes.shape[1]

    def score(self, logits: Tensor, index: int) -> Tensor:
        """The explained score (B,) of target number `index`, from logits (B, C)."""
        if self.function is not None:
            return self.function(logits)
        score = logits.gather(1, self._column(self.classes, index))[:, 0]
        if self.against is not None:
            score = score - logits.gather(1, self._column(self.against, index))[:, 0]
        return score

    def plain_classes(self, index: int) -> Tensor | None:
        """(B,) classes of target number `index`; None where it is a contrast or a function."""
        return None if self.classes is None or self.against is not None else self.classes[:, index]

    def of_images(self, rows: Tensor | slice) -> ResolvedTarget:
        """The targets of some images: a slice, or (n,) int64, which may name one more than once."""

        def of(classes: Tensor | None) -> Tensor | None:
            return None if classes is None else classes[rows if isinstance(rows, slice) else rows.to(classes.device)]

        return replace(self, classes=of(self.classes), against=of(self.against))

    @staticmethod
    def concatenate(targets: Sequence[ResolvedTarget]) -> ResolvedTarget:
        """The targets of several batches in one, where none is a function."""
        ours = [each.classes for each in targets if each.classes is not None]
        theirs = [each.against for each in targets if each.against is not None]
        return replace(targets[0], classes=torch.cat(ours), against=torch.cat(theirs) if theirs else None)

    def explained_classes(self) -> Tensor | None:
        """(B,) or (B, K) classes, as the target was given."""
        return self._as_given(self.classes)

    def opposed_classes(self) -> Tensor | None:
        """(B,) or (B, K) classes of a contrast's other side, as the target was given; None where there is none."""
        return self._as_given(self.against)

    def _as_given(self, classes: Tensor | None) -> Tensor | None:
        return classes[:, 0] if self.single and classes is not None else classes

    @staticmethod
    def _column(classes: Tensor | None, index: int) -> Tensor:
        if classes is None:
            raise TargetError(f"there are no classes to take; expected {FORMS}")
        return classes[:, index, None]


@dataclass(frozen=True, eq=False)
class ExplainedScore:
    """The score that one map explains: one of the K targets of each image.

    Attributes:
        target: of the batch.
        index: which of the K.
    """

    target: ResolvedTarget
    index: int

    @property
    def classes(self) -> Tensor | None:
        """(B,) classes; None where a contrast or a function is explained."""
        return self.target.plain_classes(self.index)

    def of_versions(self, logits: Tensor, rows: Tensor, unchanged: Tensor, *, probability: bool = False) -> Tensor:
        """The score of changed versions of the images.

        A function of the logits may treat the images of its batch differently. So it is shown the batch it was meant
        for, in which the logits of one image are those of the version.

        Args:
            logits: (n, C), of n versions.
            rows: (n,) int64, which image of the batch each is a version of.
            unchanged: (B, C), of the batch as it is.
            probability: take the softmax of a class for its logit; a contrast is then the difference of two
                probabilities. A function is one of the logits in any case.

        Returns:
            (n,), differentiable by the logits where the target is.
        """
        target, rows = self.target, rows.to(logits.device)
        if target.function is None:
            return target.of_images(rows).score(logits.softmax(1) if probability else logits, self.index)
        if torch.equal(rows, torch.arange(len(unchanged), device=rows.device)):
            return target.function(logits)
        unchanged = unchanged.to(logits)
        batches = (unchanged.index_copy(0, row[None], each[None]) for row, each in zip(rows, logits, strict=True))
        return torch.stack([target.function(batch)[row] for row, batch in zip(rows, batches, strict=True)])


def resolve_target(target: Target, logits: Tensor) -> ResolvedTarget:
    """Checks a target against the logits (B, C) and brings it into one form.

    Raises:
        TargetError: it is of no accepted form, of another batch size, or names a class the model does not have.
    """
    if not logits.isfinite().all():
        raise TargetError("the model's logits hold NaN or infinite values; expected finite ones. Check the weights")
    if target is None:
        return ResolvedTarget(logits.detach().argmax(dim=1, keepdim=True), None, None, True)
    if callable(target) and not isinstance(target, Tensor):
        return ResolvedTarget(None, None, _checked(target), True)
    if isinstance(target, tuple):
        if len(target) != 2:
            raise TargetError(f"found a tuple of {len(target)}, expected {FORMS}. A list gives one class an image")
        (ours, single), (theirs, _) = (_classes(side, logits) for side in target)
        if ours.shape != theirs.shape:
            raise TargetError(f"found a contrast of {tuple(ours.shape)} against {tuple(theirs.shape)} classes")
        return ResolvedTarget(ours, theirs, None, single)
    classes, single = _classes(target, logits)
    return ResolvedTarget(classes, None, None, single)


def named_classes(target: Target, labels: Sequence[str] | None) -> Target:
    """The target with indices in place of the names of classes, at any depth.

    Raises:
        TargetError: a name where no labels are known.
        UnknownNameError: no class, or several, have this name.
    """
    from .models.labels import class_index

    if isinstance(target, np.ndarray) and target.dtype.kind in "USO":
        target = cast("Target", target.tolist())
    if isinstance(target, str):
        return class_index(target, labels)
    if isinstance(target, list | tuple):
        found: list[Any] = [named_classes(each, labels) for each in target]
        return tuple(found) if isinstance(target, tuple) else found
    return target


def check_length(target: Target, batch: int) -> None:
    """Checks that a target with one entry an image has as many as there are images.

    Raises:
        TargetError: it has more or fewer.
    """
    for side in target if isinstance(target, tuple) else (target,):
        if _is_listed(side) and len(side) != batch:
            raise TargetError(f"found a target with {len(side)} entries for {batch} images, expected {FORMS}")


def is_function(target: Target | ResolvedTarget) -> bool:
    """Whether a target is a function of the logits, as a user passes it or resolved."""
    if isinstance(target, ResolvedTarget):
        return target.function is not None
    return callable(target) and not isinstance(target, Tensor)


def select_target(target: Target, rows: slice) -> Target:
    """The part of a target that belongs to some images of the batch."""
    if isinstance(target, tuple):
        return tuple(side[rows] if _is_listed(side) else side for side in target)
    return target[rows] if _is_listed(target) else target


def _is_listed(side: object) -> TypeGuard[Any]:
    """Whether a target, or a side of a contrast, has an entry an image."""
    if isinstance(side, Tensor | np.ndarray):
        return side.ndim > 0
    return isinstance(side, Sequence) and not isinstance(side, str)


def _classes(target: object, logits: Tensor) -> tuple[Tensor, bool]:
    batch, count = logits.shape
    try:
        classes = target if isinstance(target, Tensor) else torch.as_tensor(target, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(f"found a target of type {type(target).__name__} ({target!r}), expected {FORMS}") from None
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TargetError(f"found a target of {classes.dtype}, expected whole class indices: {FORMS}")
    if classes.ndim > 2 or (classes.ndim > 0 and classes.shape[0] != batch) or not classes.numel():
        raise TargetError(f"found a target of shape {tuple(classes.shape)} for {batch} images, expected {FORMS}")
    # clone: a tensor made in the caller's inference_mode cannot take part in a graph
    classes = classes.to(device=logits.device, dtype=torch.int64).clone()
    for found in map(int, classes.aminmax()):
        if not 0 <= found < count:
            raise TargetError(f"found class {found}, expected 0 to {count - 1}: the model has {count} classes")
    if classes.ndim == 2:
        if count > 2 and classes.shape[1] == count and int(classes.max()) <= 1:
            raise TargetError(
                f"found a target of shape {tuple(classes.shape)} that holds 0 and 1 alone, an entry for each of the "
                f"{count} classes, expected class indices: {FORMS}. Rows of one-hot labels become indices by argmax(1)"
            )
        return classes, False
    return classes.expand(batch)[:, None], True


def _checked(function: ScoreFunction) -> ScoreFunction:
    def score(logits: Tensor) -> Tensor:
        result = function(logits)
        if not isinstance(result, Tensor) or result.shape != logits.shape[:1]:
            found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise TargetError(
                f"the target function returned {found} for logits of shape {tuple(logits.shape)}; expected "
                f"({logits.shape[0]},), one score an image"
            )
        return result

    return score
