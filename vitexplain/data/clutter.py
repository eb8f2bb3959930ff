"""Everything in a scene that has no label: background, distractors, things in front, camera and light."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from .painting import Light, Stamp, paint, stamp
from .silhouettes import CLASS_NAMES, VARIANTS, outline
from .textures import FloatImage, cloud, colour, contrasting_colour, positions, surface, whole

FloatArray = NDArray[np.float64]


def background(rng: np.random.Generator, size: int) -> FloatImage:
    """Returns a textured background (3, size, size), float32 about 0..1, of a few regions."""
    canvas = surface(rng, whole(size), size, colour(rng), rng.uniform(0.3, 1.0))
    canvas += (cloud(rng, size) - np.float32(0.5)) * ((colour(rng) - np.float32(0.5)) * np.float32(0.7))[:, None, None]
    across, down = positions(size)
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.5:
            field, sharpness = cloud(rng, size) - np.float32(rng.uniform(0.45, 0.65)), rng.uniform(6, 40)
        else:
            turn = rng.uniform(0, 2 * math.pi)
            field = across * np.float32(math.cos(turn)) + down * np.float32(math.sin(turn))
            field -= np.float32(rng.uniform(0, 0.35))
            sharpness = rng.uniform(12, 90)
        share = np.clip(np.float32(0.5) + np.float32(sharpness) * field, 0, 1)
        canvas += share * (surface(rng, whole(size), size, colour(rng), rng.uniform(0.2, 1.0)) - canvas)
    return canvas


def _ring(rng: np.random.Generator, points: int, unevenness: float) -> FloatArray:
    """A closed curve around the origin with a radius of about 1."""
    angle = np.linspace(0, 2 * math.pi, points, endpoint=False)
    radius = np.ones(points)
    for harmonic in (2, 3, 4, 5):
        radius += unevenness / harmonic * rng.normal() * np.cos(harmonic * angle + rng.uniform(0, 2 * math.pi))
    radius = np.clip(radius, 0.25, None)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _corners(rng: np.random.Generator) -> FloatArray:
    """A random polygon of 3 to 7 corners around the origin."""
    count = int(rng.integers(3, 8))
    angle = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * 2 * math.pi / count
    radius = rng.uniform(0.55, 1.3, count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _bar(rng: np.random.Generator) -> FloatArray:
    slender = rng.uniform(1.4, 3.0)
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (slender, 1 / slender) * 0.9


def _no_object(rng: np.random.Generator) -> list[FloatArray]:
    """The outline of something that is of no class, about 2 wide."""
    kind = int(rng.integers(6))
    if kind == 0:
        return [_ring(rng, 60, 0.45)]
    if kind == 1:
        return [_corners(rng)]
    if kind == 2:
        return [_bar(rng)]
    if kind == 3:
        outer = _ring(rng, 60, 0.12)
        return [outer * 1.1, outer[::-1] * rng.uniform(0.4, 0.8)]
    if kind == 4:
        squeeze = rng.uniform(0.6, 1.0)
        return [_ring(rng, 60, 0.0) * (1 / squeeze, squeeze)]
    return [_bar(rng), _ring(rng, 40, 0.2) * 0.7 + rng.uniform(-0.6, 0.6, 2)]


def _turned(rng: np.random.Generator) -> FloatArray:
    """A rotation matrix (2, 2) for row vectors."""
    turn = rng.uniform(0, 2 * math.pi)
    return np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])


def _fragment(rng: np.random.Generator, size: int, place: FloatArray, scale: float) -> Stamp:
    """A third or so of some object, cut off along a line."""
    label, variant = int(rng.integers(len(CLASS_NAMES))), int(rng.integers(VARIANTS))
    rotation, cut = _turned(rng) * scale * 1.5, rng.uniform(0, 2 * math.pi)
    entire = stamp([ring @ rotation + place for ring in outline(label, variant)], size)
    across, down = (plane[entire.window] for plane in positions(size))
    x, y = np.float32(size) * (across + np.float32(0.5)), np.float32(size) * (down + np.float32(0.5))
    depth = (x - np.float32(place[0])) * np.float32(math.cos(cut)) + (y - np.float32(place[1])) * np.float32(
        math.sin(cut)
    )
    return Stamp(entire.window, entire.share * np.clip(depth - np.float32(0.14 * scale), 0, 1))


def distractor(rng: np.random.Generator, canvas: FloatImage, light: Light) -> None:
    """Paints one shape of no class on the canvas, in place, with the same light and surfaces as objects have."""
    size = canvas.shape[1]
    place = rng.uniform(-0.05, 1.05, 2) * size
    scale = size * math.sqrt(rng.uniform(0.01, 0.1))
    if rng.random() < 0.25:
        shape = _fragment(rng, size, place, scale)
    else:
        rotation = _turned(rng) * scale * 0.56
        shape = stamp([ring @ rotation + place for ring in _no_object(rng)], size)
    column, row = np.clip(place, 0, size - 1).astype(int).tolist()
    tint = contrasting_colour(rng, canvas[:, row, column])
    paint(canvas, shape, surface(rng, shape.window, size, tint, rng.uniform(0.0, 1.0)), light)


def occluder(rng: np.random.Generator, size: int, near: FloatArray) -> Stamp:
    """Returns a thin thing that passes in front of the point `near` (x, y)."""
    turn = rng.uniform(0, math.pi)
    along, across = np.array([math.cos(turn), math.sin(turn)]), np.array([-math.sin(turn), math.cos(turn)])
    middle = near + (across * rng.uniform(-0.2, 0.2) + along * rng.uniform(-0.2, 0.2)) * size
    half_length, half_width = rng.uniform(0.15, 0.6) * size, rng.uniform(0.012, 0.035) * size
    bend = rng.uniform(-0.12, 0.12) * size
    step = np.linspace(-1, 1, 16)[:, None]
    spine = middle + step * along * half_length + step**2 * across * bend
    edge = spine + across * half_width * rng.uniform(0.4, 1.0)
    return stamp([np.concatenate([spine - across * half_width, edge[::-1]])], size)


def photograph(rng: np.random.Generator, canvas: FloatImage) -> NDArray[np.uint8]:
    """Lights the canvas unevenly and takes its picture.

    Args:
        rng: source of randomness; what is drawn does not depend on the canvas.
        canvas: planes (3, S, S), float32 about 0..1.

    Returns:
        Image (S, S, 3), uint8 RGB, with white balance, uneven light, slight blur and sensor noise.
    """
    size = canvas.shape[1]
    across, down = positions(size)
    turn, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.5)
    light = 1 + np.float32(slope * math.cos(turn)) * across + np.float32(slope * math.sin(turn)) * down
    light += np.float32(rng.uniform(0, 0.4)) * (cloud(rng, size) - np.float32(0.5))
    light -= np.float32(rng.uniform(0, 0.7)) * (across * across + down * down)
    balance = rng.uniform(0.9, 1.1, 3).astype(np.float32) * np.float32(rng.uniform(0.8, 1.15))
    blur, grain = float(rng.uniform(0.25, 0.75)) * size / 96, np.float32(rng.uniform(0.008, 0.03))
    noise = rng.standard_normal((size, size, 3), dtype=np.float32)
    picture = cv2.GaussianBlur(cv2.merge(list(canvas * light * balance[:, None, None])), (0, 0), blur)
    result: NDArray[np.uint8] = np.round(np.clip(picture + grain * noise, 0, 1) * np.float32(255)).astype(np.uint8)
    return result
