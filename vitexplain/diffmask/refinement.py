"""Search of one image's own mask, from the mask that the gates propose.

The gates were trained to be right on average. Where that leaves an image's answer changed, or patches kept that it
does not need, a search on the image itself repairs it: first how many patches have to be kept in the gates' own order,
then some steps of the constrained optimisation that trained the gates, on the image's own logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..randomness import DRAWN
from .constraint import Constraint, divergence
from .gates import Gates
from .hard_concrete import HIGH, LOW, TEMPERATURE, log_survival, stretched
from .masking import MaskedModel, PatchStates, hard_mask

_START_WITHIN = 2.0  # a logit beyond it is never drawn on the other side, so that nothing could be learnt about it
_BOUND = 10.0
_LEARNING_RATE = 0.2
_MULTIPLIER, _MULTIPLIER_RATE, _MULTIPLIER_LIMITS = 5.0, 0.1, (0.01, 1000.0)
_CHECK_EVERY = 10

Change = Callable[[Tensor], Tensor]
"""From masks (B, P) in [0, 1] to the divergence (B,) that they cause."""


class _Best:
    """The best hard mask of each image so far: the constraint met, then few patches; or else the least divergence."""

    def __init__(self, log_kept: Tensor, change: Change, margin: float) -> None:
        self.log_kept, self.change, self.margin = log_kept.clone(), change, margin
        self.met, self.cost = self._judge(log_kept)

    @torch.no_grad()
    def offer(self, log_kept: Tensor) -> None:
        met, cost = self._judge(log_kept)
        better = (met & ~self.met) | ((met == self.met) & (cost < self.cost))
        self.log_kept = torch.where(better[:, None], log_kept, self.log_kept)
        self.met, self.cost = self.met | met, torch.where(better, cost, self.cost)

    def _judge(self, log_kept: Tensor) -> tuple[Tensor, Tensor]:
        found = self.change(hard_mask(log_kept))
        met = found <= self.margin
        return met, torch.where(met, hard_mask(log_kept).mean(1), found)


def refined(
    masked: MaskedModel,
    gates: Gates,
    found: PatchStates,
    log_kept: Tensor,
    *,
    constraint: Constraint,
    classes: Tensor,
    margin: float,
    steps: int,
) -> Tensor:
    """log of the probability (B, P) that a patch is kept, after a search for each image alone.

    An image's result is the best hard mask seen, the proposed one included, and does not depend on the batch.

    Args:
        masked: the model.
        gates: of them only the replacement vector is used.
        found: the batch.
        log_kept: (B, P) what the gates propose.
        constraint: what must not change.
        classes: (B,) the classes that it is about.
        margin: by how much it may change, in nats, for each image.
        steps: forward and backward passes; every tenth is followed by one more forward. Before them, about log₂ P
            forwards.
    """
    replacement = gates.replacement.detach().to(log_kept.dtype)

    def change(mask: Tensor) -> Tensor:
        return divergence(constraint, found.logits, masked.logits(found.images, mask, replacement), classes)

    with torch.no_grad():
        best = _Best(log_kept, change, margin)
        best.offer(F.logsigmoid(_enough_by_rank(_log_odds(log_kept), change, margin)))
    with torch.inference_mode(False), torch.enable_grad():
        _search(best, margin, steps)
    return best.log_kept


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)), finite where p rounds to 1."""
    return log_probability - torch.log(-torch.expm1(log_probability.clamp(max=-1e-7)))


def _enough_by_rank(odds: Tensor, change: Change, margin: float) -> Tensor:
    """Log-odds (B, P) moved, for each image, to where just enough of the first patches are above 0 for the constraint.

    Found by bisection, which takes keeping more patches to change less.
    """
    count = odds.shape[1]
    ranked = odds.sort(dim=1, descending=True).values
    edges = torch.cat([ranked[:, :1] + 1, (ranked[:, 1:] + ranked[:, :-1]) / 2, ranked[:, -1:] - 1], dim=1)
    low, high = odds.new_zeros(len(odds), dtype=torch.long), odds.new_full((len(odds),), count, dtype=torch.long)
    for _ in range(count.bit_length()):
        middle = (low + high) // 2
        kept = (odds > edges.gather(1, middle[:, None])).to(odds.dtype)
        enough = change(kept) <= margin
        low, high = torch.where(enough, low, (middle + 1).clamp(max=count)), torch.where(enough, middle, high)
    return odds - edges.gather(1, high[:, None])


def _search(best: _Best, margin: float, steps: int) -> None:
    """Constrained optimisation of each image's own logits, from the best mask on."""
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    start = (_log_odds(best.log_kept) + shift).clamp(-_START_WITHIN, _START_WITHIN)
    logits = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=_LEARNING_RATE)
    multipliers = torch.full((len(logits),), _MULTIPLIER, device=logits.device, dtype=logits.dtype)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        # the same noise for every image, so that none depends on its neighbours
        noise = torch.rand(logits.shape[1], generator=generator, **DRAWN).to(logits)
        changed = best.change(stretched(logits, noise.expand_as(logits)))
        loss = (multipliers * changed + log_survival(logits).mean(1)).sum()
        (logits.grad,) = torch.autograd.grad(loss, [logits])
        optimizer.step()
        with torch.no_grad():
            logits.clamp_(-_BOUND, _BOUND)
            # by factors: there is no time for the small steps of plain ascent where the constraint holds well
            excess = ((changed - margin) / margin).clamp(-1, 1)
            multipliers = (multipliers * torch.exp(_MULTIPLIER_RATE * excess)).clamp(*_MULTIPLIER_LIMITS)
            if step % _CHECK_EVERY == 0 or step == steps:
                best.offer(log_survival(logits))
