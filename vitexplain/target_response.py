"""What the explained score becomes when the model is shown changed copies of the captured images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import widen
from .borrowing import all_modules, callers_autocast, check_graph
from .capture import Capture
from .errors import CaptureError, TargetError
from .modified_backward import BackwardRules
from .short_last_block import plain_logits
from .targets import ExplainedScore

if TYPE_CHECKING:
    from .metrics.predictor import Predictor

OUTPUTS = ("logit", "probability")
"""What can be read of a class. A contrast is a difference of two of these; a function is one of the logits."""

BASELINES = ("zeros", "image_mean", "blur", "noise")
"""What can stand in the place of pixels that are taken away; see `metrics.replacement.replacement_images`."""


@dataclass(frozen=True, eq=False)
class TargetResponse:
    """A model that is asked again about the images of a capture, each about its own explained score.

    Called inside the capture, which keeps the model borrowed. Nothing runs in `torch.inference_mode`: a model may keep
    tensors for later calls, and such tensors could take part in no graph of its owner's.

    Attributes:
        capture: after its forward pass.
        explained: the score.
        output: what is read of a class, one of `OUTPUTS`.
        batch_size: images in one forward, where the device gains by it; see `forward_size`.
        backward: the rules by which gradients go back to changed images; None for the derivative.
    """

    capture: Capture
    explained: ExplainedScore
    output: str = "logit"
    batch_size: int = 64
    backward: BackwardRules | None = None

    @classmethod
    def of(
        cls,
        capture: Capture,
        method: str,
        output: str = "logit",
        batch_size: int = 64,
        backward: BackwardRules | None = None,
    ) -> TargetResponse:
        """Takes the explained score from a capture.

        Args:
            capture: after its forward pass.
            method: who asks, for the error.
            output: one of `OUTPUTS`.
            batch_size: images in one forward.
            backward: the rules of the backward pass.

        Raises:
            CaptureError: nobody said what is explained.
        """
        if capture.explained is None:
            raise CaptureError(
                f"{method} asks the model again about the explained score, and was not told which it is: call it "
                "through an Explainer, or set Capture.explained"
            )
        return cls(capture, capture.explained, output, batch_size, backward)

    @property
    def images(self) -> Tensor:
        """The captured images (B, channels, H, W), float32 or wider, without a graph."""
        return widen(self.capture.images.detach())

    @property
    def forward_size(self) -> int:
        """Images that go into one forward; few on the CPU, and few large ones, which gain nothing by being more."""
        return self._predictor.at_a_time(self.capture.images)

    def part_of(self, count: int) -> int:
        """The size of the parts in which so many changed copies of an image are asked about."""
        return self._predictor.part_of(count, self.capture.images)

    def baseline(self, name: str) -> Tensor:
        """What stands in the place of pixels that are taken away (B, channels, H, W): one of `BASELINES`."""
        from .metrics.replacement import replacement_images

        return replacement_images(name, self.images, self._predictor)

    @property
    def clean(self) -> Tensor:
        """What the model said (B,) of the images as they are."""
        return self.read(self.capture.logits, torch.arange(len(self.capture.images), device="cpu"))

    def each(self) -> Iterator[ImageResponse]:
        """The images one by one."""
        return (ImageResponse(self, row) for row in range(len(self.capture.images)))

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        """Asks about changed images in one forward.

        Args:
            images: (n, channels, H, W), of any precision.
            rows: (n,) int64, which of the captured images each was made of.

        Returns:
            (n,) float32 or wider, differentiable by the images, by the response's rules of the backward pass.

        Raises:
            TargetError: the images ask for a gradient, and the target is a function that has none.
            UnsupportedModelError: the model computes something that has no such rule, or no gradient can go through it.
        """
        adapter, given = self.capture.adapter, images.to(self.capture.images.dtype)
        graph = torch.is_grad_enabled() and images.requires_grad
        if graph:
            check_graph(adapter.model, all_modules(adapter.model))
        with callers_autocast(), self._rules(len(images)):
            logits = plain_logits(adapter, given) if self.backward is None else adapter.logits(given)
        score = self.read(logits, rows)
        if graph and not score.requires_grad:
            raise TargetError(
                "the explained score carries no gradient: make it of the logits with differentiable operations, or "
                "take a method that needs no gradient, such as occlusion or rise"
            )
        return score

    def read(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The explained score (n,) by logits (n, C) of versions of the images `rows` (n,)."""
        probability = self.output == "probability"
        unchanged = widen(self.capture.logits)
        return self.explained.of_versions(widen(logits), rows, unchanged, probability=probability)

    def _rules(self, batch: int) -> AbstractContextManager[Any]:
        """What is entered around a forward of so many images."""
        if self.backward is None:
            return nullcontext()
        return self.backward.watching(batch, self.capture.adapter.blocks[0].arrangement)

    @property
    def _predictor(self) -> Predictor:
        from .metrics.predictor import Predictor

        return Predictor(self.capture.adapter, batch_size=self.batch_size)


@dataclass(frozen=True, eq=False)
class ImageResponse:
    """The same for one image of the batch: what is drawn, batched or chosen for it then depends on it alone.

    Attributes:
        batch: the response of the whole batch.
        row: which image.
    """

    batch: TargetResponse
    row: int

    @property
    def image(self) -> Tensor:
        """(1, channels, H, W), float32 or wider, without a graph."""
        return self.batch.images[self.row : self.row + 1]

    def baseline(self, name: str) -> Tensor:
        """What stands in the place of pixels (1, channels, H, W): one of `BASELINES`."""
        return self.batch.baseline(name)[self.row : self.row + 1]

    def __call__(self, images: Tensor) -> Tensor:
        """Asks about changed copies (n, channels, H, W) of the image in one forward; see `TargetResponse`."""
        return self.batch(images, torch.full((len(images),), self.row, device="cpu"))

    def read(self, logits: Tensor) -> Tensor:
        """The explained score (n,) by logits (n, C) of versions of the image."""
        return self.batch.read(logits, torch.full((len(logits),), self.row, device="cpu"))

    @torch.no_grad()
    def answers(self, versions: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Asks about several versions of the image, `forward_size` of them at a time.

        Args:
            versions: V, how many there are.
            change: makes those of some numbers (n,): changed images (n, channels, H, W). No more than one forward's
                worth is alive at a time.

        Returns:
            (V,) float32 or wider.
        """
        numbers = torch.arange(versions, device=self.batch.images.device)
        return torch.cat([self(change(part)) for part in torch.split(numbers, self.batch.part_of(versions))])
