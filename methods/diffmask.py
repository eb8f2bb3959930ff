"""Vision DiffMask as a method: gates read one forward pass and say which patches the model needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitexplain.capture import Capture
from vitexplain.diffmask.checkpoint import TrainedGates, load_checkpoint
from vitexplain.diffmask.evaluation import MaskReport, judge
from vitexplain.diffmask.gates import log_kept
from vitexplain.diffmask.hard_concrete import log_survival
from vitexplain.diffmask.masking import STATE_NEEDS, MaskedModel, PatchStates, hard_mask
from vitexplain.diffmask.refinement import refined
from vitexplain.errors import (
    CheckpointError,
    InputError,
    NotTrainedError,
    OptionError,
    TargetError,
    UnsupportedModelError,
)
from vitexplain.method import Method
from vitexplain.models import adapt
from vitexplain.models.shipped import shipped_checkpoint
from vitexplain.needs import Needs
from vitexplain.options import option
from vitexplain.registry import register_method

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from vitexplain.explanation import Explanation
    from vitexplain.models.adapter import ModelAdapter
    from vitexplain.training.diffmask_settings import DiffMaskSettings


@register_method(
    "diffmask",
    title="Vision DiffMask",
    paper="Nalmpantis et al., Vision DiffMask, CVPR workshops 2023, section 3",
    class_specific=False,
    passes="1F",
    trainable=True,
)
@dataclass(frozen=True)
class DiffMask(Method):
    r"""Probability that a patch is kept by gates that were trained to drop all the model can do without.

    .. math:: m_t = \prod_{\ell=0}^{L+1} P(z_{\ell t} > 0), \qquad
        \log P(z > 0) = \log\sigma\bigl(u - \tau \log(-l/r)\bigr)

    with u the logit that the gate of depth ℓ gives patch t, from its patch embedding and its state at that depth; a
    depth is a state before, between or behind the blocks: 0 the patch embedding, 1 … L the inputs of the blocks, L + 1
    the last output. One forward pass and the gates, which cost about an eighth of the forward of a ViT-Ti. The map says
    which patches keep the whole output distribution as it is, so it is the same for every class. Scores (B, h, w) in
    [0, 1].

    As in the paper's own inference the map is P(z > 0), not the mean of z. It is handed out in double precision where
    the device has it: the product comes so close to 0 and to 1 that float32 could not tell patches apart.
    """

    checkpoint: str = option(
        "", "file that `vitexplain train diffmask` wrote (.safetensors); empty: what ships for the model, if anything"
    )
    depth: int = option(-1, "last depth whose gate takes part, 0 to L + 1; negative counts from the last")
    aggregate: bool = option(True, "product of all gates up to `depth`; False: the gate of that depth alone")
    scale: str = option(
        "probability",
        "what scores are: the probability that a patch is kept, or its logarithm, which never saturates; for rankings",
        choices=("probability", "log_probability"),
    )
    refine: bool = option(False, "search for a better mask of each image, starting from the gates' own")
    refine_steps: int = option(100, "steps of that search, each one forward and one backward pass", minimum=1)

    @property
    def needs(self) -> Needs:
        """Token states at all depths."""
        return STATE_NEEDS

    def attribute(self, capture: Capture) -> Tensor:
        """Scores (B, h, w), float64 where the device has it."""
        masked = MaskedModel(capture.adapter)
        found = PatchStates.of(capture, masked.embedding.tokens(capture.images))
        trained = self._trained(capture.adapter, capture.images.device, found.states[0].dtype)
        classes = self._classes(capture)
        features = None if trained.features is None else trained.features[classes]
        logits = trained.gates(found.states[: self._depth(len(found.states)) + 1], features)
        scores = log_kept(logits)[:, -1] if self.aggregate else log_survival(logits[:, -1])
        if self.refine:
            scores = refined(
                masked,
                trained.gates,
                found,
                scores,
                constraint=trained.constraint,
                classes=classes,
                margin=trained.margin,
                steps=self.refine_steps,
            )
        scores = scores.reshape(-1, *capture.grid)
        if self.scale == "log_probability":
            return scores
        return (scores.double() if scores.device.type != "mps" else scores).exp()

    def report(self, model: nn.Module | ModelAdapter, explanation: Explanation) -> MaskReport:
        """What the hard masks of these maps keep, and how far the model's answers to the masked images have moved.

        A map whose masked image is answered otherwise explains nothing: gates are right on average, not always. Two
        forward passes.

        Args:
            model: the model that was explained, or its adapter.
            explanation: what this method, with the same checkpoint, made of it, in either scale; one target an image.

        Raises:
            TargetError: several targets an image.
            InputError: the explanation is of another method, or was put together without the images.
        """
        images = explanation.inputs
        if images is None or explanation.method != self.info.name:
            lacks = "without its images" if images is None else f"of the method {explanation.method}"
            raise InputError(f"found an explanation {lacks}, expected one that {self.info.name} made of this model")
        if explanation.scores.ndim != 3:
            raise TargetError(f"found {explanation.scores.shape[1]} targets an image, expected one: explain one class")
        scores = explanation.scores.to(images.device).flatten(1)
        scale = explanation.options.get("scale", self.scale)
        mask = hard_mask(scores if scale == "log_probability" else scores.log())
        trained = self._trained(adapt(model), images.device, torch.promote_types(images.dtype, torch.float32))
        replacement = trained.gates.replacement
        logits, classes = explanation.logits, explanation.targets
        return judge(
            MaskedModel(adapt(model)), replacement, images, logits, mask.to(replacement), trained.constraint, classes
        )

    def fit(
        self,
        model: ModelAdapter,
        images: Iterable[Any],
        output: str | os.PathLike[str],
        *,
        validation: Iterable[Any] | None = None,
        **settings: Any,
    ) -> DiffMask:
        """This method with gates trained on a model; see `vitexplain.training.diffmask.train_diffmask`.

        Args:
            model: the model's adapter.
            images: batches of images (B, channels, H, W), normalised, or tuples that begin with them.
            output: file to write the gates to, ending in ``.safetensors``.
            validation: batches to choose the best gates by, all of them; the first of `images` by default.
            **settings: fields of `DiffMaskSettings`; `constraint` is by default that of the paper, and ``"class"`` for
                a method of a class.

        Raises:
            OptionError: the constraint is for gates that this method does not read.
        """
        from vitexplain.training.diffmask import train_diffmask

        train_diffmask(model, images, output, self._recipe(settings), validation=validation)
        return replace(self, checkpoint=str(output))

    def _recipe(self, settings: Mapping[str, Any]) -> DiffMaskSettings:
        """Settings by which gates are trained that this method reads."""
        from vitexplain.training.diffmask import DiffMaskSettings

        told = self.info.class_specific
        recipe = DiffMaskSettings(**{"constraint": "class" if told else "distribution", **settings})
        if recipe.class_specific is not told:
            expected, other = ("'class' or 'evidence'", "diffmask") if told else ("'distribution'", "diffmask_class")
            raise OptionError(
                f"found constraint={recipe.constraint!r}, expected {expected}: {self.info.name} reads gates that are "
                f"told {'a' if told else 'no'} class; leave constraint out, or fit {other}, which takes it"
            )
        return recipe

    def _trained(self, adapter: ModelAdapter, device: torch.device, dtype: torch.dtype) -> TrainedGates:
        checkpoint = self.checkpoint or shipped_checkpoint(self.info.name, adapter.model)
        if checkpoint is None:
            constraint = " --constraint class" if self.info.class_specific else ""
            raise NotTrainedError(
                f"{self.info.name} learns a model before it explains it, was given no checkpoint, and none ships for "
                f"these weights. Train one with `vitexplain train diffmask --model … --data …{constraint} --output "
                "gates.safetensors` or explainer.fit(images, output), then pass checkpoint='gates.safetensors'"
            )
        trained = load_checkpoint(checkpoint, adapter, device, dtype)
        if (trained.features is not None) is not self.info.class_specific:
            ours, other = ("no class", "diffmask_class") if trained.features is not None else ("a class", "diffmask")
            raise CheckpointError(
                f"the gates in {str(checkpoint)!r} were trained with the constraint {trained.constraint!r}; "
                f"{self.info.name} expects gates that are told {ours}: use the method {other}, or train others"
            )
        return trained

    def _classes(self, capture: Capture) -> Tensor:
        """The class (B,) whose probability the search of a better mask looks at."""
        return capture.logits.argmax(1)

    def _depth(self, count: int) -> int:
        if not -count <= self.depth < count:
            raise UnsupportedModelError(
                f"found depth {self.depth}, expected {-count} to {count - 1}: this model has {count} depths"
            )
        return self.depth % count
