"""PM: patch-level mask prediction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.errors import TargetError
from vitexplain.method import Method
from vitexplain.models.token_head import final_tokens, token_head
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.patch_probability import PATCH_SCORES, patch_scores
from vitexplain.registry import register_method


@register_method(
    "pm",
    title="PM",
    paper="Kang, Heo and Choe, patch-level mask prediction (PM), Pattern Recognition Letters 187, 2025",
    class_specific=True,
    passes="1F",
    aliases=("patch_masks", "patch_level_mask_prediction"),
)
@dataclass(frozen=True)
class PatchMasks(Method):
    r"""Probability that a patch belongs to the object of a class, by the model's own classifier.

    .. math:: p_{ic} = \sigma\bigl(w_c^\top \mathrm{norm}(x_i) + b_c\bigr)

    with x_i the patch as it leaves the last block, and norm, w and b those with which the model reads its CLS token or
    its mean token: no parameter is added. One forward pass gives the maps of all classes. Scores (B, h, w); but for
    ``score="logit"`` they are probabilities, which `Explanation.heatmap` scales to [0, 1] like any other scores.

    **It is a method for models trained for it** (`vitexplain.training.patch_masks`): with a classification loss on
    labels and a mask loss on the few images, some 1 %, that have masks. It runs on any model, but the patches of a
    model trained on its CLS token alone never had to say anything, and their map tends to be lowest on the object. And
    what is learnt from masks is where the object is, not what decided: measure faithfulness beside localisation.

    In mean-pooled models whose norm comes before the pooling, the mean of the patches' logits is the image's logit
    exactly. Where the norm comes behind, it is applied to each patch, and that no longer holds. Two averaged heads
    (DeiT's) are averaged; a head of CLS and mean token side by side (DINOv2's) gets the patch as both.

    Of the paper only the outline is public: class-dependent, probabilistic maps of patches, from the features of one
    forward pass, without further parameters, learnt from masks of less than 1 % of ImageNet-1k. That the classifier is
    shared, the sigmoid and the losses are this implementation's reading of it.
    """

    score: str = option(
        "probability",
        "probability: sigmoid of the class's logit, each class for itself; background: softmax over the classes and a "
        "background with the logit 0; joint: softmax over classes and patches; logit: the class's logit itself, signed",
        choices=PATCH_SCORES,
    )

    @property
    def needs(self) -> Needs:
        """What the head reads."""
        return Needs(states=frozenset({"out"}), from_block=-1)

    @property
    def signed(self) -> bool:
        """Probabilities are not; logits are."""
        return self.score == "logit"

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, h, w) of the explained class.

        Raises:
            TargetError: the target is a contrast or a function of the logits.
            UnsupportedModelError: the model has no linear head that reads tokens.
        """
        if capture.classes is None:
            raise TargetError("pm tells how a patch belongs to one class; found a contrast or a function of the logits")
        layout = capture.layouts[-1]
        logits = token_head(capture).token_logits(final_tokens(capture)[:, layout.prefix :])
        scores = patch_scores(logits, self.score)
        index = capture.classes.to(scores.device)[:, None, None].expand(-1, scores.shape[1], 1)
        return scores.gather(2, index)[:, :, 0].reshape(-1, *layout.grid)
