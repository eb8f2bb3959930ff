"""`Subject`: a model with what is known of its input and output, and how pictures become that input."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from .errors import InputError
from .models import adapt
from .models.adapter import ModelAdapter
from .models.labels import read_labels

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch.export import ExportedProgram

    from .models.loading import LoadedModel
    from .preprocessing import Preprocessing

    Picture: TypeAlias = "str | os.PathLike[str] | Image | np.ndarray"
    Images: TypeAlias = "Tensor | Sequence[Tensor] | Picture | Sequence[Picture]"
    Model: TypeAlias = "nn.Module | ExportedProgram | ModelAdapter | Subject | LoadedModel | str"


@dataclass(frozen=True, eq=False)
class Subject:
    """The model under explanation and what is known about its input and output.

    Attributes:
        adapter: the borrowed model.
        preprocessing: how pictures become its input; None where that is not known.
        labels: class names, as many as the model has outputs; None where they are not known. Given in order, by index
            (such as ``config.id2label``) or as a file that `vitexplain.models.labels.read_labels` takes.

    Raises:
        InputError: labels that are not understood.
    """

    adapter: ModelAdapter
    preprocessing: Preprocessing | None = None
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and not isinstance(self.labels, list | tuple):
            object.__setattr__(self, "labels", read_labels(self.labels))

    @classmethod
    def of(cls, model: Model) -> Subject:
        """Wraps a model; its preprocessing is read from its configuration where it has one.

        Args:
            model: a module, also one of `torch.export`, or an adapter; what `load_model` returned, or a name that it
                takes.

        Raises:
            UnsupportedModelError: no adapter fits, or what was passed is no model.
            UnknownNameError: no such model.
        """
        if isinstance(model, str):
            from .models.loading import load_model

            model = load_model(model)
        known = model if isinstance(model, Subject | nn.Module) else getattr(model, "subject", None)
        if isinstance(known, Subject):
            return known
        from .preprocessing import Preprocessing

        adapter = adapt(cast("nn.Module | ModelAdapter", model))
        configured = getattr(adapter.model, "pretrained_cfg", None) is not None and adapter.num_channels == 3
        return cls(adapter, Preprocessing.from_timm(adapter.model) if configured else None)

    def prepare(self, images: Images) -> Tensor:
        """Pictures or files as the model's input (B, 3, H, W); tensors pass as they are, lists of them as a batch.

        Raises:
            InputError: a file cannot be read, pictures were given and the preprocessing is not known, or what was
                given are several named inputs of a model, tensors of different sizes, or a number.
        """
        if isinstance(images, Mapping) and list(images) == ["pixel_values"]:  # of an image processor
            images = images["pixel_values"]
        if isinstance(images, list | tuple) and images and all(isinstance(each, Tensor) for each in images):
            images = _batch(cast("Sequence[Tensor]", images))
        if isinstance(images, Tensor):
            if images.ndim == 0:
                raise InputError(f"found the number {images.item()}, expected a tensor (B, 3, H, W) or (3, H, W)")
            return images[None] if images.ndim == 3 else images
        if isinstance(images, Mapping):
            raise InputError(
                f"found a mapping with {', '.join(map(repr, images))}, expected images: a tensor (B, C, H, W) of one "
                "size (patches are cut here where a model wants them; images of different sizes go one size at a time)"
            )
        dtype = getattr(images, "dtype", None)
        if getattr(dtype, "kind", "") == "f":
            raise InputError(
                f"found an array of type {dtype}, expected normalised input as a tensor (torch.from_numpy(…)), "
                "or pictures as files, PIL images or uint8 arrays (H, W, 3)"
            )
        if self.preprocessing is None:
            raise InputError(
                "pictures were given, but how this model wants them is not known: pass a normalised tensor "
                "(B, 3, H, W), or Subject(adapt(model), Preprocessing(…))"
            )
        from .images import load_image

        many = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4  # an array (B, H, W, 3)
        pictures: Any = images if many else [images]
        if not len(pictures):
            raise InputError("found an empty list of images, expected at least one")
        return self.preprocessing([load_image(picture) for picture in pictures])


def _batch(images: Sequence[Tensor]) -> Tensor:
    """Single images, each (C, H, W), as a batch.

    Raises:
        InputError: other shapes, or different ones.
    """
    shapes = list(dict.fromkeys(tuple(each.shape) for each in images))
    if len(shapes) > 1 or len(shapes[0]) != 3:
        raise InputError(
            f"found a list of tensors of shape {' and '.join(map(str, shapes[:3]))}, expected one tensor (B, C, H, W), "
            "or a list of images (C, H, W) of one size; of a data loader's (images, labels) pass the images alone"
        )
    return torch.stack(list(images))
