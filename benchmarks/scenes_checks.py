"""Evidence about the scenes and the embedded model: does it know the objects, and by their shape alone?

Run as ``python -m vitexplain.benchmarks.scenes_checks``; prints Markdown tables, measured on the shipped weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitexplain.data.scenes import CLASS_NAMES, SPLITS, Scene, make_scene, normalise
from vitexplain.models.embedded import load_scenes_model

Picture = NDArray[np.uint8]
Features = Callable[[Scene], NDArray[np.floating]]

CHANCE = 1 / len(CLASS_NAMES)


def predictions(model: nn.Module, pictures: Iterable[Picture], batch_size: int = 100) -> torch.Tensor:
    """Returns the logits (N, 12) of pictures (S, S, 3), uint8."""
    logits: list[torch.Tensor] = []
    waiting: list[Picture] = []
    with torch.inference_mode():
        for picture in pictures:
            waiting.append(picture)
            if len(waiting) == batch_size:
                logits.append(model(normalise(np.stack(waiting))))
                waiting = []
        if waiting:
            logits.append(model(normalise(np.stack(waiting))))
    return torch.cat(logits)


def first_labels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Returns the label (N,) of the first object of each scene."""
    return torch.tensor([scene.classes[0] for scene in scenes])


def share(hits: torch.Tensor) -> float:
    """Returns the share of true entries."""
    return float(hits.double().mean())


def interval(value: float, count: int) -> str:
    """Returns a share in per cent with its 95 % interval (normal approximation)."""
    half = 1.96 * math.sqrt(max(value * (1 - value), 1e-9) / count)
    return f"{100 * value:.1f} % ± {100 * half:.1f}"


def colour_histogram(scene: Scene) -> NDArray[np.floating]:
    """Returns the joint colour histogram (64,) of the whole picture."""
    return _histogram(scene.image.reshape(-1, 3))


def object_histogram(scene: Scene) -> NDArray[np.floating]:
    """Returns the joint colour histogram (64,) of the object's pixels."""
    return _histogram(scene.image[scene.masks[0]])


def place_and_area(scene: Scene) -> NDArray[np.floating]:
    """Returns centre, visible area and their squares (6,)."""
    x0, y0, x1, y1 = scene.boxes[0].tolist()
    side = scene.image.shape[0]
    values = np.array([(x0 + x1) / (2 * side), (y0 + y1) / (2 * side), 10 * scene.masks[0].mean()])
    return np.concatenate([values, values**2])


def background(scene: Scene) -> NDArray[np.floating]:
    """Returns the picture without its objects as a thumbnail (8 * 8 * 3,)."""
    empty = scene.without_objects().astype(np.float64) / 255
    side = empty.shape[0] // 8
    thumbnail: NDArray[np.floating] = empty.reshape(8, side, 8, side, 3).mean(axis=(1, 3)).ravel()
    return thumbnail


def _histogram(pixels: Picture) -> NDArray[np.floating]:
    bins = (pixels // 64).astype(np.int64) @ np.array([16, 4, 1])
    counts: NDArray[np.floating] = np.sqrt(np.bincount(bins, minlength=64) / len(pixels))
    return counts


def simple_classifier(features: Features, train: range, test: range) -> float:
    """Returns the test accuracy of logistic regression on simple features of one-object scenes.

    Args:
        features: what the classifier may see of a scene.
        train: seeds to fit on.
        test: seeds to measure on.
    """
    tables = []
    for seeds in (train, test):
        scenes = [make_scene(seed) for seed in seeds]
        table = torch.from_numpy(np.stack([features(scene) for scene in scenes])).float()
        tables.append((table, first_labels(scenes)))
    (seen, seen_labels), (unseen, unseen_labels) = tables
    mean, deviation = seen.mean(dim=0), seen.std(dim=0) + 1e-4
    seen, unseen = (seen - mean) / deviation, (unseen - mean) / deviation
    weight = torch.zeros(seen.shape[1], len(CLASS_NAMES), requires_grad=True)
    bias = torch.zeros(len(CLASS_NAMES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(seen @ weight + bias, seen_labels) + 1e-3 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return share((unseen @ weight + bias).argmax(dim=1) == unseen_labels)


def check_one_object(model: nn.Module, seeds: range) -> None:
    """Prints accuracy on one-object scenes, over all and by class."""
    labels, found = _named(model, seeds)
    print(f"\nOne object, {len(seeds)} unseen scenes (test seeds from {seeds[0]}): accuracy ", end="")
    print(
        f"**{interval(share(found == labels), len(seeds))}**\n\n| class | scenes | accuracy | most frequent mistake |"
    )
    print("|---|---|---|---|")
    for label, name in enumerate(CLASS_NAMES):
        chosen = found[labels == label]
        wrong = chosen[chosen != label]
        mistake = CLASS_NAMES[int(wrong.mode().values)] if len(wrong) else "none"
        print(f"| {name} | {len(chosen)} | {100 * share(chosen == label):.1f} % | {mistake} |")


def _named(model: nn.Module, seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    labels: list[int] = []

    def pictures() -> Iterable[Picture]:
        for seed in seeds:
            scene = make_scene(seed)
            labels.append(scene.classes[0])
            yield scene.image

    found = predictions(model, pictures()).argmax(dim=1)
    return torch.tensor(labels), found


def check_two_objects(model: nn.Module, seeds: range) -> None:
    """Prints how often the model names both objects of two-object scenes."""
    scenes = [make_scene(seed, num_objects=2) for seed in seeds]
    best = predictions(model, (scene.image for scene in scenes)).topk(2, dim=1).indices.tolist()
    both = torch.tensor([set(pair) == set(scene.classes) for pair, scene in zip(best, scenes, strict=True)])
    first = torch.tensor([pair[0] in scene.classes for pair, scene in zip(best, scenes, strict=True)])
    print(f"\nTwo objects, {len(seeds)} unseen scenes:\n\n| what | share |\n|---|---|")
    print(f"| both objects are the two best classes | {interval(share(both), len(seeds))} |")
    print(f"| the best class is one of the objects | {interval(share(first), len(seeds))} |")


def check_cues(model: nn.Module, seeds: range) -> None:
    """Prints the model's accuracy when one cue is taken away at a time."""
    scenes = [make_scene(seed) for seed in seeds]
    labels = first_labels(scenes)
    plain = predictions(model, (scene.image for scene in scenes)).argmax(dim=1)
    cases: dict[str, Iterable[Picture]] = {
        "without the object (same scene, never there)": (scene.without_objects() for scene in scenes),
        "other colours and texture on the object": (scene.recoloured(1).image for scene in scenes),
        "grey picture (colour removed)": (_grey(scene.image) for scene in scenes),
        "negative picture": (255 - scene.image for scene in scenes),
    }
    print(
        f"\nCues, {len(seeds)} one-object scenes; chance is {100 * CHANCE:.1f} %:\n\n| picture | accuracy |\n|---|---|"
    )
    print(f"| as it is | {interval(share(plain == labels), len(seeds))} |")
    for name, pictures in cases.items():
        found = predictions(model, pictures).argmax(dim=1)
        print(f"| {name} | {interval(share(found == labels), len(seeds))} |")


def _grey(picture: Picture) -> Picture:
    level = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat(np.round(level)[..., None], 3, axis=2).astype(np.uint8)


def check_simple_classifiers(train: range, test: range) -> None:
    """Prints what logistic regression gets from colour, place, area or background alone."""
    print(f"\nLogistic regression on {len(train)} scenes, tested on {len(test)}; chance is {100 * CHANCE:.1f} %:\n")
    print("| what it sees | accuracy |\n|---|---|")
    for name, features in (
        ("colour histogram of the picture", colour_histogram),
        ("colour histogram of the object (exact mask)", object_histogram),
        ("place and visible area of the object", place_and_area),
        ("thumbnail of the scene without the object", background),
    ):
        print(f"| {name} | {interval(simple_classifier(features, train, test), len(test))} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all checks and prints their tables."""
    parser = argparse.ArgumentParser(description="Checks of the scenes and of the embedded model.")
    parser.add_argument("--scenes", type=int, default=6000, help="one-object scenes; most checks use a third")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves its choice")
    options = parser.parse_args(arguments)
    if options.scenes < 30:
        parser.error(f"found --scenes {options.scenes}, expected 30 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.monotonic()
    model, test, some = load_scenes_model(), SPLITS["test"], options.scenes // 3
    check_one_object(model, test[: options.scenes])
    check_two_objects(model, test[:some])
    check_cues(model, test[:some])
    check_simple_classifiers(SPLITS["train"][: options.scenes], test[:some])
    print(f"\nMeasured in {time.monotonic() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
