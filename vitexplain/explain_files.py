"""Explaining files: for each image its overlays, raw scores, and one record of what was done."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from .errors import InputError
from .explainer import explain_with
from .explanation import Explanation
from .files import save_json, save_scores
from .images import load_image
from .method import Method
from .models.loading import LoadedModel
from .render import save_png


def explain_files(
    files: Sequence[Path],
    model: LoadedModel,
    methods: Sequence[Method],
    targets: Sequence[int],
    output: Path,
    *,
    batch_size: int = 8,
) -> tuple[int, list[InputError]]:
    """Explains image files and writes ``NAME-METHOD-CLASS.png`` and ``.npy`` for each map, and ``NAME.json``.

    Args:
        files: the images.
        model: from `load_model`.
        methods: configured methods; one capture serves all.
        targets: class indices explained for every image; empty for each image's predicted class.
        output: folder for the results.
        batch_size: images at a time.

    Returns:
        How many images were done, and an error for each that could not be read.

    Raises:
        TargetError: the model has no such class.
        ExportError: a result cannot be written.
    """
    about = {"model": model.identity(), "versions": _versions()}
    names = _distinct_names(files)
    failures: list[InputError] = []
    done = 0
    with tqdm(total=len(files), unit="image", disable=None) as progress:
        for start in range(0, len(files), batch_size):
            readable: list[tuple[Path, Image.Image]] = []
            for file in files[start : start + batch_size]:
                try:
                    readable.append((file, load_image(file)))
                except InputError as error:
                    failures.append(error)
                    progress.update()
            if not readable:
                continue
            target = torch.tensor([list(targets)] * len(readable)) if targets else None
            explanations = explain_with(methods, model.subject, [picture for _, picture in readable], target)
            for index, (file, _) in enumerate(readable):
                _write(output, names[file], file, [each[index] for each in explanations], about)
                done += 1
                progress.update()
    return done, failures


def _write(output: Path, name: str, file: Path, explanations: Sequence[Explanation], about: dict[str, Any]) -> None:
    maps = []
    pictures = explanations[0].pictures()
    for explanation in explanations:
        overlays = explanation.overlay(pictures)
        scores = explanation.scores[0]
        overlays, scores = (overlays, scores[None]) if explanation.scores.ndim == 3 else (overlays[0], scores)
        classes = [] if explanation.targets is None else explanation.targets.reshape(-1).tolist()
        diagnostics = {key: value.reshape(-1).tolist() for key, value in explanation.diagnostics.items()}
        for k, label in enumerate(explanation.target_names()[0]):
            stem = f"{name}-{explanation.method}-{classes[k]}"
            maps.append(
                {
                    "method": explanation.method,
                    "options": dict(explanation.options),
                    "class": classes[k],
                    "label": label,
                    "probability": float(explanation.probabilities.reshape(-1)[k]),
                    "scores": save_scores(scores[k], output / f"{stem}.npy").name,
                    "overlay": save_png(overlays[k], output / f"{stem}.png").name,
                    **{key: values[k] for key, values in diagnostics.items()},
                }
            )
    first = explanations[0]
    record = {
        "image": str(file),
        "predicted": _predictions(first),
        "patch_grid": list(first.grid),
        "image_size": list(first.image_size),
        "maps": maps,
        **about,
    }
    save_json(record, output / f"{name}.json")


def _predictions(explanation: Explanation, count: int = 5) -> list[dict[str, Any]]:
    probabilities = explanation.logits[0].float().softmax(0)
    top = probabilities.topk(min(count, len(probabilities)))
    labels = explanation.labels
    return [
        {"class": index, "label": labels[index] if labels else f"class {index}", "probability": probability}
        for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _distinct_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file's results; files of one stem in several folders or formats are numbered."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        name, number = file.stem, 2
        while name in taken:
            name, number = f"{file.stem}-{number}", number + 1
        taken.add(name)
        names[file] = name
    return names


def _versions() -> dict[str, str]:
    from . import __version__

    packages = {name: version(name) for name in ("torch", "timm", "numpy", "pillow")}
    return {"vitexplain": __version__, "python": platform.python_version(), **packages}
