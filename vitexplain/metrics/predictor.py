"""The model as metrics see it: logits of many changed images, the model untouched."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..batch_parts import even_part, images_that_pay
from ..borrowing import borrowed, callers_autocast
from ..errors import InputError
from ..models.adapter import ModelAdapter
from ..preprocessing import Preprocessing
from ..short_last_block import plain_logits
from ..subject import Subject
from .compiled import compiled_logits

CPU_BATCH = 4
"""Most images in one forward on the CPU. Larger activations are allocated from fresh pages in every layer, which made a
ViT-Ti 1.4 times as slow per image at 64 as at 8, and in some processes 1.13 times as slow at 8 as at 4; an accelerator
needs the larger batch."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """A model that is asked about many images.

    Attributes:
        adapter: the borrowed model.
        preprocessing: how pictures become its input; None where that is not known.
        batch_size: images in one forward, where the device gains by it; see `at_a_time`.
        compiled: whether the forward is compiled, once a model and shape of images; the same logits to rounding.
    """

    adapter: ModelAdapter
    preprocessing: Preprocessing | None = None
    batch_size: int = 64
    compiled: bool = field(default=False, kw_only=True)

    @classmethod
    def of(
        cls, model: nn.Module | ModelAdapter | Subject, batch_size: int = 64, *, compiled: bool = False
    ) -> Predictor:
        """Wraps a model; its preprocessing is read from its configuration where it has one."""
        subject = Subject.of(model)
        return cls(subject.adapter, subject.preprocessing, batch_size, compiled=compiled)

    def at_a_time(self, images: Tensor) -> int:
        """How many images of the size of these (…, H, W) go into one forward.

        That is `batch_size`; on the CPU no more than `CPU_BATCH`, and fewer large ones; and as often as it fits, the
        one number that the model takes, if it does.
        """
        parameter = next(self.adapter.model.parameters(), None)
        on_cpu = parameter is None or parameter.device.type == "cpu"
        size = min(self.batch_size, CPU_BATCH, images_that_pay(images)) if on_cpu else self.batch_size
        whole = self.adapter.batch
        return size if whole is None else whole * max(1, size // whole)

    def part_of(self, count: int, images: Tensor) -> int:
        """The size of the parts, as even as may be, in which so many such images are asked about."""
        size = self.at_a_time(images)
        return size if self.adapter.batch else even_part(count, size)

    def logits(self, inputs: Tensor) -> Tensor:
        """Normalised images (n, 3, H, W) to logits (n, C), float32, without a graph.

        Raises:
            InputError: images that the model does not take.
            OptionError: the model cannot be compiled, and is to be.
        """
        size, part = self.at_a_time(inputs), self.part_of(len(inputs), inputs)
        with torch.no_grad(), borrowed(self.adapter.model), callers_autocast():
            parts = [self._ask(self.adapter.check_images(some), size) for some in torch.split(inputs, part)]
        return torch.cat(parts).float()

    def _ask(self, images: Tensor, size: int) -> Tensor:
        if self.compiled:
            return compiled_logits(self.adapter, images, size)
        return plain_logits(self.adapter, images)

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Softmax of `logits`, (n, C)."""
        return self.logits(inputs).softmax(1)

    def colour(self, value: float) -> Tensor:
        """What a grey level in [0, 1] is in the model's input: (3, 1, 1). 0 is black.

        Raises:
            InputError: the normalisation is not known.
        """
        if self.preprocessing is None:
            raise InputError(
                "how images are normalised for this model is not known, so a colour cannot be painted: pass a model "
                "from load_model, or Subject(adapt(model), Preprocessing(…))"
            )
        mean, std = (
            torch.tensor(numbers).view(3, 1, 1) for numbers in (self.preprocessing.mean, self.preprocessing.std)
        )
        return (value - mean) / std
