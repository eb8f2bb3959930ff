"""Checkpoints for methods that learn: random weights of the right shape, which is all that contract tests ask for."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitexplain
from vitexplain import Explainer, adapt, method_info
from vitexplain.diffmask.checkpoint import save_checkpoint
from vitexplain.diffmask.gates import Gates, GateShape
from vitexplain.diffmask.masking import class_features
from vitexplain.iavit.checkpoint import save_checkpoint as save_interpreter
from vitexplain.iavit.interpreter import InterpreterShape, fresh_interpreter
from vitexplain.models.adapter import ModelAdapter
from vitexplain.models.fingerprint import weights_digest


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="checkpoints")  # removed when the interpreter ends


def trained_options(method: str, model: nn.Module | ModelAdapter) -> dict[str, Any]:
    """Options with which a method can explain this very model; none for those that need no training."""
    if not method_info(method).trainable:
        return {}
    if method == "iavit":
        return {"checkpoint": str(random_interpreter(adapt(model)))}
    return {"checkpoint": str(random_gates(adapt(model), class_specific=method_info(method).class_specific))}


def random_gates(model: nn.Module | ModelAdapter, *, class_specific: bool = False, seed: int = 0) -> Path:
    """A checkpoint of random gates that belong to a model; the same gates for models of the same shape."""
    adapter = adapt(model)
    path = Path(_folder().name) / f"{weights_digest(adapter.model)[:24]}-{class_specific}-{seed}.safetensors"
    if path.is_file():
        return path
    shape = shape_of(adapter, class_specific=class_specific)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates = Gates(shape)
        for name, parameter in gates.named_parameters():
            nn.init.normal_(parameter, std=0.5)
            if name.endswith("original0"):  # gains so large that patches and classes differ clearly
                nn.init.constant_(parameter, 3.0)
            if name.endswith("offset"):  # and some patches are kept
                nn.init.constant_(parameter, 1.5)
    save_checkpoint(path, gates, adapter, 7, constraint="class" if class_specific else "distribution")
    return path


def random_interpreter(model: nn.Module | ModelAdapter) -> Path:
    """A checkpoint of a random interpreter that belongs to a model of one of the tests' families."""
    adapter = adapt(model)
    path = Path(_folder().name) / f"{weights_digest(adapter.model)[:24]}-iavit.safetensors"
    if not path.is_file():
        interpreter = fresh_interpreter(InterpreterShape(width=24, num_classes=7, scale_logits=False), seed=0)
        save_interpreter(path, interpreter, adapter, with_model=False)
    return path


def shape_of(adapter: ModelAdapter, *, class_specific: bool = False) -> GateShape:
    """The shape of gates for one of the tests' families: width 24, 7 classes."""
    told = class_features(adapter, 7).shape[1] if class_specific else 0
    return GateShape(24, len(adapter.blocks) + 2, 6, stretch=2.0, class_width=told)


def get_explainer(name: str, model: nn.Module | ModelAdapter, **options: Any) -> Explainer:
    """`vitexplain.get_explainer`, with a checkpoint of random gates where the method needs one."""
    return vitexplain.get_explainer(name, model, **{**trained_options(name, model), **options})
