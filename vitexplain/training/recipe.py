"""The recipe by which the embedded model is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.scenes import SIZE
from ..errors import InputError
from ..models.embedded import SCENES_ARCHITECTURE

PATCH = 8
"""Side of a patch of the embedded model in pixels."""


@dataclass(frozen=True)
class ClassifierSettings:
    """The training recipe.

    Attributes:
        architecture: arguments of `vitexplain.models.embedded.build_model`.
        one_object_scenes: training scenes with one object, each used several times, mirrored and shifted.
        two_object_scenes: training scenes with two objects; the target is half of each class.
        occlusion: of the training scenes (see `make_scene`); more than in the scenes the model is tested on.
        steps: number of training steps, both rounds together.
        window_share: share of the steps, the first ones, that see windows around the object; the rest see whole scenes.
        fading_share: share of the steps, the first ones, in which textures and clutter grow from none to full.
        refining_share: share of the steps, the last ones, that make up the second round: on whole scenes, the learning
            rate rising and falling once more.
        window: side of the window in patches, 1 to 11.
        two_object_share: share of two-object scenes in the batches of whole scenes, 0 to 1.
        batch_size: images in a step.
        learning_rate: the highest of the first round; warm-up, then cosine decay to a hundredth.
        refining_rate: the highest of the second round.
        warmup_steps: steps in which the learning rate grows.
        weight_decay: of matrices; the other parameters have none.
        label_smoothing: of the class targets, 0 to below 1.
        guidance: weight of the patch heads' losses; 0 trains on the class alone.
        gradient_clip: largest norm of the gradient.
        validation_scenes: scenes behind the accuracies in the log.
        test_scenes: scenes behind the accuracy in the report, looked at once at the end.
        seed: decides initial weights and batches.
        threads: threads of the matrix arithmetic; 0 leaves torch's choice.
    """

    architecture: Mapping[str, Any] = field(default_factory=lambda: dict(SCENES_ARCHITECTURE))
    one_object_scenes: int = 22_000
    two_object_scenes: int = 8_000
    occlusion: float = 0.2
    steps: int = 8_000
    window_share: float = 0.375
    fading_share: float = 0.1
    refining_share: float = 0.375
    window: int = 7
    two_object_share: float = 0.375
    batch_size: int = 32
    learning_rate: float = 2e-3
    refining_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    guidance: float = 0.5
    gradient_clip: float = 1.0
    validation_scenes: int = 1_000
    test_scenes: int = 5_000
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        wrong: list[str] = []
        for names, low, high in (
            (("one_object_scenes", "steps", "batch_size", "validation_scenes", "test_scenes"), 1, math.inf),
            (("two_object_scenes", "warmup_steps", "seed", "threads", "guidance", "weight_decay"), 0, math.inf),
            (("window_share", "fading_share", "refining_share", "two_object_share", "label_smoothing"), 0, 1),
            (("learning_rate", "refining_rate", "gradient_clip"), 1e-12, math.inf),
            (("occlusion",), 0, 0.5),
            (("window",), 1, SIZE // PATCH - 1),
        ):
            wrong += [f"{name} = {value!r}" for name in names if not low <= (value := getattr(self, name)) <= high]
        if wrong:
            raise InputError(f"found {', '.join(wrong)}; the description of ClassifierSettings says what each can be")

    @property
    def window_steps(self) -> int:
        """Number of first steps that see windows."""
        return round(self.window_share * self.steps)

    @property
    def fading_steps(self) -> int:
        """Number of first steps in which clutter grows."""
        return round(self.fading_share * self.steps)

    @property
    def refining_steps(self) -> int:
        """Number of last steps that make up the second round."""
        return round(self.refining_share * self.steps)
