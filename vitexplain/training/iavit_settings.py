"""The recipe by which an interpreter, alone or with its model, is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import OptionError
from ..iavit.interpreter import HEADS, Head
from ..iavit.losses import REGULARISERS, Regulariser

Optimiser = Literal["adamw", "sgd"]
"""What moves the weights; SGD with momentum 0.9."""

OPTIMISERS: tuple[Optimiser, ...] = ("adamw", "sgd")
"""All of them."""

_MAY_CHANGE = frozenset({"workers"})


@dataclass(frozen=True)
class IAViTSettings:
    """The training recipe. The defaults depart from the published code where that works against itself; see `released`.

    The loss is CE(o, y) + `simulation_weight` · T² KL(softmax(o/T) ‖ softmax(u/T)) + `reg_weight` · R(e, i)
    + `imitation_weight` · CE(u, y), with o and u the logits of model and interpreter, and e and i the attention that
    patches receive in model and interpreter. Without labels, or with the model frozen, the terms of y are left out.

    Attributes:
        reg: R, see `vitexplain.iavit.losses`: ``"kl"``, image by image; ``"mmd"``, between the sets of a batch;
            ``"released"``, the published code's, which is no MMD; ``"none"``.
        reg_weight: weight of R.
        simulation_weight: weight of the interpreter's imitation of the model's distribution.
        temperature: T.
        detach_teacher: the imitation moves the interpreter alone; False: it pulls the model towards it, too.
        imitation_weight: weight of the interpreter's own cross-entropy.
        label_smoothing: of both cross-entropies, 0 to below 1.
        head: the interpreter's, see `InterpreterShape`.
        scale_logits: the interpreter divides queries times keys by √D.
        steps: number of training steps.
        batch_size: images in a step.
        optimiser: one of `OPTIMISERS`.
        learning_rate: the highest; it rises over the first steps and falls to about 0, both along a cosine.
        interpreter_rate: the highest of the interpreter, where the model is trained with it; 0 takes `learning_rate`.
        warmup_share: share of the steps, the first ones, in which the rate rises.
        weight_decay: of matrices; biases, norms, positions and class tokens have none.
        gradient_clip: largest norm of the gradient.
        images: where the model is frozen, how many images it is read on, once; the readings are kept in memory, four
            bytes for each of P·D numbers an image.
        smallest_crop: where the model is trained, random crops show at least this share of the image's area.
        flip: where the model is trained, whether images are mirrored half of the time.
        validation_share: share of the images kept to choose the best weights by, where no others are given.
        evaluate_every: steps between two evaluations; the lowest loss on the images kept wins. Training that is
            interrupted goes on from the last one.
        workers: processes that prepare images; 0 prepares them in this one.
        seed: decides first weights, images kept, batches, crops and dropout.
    """

    reg: Regulariser = "kl"
    reg_weight: float = 1.0
    simulation_weight: float = 1.0
    temperature: float = 3.0
    detach_teacher: bool = True
    imitation_weight: float = 0.0
    label_smoothing: float = 0.0
    head: Head = "pooled"
    scale_logits: bool = True
    steps: int = 3_000
    batch_size: int = 64
    optimiser: Optimiser = "adamw"
    learning_rate: float = 1e-3
    interpreter_rate: float = 0.0
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    images: int = 2_000
    smallest_crop: float = 0.5
    flip: bool = True
    validation_share: float = 0.1
    evaluate_every: int = 200
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong: list[str] = []
        for names, low, high in (
            (("steps", "batch_size", "evaluate_every"), 1, math.inf),
            (("images",), 2, math.inf),
            (("reg_weight", "simulation_weight", "imitation_weight", "weight_decay", "workers"), 0, math.inf),
            (("interpreter_rate", "seed"), 0, math.inf),
            (("learning_rate", "gradient_clip", "temperature"), 1e-12, math.inf),
            (("smallest_crop",), 1e-3, 1),
            (("warmup_share", "validation_share"), 1e-3, 0.9),
            (("label_smoothing",), 0, 0.99),
        ):
            wrong += [f"{name} = {value!r}" for name in names if not low <= (value := getattr(self, name)) <= high]
        for name, known in (("reg", REGULARISERS), ("head", HEADS), ("optimiser", OPTIMISERS)):
            if getattr(self, name) not in known:
                wrong.append(f"{name} = {getattr(self, name)!r}")
        if wrong:
            raise OptionError(f"found {', '.join(wrong)}; the description of IAViTSettings says what each can be")

    @property
    def reads_attention(self) -> bool:
        """Whether the loss looks at the model's attention."""
        return self.reg != "none" and self.reg_weight > 0

    def must_match(self) -> dict[str, Any]:
        """What an interrupted training has to be continued with."""
        return {name: value for name, value in vars(self).items() if name not in _MAY_CHANGE}

    @classmethod
    def released(cls, **changes: Any) -> IAViTSettings:
        """The published code's choices, for comparison: CIFAR-10 at 224 pixels, from ImageNet weights.

        Its regulariser rewards disagreement (`vitexplain.iavit.losses.released_kernel_mean`), its attention is not
        scaled, and its model is pulled towards the interpreter. It chooses the best weights by test accuracy; here, as
        always, images kept from training decide.

        Args:
            **changes: further fields.
        """
        published: dict[str, Any] = {
            "reg": "released",
            "detach_teacher": False,
            "head": "position",
            "scale_logits": False,
            "steps": 10_000,
            "optimiser": "sgd",
            "learning_rate": 0.03,
            "warmup_share": 0.05,
            "weight_decay": 0.0,
            "smallest_crop": 0.05,
            "flip": False,
        }
        return cls(**{**published, **changes})
