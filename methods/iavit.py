"""IA-ViT as a method: an interpreter that was trained to answer as the model does, and where it attends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitexplain.capture import Capture
from vitexplain.errors import NotTrainedError
from vitexplain.iavit.checkpoint import load_interpreter
from vitexplain.iavit.trunk import STATE_NEEDS, patch_tokens
from vitexplain.method import Method
from vitexplain.models.shipped import shipped_checkpoint
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.registry import register_method

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from vitexplain.models.adapter import ModelAdapter


@register_method(
    "iavit",
    title="IA-ViT",
    paper="Qiang, Li, Khanduri and Zhu, Interpretability-aware Vision Transformer, arXiv:2309.08035",
    class_specific=False,
    passes="1F",
    trainable=True,
    aliases=("ia-vit", "interpretability_aware_vit"),
)
@dataclass(frozen=True)
class IAViT(Method):
    r"""Attention that patches receive in an interpreter, which was trained beside the model's own classifier.

    .. math:: m_p = \frac{1}{P} \sum_i \alpha_{ip}, \qquad
        \alpha = \mathrm{softmax}\bigl((H W_q + b_q)(H W_k + b_k)^\top / \sqrt{D}\bigr)

    with H the P normalised patch tokens behind the last block. One forward pass and the interpreter, two linear maps of
    the tokens and one head of attention: some hundredths of the forward. Scores (B, h, w) in [0, 1] that sum to 1.

    There is no class in it: the map is the same for all targets. It tells where the interpreter looks; as far as that
    imitates the model (its agreement is in the checkpoint's card) and attends where the model attends (that is what the
    regulariser is for), it tells where the model does. The interpreter is trained for a model as it is, or together
    with it as in the paper: `vitexplain.training.iavit`.

    Where this departs from the published code, options of the training say so: attention is divided by √D, the model is
    not pulled towards its interpreter, and the regulariser is another. The scale and shift of the model's final norm
    are left to the interpreter's own linear maps, which amounts to the same.
    """

    checkpoint: str = option(
        "", "file that `vitexplain train iavit` wrote (.safetensors); empty: what ships for the model, if anything"
    )

    @property
    def needs(self) -> Needs:
        """Token states behind the last block."""
        return STATE_NEEDS

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, h, w), each map summing to 1.

        Raises:
            NotTrainedError: there is no checkpoint for this model.
            CheckpointError: the checkpoint is broken, or belongs to another model.
            UnsupportedModelError: the last block puts out no tokens of patches.
        """
        checkpoint = self.checkpoint or shipped_checkpoint(self.info.name, capture.adapter.model)
        if checkpoint is None:
            raise NotTrainedError(
                "iavit explains with an interpreter that was trained for the model, was given no checkpoint, and none "
                "ships for these weights. Train one with `vitexplain train iavit --model … --data … --output "
                "interpreter.safetensors` or explainer.fit(images, output), then pass "
                "checkpoint='interpreter.safetensors'"
            )
        tokens = patch_tokens(capture)
        interpreter = load_interpreter(checkpoint, capture.adapter, tokens.device, tokens.dtype)
        return interpreter.received(tokens).reshape(-1, *capture.layouts[-1].grid)

    def fit(
        self,
        model: ModelAdapter,
        images: Iterable[Any],
        output: str | os.PathLike[str],
        *,
        validation: Iterable[Any] | None = None,
        **settings: Any,
    ) -> IAViT:
        """This method with an interpreter for a model as it is; see `vitexplain.training.iavit.train_interpreter`.

        Args:
            model: the model's adapter.
            images: batches of images (B, channels, H, W), normalised, or tuples that begin with them.
            output: file to write the interpreter to, ending in ``.safetensors``.
            validation: batches to choose the best weights by; a share of `images` by default.
            **settings: fields of `IAViTSettings`.
        """
        from vitexplain.training.iavit import IAViTSettings, train_interpreter

        train_interpreter(model, images, output, IAViTSettings(**settings), validation=validation)
        return replace(self, checkpoint=str(output))
