"""Completeness: do the scores of some patches add up to what their removal costs?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..options import option
from ..patch_pixels import at_pixels
from .catalogue import Figure, register_metric
from .correlation import pearson
from .draws import generators
from .metric import Metric, MetricBatch
from .predictor import Predictor
from .replacement import REPLACEMENTS, replacement_images
from .responses import checked_classes

_OUTPUTS = ("logit", "probability")


@register_metric(
    "infidelity",
    title="Infidelity",
    paper="Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019",
    requires=("targets", "inputs", "predictor"),
    figures=[Figure("infidelity", "squared error of the foretold drop of the output", higher_is_better=False)],
)
@dataclass(frozen=True)
class Infidelity(Metric):
    """Squared error with which scores of removed patches foretell the drop of the output (section 2 of the paper).

    E over removals I of (I·βΦ − (f(x) − f(x without I)))²; computed by captum. I is 1 at each patch removed, so that
    I·Φ is the sum of their scores; f is the output explained. β is 1, or with `normalize` the factor that fits best for
    the image: E[I·Φ Δf] / E[(I·Φ)²]. Costs `draws` forwards an image.
    """

    removal: str = option(
        "subset", "patches removed in one draw: anywhere, or one square", choices=("subset", "square")
    )
    share: float = option(0.1, "share of the patches removed in one draw", minimum=0, maximum=1)
    draws: int = option(10, "removals per image", minimum=1)
    normalize: bool = option(True, "fit the scale of each map, which attention maps leave open")
    output: str = option("logit", "what is explained", choices=_OUTPUTS)
    replacement: str = option("image_mean", "what replaces the pixels of removed patches", choices=REPLACEMENTS)
    seed: int = option(0, "seed of the draws", minimum=0, maximum=2**32 - 1)

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``infidelity`` (B,), >= 0, in squared units of the output."""
        asked = _Asked.of(batch, self.output, self.replacement, self.seed)
        found = torch.cat([self._infidelity(part) for part in asked.parts(self.draws)])
        # with `normalize` the square is expanded, and rounding may leave it just below zero
        return {"infidelity": found.clamp(min=0)}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over images."""
        return {"infidelity": means["infidelity"]}

    def _infidelity(self, asked: _Asked) -> Tensor:
        from captum.metrics import infidelity

        own, grid = generators(asked.inputs, self.seed), asked.scores.shape[1:]
        draw = _square if self.removal == "square" else _subset

        def perturb(present: Tensor) -> tuple[Tensor, Tensor]:
            times = range(len(present) // len(own))  # captum repeats every image this often, side by side
            removed = torch.stack([draw(grid, self.share, mine) for mine in own for _ in times]).to(present)
            return removed, present - removed

        def forward(present: Tensor, images: Tensor, replaced: Tensor) -> Tensor:
            return asked.output(_without(images, present == 0, replaced, asked.extent))

        changed = len(own) * self.draws
        found: Tensor = infidelity(
            forward,
            perturb,
            torch.ones_like(asked.scores),
            asked.scores,
            additional_forward_args=(asked.inputs, asked.replaced),
            target=asked.targets,
            n_perturb_samples=self.draws,
            max_examples_per_batch=min(max(asked.predictor.batch_size, len(own)), changed),
            normalize=self.normalize,
        )
        return found


@register_metric(
    "faithfulness_correlation",
    title="Faithfulness correlation",
    paper="Bhatt et al., Evaluating and Aggregating Feature-based Model Explanations, IJCAI 2020",
    requires=("targets", "inputs", "predictor"),
    figures=[
        Figure(
            "faithfulness_correlation", "correlation of scores and drop of the output", higher_is_better=True, chance=0
        )
    ],
)
@dataclass(frozen=True)
class FaithfulnessCorrelation(Metric):
    """Correlation of the scores of removed patches with the drop of the output, over random subsets.

    Pearson over draws of S, of (the sum of scores in S, f(x) − f(x without S)); the subsets have equal sizes. Costs
    `draws` forwards an image. NaN where all sums or all drops are alike, as for constant maps.
    """

    draws: int = option(50, "subsets per image", minimum=2)
    share: float = option(0.1, "share of the patches in one subset", minimum=0, maximum=1)
    output: str = option("logit", "what is explained", choices=_OUTPUTS)
    replacement: str = option("image_mean", "what replaces the pixels of removed patches", choices=REPLACEMENTS)
    seed: int = option(0, "seed of the draws", minimum=0, maximum=2**32 - 1)

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """``correlation`` (B,) in [-1, 1]."""
        asked = _Asked.of(batch, self.output, self.replacement, self.seed)
        return {"correlation": torch.cat([self._correlation(part) for part in asked.parts(self.draws)])}

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over images."""
        return {"faithfulness_correlation": means["correlation"]}

    def _correlation(self, asked: _Asked) -> Tensor:
        grid, own = asked.scores.shape[1:], generators(asked.inputs, self.seed)
        subsets = [torch.stack([_subset(grid, self.share, mine) for _ in range(self.draws)]) for mine in own]
        removed = torch.stack(subsets).to(asked.inputs.device)  # (b, draws, h, w)
        changed = _without(asked.inputs[:, None], removed, asked.replaced[:, None], asked.extent)
        outputs = asked.output(changed.flatten(0, 1)).reshape(*removed.shape[:2], -1)
        drops = asked.output(asked.inputs)[:, None] - outputs
        explained = drops.gather(2, asked.targets[:, None, None].expand(-1, self.draws, 1))[..., 0]
        return pearson((asked.scores[:, None] * removed).sum((2, 3)), explained)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A checked batch, and what the model is asked about it.

    Attributes:
        predictor: the model.
        kind: ``"logit"`` or ``"probability"``.
        inputs: (b, 3, H, W).
        replaced: (b, 3, H, W), pixels that replace those of removed patches.
        targets: (b,) int64.
        scores: (b, h, w) float64.
        extent: pixels (height, width) that their grid takes up; None for just the images.
    """

    predictor: Predictor
    kind: str
    inputs: Tensor
    replaced: Tensor
    targets: Tensor
    scores: Tensor
    extent: tuple[int, int] | None

    @classmethod
    def of(cls, batch: MetricBatch, kind: str, replacement: str, seed: int) -> _Asked:
        predictor = cast("Predictor", batch.predictor)
        logits = predictor.logits(cast("Tensor", batch.inputs))  # the batch's own tensor: they may be known already
        targets = checked_classes(cast("Tensor", batch.targets), logits)
        inputs = predictor.adapter.check_images(cast("Tensor", batch.inputs))
        replaced = replacement_images(replacement, inputs, predictor, seed)
        scores = batch.scores.to(inputs.device).double()
        return cls(predictor, kind, inputs, replaced, targets, scores, batch.extent)

    def parts(self, draws: int) -> Iterator[_Asked]:
        """As many images at a time as fit into one forward with all their draws; at least one."""
        step = max(1, self.predictor.batch_size // draws)
        tensors = ("inputs", "replaced", "targets", "scores")
        for start in range(0, len(self.inputs), step):
            yield replace(self, **{name: getattr(self, name)[start : start + step] for name in tensors})

    def output(self, images: Tensor) -> Tensor:
        """(n, C), float64, since differences of outputs are small."""
        ask = self.predictor.probabilities if self.kind == "probability" else self.predictor.logits
        return ask(images).double()


def _without(images: Tensor, removed: Tensor, replaced: Tensor, extent: tuple[int, int] | None) -> Tensor:
    """Images (…, 3, H, W) with the pixels of other images where patches are `removed`, (…, h, w) bool."""
    pixels = at_pixels(removed, images.shape[-2:], extent).unsqueeze(-3).to(images.device)
    return torch.where(pixels, replaced, images)


def _subset(grid: torch.Size, share: float, generator: torch.Generator) -> Tensor:
    """(h, w) bool: a random subset of patches, at least one."""
    patches = grid.numel()
    removed = torch.zeros(patches, dtype=torch.bool)
    removed[torch.randperm(patches, generator=generator, device="cpu")[: max(1, round(share * patches))]] = True
    return removed.view(grid)


def _square(grid: torch.Size, share: float, generator: torch.Generator) -> Tensor:
    """(h, w) bool: a square of patches within the grid, at a random place, at least one patch."""
    side = min(max(1, round((share * grid.numel()) ** 0.5)), *grid)
    top, left = (int(torch.randint(length - side + 1, (), generator=generator, device="cpu")) for length in grid)
    removed = torch.zeros(grid, dtype=torch.bool)
    removed[top : top + side, left : left + side] = True
    return removed
