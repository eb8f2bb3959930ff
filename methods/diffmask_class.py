"""Vision DiffMask with gates that are told a class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.errors import TargetError
from vitexplain.registry import register_method

from .diffmask import DiffMask


@register_method(
    "diffmask_class",
    title="Vision DiffMask of a class",
    paper="Nalmpantis et al., Vision DiffMask, CVPR workshops 2023, section 3",
    class_specific=True,
    passes="1F",
    trainable=True,
)
@dataclass(frozen=True)
class ClassDiffMask(DiffMask):
    """`DiffMask` with gates that are told a class: which patches keep the probability of that class as it is.

    No such variant is published; this one follows the paper but for two points. Gates read, beside the two states, the
    class's row of the classifier, scaled to unit length. And the constraint is on that class alone: the divergence of
    (p_c, 1 - p_c), or how much less probable c becomes (`constraint` in the training settings). Training draws the
    class among the most probable ones of each image, so a map of a class that the model thinks impossible means little.
    Scores (B, h, w) in [0, 1].
    """

    def _classes(self, capture: Capture) -> Tensor:
        """The explained class (B,) of each image."""
        if capture.classes is None:
            raise TargetError("diffmask_class is told one class an image; found a contrast or a function of the logits")
        return capture.classes
