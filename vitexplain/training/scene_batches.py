"""Seeded batches of scenes for training, from simple to full clutter.

A pool of scenes is painted once and drawn from again and again with mirror images and shifts. Early batches are
easy twice over: they show a window around the object instead of the whole scene, and their textures and clutter are
faded, down to a plain object on a plain ground.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.scenes import CLASS_NAMES, SIZE, SPLITS, make_scene, normalise
from .recipe import PATCH, ClassifierSettings

NO_OBJECT = len(CLASS_NAMES)
"""Patch label of patches that show no object."""

_LEAST_COVERED = 0.15
_LARGEST_SHIFT = 8


class Batch(NamedTuple):
    """What one training step sees.

    Attributes:
        images: (B, 3, w, w), float32, normalised; w is the side of the window.
        corners: (B, 2), int64; column and row of the first patch of the window in the scene's patch grid.
        targets: (B, 12), float32; shares of the classes, 1 or 0.5 and 0.5.
        patch_labels: (B, N), int64; class of the object in each patch of the window, or `NO_OBJECT`.
        patch_masks: (B, N, 64), float32; 1 where a pixel of the patch shows an object.
    """

    images: torch.Tensor
    corners: torch.Tensor
    targets: torch.Tensor
    patch_labels: torch.Tensor
    patch_masks: torch.Tensor


@dataclass(frozen=True, eq=False)
class ScenePool:
    """Painted training scenes: those with one object first, then those with two.

    Attributes:
        images: (N, 96, 96, 3), uint8.
        objects: (N, 96, 96), uint8; the label seen at each pixel, or `NO_OBJECT`.
        ones: number of scenes with one object.
    """

    images: NDArray[np.uint8]
    objects: NDArray[np.uint8]
    ones: int

    @classmethod
    def paint(cls, ones: int, twos: int, occlusion: float) -> ScenePool:
        """Paints the first scenes of the training split."""
        images = np.empty((ones + twos, SIZE, SIZE, 3), np.uint8)
        objects = np.full((ones + twos, SIZE, SIZE), NO_OBJECT, np.uint8)
        for index in range(ones + twos):
            scene = make_scene(SPLITS["train"][index], num_objects=1 if index < ones else 2, occlusion=occlusion)
            images[index] = scene.image
            for label, mask in zip(scene.classes, scene.masks, strict=True):
                objects[index][mask] = label
        return cls(images, objects, ones)


def faded(images: NDArray[np.uint8], shown: NDArray[np.bool_], strength: float) -> NDArray[np.uint8]:
    """Fades texture and clutter towards a plain object on a plain ground.

    Args:
        images: (B, S, S, 3), uint8.
        shown: (B, S, S), true where an object is visible.
        strength: 0 for plain colours, 1 for the images as they are.
    """
    if strength >= 1:
        return images
    pixels, weight = images.astype(np.float32), shown[..., None].astype(np.float32)
    count = weight.sum((1, 2), keepdims=True)
    inside = (pixels * weight).sum((1, 2), keepdims=True) / np.maximum(count, 1)
    outside = (pixels * (1 - weight)).sum((1, 2), keepdims=True) / np.maximum(shown[0].size - count, 1)
    plain = outside + weight * (inside - outside)
    result: NDArray[np.uint8] = np.round(plain + np.float32(strength) * (pixels - plain)).astype(np.uint8)
    return result


class SceneBatches:
    """The batches of one round of training, in order; every iteration gives the same.

    Args:
        pool: the scenes.
        settings: the recipe; `settings.seed` decides everything drawn here.
        refining: whether this is the second round, with whole scenes only.
    """

    def __init__(self, pool: ScenePool, settings: ClassifierSettings, *, refining: bool = False) -> None:
        self.pool = pool
        self.settings = settings
        self.refining = refining

    def __iter__(self) -> Iterator[Batch]:
        recipe, pool = self.settings, self.pool
        rng = np.random.default_rng((recipe.seed, 2 if self.refining else 1))
        steps, window_steps = recipe.refining_steps, 0
        if not self.refining:
            steps, window_steps = recipe.steps - steps, min(recipe.window_steps, recipe.steps - steps)
        for step in range(window_steps):
            chosen = rng.integers(0, pool.ones, recipe.batch_size)
            yield self._batch(pool, rng, chosen, recipe.window, min(1.0, step / max(1, recipe.fading_steps)))
        twos = round(recipe.batch_size * recipe.two_object_share) if len(pool.images) > pool.ones else 0
        for _ in range(window_steps, steps):
            chosen = rng.integers(0, pool.ones, recipe.batch_size)
            if twos:
                chosen[:twos] = rng.integers(pool.ones, len(pool.images), twos)
            yield self._batch(pool, rng, chosen, SIZE // PATCH, 1.0)

    @classmethod
    def _batch(
        cls, pool: ScenePool, rng: np.random.Generator, chosen: NDArray[np.int64], window: int, strength: float
    ) -> Batch:
        images, objects = pool.images[chosen], pool.objects[chosen]
        mirrored = rng.random(len(chosen)) < 0.5
        images[mirrored], objects[mirrored] = images[mirrored, :, ::-1], objects[mirrored, :, ::-1]
        images = faded(images, objects != NO_OBJECT, strength)
        if window < SIZE // PATCH:
            corners = cls._corners(rng, objects, window)
            side = window * PATCH
            starts = corners * PATCH
            images = np.stack([image[y : y + side, x : x + side] for image, (x, y) in zip(images, starts, strict=True)])
            seen = np.stack([area[y : y + side, x : x + side] for area, (x, y) in zip(objects, starts, strict=True)])
        else:
            corners = np.zeros((len(chosen), 2), np.int64)
            right, down = rng.integers(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1, 2).tolist()
            images, objects = np.roll(images, (down, right), (1, 2)), np.roll(objects, (down, right), (1, 2))
            seen = objects
        patches = seen.reshape(len(seen), window, PATCH, window, PATCH).swapaxes(2, 3).reshape(len(seen), -1, PATCH**2)
        shares = (patches[..., None] == np.arange(len(CLASS_NAMES), dtype=np.uint8)).mean(axis=2)
        labels = np.where(shares.max(axis=-1) > _LEAST_COVERED, shares.argmax(axis=-1), NO_OBJECT)
        present = (objects.reshape(len(objects), -1, 1) == np.arange(len(CLASS_NAMES), dtype=np.uint8)).any(axis=1)
        targets = present / present.sum(axis=1, keepdims=True)
        return Batch(
            normalise(images),
            torch.from_numpy(corners),
            torch.from_numpy(targets.astype(np.float32)),
            torch.from_numpy(labels),
            torch.from_numpy((patches != NO_OBJECT).astype(np.float32)),
        )

    @staticmethod
    def _corners(rng: np.random.Generator, objects: NDArray[np.uint8], window: int) -> NDArray[np.int64]:
        """First patch (column, row) of a window about the object of each scene, (B, 2)."""
        shown = objects != NO_OBJECT
        weight = np.maximum(shown.sum((1, 2)), 1)
        middle = np.stack([shown.sum(1) @ np.arange(SIZE), shown.sum(2) @ np.arange(SIZE)], 1) / weight[:, None]
        first = np.round((middle + rng.uniform(-PATCH, PATCH, middle.shape)) / PATCH - window / 2)
        corners: NDArray[np.int64] = np.clip(first, 0, SIZE // PATCH - window).astype(np.int64)
        return corners
