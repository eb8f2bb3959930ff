"""Procedural scenes: labelled objects in photograph-like clutter, with exact masks.

Every scene is a function of one integer seed. Objects differ by silhouette alone: colour, texture, area, light,
background and clutter are drawn without looking at the class. The same scene can be painted again without its
objects (`Scene.without_objects`) or with other colours on them (`Scene.recoloured`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..errors import InputError
from .clutter import background, distractor, occluder, photograph
from .painting import Light, paint, stamp
from .silhouettes import CLASS_NAMES, VARIANTS, outline
from .textures import colour, contrasting_colour, surface

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CLASS_NAMES", "MEAN", "SIZE", "SPLITS", "STD", "Scene", "SceneDataset", "make_scene", "normalise"]

SIZE: Final = 96
"""Default side of a scene in pixels; the embedded model takes this size."""

MEAN: Final = (0.5, 0.5, 0.5)
"""Mean by which images in 0..1 are normalised, by channel."""

STD: Final = (0.5, 0.5, 0.5)
"""Standard deviation by which images in 0..1 are normalised, by channel."""

SPLITS: Mapping[str, range] = MappingProxyType(
    {
        "train": range(0, 10**9),
        "validation": range(10**9, 2 * 10**9),
        "test": range(2 * 10**9, 3 * 10**9),
    }
)
"""Seeds of each split; they do not overlap."""

_MOST_OBJECTS = 2
_LARGEST_SIZE = 1024
_SMALLEST_SIZE = 32
_LAYOUT, _CLUTTER, _COLOURS, _CAMERA, _COUNT = range(5)
"""Independent random streams of a scene: leaving one layer out does not change the others."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with labelled objects.

    Attributes:
        image: (S, S, 3), uint8, RGB.
        classes: labels of the K objects, indices into `CLASS_NAMES`, all different.
        masks: (K, S, S), bool; the pixels where each object is visible, after occlusion.
        boxes: (K, 4), int64; x0, y0, x1, y1 around each mask, x1 and y1 exclusive.
        seed: the number this scene was made from.
        occlusion: largest share of an object that was allowed to be hidden by a bar in front.
    """

    image: NDArray[np.uint8] = field(repr=False)
    classes: tuple[int, ...]
    masks: NDArray[np.bool_] = field(repr=False)
    boxes: NDArray[np.int64] = field(repr=False)
    seed: int
    occlusion: float

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of the objects, in the order of `classes`."""
        return tuple(CLASS_NAMES[label] for label in self.classes)

    def without_objects(self) -> NDArray[np.uint8]:
        """Returns the picture (S, S, 3), uint8, as it would be had the objects never been there.

        Background, clutter, light and sensor noise are those of the scene; the objects, their shadows and their
        outlines are gone. A model that still knows the class cheats.
        """
        return self._again(with_objects=False).image

    def recoloured(self, variant: int) -> Scene:
        """Returns the same scene with other colours and textures on the objects.

        Args:
            variant: 1 or more; each number gives other colours.

        Raises:
            InputError: `variant` is not a positive integer.
        """
        if isinstance(variant, bool) or not isinstance(variant, int) or variant < 1:
            raise InputError(f"variant is {variant!r}; expected an integer of 1 or more, each giving other colours.")
        return self._again(colours=variant)

    def _again(self, *, with_objects: bool = True, colours: int = 0) -> Scene:
        count, size = len(self.classes), self.image.shape[0]
        return _render(self.seed, count, size, self.occlusion, with_objects=with_objects, colours=colours)


def make_scene(seed: int, *, num_objects: int | None = 1, size: int = SIZE, occlusion: float = 0.1) -> Scene:
    """Makes the scene of a seed.

    Args:
        seed: any non-negative integer; `SPLITS` says which seeds are for training, validation and testing.
        num_objects: 1 or 2 labelled objects; None lets the seed decide.
        size: side of the picture in pixels, 32 to 1024. The layout is the same for every size.
        occlusion: largest share of an object that a thin bar in front may hide, 0 to 0.5. Larger values also give more
            bars: each object gets one with a chance of 0.05 + 1.5 * occlusion, where it hides no more than that.

    Returns:
        The scene. The same arguments give the same pixels every time, whatever was made before.

    Raises:
        InputError: an argument is outside its range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed is {seed!r}; expected an integer of 0 or more. Take one from SPLITS.")
    if num_objects is not None and num_objects not in range(1, _MOST_OBJECTS + 1):
        raise InputError(f"num_objects is {num_objects!r}; expected 1, 2 or None (the seed decides).")
    if not isinstance(size, int | np.integer) or not _SMALLEST_SIZE <= size <= _LARGEST_SIZE:
        raise InputError(f"size is {size!r}; expected an integer from {_SMALLEST_SIZE} to {_LARGEST_SIZE} pixels.")
    if not 0 <= occlusion <= 0.5:
        raise InputError(f"occlusion is {occlusion!r}; expected a share from 0 to 0.5.")
    if num_objects is None:
        num_objects = int(_stream(int(seed), _COUNT).integers(1, _MOST_OBJECTS + 1))
    return _render(int(seed), int(num_objects), int(size), float(occlusion))


def normalise(images: NDArray[np.uint8]) -> torch.Tensor:
    """Turns pictures into what the embedded model takes.

    Args:
        images: (S, S, 3) or (B, S, S, 3), uint8, RGB.

    Returns:
        Tensor (3, S, S) or (B, 3, S, S), float32 in -1..1.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3).float() / 255
    shape = (3, 1, 1)
    return ((tensor - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)).contiguous()


class SceneDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The first scenes of a split as (image, label) pairs.

    An item is the normalised image (3, 96, 96), float32, and the label: int64, of shape () for one object and (2,)
    for two.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        length: number of scenes, at most 10**9.
        num_objects: 1 or 2 objects in every scene.

    Raises:
        InputError: an argument is outside its range.
    """

    def __init__(self, split: str, length: int, num_objects: int = 1) -> None:
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; expected one of {', '.join(SPLITS)}.")
        if not 1 <= length <= len(SPLITS[split]):
            raise InputError(f"length is {length!r}; expected 1 to {len(SPLITS[split])} scenes.")
        if num_objects not in range(1, _MOST_OBJECTS + 1):
            raise InputError(f"num_objects is {num_objects!r}; expected 1 or 2, the same in every scene.")
        self.seeds = SPLITS[split][:length]
        self.num_objects = num_objects

    def __len__(self) -> int:
        return len(self.seeds)

    def scene(self, index: int) -> Scene:
        """Returns the scene behind item `index`, with its masks."""
        return make_scene(self.seeds[index], num_objects=self.num_objects)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scene = self.scene(index)
        label = scene.classes[0] if self.num_objects == 1 else scene.classes
        return normalise(scene.image), torch.tensor(label)


def _stream(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.default_rng((seed, *purpose))


def _posed(rng: np.random.Generator, label: int, area: float) -> list[NDArray[np.float64]]:
    """An outline of the class in a random pose, enclosing `area`, centred on its bounding box."""
    rings = outline(label, int(rng.integers(VARIANTS)))
    turn, shear = math.radians(rng.uniform(-22, 22)), rng.uniform(-0.15, 0.15)
    stretch, mirror = math.sqrt(rng.uniform(0.82, 1.22)), rng.choice((-1.0, 1.0))
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    pose = rotation @ np.array([[mirror * stretch, shear], [0, 1 / stretch]]) * math.sqrt(area)
    phase, strength = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0, 0.05)
    posed = [(ring + strength * np.sin(4 * ring[:, ::-1] + phase)) @ pose.T for ring in rings]
    corners = np.concatenate(posed)
    centre = (corners.min(axis=0) + corners.max(axis=0)) / 2
    return [ring - centre for ring in posed]


def _layout(rng: np.random.Generator, count: int) -> tuple[list[int], list[list[NDArray[np.float64]]]]:
    """Labels and placed outlines, in a frame from 0 to 1, hardly overlapping."""
    labels = rng.permutation(len(CLASS_NAMES))[:count].tolist()
    placed: list[list[NDArray[np.float64]]] = []
    taken: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for label in labels:
        area = rng.uniform(0.075, 0.15) if count == 1 else rng.uniform(0.05, 0.085)
        rings = _posed(rng, label, area)
        for attempt in range(60):
            half = np.concatenate(rings).max(axis=0)
            limit = float(half.max()) / 0.47
            if limit > 1:
                rings = [ring / limit for ring in rings]
                half = half / limit
            centre = rng.uniform(half + 0.02, 1 - half - 0.02)
            overlap = [
                np.prod(np.clip(np.minimum(centre + half, high) - np.maximum(centre - half, low), 0, None))
                for low, high in taken
            ]
            if not overlap or max(overlap) < 0.15 * 4 * np.prod(half):
                break
            if attempt % 12 == 11:
                rings = [ring * 0.88 for ring in rings]
        taken.append((centre - half, centre + half))
        placed.append([ring + centre for ring in rings])
    return labels, placed


def _render(
    seed: int, count: int, size: int, occlusion: float, *, with_objects: bool = True, colours: int = 0
) -> Scene:
    """Paints the layers of a scene from back to front."""
    labels, outlines = _layout(_stream(seed, _LAYOUT, count), count)
    clutter = _stream(seed, _CLUTTER)
    turn = clutter.uniform(0, 2 * math.pi)
    light = Light(math.cos(turn), math.sin(turn), clutter.uniform(0.05, 0.5), clutter.uniform(0.0, 0.5))
    canvas = background(clutter, size)
    for _ in range(int(clutter.integers(3, 7))):
        distractor(clutter, canvas, light)
    shapes = [stamp([ring * size for ring in rings], size) for rings in outlines]
    visible = [shape.mask(size) for shape in shapes]
    if with_objects:
        paints = _stream(seed, _COLOURS, colours)
        for shape, mask in zip(shapes, visible, strict=True):
            tint = contrasting_colour(paints, canvas[:, mask].mean(axis=1))
            paint(canvas, shape, surface(paints, shape.window, size, tint, paints.uniform(0.0, 0.9)), light)
    for behind in range(count):
        for front in range(behind + 1, count):
            visible[behind] &= ~visible[front]
    for rings in outlines:
        if clutter.random() < 0.05 + 1.5 * occlusion:
            bar = occluder(clutter, size, np.concatenate(rings).mean(axis=0) * size)
            fill = surface(clutter, bar.window, size, colour(clutter), clutter.uniform(0.0, 1.0))
            covered = bar.mask(size)
            if all(np.count_nonzero(mask & covered) <= occlusion * np.count_nonzero(mask) for mask in visible):
                paint(canvas, bar, fill, light)
                visible = [mask & ~covered for mask in visible]
    masks = np.stack(visible)
    boxes = np.array([_box(mask) for mask in masks], np.int64)
    return Scene(photograph(_stream(seed, _CAMERA), canvas), tuple(labels), masks, boxes, seed, occlusion)


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
