"""What the IA-ViT tables are made of: data sets, the models trained on them, and the variants of the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitexplain.data import load_examples, open_dataset
from vitexplain.data.example import Example
from vitexplain.data.stripes import CLASSES, SIZE, stripes_examples
from vitexplain.explainer import Explainer
from vitexplain.iavit import load_iavit
from vitexplain.models import adapt
from vitexplain.models.embedded import build_model, load_scenes_model
from vitexplain.preprocessing import Preprocessing
from vitexplain.registry import create_method
from vitexplain.subject import Subject
from vitexplain.training.iavit import IAViTSettings, train_iavit, train_interpreter

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"reg": "none", "simulation_weight": 0.0},
    "none": {"reg": "none"},
    "released": {"reg": "released", "scale_logits": False, "detach_teacher": False, "simulation_weight": 1.0},
    "mmd": {"reg": "mmd"},
    "kl": {"reg": "kl"},
}
"""What each variant changes in the recipe; ``plain`` is the model alone, by cross-entropy."""

CIFAR_ARCHITECTURE: Mapping[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "num_classes": 10,
}

FROZEN = "frozen-scenes"
"""The task in which the model is not trained."""


@dataclass(frozen=True, eq=False)
class Task:
    """A data set and what is trained on it.

    Attributes:
        model: the model that training begins with, by seed.
        preprocessing: its pictures.
        settings: the recipe.
        training: makes the training examples.
        test: makes the test examples.
        frozen: the model stays as it is, and the interpreter alone is trained, without labels.
    """

    model: Callable[[int], nn.Module]
    preprocessing: Preprocessing
    settings: IAViTSettings
    training: Callable[[], Sequence[Example]]
    test: Callable[[], Sequence[Example]]
    frozen: bool = False


def scenes(steps: int, count: int) -> Task:
    """The embedded model, trained on, on so many scenes with one object."""
    from vitexplain import load_model

    return Task(
        lambda seed: load_scenes_model(),
        load_model().preprocessing,
        IAViTSettings(
            steps=steps,
            batch_size=32,
            learning_rate=3e-4,
            interpreter_rate=3e-3,
            smallest_crop=0.8,
            validation_share=0.05,
            evaluate_every=steps,
        ),
        lambda: _painted("train", count),
        lambda: _painted("test", 300),
    )


def frozen_scenes(steps: int, count: int) -> Task:
    """The embedded model as it is."""
    settings = IAViTSettings(images=count, steps=steps, batch_size=32, learning_rate=2e-3, evaluate_every=steps)
    return replace(scenes(steps, count), settings=settings, frozen=True)


@lru_cache
def _painted(split: str, count: int) -> Sequence[Example]:
    return list(open_dataset("scenes", split=split, count=count))


def stripes(steps: int) -> Task:
    """A small ViT from random weights on striped ellipses, whose direction of stripes is the class."""

    def fresh(seed: int) -> nn.Module:
        return _fresh({**CIFAR_ARCHITECTURE, "depth": 3, "num_classes": CLASSES}, seed)

    middle, spread = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return Task(
        fresh,
        Preprocessing((SIZE, SIZE), middle, spread, crop_fraction=1.0),
        IAViTSettings(
            steps=steps,
            batch_size=64,
            learning_rate=2e-3,
            smallest_crop=1.0,  # a stripe's width and direction are its class
            flip=False,
            validation_share=0.02,
            evaluate_every=50,
        ),
        lambda: stripes_examples(range(10_000)),
        lambda: stripes_examples(range(20_000, 20_500)),
    )


def cifar10(root: str, steps: int) -> Task:
    """A small ViT from random weights on CIFAR-10, patches of 4 × 4."""
    middle = (0.5, 0.5, 0.5)
    return Task(
        lambda seed: _fresh(CIFAR_ARCHITECTURE, seed),
        Preprocessing((32, 32), middle, middle, crop_fraction=1.0),
        IAViTSettings(
            steps=steps,
            batch_size=64,
            learning_rate=2e-3,
            simulation_weight=0.1,  # from random weights, imitation of a model that knows nothing holds it back
            smallest_crop=0.7,
            validation_share=0.05,
            evaluate_every=max(1, steps // 2),
        ),
        lambda: open_dataset(f"cifar10:{root}", split="train"),
        lambda: open_dataset(f"cifar10:{root}", split="test"),
    )


def _fresh(architecture: Mapping[str, Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(architecture)


def trained(task: Task, settings: IAViTSettings, weights: Path) -> Explainer:
    """The model of a task with its interpreter, after training."""
    model = task.model(settings.seed)
    if not task.frozen:
        train_iavit(model, task.training(), task.preprocessing, weights, settings, resume=True)
        return load_iavit(weights, model)
    images = (batch.inputs for batch in load_examples(task.training(), task.preprocessing))
    train_interpreter(model, images, weights, settings, resume=True)
    return Explainer(create_method("iavit", checkpoint=str(weights)), Subject(adapt(model.eval()), task.preprocessing))
