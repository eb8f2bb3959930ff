"""What one visitor has: a picture, a model, and the comparison made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from ..comparison import Comparison, compare
from ..errors import InputError, OptionError
from ..method import Method
from ..models.loading import LoadedModel
from .limits import Limits, open_upload

TOP = 6
"""How many of the most probable classes a visitor chooses from."""

_PREVIEW = 420


@dataclass(frozen=True, eq=False)
class Session:
    """One visitor's choices. A change is a new session; nothing of it lies in files.

    Attributes:
        model: the model that is explained.
        limits: of pictures.
        content: the picture's file; None before there is one.
        name: what the picture is called.
        comparison: what was compared last; None before.
    """

    model: LoadedModel
    limits: Limits
    content: bytes | None = None
    name: str = ""
    comparison: Comparison | None = None

    def with_picture(self, content: bytes, name: str) -> Session:
        """The same with another picture."""
        return replace(self, content=content, name=name, comparison=None)

    def with_model(self, model: LoadedModel) -> Session:
        """The same with another model."""
        return replace(self, model=model, comparison=None)

    @property
    def picture(self) -> Image.Image:
        """The picture.

        Raises:
            InputError: there is none yet.
        """
        if self.content is None:
            raise InputError("there is no picture yet: upload one, or choose an example")
        return open_upload(self.content, self.limits)

    def preview(self) -> Image.Image:
        """The picture, small enough to be shown beside the controls."""
        picture = self.picture
        picture.thumbnail((_PREVIEW, _PREVIEW))
        return picture

    @cached_property
    def probable(self) -> list[tuple[int, str, float]]:
        """The most probable classes: index, name, probability; none where there is no picture."""
        if self.content is None:
            return []
        from ..metrics.predictor import Predictor

        inputs = self.model.preprocessing([self.picture])
        probabilities = Predictor.of(self.model.subject).probabilities(inputs)[0]
        top = torch.topk(probabilities, min(TOP, len(probabilities)))
        labels = self.model.labels
        return [
            (index, labels[index].split(",")[0] if labels else f"class {index}", value)
            for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def chosen(self, listed: Sequence[int], named: str) -> list[int]:
        """The classes that are chosen from a list, and the one that is named beside it, if any.

        Raises:
            TargetError: the model has no class of this index.
            UnknownNameError: no class, or several, have this name.
        """
        return list(dict.fromkeys([*listed, *([self.model.class_index(named)] if named.strip() else [])]))

    def compared(self, methods: Sequence[Method], targets: Sequence[int]) -> Session:
        """The same with a comparison of these methods for these classes.

        Raises:
            VitExplainError: no picture, no methods, no classes, or as `compare`.
        """
        if not methods:
            raise OptionError("no methods are chosen: choose at least one")
        if not targets:
            raise OptionError("no class is chosen: choose at least one, or name one")
        picture: Any = self.picture
        picture.filename = self.name
        return replace(self, comparison=compare(self.model, [picture], methods, list(targets)))

    def made(self) -> Comparison:
        """The comparison.

        Raises:
            InputError: nothing was compared yet.
        """
        if self.comparison is None:
            raise InputError("nothing was explained yet: press Explain first")
        return self.comparison
