"""What the tests of the export share: a tiny model, pictures, and all that an export holds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import SIZE, make_model
from PIL import Image

from vitexplain import Subject, adapt, export_heatmaps
from vitexplain.benchmarks.export_images import contents
from vitexplain.export.results import HeatmapExport
from vitexplain.models.loading import LoadedModel
from vitexplain.preprocessing import Preprocessing

if sys.version_info < (3, 11):
    pytest.skip("Zarr 3 needs Python 3.11", allow_module_level=True)

LABELS = ["cat", "dog", "bird, fowl", "fish", "fox", "frog", "fly"]
METHODS = ("rollout", "tokentm")

__all__ = [
    "LABELS",
    "METHODS",
    "contents",
    "export",
    "picture",
    "pictures",
    "prepared_by",
    "tiny_model",
]


def tiny_model() -> LoadedModel:
    """A ViT with registers on inputs that are not square; the same weights at every call."""
    preprocessing = Preprocessing(SIZE, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), crop_fraction=1.0)
    subject = Subject(adapt(make_model("registers")), preprocessing, LABELS)
    return LoadedModel("tiny", subject.adapter.model, subject, "made up", len(LABELS))


def picture(path: Path, seed: int = 0) -> Path:
    """A picture of coloured patches, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 40)).save(path)
    return path


def pictures(folder: Path, count: int) -> list[Path]:
    """Different pictures, in the order of their names."""
    return [picture(folder / f"{number:03d}.png", number) for number in range(count)]


def export(inputs: Any, output: Path, **changes: Any) -> HeatmapExport:
    """An export with small shards and batches."""
    settings: dict[str, Any] = {
        "model": tiny_model(),
        "methods": METHODS,
        "shard_size": 4,
        "batch_size": 3,
        "workers": 2,
        **changes,
    }
    return export_heatmaps(inputs, output, **settings)


def prepared_by(kind: type[Preprocessing], **more: str) -> LoadedModel:
    """The tiny model with another kind of preprocessing, of the same settings."""
    model = tiny_model()
    preprocessing = kind(**model.preprocessing.to_dict(), **more)
    return replace(model, subject=replace(model.subject, preprocessing=preprocessing))
