"""What recipes ask of a model: several classes; and where its own weights move, its precision and which decay."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UnsupportedModelError

_POSITIONS_AND_TOKENS = frozenset(
    {
        *("pos_embed", "pos_embedding", "position_embedding", "position_embeddings", "positional_embedding"),
        *("absolute_pos_embed", "relative_position_bias_table"),
        *("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token"),
        *("reg_token", "register_tokens", "mask_token"),
    }
)
"""As timm, torchvision, transformers and open_clip call them; not all of their models list them themselves."""


def check_classes(model: nn.Module, num_classes: int) -> None:
    """Refuses a model of one output, whose softmax is 1 whatever it is shown: any mask keeps it, anything imitates it.

    Raises:
        UnsupportedModelError: there are fewer than two classes.
    """
    if num_classes < 2:
        raise UnsupportedModelError(
            f"found a {type(model).__name__} with {num_classes} output, expected two classes or more, whose "
            "probabilities can change: wrap the model so that it gives its logit with a 0 beside it, (B, 2), which "
            "says the same"
        )


def check_precision(model: nn.Module) -> None:
    """Refuses a model that is not float32 throughout: images are, and half precision would lose small steps.

    Raises:
        UnsupportedModelError: a parameter has another precision.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UnsupportedModelError(
                f"found {name!r} of this {type(model).__name__} in {parameter.dtype}, expected torch.float32: train "
                "model.float(), and convert what comes out of it"
            )


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: biases, norms, positions, tokens, and what the model lists."""
    listed = {
        f"{place}.{name}" if place else name
        for place, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name in listed or _own_name(name) in _POSITIONS_AND_TOKENS
    }


def _own_name(parameter: str) -> str:
    """The last part of a parameter's name; that of its module where this is a table (``position_embedding.weight``)."""
    return parameter.removesuffix(".weight").rpartition(".")[2]
