"""What a method is: a frozen dataclass whose fields are its options and whose `attribute` gives the scores."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .errors import OptionError
from .record import BlockRecord, Needs

if TYPE_CHECKING:
    from .capture import Capture
    from .registry import MethodInfo


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """An option of a method: a dataclass field that knows its meaning and its range.

    Args:
        default: the value when none is given; its type is the option's type.
        help: what it does, in one sentence, with its unit.
        choices: the values it can take; besides numbers, where `minimum` or `maximum` is given too.
        minimum: smallest number.
        maximum: largest number.
    """
    metadata = {"help": help, "choices": tuple(choices), "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Options are the fields; an instance is one fully configured method.

    Attributes:
        info: what the decorator was told: name, paper, claims.
    """

    info: ClassVar[MethodInfo]

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            _check_option(self.info.name, each, getattr(self, each.name))

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

    @property
    def options(self) -> dict[str, Any]:
        """The options and their values."""
        return dataclasses.asdict(self)

    @abstractmethod
    def attribute(self, capture: Capture) -> Tensor:
        """Raw scores of one target for each image.

        Returns:
            (B, N) relevance of every token, prefix tokens first (the core cuts them off and reports their share);
            or (B, h, w) on the patch grid. Higher is more relevant. Not normalised, not upsampled.
        """


@dataclass(frozen=True)
class AttentionMethod(Method):
    """Base of methods that carry a row vector of relevance from the last block down to `start_layer`."""

    start_layer: int = option(0, "first block that takes part, zero-based", minimum=0)

    @property
    def needs(self) -> Needs:
        """Attention of every block from `start_layer` on."""
        return Needs(attention=True, from_block=self.start_layer)

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
        for block in reversed(capture.blocks[self.start_layer :]):
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
        for block in reversed(capture.blocks[self.start_layer :]):
            factor = self.factor(block)
            seed, moved = block.receive(seed) * factor, block.receive(moved) * factor
            moved = moved + self.moved(seed + moved, block)
        return self.read_out(moved, capture)


def describe_range(each: dataclasses.Field[Any]) -> str:
    """What an option can take, in words."""
    words = [repr(choice) for choice in each.metadata["choices"]]
    if isinstance(each.default, bool):
        words += ["True", "False"]
    elif isinstance(each.default, int | float):
        limits = [
            f"{relation} {each.metadata[key]:g}"
            for key, relation in (("minimum", ">="), ("maximum", "<="))
            if each.metadata[key] is not None
        ]
        kind = "a whole number" if isinstance(each.default, int) else "a number"
        words.append(" ".join([kind, " and ".join(limits)]).rstrip())
    elif not words:
        words.append("text")
    return " or ".join(words)


def _check_option(method: str, each: dataclasses.Field[Any], value: Any) -> None:
    if not _fits(each.default, value, **{key: each.metadata[key] for key in ("choices", "minimum", "maximum")}):
        raise OptionError(f"{method}: found {each.name}={value!r}, expected {describe_range(each)}")


def _fits(default: Any, value: Any, choices: tuple[Any, ...], minimum: float | None, maximum: float | None) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(value, str) or isinstance(default, str):
        return value in choices if choices else isinstance(value, str) and isinstance(default, str)
    if not isinstance(value, int if isinstance(default, int) else (int, float)):
        return False
    return (minimum is None or value >= minimum) and (maximum is None or value <= maximum)
