"""What an interpreter is trained for: to answer as its model does, and to attend where the model attends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

Regulariser = Literal["kl", "mmd", "released", "none"]
"""How the interpreter's attention is held to the model's."""

REGULARISERS: Sequence[Regulariser] = ("kl", "mmd", "released", "none")
"""All of them."""

_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def simulation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 3.0, detach_teacher: bool = True
) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch (), in nats.

    Args:
        student: logits of the interpreter (B, C).
        teacher: logits of the model (B, C).
        temperature: T, above 0.
        detach_teacher: only the student learns. The published code pulls the model towards the interpreter, too.
    """
    target = (teacher.detach() if detach_teacher else teacher) / temperature
    said, wanted = (_log_probabilities(each) for each in (student / temperature, target))
    return temperature**2 * F.kl_div(said, wanted, reduction="batchmean", log_target=True)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Finite: a class that the model rules out, by a logit of -inf, takes no part, in place of making all NaN."""
    found = logits.log_softmax(-1)
    return found.clamp(min=torch.finfo(found.dtype).min)


def attention_regulariser(reg: Regulariser, model: Tensor, interpreter: Tensor) -> Tensor:
    """How far the interpreter's received attention is from the model's, ().

    Args:
        reg: one of `REGULARISERS`; see the functions of that name here. ``"none"`` is 0.
        model: e (B, P), attention that patches receive from patches, summed over blocks; each row in any total.
        interpreter: i (B, P), rows sum to 1.

    Raises:
        InputError: the shapes differ.
    """
    if model.shape != interpreter.shape or model.ndim != 2:
        raise InputError(
            f"found received attention of {tuple(model.shape)} and {tuple(interpreter.shape)}, expected the same (B, P)"
        )
    return _REGULARISERS[reg](model, interpreter)


def paired_divergence(model: Tensor, interpreter: Tensor) -> Tensor:
    """``kl``: Σ_p ē_p ln(ē_p / i_p), mean over the images (): each image's maps are held together, 0 where equal."""
    target = distribution(model)
    floor = torch.finfo(interpreter.dtype).tiny  # where nothing is received, the logarithm has no gradient
    return (target * (target.clamp(min=floor).log() - interpreter.clamp(min=floor).log())).sum(1).mean()


def discrepancy(model: Tensor, interpreter: Tensor) -> Tensor:
    """``mmd``: the biased squared maximum mean discrepancy between the batch's rows ē and i, ().

    Kernels are exp(−‖x − y‖² / s), averaged over s = ¼, ½, 1, 2 and 4 times the mean squared distance of all 2B rows,
    which is not differentiated. 0 for equal sets; it compares the sets, so any order of the images gives the same.
    """
    rows = torch.cat([distribution(model), interpreter])
    distances = _squared_distances(rows, rows)
    spread = distances.detach().mean().clamp(min=torch.finfo(distances.dtype).tiny)
    kernel = torch.stack([(-distances / (factor * spread)).exp() for factor in _BANDWIDTHS]).mean(0)
    sign = rows.new_ones(len(rows))
    sign[len(model) :] = -1
    return (sign @ kernel @ sign) / len(model) ** 2


def released_kernel_mean(model: Tensor, interpreter: Tensor) -> Tensor:
    """``released``: the term that the published code calls MMD, (), in [e^−½, 1] whatever it is given.

    The mean of exp(−‖e_a − i_b‖² / 2σ²) over all B² pairs of images, σ² being the mean of the same squared distances
    and not differentiated. It is no MMD: the kernels within each set are missing and the one between them has a plus
    sign, so minimising it drives the two apart until it meets the floor that Jensen's inequality sets. Kept to
    reproduce published training.
    """
    distances = _squared_distances(model, interpreter)
    spread = distances.detach().mean().clamp(min=torch.finfo(distances.dtype).tiny)
    return (-distances / (2 * spread)).exp().mean()


def distribution(received: Tensor) -> Tensor:
    """Received attention (B, P) with rows scaled to sum 1; entries below 0 (differential attention) count as 0."""
    positive = received.clamp(min=0)
    return positive / positive.sum(1, keepdim=True).clamp(min=torch.finfo(received.dtype).tiny)


def _none(model: Tensor, interpreter: Tensor) -> Tensor:
    return interpreter.new_zeros(())


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """‖l_a − r_b‖² (A, B); differences first, since rows are near each other."""
    return (left[:, None] - right[None]).square().sum(-1)


_REGULARISERS: Mapping[Regulariser, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": paired_divergence,
    "mmd": discrepancy,
    "released": released_kernel_mean,
    "none": _none,
}
