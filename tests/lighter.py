"""Cheap options for methods that ask a model many times, so that contract tests stay quick; and their passes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import trained
from torch import Tensor, nn

from vitexplain import Capture, Explainer, Needs, create_method, method_info
from vitexplain.feature_masks import merged_channels
from vitexplain.models.adapter import ModelAdapter


@dataclass(frozen=True)
class Lighter:
    """Options, and what `MethodInfo.passes` would say with them."""

    options: dict[str, Any]
    passes: str


LIGHTER = {
    "beyond_intuition": Lighter({"points": 5}, "5F + 5B"),
    "gradient_shap": Lighter({"samples": 3}, "4F + 3B"),
    "integrated_gradients": Lighter({"steps": 3}, "4F + 3B"),
    "kernel_shap": Lighter({"samples": 8}, "9F"),
    "occlusion": Lighter({"window": 2}, "(2 + W)F"),
    "rise": Lighter({"masks": 8, "cells": 3}, "9F"),
    "smoothgrad": Lighter({"samples": 3}, "4F + 3B"),
    "tis": Lighter({"masks": 8}, "9F"),
    "transition_attention": Lighter({"points": 5}, "5F + 5B"),
    "vit_cx": Lighter({"distance": 0.6}, "(1 + 2K)F"),
}


def method_options(name: str, model: nn.Module | ModelAdapter) -> dict[str, Any]:
    """Options with which a method explains this model quickly; see `trained.trained_options`."""
    cheap = LIGHTER[name].options if name in LIGHTER else {}
    return {**trained.trained_options(name, model), **cheap}


def get_explainer(name: str, model: nn.Module | ModelAdapter, **options: Any) -> Explainer:
    """`vitexplain.get_explainer`, quick, and with a checkpoint where the method needs one."""
    return trained.get_explainer(name, model, **{**method_options(name, model), **options})


def passes_claimed(name: str, model: nn.Module, images: Tensor, *, lighter: bool = True) -> dict[str, int]:
    """How many images a method claims to send forward ("F") and backward ("B") for a batch.

    The claim is a sum of terms such as ``1F``, ``50B`` or ``(2 + P)F``: P is the number of patches, W of occlusion's
    windows, K of an image's masks in ViT-CX.
    """
    claim = LIGHTER[name].passes if lighter and name in LIGHTER else method_info(name).passes
    options = LIGHTER[name].options if lighter and name in LIGHTER else {}
    method, batch = create_method(name, **options), len(images)
    with Capture(model, Needs(states=frozenset({"attention_input"}) if name == "vit_cx" else frozenset())) as capture:
        capture.forward(images)
    h, w = capture.grid
    totals = {"P": h * w * batch}
    if name == "occlusion":
        totals["W"] = (h - min(method.window, h) + 1) * (w - min(method.window, w) + 1) * batch
    if name == "vit_cx":
        block = capture.blocks[method.layer]
        patches = block.state("attention_input")[:, block.layout.prefix :]
        totals["K"] = sum(len(merged_channels(each, method.distance)) for each in patches)
    found: dict[str, int] = {}
    for several, one, kind in re.findall(r"(?:\(([^)]*)\)|(\d+))([FB])", claim):
        for term in (several or one).split(" + "):
            factor, symbol = re.fullmatch(r"(\d*)([A-Z]?)", term).groups()
            found[kind] = found.get(kind, 0) + int(factor or 1) * totals.get(symbol, batch)
    return found
