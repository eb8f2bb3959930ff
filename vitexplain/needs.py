"""What methods ask of a capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fused_gradient import GradientFusion
from .fusion import Fusion
from .modified_backward import BackwardRules

State = Literal["in", "attention_input", "mid", "mlp", "out"]
"""A token state of one block, (B, N, D): ``in`` entering the block; ``attention_input`` after the first norm;
``mid`` after attention and residual; ``mlp`` what the feed-forward branch adds; ``out`` leaving the block."""

BEHIND_ATTENTION: frozenset[State] = frozenset({"mid", "mlp", "out"})
"""What a block makes of its tokens after they attended to each other."""

SCORED_STATES: frozenset[State] = frozenset({"in", "out"})
"""What is kept of blocks that are scored by themselves where their graph is not."""


@dataclass(frozen=True)
class Needs:
    """What a method asks of the capture; the union of several is ``a | b``.

    Attributes:
        attention: q, k, v of each block.
        attention_gradient: the gradient at each attention output; brings `attention` with it.
        states: token states to keep.
        state_gradients: token states whose gradient is kept; brings the state itself with it.
        from_block: first block needed, zero-based, or a float for a share of the blocks; nothing is recorded below it,
            and the graph starts here.
        changes: pairs of token states of which the `Change` is kept, and not the states.
        fusion: attention is only read with its heads fused so; where nothing else is asked for, that is what is kept.
        fused_gradient: attention and its gradient are only read as dy/dA ∘ A with its heads fused so; likewise.
        image_gradient: the gradient at the images is kept; the graph then starts there.
        apart: how many of the last blocks get a score of their own: each keeps its graph from its attention to its
            output, and nothing goes back from block to block. Beside needs with gradients, which go through blocks,
            attention, input and output of all blocks are kept instead, of which the same can be computed again.
        backward: the rules by which the backward pass goes; None for the derivative. Needs with different rules
            share a capture by the derivative, and `Capture.meeting` gives each its own.
    """

    attention: bool = False
    attention_gradient: bool = False
    states: frozenset[State] = frozenset()
    state_gradients: frozenset[State] = frozenset()
    from_block: int | float = 0
    changes: frozenset[tuple[State, State]] = frozenset()
    fusion: Fusion | None = None
    fused_gradient: GradientFusion | None = None
    image_gradient: bool = False
    apart: int = 0
    backward: BackwardRules | None = None

    def __or__(self, other: Needs) -> Needs:
        readers = [each for each in (self, other) if each.any_attention]
        kinds, of_gradients = {each.fusion for each in readers}, {each.fused_gradient for each in readers}
        apart = max(self.apart, other.apart)
        together = apart > 0 and (self.gradient or other.gradient)
        return Needs(
            attention=self.attention or other.attention or together,
            attention_gradient=self.attention_gradient or other.attention_gradient,
            states=self.states | other.states | (SCORED_STATES if together else frozenset()),
            state_gradients=self.state_gradients | other.state_gradients,
            from_block=min(self.from_block, other.from_block),
            changes=self.changes | other.changes,
            fusion=kinds.pop() if len(kinds) == 1 else None,
            fused_gradient=of_gradients.pop() if len(of_gradients) == 1 else None,
            image_gradient=self.image_gradient or other.image_gradient,
            apart=0 if together else apart,
            backward=self.backward if self.backward == other.backward else None,
        )

    @property
    def kept_states(self) -> frozenset[State]:
        """The token states that can be read afterwards."""
        return self.states | self.state_gradients

    @property
    def recorded_states(self) -> frozenset[State]:
        """The token states that are recorded in each block, in the forward or beyond it."""
        return self.kept_states | {state for pair in self.changes for state in pair}

    @property
    def seen_states(self) -> frozenset[State]:
        """The token states that are read at all."""
        return self.recorded_states | (frozenset({"out"}) if self.apart else frozenset())

    @property
    def every_attention(self) -> bool:
        """Whether attention of every block is recorded."""
        return self.attention or self.attention_gradient

    @property
    def any_attention(self) -> bool:
        """Whether attention is recorded at all."""
        return self.every_attention or self.apart > 0

    @property
    def gradient(self) -> bool:
        """Whether a backward pass through the blocks is needed."""
        return self.attention_gradient or bool(self.state_gradients) or self.image_gradient
