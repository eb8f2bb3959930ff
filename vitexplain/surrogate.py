"""The linear surrogate that captum's KernelSHAP fits, by weighted least squares."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class LeastSquares:
    """A line through weighted samples, with an intercept: what captum expects of an interpretable model.

    captum's own would need scikit-learn. Solved in float64; where samples do not determine the line, the one with the
    smallest coefficients is taken.
    """

    def fit(self, samples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Fits inputs (n, P), values (n,) and weights (n,), in one batch or several."""
        parts = zip(*samples, strict=True)
        inputs, values, weights = (torch.cat(list(each)).detach().cpu().double() for each in parts)
        weights = weights[:, None] / weights.sum()
        centred = [each - (weights * each).sum(0) for each in (inputs, values.reshape(-1, 1))]
        left, right = (weights.sqrt() * each for each in centred)
        self._coefficients: Tensor = torch.linalg.lstsq(left, right, driver="gelsd").solution[:, 0]

    def representation(self) -> Tensor:
        """The coefficients (P,), without the intercept, float64 on the CPU."""
        return self._coefficients
