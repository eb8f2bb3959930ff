"""The demo: several methods side by side on scenes with two objects, all offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from .data.scenes import SPLITS, Scene, make_scene
from .errors import OptionError
from .explainer import explain_with
from .explanation import Explanation
from .metrics.localisation import energy_in_mask
from .models.loading import LoadedModel, load_model
from .panels import Cell, panel
from .registry import create_method, method_info
from .render import contours, save_png

METHODS = ("rollout", "gradcam", "tokentm", "contributions")
_SHOWN = 288  # pixels a side at which the small scenes are drawn
_TRIES = 200


def make_demo(
    path: Path, *, num_scenes: int = 3, seed: int = 0, methods: Sequence[str] = METHODS
) -> list[tuple[str, float]]:
    """Draws the demo picture: a row for each object of each scene, a column for each method.

    Scenes are taken in order of their seeds from the test split, leaving out those in which the model's two most
    probable classes are not the two objects.

    Args:
        path: PNG file to write.
        num_scenes: scenes shown, 1 to 20.
        seed: where to begin in the test split, >= 0.
        methods: registry names, one column each.

    Returns:
        For each method its title and the mean share of positive relevance on the explained object, in [0, 1], over
        the maps shown.

    Raises:
        OptionError: a number out of its range, or no such scenes among the first 200.
        UnknownNameError: no such method.
    """
    if not 1 <= num_scenes <= 20 or seed < 0:
        raise OptionError(f"found {num_scenes} scenes and seed {seed}, expected 1 to 20 scenes and a seed >= 0")
    chosen = [create_method(name) for name in methods]
    model = load_model()
    scenes = _recognised(model, num_scenes, seed)
    images = model.preprocessing([scene.image for scene in scenes])
    targets = torch.tensor([scene.classes for scene in scenes])
    explanations = explain_with(chosen, model.subject, images, targets)
    titles = [method_info(name).title for name in methods]
    _draw(scenes, explanations, titles, path)
    masks = torch.from_numpy(np.stack([scene.masks for scene in scenes]))
    return [
        (title, float(energy_in_mask(each.scores, masks).nanmean()))
        for title, each in zip(titles, explanations, strict=True)
    ]


def _recognised(model: LoadedModel, count: int, seed: int) -> list[Scene]:
    found: list[Scene] = []
    for index in SPLITS["test"][seed : seed + _TRIES]:
        scene = make_scene(index, num_objects=2)
        with torch.no_grad():
            logits = model.model(model.preprocessing([scene.image]))
        if set(logits[0].topk(2).indices.tolist()) == set(scene.classes):
            found.append(scene)
        if len(found) == count:
            return found
    raise OptionError(
        f"found {len(found)} scenes with both objects recognised in {_TRIES}, expected {count}: ask fewer"
    )


def _draw(scenes: Sequence[Scene], explanations: Sequence[Explanation], titles: Sequence[str], path: Path) -> None:
    pictures = np.stack(
        [cv2.resize(scene.image, (_SHOWN, _SHOWN), interpolation=cv2.INTER_CUBIC) for scene in scenes], dtype=np.uint8
    )
    overlays = [each.overlay(pictures) for each in explanations]
    probabilities = explanations[0].probabilities
    names = explanations[0].target_names()
    rows, row_titles = [], []
    for index, scene in enumerate(scenes):
        for k, mask in enumerate(scene.masks):
            mask = cv2.resize(mask.astype(np.float32), (_SHOWN, _SHOWN), interpolation=cv2.INTER_LINEAR)
            outlined = contours(pictures[index : index + 1], mask[None], levels=(0.5,))[0]
            rows.append([Cell(outlined), *(Cell(overlay[index, k]) for overlay in overlays)])
            row_titles.append(f"{names[index][k]}\n{probabilities[index, k]:.0%}")
    image = panel(
        rows,
        title=f"Why these classes?  One model, {len(titles)} methods",
        column_titles=["Object explained", *titles],
        row_titles=row_titles,
        cell_size=176,
        scale=2,
    )
    save_png(image, path)
