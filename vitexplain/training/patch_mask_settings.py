"""The recipe by which a model learns to name the object of each patch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import OptionError
from .patch_mask_losses import MASK_LOSSES, MaskLoss

_MAY_CHANGE = frozenset({"save_every", "workers"})


@dataclass(frozen=True)
class PatchMaskSettings:
    """The training recipe. The defaults suit a pretrained model, and masks for about 1 % of the images.

    Attributes:
        loss: what patches of images with masks are asked; see `patch_mask_losses`.
        mask_weight: λ, weight of the mask loss beside the classification loss; 0 trains on labels alone.
        distillation: whether the classification loss follows the probabilities that the model gave before training,
            for every picture as it was cropped, instead of the labels. It costs a further forward pass a step, and
            keeps the model's answers where few pictures are there to teach them; those without masks need no label.
        steps: number of training steps.
        batch_size: images with labels in a step.
        annotated_batch_size: images with masks in a step, drawn with replacement; they have labels too, and count in
            the classification loss as well.
        learning_rate: highest, of the last block and the final norm; warm-up, then cosine decay to 0.
        head_rate: highest learning rate of the classifier.
        layer_decay: factor on the learning rate from each block to the one below it, 1 for none.
        trained_blocks: how many blocks are trained, the last ones, with norm and classifier; what lies below stays
            frozen. 0 trains the whole model.
        warmup_share: share of the steps, the first ones, in which the learning rate grows.
        weight_decay: of matrices; biases, norms, positions and class tokens have none.
        label_smoothing: of the classification loss, 0 to below 1.
        gradient_clip: largest norm of the gradient.
        smallest_crop: training sees random crops that show at least this share of the picture's area; 1 shows the
            picture as the model sees it otherwise.
        most_squeezed: largest change of the crop's aspect ratio, as a factor of 1 or more.
        flip: whether pictures are mirrored half of the time.
        log_every: steps between two entries of the log.
        save_every: steps between two savings of what an interrupted training goes on from; the last step is saved, too.
        workers: processes that prepare images; 0 prepares them in this one.
        seed: decides batches, crops and dropout.
    """

    loss: MaskLoss = "balanced"
    mask_weight: float = 1.0
    distillation: bool = False
    steps: int = 3_000
    batch_size: int = 48
    annotated_batch_size: int = 16
    learning_rate: float = 1e-5
    head_rate: float = 1e-4
    layer_decay: float = 0.65
    trained_blocks: int = 0
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    gradient_clip: float = 1.0
    smallest_crop: float = 0.35
    most_squeezed: float = 4 / 3
    flip: bool = True
    log_every: int = 20
    save_every: int = 200
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong: list[str] = []
        for names, low, high in (
            (("steps", "batch_size", "annotated_batch_size", "log_every", "save_every", "most_squeezed"), 1, math.inf),
            (("trained_blocks", "workers", "seed", "mask_weight", "weight_decay"), 0, math.inf),
            (("learning_rate", "head_rate", "gradient_clip"), 1e-12, math.inf),
            (("layer_decay", "smallest_crop"), 1e-3, 1),
            (("warmup_share",), 0, 1),
            (("label_smoothing",), 0, 0.99),
        ):
            wrong += [f"{name} = {value!r}" for name in names if not low <= (value := getattr(self, name)) <= high]
        if self.loss not in MASK_LOSSES:
            wrong.append(f"loss = {self.loss!r}")
        if wrong:
            raise OptionError(f"found {', '.join(wrong)}; the description of PatchMaskSettings says what each can be")

    @property
    def score(self) -> str:
        """The option `score` of the method `pm` under which the trained map is a probability."""
        return self.loss if self.loss in ("background", "joint") else "probability"

    def share_of_rate(self, step: int) -> float:
        """What part of its highest the learning rate has at a step."""
        warm = max(1, round(self.warmup_share * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, self.steps - warm))

    def must_match(self) -> dict[str, object]:
        """What an interrupted training has to be continued with."""
        return {name: value for name, value in vars(self).items() if name not in _MAY_CHANGE}
