"""Training for PM: the model's own classifier learns to name the object of each patch.

All images have a class, a small share of them also masks or boxes. The result is an ordinary checkpoint of the same
architecture, with the same names of weights; the method `pm` reads its maps.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ..capture import Capture
from ..data.example import Example
from ..errors import VitExplainError
from ..files import save_json, write_whole
from ..models import adapt, unwrap
from ..models.adapter import ModelAdapter
from ..models.fingerprint import weights_digest
from ..models.token_head import TokenHead, token_head
from ..needs import Needs
from ..preprocessing import Preprocessing
from .data_digest import examples_digest
from .lightning_run import check_output, interruption, trainer, undisturbed
from .patch_mask_batches import PatchMaskBatches
from .patch_mask_evaluation import evaluate_patch_masks
from .patch_mask_settings import PatchMaskSettings
from .trained_model import check_precision

__all__ = ["PatchMaskSettings", "train_patch_masks"]


@torch.inference_mode(False)  # a caller's, in which nothing can be learnt
def train_patch_masks(
    model: nn.Module | ModelAdapter,
    labelled: Sequence[Example],
    annotated: Sequence[Example],
    preprocessing: Preprocessing,
    output: str | os.PathLike[str],
    settings: PatchMaskSettings | None = None,
    *,
    validation: Sequence[Example] | None = None,
    resume: bool = False,
    logs: str | os.PathLike[str] | None = None,
    card: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains a copy of a model on labels and a few masks, and writes its weights.

    The model itself stays as it is. While training runs, a file ``<output>.training`` holds what an interrupted
    training goes on from; it is deleted at the end.

    Args:
        model: the model, or its adapter; training runs on its device.
        labelled: examples of which only the first label is used, and not even that with `distillation`.
        annotated: examples with a label, and a mask or boxes of that class's objects. Patches beside them are taken to
            show none of the classes, so objects of others have to be left out of the mask (-1). Some pictures with
            objects of several classes, an example each, make the map of a class keep off the others' objects.
        preprocessing: how pictures become the model's input.
        output: file to write, ending in ``.safetensors``; a record with the ending ``.json`` goes beside it.
        settings: the recipe.
        validation: examples with labels and masks, measured before and after training; None measures nothing.
        resume: go on from an interrupted training with the same output, model, settings and data, if there is one.
        logs: folder for the losses as ``metrics.csv``.
        card: further entries of the record, such as the model's ``architecture``.
        progress: whether to show a progress bar.

    Returns:
        What the JSON file holds: the entries of `card`, ``method``, ``score`` (the option of `pm` that fits the loss),
        ``model`` (kind and SHA-256 of the weights that training began with), ``preprocessing``, ``training`` (the
        recipe), ``labelled`` and ``annotated`` (how many), ``history``, ``before`` and ``after`` (figures of
        `validation`), ``wall_seconds`` and ``versions``.

    Raises:
        InputError: `output` is no place for a checkpoint, or an example lacks what it is used for.
        CheckpointError: what is to be resumed is broken, or of another training.
        UnsupportedModelError: the model has no linear head that reads tokens, drops patches in training, or is not
            float32.
        VitExplainError: Lightning is not installed, or training was interrupted or gave no number as its loss.
    """
    settings = settings if settings is not None else PatchMaskSettings()
    path = check_output(output)
    from .patch_mask_module import PatchMaskModule

    started = time.monotonic()
    learner = _copied(model)
    check_precision(learner.model)
    head, num_classes = _examined(learner, preprocessing.size)
    batches = PatchMaskBatches(labelled, annotated, preprocessing, settings, num_classes)
    initial = weights_digest(learner.model)
    identity = {
        "model": initial,
        "data": examples_digest(labelled, annotated),
        "preprocessing": preprocessing.to_dict(),
        **settings.must_match(),
    }
    before = _measured(learner, validation, preprocessing, settings)
    state = path.with_name(f"{path.name}.training")
    distilled = _copied(model) if settings.distillation else None
    module = PatchMaskModule(learner, head, settings, state, identity, distilled)
    if resume and state.is_file():
        module.resume()
    place = next(learner.model.parameters()).device
    with undisturbed(place):
        trainer(place, logs, progress=progress, logged=module.step).fit(module, _loader(batches, module.step))
    if module.step < settings.steps:
        raise VitExplainError(interruption(module.step, state))
    learner.model.to(place).eval()
    record = {
        **(card or {}),
        "method": "pm",
        "score": settings.score,
        "model": {"kind": type(learner.model).__name__, "num_classes": num_classes, "sha256": initial},
        "preprocessing": preprocessing.to_dict(),
        "training": dataclasses.asdict(settings),
        "labelled": len(labelled),
        "annotated": len(annotated),
        "history": module.history,
        "before": before,
        "after": _measured(learner, validation, preprocessing, settings),
        "wall_seconds": round(time.monotonic() - started, 1),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "timm", "numpy", "lightning")},
    }
    _write(path, learner.model, record)
    state.unlink(missing_ok=True)
    return record


def _copied(model: nn.Module | ModelAdapter) -> ModelAdapter:
    """A copy in evaluation mode."""
    copied = adapt(copy.deepcopy(unwrap(model) if isinstance(model, nn.Module) else model))
    copied.model.eval()
    return copied


def _examined(learner: ModelAdapter, size: tuple[int, int]) -> tuple[TokenHead, int]:
    """The model's head on single tokens, checked on an image of noise, and the number of classes."""
    noise = torch.randn(1, learner.num_channels, *size, generator=torch.Generator().manual_seed(0))
    with Capture(learner, Needs(states=frozenset({"out"}), from_block=-1)) as capture:
        logits = capture.forward(noise)
        return token_head(capture), logits.shape[1]


def _measured(
    learner: ModelAdapter,
    validation: Sequence[Example] | None,
    preprocessing: Preprocessing,
    settings: PatchMaskSettings,
) -> dict[str, Any] | None:
    if validation is None:
        return None
    return dataclasses.asdict(evaluate_patch_masks(learner, validation, preprocessing, score=settings.score))


def _loader(batches: PatchMaskBatches, first: int) -> Any:
    workers = batches.settings.workers
    return torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, batches.settings.steps),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )


def _write(path: Path, model: nn.Module, record: Mapping[str, Any]) -> None:
    """Weights first, so that a record never describes weights that are not there."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_whole(path, lambda file: file.write(save(state)))
    save_json(record, path.with_suffix(".json"))
