"""Training of the gates of Vision DiffMask on a borrowed model."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ..diffmask.checkpoint import save_checkpoint
from ..diffmask.masking import MaskedModel
from ..errors import ExplanationWarning, InputError, OptionError
from ..models import adapt
from ..models.adapter import ModelAdapter
from ..models.fingerprint import weights_digest
from .data_digest import images_digest
from .diffmask_learner import DiffMaskLearner
from .diffmask_settings import DiffMaskSettings
from .lightning_run import check_output, csv_logger, interruption, undisturbed
from .picture_batches import PictureBatches

if TYPE_CHECKING:
    from .diffmask_module import DiffMaskModule

__all__ = ["DiffMaskSettings", "train_diffmask"]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Precisions that the model's passes may have, as Lightning calls them."""

_NEARLY_ALL = 0.99
_MAY_CHANGE = ("steps", "patience")


@torch.inference_mode(False)  # a caller's, in which nothing can be learnt
def train_diffmask(
    model: nn.Module | ModelAdapter,
    images: Iterable[Any],
    output: str | os.PathLike[str],
    settings: DiffMaskSettings | None = None,
    *,
    validation: Iterable[Any] | None = None,
    resume: bool = False,
    logs: str | os.PathLike[str] | None = None,
    precision: str = "32-true",
    devices: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains gates on a model and writes a checkpoint that the method `diffmask` takes.

    The model is borrowed: it stays frozen and comes back as it was. No labels are used. While training runs, a file
    ``<output>.training`` holds what an interrupted training goes on from; it is deleted at the end.

    Args:
        model: the model, or its adapter; training runs where it is.
        images: batches of normalised images (B, channels, H, W), or tuples that begin with them, such as a
            `torch.utils.data.DataLoader` gives; iterated again whenever they end.
        output: file to write, ending in ``.safetensors``; a card with the ending ``.json`` goes beside it.
        settings: the recipe.
        validation: batches by which the best gates are chosen, all of them, held in memory; by default the first
            `DiffMaskSettings.validation_batches` of `images`, which are trained on like the others.
        resume: go on from an interrupted training with the same output, model, images and settings, if there is one.
        logs: folder for figures of the course as CSV, and for TensorBoard where that is installed.
        precision: of the model's passes, one of `PRECISIONS`. Gates, noise, divergence and multipliers are in float32
            at least.
        devices: number of GPUs; each works on batches of its own.
        progress: whether to show a progress bar.

    Returns:
        What the card holds: ``model`` (kind, SHA-256 of its weights), ``gates``, ``constraint``, ``margin``,
        ``training`` (the recipe), ``history`` (an entry an evaluation), ``result`` (the written gates' evaluation and
        step), ``met`` (whether they meet the constraint), ``restarts``, ``wall_seconds`` and ``versions``.

    Raises:
        OptionError: no such precision, or fewer than one device.
        InputError: `output` is no place for a checkpoint, or the images are not batches of images.
        CheckpointError: what is to be resumed is broken, or of another model, other settings, other pictures (as far as
            `images` is a `PictureBatches`) or other images to choose by.
        UnsupportedModelError: the model has no states for gates to read, or a single output.
        VitExplainError: Lightning is not installed.
        KeyboardInterrupt: training was interrupted; `resume` goes on from the last evaluation, if there was one.
    """
    settings = settings if settings is not None else DiffMaskSettings()
    output = check_output(output)
    if precision not in PRECISIONS or devices < 1:
        raise OptionError(
            f"found precision={precision!r} and devices={devices}, expected one of {', '.join(PRECISIONS)}, "
            "and at least 1"
        )
    from .diffmask_module import Batches, DiffMaskModule, images_of

    started = time.monotonic()
    masked = MaskedModel(adapt(model))
    source = itertools.islice(images, settings.validation_batches) if validation is None else validation
    chosen = [images_of(batch) for batch in source]
    if not chosen:
        raise InputError("found no batches of images, expected at least one")
    learner = DiffMaskLearner(masked, chosen[0], settings)
    data = _data_identity(images, None if validation is None else chosen)
    module = DiffMaskModule(learner, chosen, _state_file(output), {**data, **_identity(masked, settings)})
    if resume and module.state.is_file():
        module.resume()
    place = next(masked.adapter.model.parameters()).device
    with _model_put_back(masked.adapter.model), undisturbed(place):
        loggers = _loggers(logs, 0 if module.resumed is None else module.resumed["step"])
        _trainer(masked.adapter, loggers, precision, devices, progress).fit(module, Batches(images, module))
    if not module.finished:
        raise KeyboardInterrupt(interruption(module.step, module.state))
    record = _record(module, output, time.monotonic() - started)
    module.state.unlink(missing_ok=True)
    return record


def _record(module: DiffMaskModule, output: Path, seconds: float) -> dict[str, Any]:
    learner, settings = module.learner, module.learner.settings
    assert learner.best is not None
    result = {"step": learner.best["step"], **learner.best["evaluation"]}
    met = result["divergence"] <= settings.margin and result["agreement"] >= settings.agreement
    doubt = _doubt(result, met, module.collapsed, settings.margin)
    if doubt:
        warnings.warn(f"the gates in {output} {doubt}", ExplanationWarning, stacklevel=3)
    return save_checkpoint(
        output,
        learner.best_gates(),
        learner.masked.adapter,
        learner.num_classes,
        constraint=settings.constraint,
        margin=settings.margin,
        record={
            "training": dataclasses.asdict(settings),
            "history": module.history,
            "result": result,
            "met": met,
            "restarts": learner.restarts,
            "wall_seconds": round(seconds, 1),
            "lightning": metadata.version("lightning"),
        },
    )


def _doubt(result: dict[str, Any], met: bool, collapsed: bool, margin: float) -> str:
    """What a user should know before trusting the gates, and what to try; empty where nothing is wrong."""
    if not met:
        return (
            f"do not meet the constraint{', training collapsed' if collapsed else ''}: divergence "
            f"{result['divergence']:.3f} (margin {margin:g}), agreement {result['agreement']:.2f}, "
            f"{result['kept']:.1%} of patches kept. Try more steps, a smaller masked_at_start, a larger margin or "
            "another seed"
        )
    if result["kept"] > _NEARLY_ALL:
        return (
            f"keep {result['kept']:.1%} of the patches, so their maps say little. Either the model needs them all, or "
            "the multiplier began so high that nothing was given up: try a smaller multiplier_start, a larger "
            "masked_at_start, or more steps"
        )
    return ""


def _identity(masked: MaskedModel, settings: DiffMaskSettings) -> dict[str, Any]:
    recipe = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _MAY_CHANGE}
    return {"model": weights_digest(masked.adapter.model), **recipe}


def _data_identity(images: Iterable[Any], validation: Sequence[Tensor] | None) -> dict[str, Any]:
    """What is known of the data: nothing of loaders that are not ours, which may come in another order each time."""
    return {
        "images": images.digest() if isinstance(images, PictureBatches) else None,
        "validation": None if validation is None else images_digest(validation),
    }


def _state_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.training")


def _trainer(
    adapter: ModelAdapter, loggers: Sequence[Any] | Literal[False], precision: str, devices: int, progress: bool
) -> Any:
    import lightning

    place, passes = next(adapter.model.parameters()).device, cast("Any", precision)
    kinds = {"cuda": "gpu", "mps": "mps"}
    chosen: Any = [place.index or 0] if place.type == "cuda" and devices == 1 else devices
    return lightning.Trainer(
        accelerator=kinds.get(place.type, "cpu"),
        devices=chosen,
        # gates behind the drawn depth take no part in a step
        strategy="auto" if devices == 1 else "ddp_find_unused_parameters_true",
        precision=passes,
        max_epochs=1,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _loggers(folder: str | os.PathLike[str] | None, logged: int) -> Sequence[Any] | Literal[False]:
    if folder is None:
        return False
    from lightning.pytorch.loggers import TensorBoardLogger

    loggers: list[Any] = [csv_logger(folder, logged)]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(Path(folder), name="", version=""))
    return loggers


@contextmanager
def _model_put_back(model: nn.Module) -> Iterator[None]:
    """Back to the device where it was."""
    place = next(model.parameters()).device
    try:
        yield
    finally:
        model.to(place)
