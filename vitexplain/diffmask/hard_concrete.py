"""The Hard Concrete distribution: exactly 0 with positive probability, and yet with a gradient.

Louizos et al., Learning Sparse Neural Networks through L0 Regularization, ICLR 2018, with the constants of Vision
DiffMask: the support is [0, 1), without mass at 1.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE: Final = 0.2
LOW: Final = -0.2
HIGH: Final = 1.0


def stretched(logits: Tensor, uniform: Tensor) -> Tensor:
    """Values z in [0, 1), differentiable in the logits.

    Args:
        logits: location parameters, of any shape.
        uniform: noise from [0, 1), of the same shape.
    """
    concrete = torch.sigmoid((torch.logit(uniform) + logits) / TEMPERATURE)
    return (LOW + (HIGH - LOW) * concrete).clamp(0.0, 1.0)


def log_survival(logits: Tensor) -> Tensor:
    """log P(z > 0), at most 0, exact also where the probability rounds to 0 or 1."""
    return F.logsigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))
