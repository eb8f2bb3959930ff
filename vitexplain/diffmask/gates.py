"""Gates: one small network a depth that votes, patch by patch, on what the model can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .hard_concrete import log_survival, stretched


@dataclass(frozen=True)
class GateShape:
    """What fixes the parameters of a set of gates.

    Attributes:
        width: D, features of a token.
        depths: n, number of gates: L + 2 for a model of L blocks.
        hidden: features inside a gate; D / 4 in the paper.
        stretch: α; a gate's logit lies within its offset ± α.
        normalise_inputs: whether both inputs pass a LayerNorm without parameters first.
        class_width: features by which a class is told to the gates; 0 for gates that do not know the class.
    """

    width: int
    depths: int
    hidden: int
    stretch: float = 15.0
    normalise_inputs: bool = True
    class_width: int = 0


class Gate(nn.Module):
    """α · tanh(w₂ᵀ tanh(W₁ [s₀; s] + c₁) + c₂) + β, for one depth (Vision DiffMask, section 3.1).

    W₁ and w₂ are weight-normalised; β, the offset, is learnt. Told a class, W₁ reads its features too.

    Args:
        shape: sizes of the parameters.
    """

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.inner = weight_norm(nn.Linear(2 * shape.width + shape.class_width, shape.hidden))
        self.outer = weight_norm(nn.Linear(shape.hidden, 1))
        self.offset = nn.Parameter(torch.zeros(()))


class Gates(nn.Module):
    """The gates of all depths, and the learnt vector that stands in for a dropped patch.

    Args:
        shape: number and sizes.

    Attributes:
        replacement: b, (D,): takes a dropped patch's place in the patch embedding, before positions are added.
    """

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.shape = shape
        self.gates = nn.ModuleList(Gate(shape) for _ in range(shape.depths))
        self.replacement = nn.Parameter(torch.zeros(shape.width))

    def forward(self, states: Sequence[Tensor], classes: Tensor | None = None) -> Tensor:
        """Logits (B, k + 1, P) of the first gates; arguments as for `lean`."""
        lean = self.lean(states, classes)
        offsets = torch.stack([gate.offset for gate in self._first(len(states))])
        return self.shape.stretch * lean + offsets[:, None]

    def lean(self, states: Sequence[Tensor], classes: Tensor | None = None) -> Tensor:
        """What the first gates make of a patch before stretch and offset: (B, k + 1, P) in (-1, 1).

        Computed outside autocast: log-probabilities do not survive half precision.

        Args:
            states: s₀ … s_k, each (B, P, D): the patch embedding first; k < n.
            classes: (B, class_width) features of the explained class, for gates that are told one.
        """
        with torch.autocast(self.replacement.device.type, enabled=False):
            wide = [each.to(self.replacement) for each in states]
            if self.shape.normalise_inputs:
                wide = [F.layer_norm(each, (self.shape.width,)) for each in wide]
            gates, width = self._first(len(states)), self.shape.width
            weights = [gate.inner.weight for gate in gates]
            # all gates read the patch embedding: one product serves them
            embedding = F.linear(wide[0], torch.cat([each[:, :width] for each in weights]))
            leans = []
            for gate, weight, state, shared in zip(
                gates, weights, wide, torch.split(embedding, self.shape.hidden, dim=-1), strict=True
            ):
                hidden = F.linear(state, weight[:, width : 2 * width], gate.inner.bias) + shared
                if self.shape.class_width:
                    hidden = hidden + self._told(classes, weight[:, 2 * width :])
                leans.append(torch.tanh(gate.outer(torch.tanh(hidden)))[..., 0])
            return torch.stack(leans, dim=1)

    def _first(self, count: int) -> list[Gate]:
        return [gate for gate in self.gates if isinstance(gate, Gate)][:count]

    def _told(self, classes: Tensor | None, weight: Tensor) -> Tensor:
        if classes is None:
            raise ValueError("these gates are told a class; found none")
        return F.linear(classes.to(weight), weight)[:, None]


def sampled_mask(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Soft mask z (B, P) in [0, 1): kept as far as all gates (B, k + 1, P) keep a patch, each with its own noise."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    return stretched(logits, uniform).prod(dim=1)


def log_kept(logits: Tensor) -> Tensor:
    """log of the probability that all gates up to each depth keep a patch: (B, k + 1, P) like the logits."""
    return log_survival(logits).cumsum(dim=1)
