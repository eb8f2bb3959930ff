"""Fresh gates that mask as much as is asked for from the first step on.

Whether training succeeds is decided by how much the first gates mask: too much and the replacement is never learnt, too
little and nothing tells the gates what could go. It depends on the number of gates and the scale of the model's states,
so the offset is solved for on a batch instead of being a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..randomness import begin_at
from .gates import Gate, Gates, GateShape
from .hard_concrete import log_survival

_HALVINGS = 60


def fresh_gates(
    shape: GateShape, embeddings: Tensor, *, seed: int, replacement: Literal["mean", "random"] = "mean"
) -> Gates:
    """Gates with random weights; the caller's random state stays as it is.

    Args:
        shape: number and sizes.
        embeddings: patch embeddings (B, P, D) of some images.
        seed: decides the weights.
        replacement: where b starts: ``"mean"``, the mean embedding; ``"random"``, a small random vector.
    """
    with torch.random.fork_rng(devices=[]):
        begin_at(seed, torch.device("cpu"))
        gates = Gates(shape)
        nn.init.normal_(gates.replacement, std=shape.width**-0.5)
    gates = gates.to(embeddings.device)
    if replacement == "mean":
        with torch.no_grad():
            gates.replacement.copy_(embeddings.mean((0, 1)))
    return gates


@torch.no_grad()
def set_offsets(gates: Gates, offset: float) -> None:
    """Gives all gates the same offset β."""
    for gate in gates.gates:
        assert isinstance(gate, Gate)
        gate.offset.fill_(offset)


@torch.no_grad()
def calibrated_offset(gates: Gates, states: Sequence[Tensor], classes: Tensor | None, masked_share: float) -> float:
    """The offset β, the same for all gates, with which they together are expected to mask a share of the patches.

    Args:
        gates: what is calibrated; left as it is.
        states: s₀ … s_{n-1} of some images, each (B, P, D).
        classes: see `Gates.lean`.
        masked_share: between 0 and 1: 1 minus the mean over patches of the product of P(z > 0).
    """
    logits = gates.shape.stretch * gates.lean(states, classes)
    if logits.device.type != "mps":  # which has no double precision
        logits = logits.double()
    low, high = -2 * gates.shape.stretch - 10.0, 2 * gates.shape.stretch + 10.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        masked = 1 - log_survival(logits + middle).sum(1).exp().mean().item()
        low, high = (middle, high) if masked > masked_share else (low, middle)
    return (low + high) / 2
