"""Colours, surface textures and light for the scenes.

A small bank of seamless-looking grey textures is made once; a surface is a random crop of one of them, tinted
between two colours. Nothing here knows the classes.
"""

from __future__ import annotations

import colorsys
import functools
import math
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]

_BANK_SIDE = 256
_BANK_SEED = 20_240_917


def _clouds(rng: np.random.Generator, coarsest: int, octaves: int, persistence: float) -> FloatImage:
    """Sum of octaves of smooth noise, stretched to 0..1."""
    total = np.zeros((_BANK_SIDE, _BANK_SIDE), np.float32)
    for octave in range(octaves):
        cells = min(_BANK_SIDE, coarsest * 2**octave)
        noise = rng.random((cells, cells), dtype=np.float32)
        total += persistence**octave * cv2.resize(noise, (_BANK_SIDE, _BANK_SIDE), interpolation=cv2.INTER_CUBIC)
    return _stretched(total)


def _stretched(field: NDArray[np.floating]) -> FloatImage:
    low, high = np.percentile(field, (1, 99))
    stretched: FloatImage = np.clip((field - low) / (high - low), 0, 1).astype(np.float32)
    return stretched


@functools.lru_cache(maxsize=1)
def _cloud_bank() -> FloatImage:
    """Large soft fields (6, 256, 256), for regions and uneven light."""
    rng = np.random.default_rng((_BANK_SEED, 1))
    return np.stack([_clouds(rng, 3 + index % 3, 3, 0.45) for index in range(6)])


@functools.lru_cache(maxsize=1)
def _texture_bank() -> FloatImage:
    """Grey textures (24, 256, 256): clouds, grain, veins, wood, cloth, checks, dots and stripes."""
    rng = np.random.default_rng((_BANK_SEED, 2))
    down, across = np.mgrid[:_BANK_SIDE, :_BANK_SIDE].astype(np.float32)
    bank: list[FloatImage] = []
    for round_index in range(3):
        wobble = _clouds(rng, 4, 4, 0.5)
        pitch = 2 * math.pi / (9 + 6 * round_index)
        bank.append(_clouds(rng, 4 + 4 * round_index, 5, 0.55))
        bank.append(_clouds(rng, 24 + 16 * round_index, 4, 0.8))
        bank.append(_stretched(1 - np.abs(_clouds(rng, 6 + 5 * round_index, 4, 0.6) - 0.5)))
        bank.append(_stretched(np.sin(pitch * across + 14 * wobble) + 0.8 * _clouds(rng, 64, 2, 0.7)))
        bank.append(_stretched(np.sin(2 * pitch * across) * np.sin(2 * pitch * down) + _clouds(rng, 64, 2, 0.7)))
        bank.append(_stretched(np.sign(np.sin(pitch * across) * np.sin(pitch * down)) + 1.2 * wobble))
        bank.append(_stretched(np.maximum(np.sin(pitch * across) + np.cos(pitch * down), 0.4) + 0.5 * wobble))
        bank.append(_stretched(np.tanh(3 * np.sin(pitch * (down + 0.2 * across) + 3 * wobble)) + 0.6 * wobble))
    return np.stack(bank)


def _crop(
    rng: np.random.Generator, bank: FloatImage, shape: tuple[int, int], smallest: float, largest: float
) -> FloatImage:
    """A random piece of the bank, `smallest` to `largest` texture pixels for each pixel of `shape`."""
    zoom = rng.uniform(smallest, largest)
    height, width = (min(_BANK_SIDE, max(2, round(side * zoom))) for side in shape)
    index, turn = int(rng.integers(len(bank))), int(rng.integers(4))
    top, left = int(rng.integers(0, _BANK_SIDE - height + 1)), int(rng.integers(0, _BANK_SIDE - width + 1))
    piece = bank[index, top : top + height, left : left + width]
    piece = np.ascontiguousarray(piece[:: 1 - (turn & 2), :: 1 - 2 * (turn & 1)])
    return cast("FloatImage", cv2.resize(piece, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR))


def cloud(rng: np.random.Generator, size: int) -> FloatImage:
    """Returns a soft field (size, size), float32 in 0..1, with a few bright and dark areas."""
    return _crop(rng, _cloud_bank(), (size, size), 96 / size, 224 / size)


def colour(rng: np.random.Generator) -> FloatImage:
    """Returns a random colour (3,), float32 RGB in 0..1; muted colours are more frequent than pure ones."""
    hue, saturation, value = rng.random(), rng.random() ** 1.4, rng.uniform(0.12, 0.97)
    return np.array(colorsys.hsv_to_rgb(hue, saturation * 0.9, value), np.float32)


def contrasting_colour(rng: np.random.Generator, against: NDArray[np.floating]) -> FloatImage:
    """Returns a random colour (3,) that can be told from `against` (3,), both RGB in 0..1."""
    weights = np.array([0.9, 1.2, 0.6], np.float32)
    best, best_distance = colour(rng), 0.0
    for _ in range(12):
        candidate = colour(rng)
        distance = float(np.linalg.norm((candidate - against) * weights))
        if distance > best_distance:
            best, best_distance = candidate, distance
        if distance > 0.5:
            break
    return best


def surface(
    rng: np.random.Generator, window: tuple[slice, slice], size: int, tint: FloatImage, roughness: float
) -> FloatImage:
    """Returns a textured surface of about one colour for a window of a canvas.

    Args:
        rng: source of randomness.
        window: rows and columns of the canvas.
        size: side of the canvas in pixels; textures are as coarse on any size.
        tint: main colour (3,), RGB in 0..1.
        roughness: how far the texture departs from the main colour, 0 (plain) to 1 (strong).

    Returns:
        Planes (3, h, w), float32, about 0..1.
    """
    rows, columns = window
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    grain = _crop(rng, _texture_bank(), shape, 48 / size, 160 / size) - np.float32(0.5)
    partner = np.float32(0.5) * (tint + colour(rng))
    direction = (partner - tint + np.float32(rng.uniform(-0.5, 0.5))) * np.float32(roughness)
    planes: FloatImage = tint[:, None, None] + grain * direction[:, None, None]
    return planes


def whole(size: int) -> tuple[slice, slice]:
    """Returns the window that is all of a canvas."""
    return slice(0, size), slice(0, size)


@functools.lru_cache(maxsize=4)
def positions(size: int) -> tuple[FloatImage, FloatImage]:
    """Returns x and y of each pixel of a canvas, two arrays (size, size) from -0.5 to 0.5."""
    down, across = np.mgrid[:size, :size].astype(np.float32) / np.float32(size) - np.float32(0.5)
    return across, down
