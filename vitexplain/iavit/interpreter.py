"""The interpreter of IA-ViT: one head of self-attention over patch tokens, and a small classifier behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import AttentionOperands, propagate
from ..errors import InputError, OptionError
from ..randomness import begin_at

Head = Literal["pooled", "position"]
"""How an interpreter gets from mixed patches to logits."""

HEADS: Sequence[Head] = ("pooled", "position")
"""All of them."""


@dataclass(frozen=True)
class InterpreterShape:
    """What an interpreter is built from.

    Attributes:
        width: D, features of a token.
        num_classes: C.
        head: ``"pooled"``: one linear map of the mean mixed patch, for any number of patches; ``"position"``: one
            number a patch, and a linear map of all of them, for a fixed number.
        patches: P, where the head is ``"position"``; else 0.
        scale_logits: queries times keys are divided by √D.
    """

    width: int
    num_classes: int
    head: Head = "pooled"
    patches: int = 0
    scale_logits: bool = True

    def __post_init__(self) -> None:
        if self.head not in HEADS or min(self.width, self.num_classes) < 1 or (self.patches > 0) != self._by_position:
            raise OptionError(
                f"found {self}, expected a width and a number of classes of at least 1, a head out of "
                f"{', '.join(HEADS)}, and a number of patches with the head 'position' alone"
            )

    @property
    def _by_position(self) -> bool:
        return self.head == "position"


class Interpretation(NamedTuple):
    """What an interpreter says of B images.

    Attributes:
        logits: u (B, C).
        received: (B, P), rows sum to 1: the attention that each patch receives, averaged over all patches' queries.
    """

    logits: Tensor
    received: Tensor


class Interpreter(nn.Module):
    r"""Imitates a classifier from its patch tokens; where it attends is the explanation.

    .. math:: \alpha = \mathrm{softmax}\bigl((H W_q + b_q)(H W_k + b_k)^\top / \sqrt{D}\bigr), \qquad
        m_p = \frac{1}{P} \sum_i \alpha_{ip}

    with H (P, D) the normalised patch tokens: no class token, no output projection, no residual (Qiang et al.,
    arXiv:2309.08035, in the form of the published code). The logits are a linear map of the mean row of
    α (H W_v + b_v), or of one number for each of its rows. That mean row is Σ_p m_p (W_v h_p) + b_v, so the map m holds
    the very weights by which the interpreter pools the patches, and α need not be kept.

    Args:
        shape: what it is built from.
    """

    def __init__(self, shape: InterpreterShape) -> None:
        super().__init__()
        self.shape = shape
        self.query, self.key, self.value = (nn.Linear(shape.width, shape.width) for _ in range(3))
        self.token_score: nn.Linear | None = None
        features = shape.width
        if shape.head == "position":
            self.token_score = nn.Linear(shape.width, 1)
            features = shape.patches
        self.head = nn.Linear(features, shape.num_classes)
        if self.token_score is not None:
            for layer in (self.token_score, self.head):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, tokens: Tensor) -> Interpretation:
        """Logits and received attention.

        Args:
            tokens: H (B, P, D), normalised, without prefix tokens.

        Raises:
            InputError: the head is ``"position"``, and there are more or fewer patches than it was built for.
        """
        if self.token_score is None:
            received = self.received(tokens)
            pooled = (received[:, None] @ tokens)[:, 0]
            return Interpretation(self.head(self.value(pooled)), received)
        if tokens.shape[1] != self.shape.patches:
            raise InputError(
                f"found {tokens.shape[1]} patches, expected {self.shape.patches}: an interpreter with the head "
                "'position' works at one image size alone. Use images of that size, or train one with the head 'pooled'"
            )
        attention = self.attention(tokens)
        scores = attention @ self.token_score(self.value(tokens))  # rows of α sum to 1, so biases pass it
        return Interpretation(self.head(scores[..., 0]), attention.mean(1))

    def attention(self, tokens: Tensor) -> Tensor:
        """α (B, P, P) of tokens (B, P, D); rows sum to 1."""
        return self._operands(tokens).probabilities()[:, 0]

    def received(self, tokens: Tensor) -> Tensor:
        """m (B, P) of tokens (B, P, D), each row summing to 1, without holding α."""
        row = tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1])
        return propagate(row, self._operands(tokens), lambda tile: tile.attention)[:, 0]

    def _operands(self, tokens: Tensor) -> AttentionOperands:
        query, key = self.query(tokens)[:, None], self.key(tokens)[:, None]
        scale = 1 / math.sqrt(self.shape.width) if self.shape.scale_logits else 1.0
        return AttentionOperands(query, key, tokens[:, None], scale)


def fresh_interpreter(shape: InterpreterShape, seed: int) -> Interpreter:
    """An interpreter, float32, with the first weights that a seed decides; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        begin_at(seed, torch.device("cpu"))
        return Interpreter(shape).float()
