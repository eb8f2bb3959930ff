"""Lookahead (Zhang et al., NeurIPS 2019): slow weights that follow an optimizer's fast ones every few steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Lookahead:
    """Slow copies of parameters; call `step` after each step of the optimizer.

    Args:
        parameters: what the optimizer trains.
        interval: k, steps between two meetings of fast and slow weights.
        share: α, how far the slow weights go towards the fast ones.
    """

    def __init__(self, parameters: Iterable[Tensor], interval: int = 6, share: float = 0.5) -> None:
        self.parameters = list(parameters)
        self.interval, self.share = interval, share
        self.slow = [each.detach().clone() for each in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Every `interval` calls: slow += α (fast - slow), fast = slow; parameters without a gradient are left out."""
        self.steps += 1
        if self.steps % self.interval:
            return
        for fast, slow in zip(self.parameters, self.slow, strict=True):
            if fast.grad is not None:
                slow.lerp_(fast, self.share)
                fast.copy_(slow)

    def state_dict(self) -> dict[str, object]:
        """What has to be kept to go on later."""
        return {"slow": [each.clone() for each in self.slow], "steps": self.steps}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Goes on from a kept state."""
        slow, steps = state["slow"], state["steps"]
        assert isinstance(slow, list)
        assert isinstance(steps, int)
        self.steps = steps
        for mine, kept in zip(self.slow, slow, strict=True):
            mine.copy_(kept)
