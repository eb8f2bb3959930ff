"""`Comparison`: the maps of several methods, classes and models on the same images, and the views of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from ..errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..explanation import Explanation
    from ..method import Method
    from ..subject import Subject
    from .faithfulness import Faithfulness
    from .table import ComparisonTable

_PDF_QUALITY = 95


@dataclass(frozen=True)
class Case:
    """One target of one image, explained by one model; every method has a map of it.

    Attributes:
        model: label of the model.
        image: position of the image.
        index: position of the target among those explained for this image.
        classes: as the model numbers them: one, two of a contrast, none of a function of the logits.
        names: of the classes; ``"function"`` without.
        probabilities: what the model gives the classes, in [0, 1].
        predicted: it is the model's most probable class, and no contrast.
    """

    model: str
    image: int
    index: int
    classes: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    predicted: bool

    @property
    def is_class(self) -> bool:
        """One class is explained, so that there is a probability to follow."""
        return len(self.classes) == 1

    @property
    def target(self) -> int | None:
        """The class, the first one of a contrast; None for a function."""
        return self.classes[0] if self.classes else None

    @property
    def probability(self) -> float:
        """What the model gives `target`; NaN for a function."""
        return self.probabilities[0] if self.probabilities else math.nan

    @property
    def name(self) -> str:
        """The class by its name, a contrast by both."""
        return " against ".join(self.names)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Maps of the same images side by side; made by `compare`.

    ::

        comparison = compare("scenes", "photo.jpg", ["rollout", "tokentm"], top=2)
        comparison.show()
        comparison.save("report.html")
        print(comparison.table())
        comparison["tokentm"].scores

    Attributes:
        subjects: the models by label.
        methods: the configured methods by label.
        explanations: by the labels of model and method; each with K targets an image, so its scores are (B, K, h, w),
            also where K is 1.
        refusals: why a method has no maps on a model, by the same labels.
        images: names of the images.
        model_names: what was asked for as a model, by label: a name of `load_model`, or the module's class.
        against: for contrasts, the classes (B, K) that those of the explanations are held against, by the models'
            labels.
    """

    subjects: Mapping[str, Subject]
    methods: Mapping[str, Method]
    explanations: Mapping[tuple[str, str], Explanation]
    refusals: Mapping[tuple[str, str], str]
    images: Sequence[str]
    model_names: Mapping[str, str]
    against: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        refused = f", refused: {', '.join(method for _, method in self.refusals)}" if self.refusals else ""
        return (
            f"Comparison({len(self.methods)} methods, {len(self.subjects)} models, {len(self.images)} images, "
            f"{len(self.cases)} cases{refused})"
        )

    def __getitem__(self, label: str | tuple[str, str]) -> Explanation:
        """The explanation of a method, or of a model and a method.

        Raises:
            UnknownNameError: it was not compared, or was refused.
            InputError: there are several models and none was named.
        """
        if isinstance(label, str) and len(self.subjects) > 1:
            raise InputError(
                f"found the method {label!r} alone, expected a model too: comparison[model, {label!r}], with one of "
                f"{', '.join(self.subjects)}"
            )
        key = (next(iter(self.subjects)), label) if isinstance(label, str) else label
        if key in self.refusals:
            raise UnknownNameError(f"{key[1]} has no maps on {key[0]}: {self.refusals[key]}")
        if key not in self.explanations:
            raise UnknownNameError.listing("map of model and method", ", ".join(key), map(", ".join, self.explanations))
        return self.explanations[key]

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """What was explained: image by image, target by target, model by model."""
        cases = [case for model in self.subjects for case in self._cases(model)]
        return tuple(sorted(cases, key=lambda case: (case.image, case.index)))

    def _cases(self, model: str) -> Iterator[Case]:
        found = self.any_explanation(model)
        sides = [replace(found, targets=each) for each in (found.targets, self.against.get(model)) if each is not None]
        names = [each.target_names() for each in sides]
        probabilities = [each.probabilities for each in sides]
        predicted = found.logits.argmax(1).tolist()
        for image, index in product(range(len(found)), range(found.scores.shape[1])):
            classes = tuple(int(cast("Tensor", each.targets)[image, index]) for each in sides)
            named = tuple(each[image][index] for each in names) or ("function",)
            shares = tuple(float(each[image, index]) for each in probabilities)
            yield Case(model, image, index, classes, named, shares, classes == (predicted[image],))

    def any_explanation(self, model: str) -> Explanation:
        """Some explanation of a model, for what all of them share: inputs, logits, targets."""
        return next(each for (label, _), each in self.explanations.items() if label == model)

    def scores(self, case: Case, method: str) -> Tensor | None:
        """Raw scores (h, w) of one map; None where the method was refused."""
        found = self.explanations.get((case.model, method))
        return None if found is None else found.scores[case.image, case.index]

    def inputs(self, model: str) -> Tensor:
        """What a model was given, (B, 3, H, W), normalised."""
        return _inputs(self.any_explanation(model))

    @cached_property
    def pictures(self) -> Mapping[str, np.ndarray]:
        """What each model saw, uint8 (B, H, W, 3), by its label.

        Raises:
            InputError: how the images were normalised is not known.
        """
        return {model: self.any_explanation(model).pictures() for model in self.subjects}

    @cached_property
    def faithfulness(self) -> Faithfulness:
        """Deletion, insertion and SaCo of each map, on its very image; measured when first asked for."""
        from .faithfulness import measure_faithfulness

        return measure_faithfulness(self)

    @cached_property
    def costs(self) -> Mapping[tuple[str, str], Mapping[str, float]]:
        """What each method costs alone, by the labels of model and method; timed when first asked for.

        See `bench.cost.measure_cost` for the figures.
        """
        from ..bench.cost import MOST_IMAGES, measure_cost

        costs = {}
        for (model, method), found in self.explanations.items():
            # a contrast or a function costs what a class does
            targets = found.logits.argmax(1) if found.targets is None else found.targets[:, 0]
            inputs, targets = self.inputs(model)[:MOST_IMAGES], targets[:MOST_IMAGES]
            costs[model, method] = measure_cost(self.methods[method], self.subjects[model], inputs, targets)
        return costs

    def table(self, *, faithfulness: bool = True, cost: bool = True) -> ComparisonTable:
        """Agreement between the methods, faithfulness of each map on its very image, and cost.

        Args:
            faithfulness: measure deletion, insertion and SaCo; some seventy forward passes a map.
            cost: time each method alone.
        """
        from .table import make_table

        return make_table(self, faithfulness=faithfulness, cost=cost)

    def picture(self, **style: Any) -> Image:
        """Everything in one picture: a row a case, a column a method; see `picture.draw` for the options."""
        from .picture import draw

        return draw(self, **style)

    def show(self, **style: Any) -> None:
        """Shows `picture` in the notebook, or in the system's image viewer."""
        from ..showing import show_image

        show_image(self.picture(**style))

    def save(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Writes the comparison; the suffix says as what.

        Args:
            path: ``.png`` or ``.pdf`` for the picture, ``.html`` for the report.
            **options: of `picture.draw`, or of `report.render_report`.

        Raises:
            InputError: another suffix, or the pictures are not known.
            ExportError: the file cannot be written.
        """
        from ..files import write_whole
        from ..render import save_png

        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".png":
            return save_png(self.picture(**options), path)
        if suffix == ".pdf":
            # a page as large as the picture is in logical pixels, 96 of which are an inch
            resolution = 96 * options.get("scale", 2)
            save = partial(self.picture(**options).save, format="PDF", resolution=resolution, quality=_PDF_QUALITY)
            return write_whole(path, save)
        if suffix == ".html":
            from .report import render_report

            text = render_report(self, **options)
            return write_whole(path, lambda file: file.write(text.encode()))
        raise InputError(f"found suffix {path.suffix!r} in {path}, expected .png, .pdf or .html")

    def _repr_html_(self) -> str:
        from ..showing import image_html

        return image_html(self.picture(), repr(self))


def _inputs(explanation: Explanation) -> Tensor:
    if explanation.inputs is None:
        raise InputError("found an explanation without its inputs, expected one that an explainer made")
    return explanation.inputs
