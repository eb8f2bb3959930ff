"""Image-text models (CLIP, SigLIP) as classifiers of texts, so that every method can explain "why this text?"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..borrowing import borrowed
from ..errors import InputError, UnsupportedModelError

Tokeniser = Callable[[list[str]], Any]
"""Maps texts to what the text encoder takes: a tensor of token ids, or a mapping of keyword arguments."""


class ImageTextModel(nn.Module):
    """The image side of an image-text model, scored against fixed texts: images (B, C, H, W) to logits (B, K).

    ::

        model = ImageTextModel.from_texts(clip, ["a photo of a cat", "a photo of a dog"], tokeniser)
        get_explainer("tokentm", model)(images, target=0)      # why "a photo of a cat"?

    Args:
        model: with `get_image_features(pixel_values=…)` (Hugging Face) or `encode_image(images)` (OpenAI, open_clip).
        text_embeddings: (K, D), from the same model's text encoder; normalised here.

    Raises:
        UnsupportedModelError: the model has no image encoder of either kind.
        InputError: the embeddings are not (K, D).
    """

    def __init__(self, model: nn.Module, text_embeddings: Tensor) -> None:
        super().__init__()
        if text_embeddings.ndim != 2 or not len(text_embeddings):
            raise InputError(f"found text embeddings of shape {tuple(text_embeddings.shape)}, expected (K, D)")
        if not (hasattr(model, "get_image_features") or hasattr(model, "encode_image")):
            raise UnsupportedModelError(
                f"a {type(model).__name__} has neither get_image_features nor encode_image; expected one of them"
            )
        self.model = model
        # tensors made in the caller's inference_mode could not take part in a graph
        with torch.inference_mode(False), torch.no_grad():
            self.text_embeddings = F.normalize(text_embeddings, dim=-1)
        config = getattr(getattr(model, "config", None), "vision_config", None)
        size = getattr(config, "image_size", getattr(getattr(model, "visual", None), "image_size", None))
        if size is not None:
            self.image_size = size

    @classmethod
    def from_texts(cls, model: nn.Module, texts: Sequence[str], tokeniser: Tokeniser) -> ImageTextModel:
        """Encodes texts with the model's own text encoder, in evaluation mode; the model is left as it was.

        Args:
            model: as for the class.
            texts: K prompts; a single one may come alone.
            tokeniser: the model's; with Hugging Face, ``lambda texts: tokenizer(texts, padding=True,
                return_tensors="pt")``.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not texts:
            raise InputError("found no texts, expected at least one")
        tokens, anything = tokeniser(list(texts)), cast("Any", model)
        device = next(model.parameters()).device
        with torch.inference_mode(False), torch.no_grad(), borrowed(model):
            if hasattr(model, "get_text_features"):
                named = dict(tokens) if hasattr(tokens, "keys") else {"input_ids": tokens}
                output = anything.get_text_features(**{name: value.to(device) for name, value in named.items()})
            else:
                output = anything.encode_text(tokens.to(device))
        return cls(model, _features(output))

    def forward(self, images: Tensor) -> Tensor:
        """Scaled cosine similarities (B, K), the model's own logits for these texts."""
        model = cast("Any", self.model)
        encode = getattr(model, "get_image_features", None) or model.encode_image
        return self.similarities(_features(encode(images)))

    def similarities(self, features: Tensor) -> Tensor:
        """Scaled cosine similarities (B, K) of what the image encoder gives (B, D) with the texts."""
        model = cast("Any", self.model)
        features = F.normalize(features, dim=-1)
        logits: Tensor = features @ self.text_embeddings.to(features).T * model.logit_scale.exp()
        bias = getattr(model, "logit_bias", None)
        return logits if bias is None else logits + bias


class SimilarityHead(nn.Module):
    """What an image-text model says of features before their projection: (B, width) to logits (B, K).

    Args:
        model: with the texts.
        projection: of the same model, a linear map, or its weights (width, D); it is borrowed, not copied. None where
            the features are compared as they are.
    """

    def __init__(self, model: ImageTextModel, projection: nn.Module | nn.Parameter | None) -> None:
        super().__init__()
        self.projection = projection
        self.out_features, width = model.text_embeddings.shape
        linear: Any = projection
        weighs = isinstance(projection, nn.Parameter)
        self.in_features: int = width if linear is None else len(linear) if weighs else linear.in_features
        self._similarities = model.similarities  # a method: the model is no part of this head

    def forward(self, features: Tensor) -> Tensor:
        """Scaled cosine similarities of the projected features with the texts."""
        projection = self.projection
        if projection is not None:
            features = projection(features) if isinstance(projection, nn.Module) else features @ projection
        return self._similarities(features)

    @staticmethod
    def of(model: ImageTextModel, modules: Iterable[nn.Module], width: int) -> Iterator[SimilarityHead]:
        """All that modules of the model could form: each linear map, or matrix, from `width` to the texts' features."""
        features = model.text_embeddings.shape[1]
        if features == width:
            yield SimilarityHead(model, None)
        for module in modules:
            if (getattr(module, "in_features", None), getattr(module, "out_features", None)) == (width, features):
                yield SimilarityHead(model, module)
            elif not hasattr(module, "in_features"):
                found = [each for each in module.parameters(recurse=False) if each.shape == (width, features)]
                yield from (SimilarityHead(model, each) for each in found)


def _features(output: Any) -> Tensor:
    """Pooled features (B, D), whatever they are wrapped in."""
    pooled = getattr(output, "pooler_output", output)
    if not isinstance(pooled, Tensor) or pooled.ndim != 2:
        found = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(output).__name__
        raise UnsupportedModelError(f"an encoder returned {found}; expected features of shape (B, D)")
    return pooled
