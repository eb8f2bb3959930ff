"""The recipe by which the gates of Vision DiffMask are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..diffmask.constraint import CONSTRAINTS, Constraint
from ..errors import OptionError


@dataclass(frozen=True)
class DiffMaskSettings:
    """The training recipe. The defaults depart from the published code where that diverges; see `released`.

    Attributes:
        steps: number of training steps, one batch each.
        margin: m, by how much masking may change the model's answer, in nats; on average over images.
        constraint: what must not change: ``"distribution"``, all class probabilities, as in the paper; ``"class"`` or
            ``"evidence"``: those of one class, told to the gates, for maps of a class (`diffmask.constraint`).
        top_classes: classes of an image, the most probable ones, among which training draws the class told.
        masked_at_start: expected share of patches masked by the first gates, by choice of their offset; 0 takes
            `offset` as it is.
        offset: β at the start where `masked_at_start` is 0.
        stretch: α, how far a gate's logit may leave its offset.
        normalise_inputs: LayerNorm on what gates read. The paper has none; without it, convergence depends on the seed.
        replacement_start: where b starts: the ``"mean"`` patch embedding, or a small ``"random"`` vector.
        learning_rate: of the gates, after warm-up.
        replacement_rate: learning rate of b.
        warmup_steps: steps in which both rates grow.
        final_rate: share of both rates left at the last step, by a cosine from the end of warm-up; 1 keeps them.
        lookahead: Lookahead around Adam.
        averaging: decay, a step, of a running average of the gates, which is then what is evaluated and written; 0
            takes the gates as they are. Meant for gates and multipliers that swing about each other.
        shallowest_depth: share of the depths that no step ends at: k is drawn from the depths above. 0, as in the
            paper, draws from all; 1 lets all gates take part in every step. Meant for models whose first patch
            embeddings do not say what can go.
        multiplier_start: λ at the start.
        multiplier_rate: learning rate of λ, by gradient ascent.
        multiplier_limits: smallest and largest λ.
        multiplier_ascends: True for dual ascent. The published code descends by mistake.
        shared_multiplier: one λ for all depths instead of one each.
        redraw_for_multiplier: λ is updated on a second draw of depth and noise instead of on that of the gates.
        count_class_token: the never-masked class token counts in the mean of log-probabilities.
        evaluate_every: steps between two evaluations with hard masks.
        validation_batches: how many of the first training batches serve for that where no validation images are given.
        agreement: share of predictions that good gates leave as they are.
        patience: evaluations without a better result before training stops; 0 never stops early.
        collapsed_below: share of kept patches under which gates that break the constraint count as collapsed.
        restarts: how often collapsed gates are replaced by fresh ones that mask half as much at the start.
        keep_best: the result is the best evaluation's gates: the constraint met, then few patches, and of those that
            keep about as few, the least divergence; False: the last.
        seed: decides initial weights, depths and noise.
    """

    steps: int = 3_000
    margin: float = 0.1
    constraint: Constraint = "distribution"
    top_classes: int = 5
    masked_at_start: float = 0.2
    offset: float = 8.0
    stretch: float = 15.0
    normalise_inputs: bool = True
    replacement_start: Literal["mean", "random"] = "mean"
    learning_rate: float = 1e-3
    replacement_rate: float = 1e-2
    warmup_steps: int = 100
    final_rate: float = 1.0
    lookahead: bool = False
    averaging: float = 0.0
    shallowest_depth: float = 0.0
    multiplier_start: float = 20.0
    multiplier_rate: float = 0.3
    multiplier_limits: tuple[float, float] = (0.05, 200.0)
    multiplier_ascends: bool = True
    shared_multiplier: bool = False
    redraw_for_multiplier: bool = False
    count_class_token: bool = False
    evaluate_every: int = 100
    validation_batches: int = 4
    agreement: float = 0.95
    patience: int = 0
    collapsed_below: float = 0.01
    restarts: int = 2
    keep_best: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        wrong: list[str] = []
        for names, low, high in (
            (("steps", "evaluate_every", "validation_batches", "top_classes"), 1, math.inf),
            (("warmup_steps", "patience", "restarts", "seed", "multiplier_rate", "multiplier_start"), 0, math.inf),
            (("margin", "learning_rate", "replacement_rate", "stretch"), 1e-12, math.inf),
            (("masked_at_start", "averaging", "final_rate", "shallowest_depth"), 0, 1),
            (("agreement", "collapsed_below"), 0, 1),
            (("offset",), -math.inf, math.inf),
        ):
            wrong += [f"{name} = {value!r}" for name in names if not low <= (value := getattr(self, name)) <= high]
        wrong += [f"{name} = 1" for name in ("masked_at_start", "averaging") if getattr(self, name) == 1]
        if self.constraint not in CONSTRAINTS:
            wrong.append(f"constraint = {self.constraint!r}")
        if self.replacement_start not in ("mean", "random"):
            wrong.append(f"replacement_start = {self.replacement_start!r}")
        limits = tuple(self.multiplier_limits)
        if len(limits) != 2 or not 0 <= limits[0] < limits[1]:
            wrong.append(f"multiplier_limits = {self.multiplier_limits!r}")
        if wrong:
            raise OptionError(f"found {', '.join(wrong)}; the description of DiffMaskSettings says what each can be")

    @property
    def class_specific(self) -> bool:
        """Whether gates are told a class."""
        return self.constraint != "distribution"

    def rate_share(self, step: int, steps: int) -> float:
        """Share of the learning rates, above 0 up to 1, in a step of a training of so many: warm-up, then a cosine."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        gone = min(1.0, max(0.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps)))
        return warm * (self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * gone)) / 2)

    @classmethod
    def released(cls, **changes: Any) -> DiffMaskSettings:
        """The published code's behaviour, its mistakes included, for comparison.

        The multiplier goes down where the constraint is violated, so it ends at a limit: what the code then solves is
        a fixed penalty. The offset is a constant, the class token counts as a patch that could be dropped, and nothing
        is chosen by evaluation before the last step. The paper's rates, for some 70 000 steps of 32 images.

        Args:
            **changes: further fields.
        """
        published: dict[str, Any] = {
            "steps": 70_000,
            "masked_at_start": 0.0,
            "normalise_inputs": False,
            "replacement_start": "random",
            "learning_rate": 2e-5,
            "replacement_rate": 1e-3,
            "warmup_steps": 1_200,
            "lookahead": True,
            "multiplier_limits": (0.0, 200.0),
            "multiplier_ascends": False,
            "redraw_for_multiplier": True,
            "count_class_token": True,
            "restarts": 0,
            "keep_best": False,
        }
        return cls(**{**published, **changes})
