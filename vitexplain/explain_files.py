"""Explaining files: for each image its overlays, raw scores, and one record of what was done."""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .boxes import heatmap_to_boxes
from .errors import ExplanationWarning, ExportError, InputError, OptionError
from .explainer import explain_with
from .explanation import Explanation
from .files import distinct_names, make_folder, save_json, save_scores
from .images import load_image
from .method import Method
from .models.loading import LoadedModel
from .own_pictures import is_record
from .render import evidence, save_png

_MOST_LIKELY = 5


def explain_to_folder(
    files: Sequence[Path],
    model: LoadedModel,
    methods: Sequence[Method],
    targets: Sequence[int],
    output: Path,
    *,
    batch_size: int = 8,
    box_threshold: float | None = None,
    whole: bool = False,
    on_failure: Callable[[InputError], object] | None = None,
) -> tuple[int, list[InputError]]:
    """Explains image files and writes ``NAME-METHOD-CLASS.png`` and ``.npy`` for each map, and ``NAME.json``.

    NAME is the file's, without suffix; the second file of that name gets a number, and so does a method that is there
    twice. Results of a batch are written before the next one is read; a record comes after the maps that it names.

    Args:
        files: the images.
        model: from `load_model`.
        methods: configured methods; one capture serves all.
        targets: class indices explained for every image; empty for each image's predicted class.
        output: folder for the results; those of an earlier run are replaced, somebody else's files are not.
        batch_size: images at a time.
        box_threshold: draws boxes around what is hotter than this share of each map's highest heat, and records them;
            None draws none.
        whole: draws over the whole photographs, as `Explanation.overlay_on`, and not over what the model saw of them.
        on_failure: called with each error as it happens.

    Returns:
        How many images were done, and an error for each that could not be read.

    Raises:
        TargetError: the model has no such class.
        OptionError: no methods, a batch size below 1, or a threshold outside [0, 1).
        ExportError: a result cannot be written, or would replace one of the images or a JSON file of somebody else's.
    """
    if not methods or batch_size < 1:
        raise OptionError(f"found {len(methods)} methods and batch_size={batch_size}, expected at least 1 of each")
    about = {"model": model.identity(), "versions": _versions()}
    writer = _Writer(make_folder(output), files, methods, about, box_threshold, whole)
    targets = list(dict.fromkeys(targets))
    failures: list[InputError] = []

    def fail(error: InputError) -> None:
        failures.append(error)
        if on_failure is not None:
            on_failure(error)

    with tqdm(total=len(files), unit="image", disable=None) as progress:
        for start in range(0, len(files), batch_size):
            readable: list[tuple[int, Path]] = []
            inputs: list[Tensor] = []
            for position, file in enumerate(files[start : start + batch_size], start):
                try:
                    # reduced to the model's input at once: a batch of large photographs would fill the memory
                    inputs.append(model.preprocessing(file))
                    readable.append((position, file))
                except InputError as error:
                    fail(error)
                    progress.update()
            if not readable:
                continue
            explanations = _explain(methods, model, torch.stack(inputs), targets, [file for _, file in readable])
            for index, (position, file) in enumerate(readable):
                try:
                    writer.write(position, file, [each[index] for each in explanations])
                except InputError as error:  # a whole photograph is read again, and may be gone
                    fail(error)
                progress.update()
    return len(files) - len(failures), failures


def _explain(
    methods: Sequence[Method], model: LoadedModel, inputs: Tensor, targets: Sequence[int], files: Sequence[Path]
) -> list[Explanation]:
    """One batch; warnings about images by their number name the files instead."""
    target = torch.tensor([list(targets)] * len(files)) if targets else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExplanationWarning)
        explanations = explain_with(methods, model.subject, inputs.to(model.device), target)
    for each in caught:
        text = str(each.message)
        if issubclass(each.category, ExplanationWarning):
            text = re.sub(r"images \[([\d, ]+)\]", lambda found: _named(found[1], files), text)
            warnings.warn(text, each.category, stacklevel=3)
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno, source=each.source)
    return explanations


def _named(numbers: str, files: Sequence[Path]) -> str:
    return ", ".join(repr(str(files[int(number)])) for number in numbers.split(","))


class _Writer:
    """Writes the results of one image after another into a folder.

    Args:
        output: the folder.
        files: all images of the run: their results get different names, and none of them is overwritten.
        methods: in the order of the explanations.
        about: what every record says.
        box_threshold: where boxes are drawn, if anywhere.
        whole: whether to draw over whole photographs.

    Raises:
        ExportError: a record would replace a JSON file that is none.
    """

    def __init__(
        self,
        output: Path,
        files: Sequence[Path],
        methods: Sequence[Method],
        about: dict[str, Any],
        box_threshold: float | None,
        whole: bool,
    ) -> None:
        self.output = output
        self.names = distinct_names([file.stem for file in files])
        self.sources = {file.resolve() for file in files}
        self.methods = methods
        self.method_names = distinct_names([method.info.name for method in methods])
        self.about = about
        self.box_threshold, self.whole = box_threshold, whole
        for record in (output / f"{name}.json" for name in self.names):
            if record.exists() and not is_record(record):
                raise ExportError(
                    f"{str(record)!r} is there already and no record of an earlier run, and would be overwritten by "
                    "one; choose another output folder"
                )

    def write(self, position: int, file: Path, explanations: Sequence[Explanation]) -> None:
        """Writes maps and record of one image; each explanation is a batch of one."""
        name, first = self.names[position], explanations[0]
        picture = load_image(file) if self.whole else first.pictures()
        maps = [
            record
            for method, method_name, explanation in zip(self.methods, self.method_names, explanations, strict=True)
            for record in self._maps(f"{name}-{method_name}", method, explanation, picture)
        ]
        record = {
            "image": str(file),
            "predicted": _predictions(first),
            "patch_grid": list(first.grid),
            "image_size": list(first.image_size),
            **({} if first.extent is None else {"patch_extent": list(first.extent)}),
            "maps": maps,
            **self.about,
        }
        save_json(record, self._place(f"{name}.json"))

    def _maps(self, stem: str, method: Method, explanation: Explanation, picture: Any) -> list[dict[str, Any]]:
        if explanation.targets is None:
            raise OptionError("found a target that is a function, expected classes: files are named by class")
        if self.whole:
            overlays = explanation.overlay_on([picture], box_threshold=self.box_threshold)[0]
        else:
            overlays = explanation.overlay(picture, box_threshold=self.box_threshold)
        grid, size = explanation.scores.shape[-2:], overlays.shape[-3:]
        figures = {
            "class": explanation.targets,
            "probability": explanation.probabilities,
            **explanation.diagnostics,
        }
        columns = {key: values.reshape(-1).tolist() for key, values in figures.items()}
        if self.box_threshold is not None:
            hot = evidence(explanation.heatmap(), explanation.signed).reshape(-1, *explanation.image_size)
            columns["boxes"] = [boxes.tolist() for boxes in heatmap_to_boxes(hot, self.box_threshold)]
        return [
            {
                "method": explanation.method,
                "options": dict(explanation.options),
                "class_specific": method.info.class_specific,
                "signed": explanation.signed,
                "approximate": explanation.approximate,
                "label": label,
                **{key: values[k] for key, values in columns.items()},
                "scores": save_scores(scores, self._place(f"{stem}-{columns['class'][k]}.npy")).name,
                "overlay": save_png(overlay, self._place(f"{stem}-{columns['class'][k]}.png")).name,
            }
            for k, (label, scores, overlay) in enumerate(
                zip(
                    explanation.target_names()[0],
                    explanation.scores.reshape(-1, *grid),
                    overlays.reshape(-1, *size),
                    strict=True,
                )
            )
        ]

    def _place(self, name: str) -> Path:
        path = self.output / name
        if path.resolve() in self.sources:
            raise ExportError(
                f"{str(path)!r} is one of the images and would be overwritten by a result; choose another output folder"
            )
        return path


def _predictions(explanation: Explanation) -> list[dict[str, Any]]:
    probabilities = explanation.logits[0].float().softmax(0)
    top = probabilities.topk(min(_MOST_LIKELY, len(probabilities)))
    labels = explanation.labels
    return [
        {"class": index, "label": labels[index] if labels else f"class {index}", "probability": probability}
        for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _versions() -> dict[str, str]:
    from . import __version__

    packages = {name: version(name) for name in ("torch", "timm", "numpy", "pillow")}
    return {"vitexplain": __version__, "python": platform.python_version(), **packages}
