"""What a method is: a frozen dataclass whose fields are its options and whose `attribute` gives the scores."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .balanced import BALANCED
from .errors import OptionError
from .modified_backward import BackwardRules
from .needs import Needs
from .options import Configurable, option
from .record import BlockRecord

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from .capture import Capture
    from .models.adapter import ModelAdapter
    from .registry import MethodInfo


@dataclass(frozen=True)
class Method(Configurable):
    """Base of all methods. Options are the fields; an instance is one fully configured method.

    Attributes:
        info: what the decorator was told: name, paper, claims.
    """

    info: ClassVar[MethodInfo]

    @property
    def needs(self) -> Needs:
        """What has to be captured for these options."""
        return Needs()

    @property
    def signed(self) -> bool:
        """Whether scores below zero mean evidence against the target, with these options."""
        return self.info.signed

    @property
    def follows_blocks(self) -> bool:
        """Whether attention is followed through several blocks, with these options; else a `layer` is read alone."""
        return self.needs.any_attention and "layer" not in self.options

    def fit(
        self,
        model: ModelAdapter,
        images: Iterable[Any],
        output: str | os.PathLike[str],
        *,
        validation: Iterable[Any] | None = None,
        **settings: Any,
    ) -> Method:
        """This method, trained on a model; here refused, for methods that learn nothing.

        Raises:
            OptionError: the method needs no training.
        """
        raise OptionError(f"{self.info.name} learns nothing, so there is nothing to fit: explain right away")

    @abstractmethod
    def attribute(self, capture: Capture) -> Tensor:
        """Raw scores of one target for each image.

        Returns:
            (B, N) relevance of every token, prefix tokens first (the core cuts them off and reports their share);
            or (B, h, w) on the patch grid. Higher is more relevant. Not normalised, not upsampled.
        """


@dataclass(frozen=True)
class GradientMethod(Method):
    """Base of methods that follow a gradient, and can follow a balanced one instead.

    It stands first among the bases. A method's `needs` are made of ``super().needs``, which say by what rules the
    backward pass goes, and what it reads comes from ``capture.meeting(self.needs)``. A method that asks for gradients
    at changed images gives `backward` to its `TargetResponse`.
    """

    _: KW_ONLY  # options of methods keep their places, whatever they can be told of the gradient
    gradient: str = option(
        "plain",
        "plain: the derivative; balanced: with the scales of norms, gates and attention held constant (LibraGrad)",
        choices=("plain", "balanced"),
    )

    @property
    def backward(self) -> BackwardRules | None:
        """The rules of the backward pass."""
        return BALANCED if self.gradient == "balanced" else None

    @property
    def needs(self) -> Needs:
        """What the next base asks for, by these rules of the backward pass."""
        return replace(super().needs, backward=self.backward)


@dataclass(frozen=True)
class AttentionMethod(Method):
    """Base of methods that carry a row vector of relevance from the last block down to `start_layer`."""

    start_layer: int = option(0, "first block that takes part, zero-based", minimum=0)

    @property
    def needs(self) -> Needs:
        """Attention of every block from `start_layer` on."""
        return Needs(attention=True, from_block=self.start_layer)

    def blocks(self, capture: Capture) -> list[BlockRecord]:
        """The records of the blocks that take part, from the first to the last."""
        return capture.meeting(self.needs).blocks[self.start_layer :]

    def read_out(self, row: Tensor, capture: Capture) -> Tensor:
        """Scores (B, N) from the row that arrived at the first block."""
        return row


@dataclass(frozen=True)
class ProductMethod(AttentionMethod):
    """Base of methods whose map is the seed row times one factor a block."""

    @abstractmethod
    def block_update(self, row: Tensor, block: BlockRecord) -> Tensor:
        """Relevance (B, N) of the tokens entering a block, from that of the tokens leaving it."""

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, N): the seed row, carried down through the blocks."""
        row = capture.seed_row()
        for block in reversed(self.blocks(capture)):
            row = self.block_update(block.receive(row), block)
        return self.read_out(row, capture)


@dataclass(frozen=True)
class ResidualMethod(AttentionMethod):
    """Base of methods whose block factor is ``diag(f) · (I + M)``: relevance stays where it is, and some moves.

    The seed's own relevance, carried by I alone, is left out of the scores. With a CLS head it lies on CLS, which no
    map shows, so nothing changes; with a mean-pooled head it would lie as a constant on every patch and drown what
    the target moved.
    """

    @abstractmethod
    def moved(self, row: Tensor, block: BlockRecord) -> Tensor:
        """What this block's attention moves: `row` · M, (B, N)."""

    def factor(self, block: BlockRecord) -> Tensor | float:
        """f (B, N), what the feed-forward branch multiplies each token's relevance by."""
        return 1.0

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, N): all that the blocks moved."""
        seed = capture.seed_row()
        moved = torch.zeros_like(seed)
        for block in reversed(self.blocks(capture)):
            factor = self.factor(block)
            seed, moved = block.receive(seed) * factor, block.receive(moved) * factor
            moved = moved + self.moved(seed + moved, block)
        return self.read_out(moved, capture)
