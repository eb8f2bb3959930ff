"""Robustness: does the map stay where the image hardly changes?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..options import option
from ..randomness import DRAWN
from .catalogue import Figure, register_metric
from .draws import generators
from .metric import Metric, MetricBatch

_AT_ONCE = 32
"""Changed images in one call of the method; more where the batch itself is larger."""


@register_metric(
    "sensitivity_max",
    title="Sensitivity-max",
    paper="Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019",
    requires=("targets", "inputs", "explain"),
    figures=[Figure("sensitivity_max", "largest relative change of the map", higher_is_better=False)],
)
@dataclass(frozen=True)
class SensitivityMax(Metric):
    """Largest change of the map, relative to the map, among images near by (section 3 of the paper, relative).

    max over draws of ‖Φ(x + δ) − Φ(x)‖ / ‖Φ(x)‖, each number of δ uniform in [−radius, radius] of the normalised input,
    the norm that of Frobenius over patch scores; computed by captum. The class explained stays that of the clean image.
    Costs `draws` explanations an image. NaN where the map is zero everywhere.
    """

    radius: float = option(0.02, "largest change of a number of the normalised input", minimum=0)
    draws: int = option(10, "changed images per image", minimum=1)
    seed: int = option(0, "seed of the draws", minimum=0, maximum=2**32 - 1)

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``sensitivity`` (B,), >= 0."""
        from captum.metrics import sensitivity_max

        inputs, targets = cast("Tensor", batch.inputs), cast("Tensor", batch.targets)
        explain = cast("Callable[[Tensor, Tensor], Tensor]", batch.explain)
        clean, count, own = batch.scores.contiguous(), len(inputs), generators(inputs, self.seed)

        def perturb(images: Tensor) -> Tensor:
            times = range(len(images) // count)  # captum repeats every image this often, side by side
            shape, radius = images.shape[1:], self.radius
            noise = [
                torch.empty(shape, **DRAWN).uniform_(-radius, radius, generator=mine) for mine in own for _ in times
            ]
            return images + torch.stack(noise).to(images)

        def explanation(images: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            if isinstance(images, tuple):
                return (clean,)  # captum asks for the clean images first, in a tuple; their maps are at hand
            return explain(images, targets.repeat_interleave(len(images) // count)).to(clean)

        sensitivity = sensitivity_max(
            explanation,
            inputs,
            perturb,
            n_perturb_samples=self.draws,
            max_examples_per_batch=min(max(_AT_ONCE, count), count * self.draws),
        )
        return {"sensitivity": torch.where(clean.flatten(1).any(1), sensitivity.double(), torch.nan)}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over images."""
        return {"sensitivity_max": means["sensitivity"]}
