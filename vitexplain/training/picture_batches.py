"""Endless shuffled batches of picture files, as a model takes them; any place in them can be gone to at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.scenes import SPLITS, make_scene
from ..errors import InputError
from ..images import find_images, load_image
from ..preprocessing import Preprocessing

SCENES = "scenes"
"""Instead of a folder: procedural scenes, painted when they are needed."""

SCENES_AT_MOST = 20_000
"""How many of them there are, where nothing else is said."""


class PictureBatches:
    """Batches (B, 3, H, W), each picture once an epoch, in an order that the seed and the epoch decide.

    Args:
        pictures: files; or seeds of scenes.
        preprocessing: how pictures become the model's input.
        batch_size: pictures in a batch; the last of an epoch may have fewer.
        seed: decides the order.
        workers: processes that read ahead; 0 reads in this one.
        objects: objects in a scene, 1 or 2; 0 lets the seed of each decide.

    Raises:
        InputError: there are no pictures, or a number is out of range.
    """

    def __init__(
        self,
        pictures: Sequence[Path] | range,
        preprocessing: Preprocessing,
        *,
        batch_size: int = 32,
        seed: int = 0,
        workers: int = 0,
        objects: int = 1,
    ) -> None:
        if not len(pictures) or batch_size < 1 or workers < 0:
            raise InputError(
                f"found {len(pictures)} pictures, batch_size={batch_size} and workers={workers}, expected at least 1, "
                "1 and 0"
            )
        self.pictures, self.preprocessing = pictures, preprocessing
        self.batch_size, self.seed, self.workers, self.objects = batch_size, seed, workers, objects

    @classmethod
    def of(cls, data: str, preprocessing: Preprocessing, **settings: int) -> PictureBatches:
        """From what a user names: a picture, a folder, a pattern; or ``"scenes"``.

        Raises:
            InputError: there are no pictures of this name.
        """
        pictures = SPLITS["train"][:SCENES_AT_MOST] if data == SCENES else find_images([data])
        return cls(pictures, preprocessing, **settings)

    def digest(self) -> str:
        """SHA-256 of what is in which batch: names, order and preparation; no picture is opened."""
        named = (
            str(self.pictures) if isinstance(self.pictures, range) else "\n".join(map(os.path.abspath, self.pictures))
        )
        how = f"{self.batch_size} {self.seed} {self.objects} {self.preprocessing.to_dict()}"
        return hashlib.sha256(f"{how}\n{named}".encode("utf-8", "backslashreplace")).hexdigest()

    def __len__(self) -> int:
        return -(-len(self.pictures) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """The first epoch."""
        for _, batch in zip(range(len(self)), self.endless(), strict=False):
            yield batch

    def endless(self, start: int = 0) -> Iterator[Tensor]:
        """All batches from number `start` on, epoch after epoch; those before it are not read."""
        loader: DataLoader[Tensor] = DataLoader(
            _Pictures(self.pictures, self.preprocessing, self.objects),
            batch_sampler=_Orders(self, start),
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,
            generator=torch.Generator(),  # the loader draws a seed, which must not move the user's random state
        )
        return iter(loader)


class _Pictures(Dataset[Tensor]):
    """Pictures as the model takes them; goes to worker processes."""

    def __init__(self, pictures: Sequence[Path] | range, preprocessing: Preprocessing, objects: int) -> None:
        self.pictures, self.preprocessing, self.objects = pictures, preprocessing, objects

    def __getitem__(self, index: int) -> Tensor:
        picture = self.pictures[index]
        if isinstance(picture, Path):
            return self.preprocessing(load_image(picture))
        return self.preprocessing(make_scene(picture, num_objects=self.objects or None).image)


class _Orders(Sampler[list[int]]):
    """Which pictures are in which batch."""

    def __init__(self, batches: PictureBatches, start: int) -> None:
        self.count, self.size, self.seed = len(batches.pictures), batches.batch_size, batches.seed
        self.start, self.batches = start, len(batches)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, skip = divmod(self.start, self.batches)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count).tolist()
            for first in range(skip * self.size, self.count, self.size):
                yield order[first : first + self.size]
            epoch, skip = epoch + 1, 0
