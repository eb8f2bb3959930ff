"""Explainers in the shapes other libraries call them in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .api import get_explainer
from .errors import InputError


def quantus_explain(
    model: nn.Module, inputs: npt.NDArray[Any] | Tensor, targets: npt.NDArray[Any] | Tensor, **settings: Any
) -> npt.NDArray[np.float32]:
    """Explains a batch as Quantus asks for it: pass it as ``explain_func``.

    ::

        metric = quantus.Selectivity()
        metric(model, x_batch, y_batch, explain_func=quantus_explain, explain_func_kwargs={"method": "tokentm"})

    Captum needs nothing of the kind: `Explainer.attribute` has the shape that captum's metrics call.

    Args:
        model: the module that Quantus measures, or a copy that it has changed.
        inputs: (B, 3, H, W), normalised.
        targets: (B,) classes.
        **settings: ``method``, a registry name, ``"tokentm"`` by default; the options of that method. What Quantus
            adds of its own (``device``, ``normalise``, …) is left aside: maps come on the model's device, raw.

    Returns:
        (B, 1, H, W) float32 raw scores, bilinear between patch centres.

    Raises:
        InputError: inputs of another shape.
        VitExplainError: as for any explanation.
    """
    if inputs.ndim != 4:
        raise InputError(f"found inputs of shape {tuple(inputs.shape)}, expected (B, 3, H, W)")
    method = settings.pop("method", "tokentm")
    options = {name: value for name, value in settings.items() if name not in _OF_QUANTUS}
    explainer = get_explainer(method, model, **options)
    batch, classes = torch.as_tensor(inputs), torch.as_tensor(targets).reshape(-1)
    maps = explainer.attribute(batch.float() if batch.dtype == torch.float64 else batch, classes)[:, :1]
    found: npt.NDArray[np.float32] = maps.float().cpu().numpy()
    return found


_OF_QUANTUS = frozenset({"device", "normalise", "normalise_func", "normalise_func_kwargs", "abs", "softmax", "xai_lib"})
