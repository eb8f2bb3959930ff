"""Token dropping: patches are not painted over but taken away, between patch embedding and first block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..borrowing import callers_autocast
from ..errors import InputError, UnsupportedModelError
from ..layout import TokenLayout, to_tokens
from ..models.adapter import ModelAdapter
from ..needs import Needs
from .catalogue import Figure, register_metric
from .curves import CurveMetric
from .metric import MetricBatch
from .ordering import rank
from .predictor import Predictor
from .responses import Responses, clean_responses


@register_metric(
    "token_dropping",
    title="Token dropping: symmetric relevance gain",
    paper="Mehri et al.: LibraGrad, CVPR 2025 (dropped tokens); Blücher, Vielhaben, Strodthoff: Decoupling Pixel "
    "Flipping and Occlusion Strategy for Consistent XAI Benchmarks, TMLR 2024 (SRG)",
    requires=("targets", "inputs", "predictor"),
    figures=(
        Figure("srg", "SRG of probability", higher_is_better=True, chance=0.0),
        Figure("mif", "probability, most influential first", higher_is_better=False),
        Figure("lif", "probability, least influential first", higher_is_better=True),
        Figure("srg_agreement", "SRG of agreement", higher_is_better=True, chance=0.0),
        Figure("mif_agreement", "agreement, most influential first", higher_is_better=False),
        Figure("lif_agreement", "agreement, least influential first", higher_is_better=True),
    ),
)
@dataclass(frozen=True)
class TokenDropping(CurveMetric):
    """10 % to 90 % of the patch tokens are dropped, most (MIF) and least (LIF) influential first.

    Positions are part of the tokens by then, so those that stay know where they are, and nothing unnatural is shown to
    the model. Only for models whose blocks treat tokens as a set: where positions enter the blocks (relative bias,
    rotary embedding, windows), the remaining tokens would be misplaced, and the model is refused.

    Statistics of an image: ``mif`` and ``lif`` (S,), probability of the explained class; ``mif_agreement`` and
    ``lif_agreement`` (S,), 1 where the prediction is still that of the unchanged image. A figure is the mean over the
    steps, in [0, 1]; SRG is LIF minus MIF, in [-1, 1]. Equal scores go row by row.
    """

    curves = ("mif", "lif", "mif_agreement", "lif_agreement")
    ends = False

    def measure(self, batch: MetricBatch) -> dict[str, Tensor]:
        """The statistics named above.

        Raises:
            UnsupportedModelError: tokens cannot be dropped from this model.
            InputError: the maps are not on the model's patch grid.
        """
        predictor, targets = cast("Predictor", batch.predictor), cast("Tensor", batch.targets)
        inputs = predictor.adapter.check_images(cast("Tensor", batch.inputs))
        dropper = TokenDropper.of(predictor, inputs)
        if batch.scores.shape[1:] != dropper.layout.grid:
            raise InputError(
                f"found maps of {batch.scores.shape[1]}×{batch.scores.shape[2]} patches, expected the model's grid of "
                f"{dropper.layout.grid[0]}×{dropper.layout.grid[1]}"
            )
        clean = clean_responses(batch, targets)
        statistics = {}
        for name, most_influential_first in (("mif", True), ("lif", False)):
            ranks = rank(batch.scores.flatten(1), most_influential_first).to(inputs.device)
            kept = [ranks >= ranks.shape[1] * point // self.steps for point in self.points]
            found = [Responses.of(dropper.logits(inputs, each), targets) for each in kept]
            statistics[name] = torch.stack([each.probability for each in found], 1)
            same = [each.predicted == clean.predicted for each in found]
            statistics[f"{name}_agreement"] = torch.stack(same, 1).double()
        return statistics

    def summarise(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over the steps, and their differences."""
        figures = {name: means[name].mean(-1) for name in self.curves}
        figures["srg"] = figures["lif"] - figures["mif"]
        figures["srg_agreement"] = figures["lif_agreement"] - figures["mif_agreement"]
        return figures


@dataclass(frozen=True, eq=False)
class TokenDropper:
    """A model that can be asked about some of an image's patch tokens.

    Attributes:
        predictor: the model.
        layout: the tokens that enter its first block.
    """

    predictor: Predictor
    layout: TokenLayout

    @classmethod
    def of(cls, predictor: Predictor, inputs: Tensor) -> TokenDropper:
        """Makes sure that tokens can be dropped from the model, by trying it on the first image.

        Args:
            predictor: the model.
            inputs: (B, 3, H, W), as the model takes them.

        Raises:
            UnsupportedModelError: its blocks do not see one sequence of tokens, or treat them by their places.
        """
        adapter = predictor.adapter
        try:
            adapter.check_needs(Needs(attention=True))
        except UnsupportedModelError as error:
            raise _refusal(adapter, "its blocks are not known") from error
        layout = adapter.layouts(adapter.grid((inputs.shape[-2], inputs.shape[-1])))[0]
        if adapter.blocks[0].arrangement not in ("BND", "NBD"):
            raise _refusal(adapter, "its tokens stay on their grid from block to block")
        dropper = cls(replace(predictor, compiled=False), layout)  # each number of tokens would be compiled anew
        dropper._check_set(inputs[:1])
        return dropper

    def logits(self, images: Tensor, kept: Tensor) -> Tensor:
        """Logits (B, C) of images whose other patch tokens never reach the first block.

        Args:
            images: (B, 3, H, W), as the model takes them.
            kept: (B, P) bool, as many in each row; or (B, q) int64 indices of patches, in the order wanted.

        Raises:
            UnsupportedModelError: the first block runs more than once, or takes something else than all tokens.
        """
        if kept.dtype == torch.bool:
            kept = kept.nonzero()[:, 1].reshape(len(kept), -1)
        size = self.predictor.part_of(len(images), images)
        parts = zip(*(torch.split(each, size) for each in (images, kept)), strict=True)
        return torch.cat([self._part(part, chosen) for part, chosen in parts])

    def _part(self, images: Tensor, kept: Tensor) -> Tensor:
        block, calls = self.predictor.adapter.blocks[0], 0

        def select(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            nonlocal calls
            calls += 1
            if arguments:
                return (chosen(arguments[0]), *arguments[1:]), named
            first = next(iter(named))
            return arguments, {**named, first: chosen(named[first])}

        def chosen(state: Tensor) -> Tensor:
            tokens = to_tokens(state, block.arrangement)
            if tokens.shape[:2] != (len(images), self.layout.count):
                raise _refusal(self.predictor.adapter, f"its first block was given {tuple(state.shape)}")
            places = kept[..., None].expand(-1, -1, tokens.shape[2]) + self.layout.prefix
            tokens = torch.cat([tokens[:, : self.layout.prefix], tokens.gather(1, places)], 1)
            return tokens.transpose(0, 1) if block.arrangement == "NBD" else tokens

        handle = block.block.register_forward_pre_hook(select, with_kwargs=True)
        try:
            logits = self.predictor.logits(images)
        finally:
            handle.remove()
        if calls != 1:
            raise _refusal(self.predictor.adapter, f"its first block ran {calls} times")
        return logits

    def _check_set(self, image: Tensor) -> None:
        """Patch tokens in another order give the same logits, and half of them give some."""
        count = self.layout.count - self.layout.prefix
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu").to(image.device)[None]
        plain, mixed = self.predictor.logits(image), self._tried(image, order)
        tolerance = torch.finfo(_precision(image)).eps ** 0.5 * (plain - plain.mean()).abs().max()
        if not (mixed - plain).abs().max() <= tolerance:
            raise _refusal(self.predictor.adapter, "its logits depend on the order in which tokens enter the blocks")
        self._tried(image, order[:, : max(count // 2, 1)])

    def _tried(self, image: Tensor, kept: Tensor) -> Tensor:
        try:
            return self.logits(image, kept)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            if "memory" in str(error):
                raise
            raise _refusal(self.predictor.adapter, f"it failed ({type(error).__name__}: {error})") from error


def _precision(image: Tensor) -> torch.dtype:
    """That of a model's products, which is a caller's autocast's where it is on."""
    with callers_autocast():
        return (image.new_zeros(1, 1) @ image.new_zeros(1, 1)).dtype


def _refusal(adapter: ModelAdapter, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"tokens cannot be dropped from a {type(adapter.model).__name__}: {found}; expected blocks that treat tokens "
        "as a set, positions added before. Use positive_perturbation or deletion, which replace pixels"
    )
