"""The procedural scenes as a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..options import option
from .catalogue import register_dataset
from .classes import ModelClasses
from .entries import Entry, Examples
from .example import Example
from .reader import Reader
from .scenes import SPLITS, Scene, make_scene


@dataclass(frozen=True)
class SceneEntry(Entry):
    """One object of one scene.

    Attributes:
        seed: what the scene is made from.
        num_objects: how many objects it has.
        place: which of them this is.
    """

    seed: int
    num_objects: int
    place: int

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def load(self) -> Example:
        scene: Scene = make_scene(self.seed, num_objects=self.num_objects)
        return Example(
            self.name,
            Image.fromarray(scene.image),
            (scene.classes[self.place],),
            scene.masks[self.place].astype(np.int8),
            scene.boxes[[self.place]].astype(np.float64),
        )


@register_dataset(
    "scenes",
    title="Procedural scenes",
    source="vitexplain.data.scenes",
    gives=("labels", "masks", "boxes"),
    root="nothing",
)
@dataclass(frozen=True)
class Scenes(Reader):
    """Scenes painted on demand, with exact masks; the embedded model knows their 12 classes.

    Needs no files. With two objects, one scene gives two examples of the same picture: each object in turn, with the
    other as background.
    """

    split: str = option("test", "which seeds", choices=tuple(SPLITS))
    count: int = option(200, "number of scenes", minimum=1, maximum=10**9)
    objects: int = option(1, "objects in every scene", minimum=1, maximum=2)

    def read(self, root: Path, classes: ModelClasses) -> Examples:
        entries = [
            SceneEntry(f"{self.split}/{index:06d}{f'#{place}' if self.objects > 1 else ''}", seed, self.objects, place)
            for index, seed in enumerate(SPLITS[self.split][: self.count])
            for place in range(self.objects)
        ]
        return Examples(entries)
