"""Comparing with reference maps, file by file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitexplain import get_explainer

MODELS = ("vit_tiny", "deit_tiny")
TOLERANCE = 1e-4

Choose = Callable[[str, str, str], "tuple[str, dict[str, Any], int | None] | None"]


def compare(
    file: Path, models: dict[str, nn.Module], inputs: Any, choose: Choose, divide: bool = False
) -> Iterator[tuple[str, float]]:
    """Key and relative error (largest difference over largest value) of every map in a file that `choose` takes."""
    maps = np.load(file)
    for key in maps.files:
        parts = key.split("/")
        if parts[0] not in models:
            continue
        name, image, label = parts[:3]
        chosen = choose(label, parts[3] if len(parts) > 3 else "", image)
        if chosen is None:
            continue
        method, options, target = chosen
        images = torch.from_numpy(inputs[f"{name}/{image}"])[None]
        ours = get_explainer(method, models[name], **options)(images, target).scores[0].double().numpy()
        ours = ours / ours.max() if divide else ours
        theirs = maps[key].astype(np.float64)
        yield key, float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check(errors: Iterator[tuple[str, float]], expected: int, tolerance: float = TOLERANCE) -> None:
    found = dict(errors)
    assert len(found) == expected
    worst = max(found, key=lambda key: found[key])
    assert found[worst] <= tolerance, f"{worst}: {found[worst]:.2e}"
