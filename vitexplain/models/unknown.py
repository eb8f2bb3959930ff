"""What is common to adapters of models whose class is not known: how to call them, and with what."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..borrowing import attributes_set
from ..errors import InputError, UnsupportedModelError
from .adapter import ModelAdapter


class UnknownModelAdapter(ModelAdapter, ABC):
    """A model that is called with images and returns logits, or an object that has them.

    Args:
        model: called with images (B, C, H, W), by keyword where it names its main input.
        image_size: pixels (H, W) to probe with; by default what the model's configuration says, or 224×224.

    Raises:
        UnsupportedModelError: the model's main input is not images.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int] | None = None) -> None:
        self.model = model
        self._keyword = _main_input(model)
        self._probe_size = image_size or _configured_size(model)

    @property
    def num_channels(self) -> int:
        """Channels that the patch embedding takes."""
        return next((module.in_channels for module in self.model.modules() if isinstance(module, nn.Conv2d)), 3)

    def logits(self, images: Tensor) -> Tensor:
        """As for any adapter; the images go in by keyword where the model names its main input."""
        given = images.clone()  # which the model may normalise in place
        try:
            output = self.model(given) if self._keyword is None else self.model(**{self._keyword: given})
        except (AssertionError, RuntimeError, ValueError) as error:
            size = tuple(images.shape[-2:])
            if size == tuple(self._probe_size) or "memory" in str(error):
                raise
            raise InputError(
                f"the model refused images of {size[0]}×{size[1]} pixels ({type(error).__name__}: {error}); expected "
                f"{self._probe_size[0]}×{self._probe_size[1]}"
            ) from error
        return _scores(output)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Attention through `scaled_dot_product_attention` wherever a switch or a configuration chooses."""
        modules = list(self.model.modules())
        configurations = {
            id(config): config
            for module in modules
            if getattr(config := getattr(module, "config", None), "_attn_implementation", None) is not None
        }
        with ExitStack() as stack:
            for owners, name, value in (
                ([module for module in modules if hasattr(module, "fused_attn")], "fused_attn", True),
                (list(configurations.values()), "_attn_implementation", "sdpa"),
            ):
                stack.enter_context(attributes_set(owners, name, value))
            yield


def _scores(output: Any) -> Tensor:
    scores = getattr(output, "logits", output)
    if isinstance(scores, Tensor) and scores.ndim == 2:
        return scores
    found = tuple(scores.shape) if isinstance(scores, Tensor) else type(output).__name__
    raise UnsupportedModelError(
        f"the model returned {found}; expected logits of shape (B, C), one row an image. Use the class with a "
        "classification head, or wrap it in a module that returns such scores"
    )


def _main_input(model: nn.Module) -> str | None:
    name = getattr(model, "main_input_name", None)
    if name not in (None, "pixel_values"):
        raise UnsupportedModelError(
            f"a {type(model).__name__} takes {name!r} first, not images; to explain an image-text model, pass "
            "vitexplain.models.image_text.ImageTextModel(model, text_embeddings)"
        )
    return name


def _configured_size(model: nn.Module) -> tuple[int, int]:
    config = getattr(model, "config", None)
    for owner in (model, config, getattr(config, "vision_config", None)):
        for name in ("image_size", "input_resolution"):
            size = getattr(owner, name, None)
            if isinstance(size, int):
                return size, size
            if isinstance(size, tuple | list) and len(size) == 2:
                return int(size[0]), int(size[1])
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))  # timm: channels first
    return int(size[1]), int(size[2])
