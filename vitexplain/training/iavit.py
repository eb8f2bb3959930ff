"""Training for IA-ViT: an interpreter for a model as it is, or a model and its interpreter together."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ..data.example import Example
from ..data.selection import held_out
from ..errors import InputError, VitExplainError
from ..iavit.checkpoint import save_checkpoint
from ..iavit.interpreter import Interpreter, InterpreterShape, fresh_interpreter
from ..iavit.trunk import TrunkReading, read_frozen
from ..models import adapt, unwrap
from ..models.adapter import ModelAdapter
from ..models.fingerprint import weights_digest
from ..preprocessing import Preprocessing
from .data_digest import examples_digest
from .iavit_batches import (
    PictureBatches,
    ReadingBatches,
    labelled_batches,
    read_images,
    rows_of,
)
from .iavit_learners import InterpreterLearner, JointLearner, LabelledImages
from .iavit_settings import IAViTSettings
from .lightning_run import check_output, interruption, trainer, undisturbed
from .trained_model import check_classes, check_precision

if TYPE_CHECKING:
    from .iavit_module import IAViTModule

__all__ = ["IAViTSettings", "train_iavit", "train_interpreter"]


@torch.inference_mode(False)  # a caller's, in which nothing can be learnt
def train_interpreter(
    model: nn.Module | ModelAdapter,
    images: Iterable[Any],
    output: str | os.PathLike[str],
    settings: IAViTSettings | None = None,
    *,
    validation: Iterable[Any] | None = None,
    resume: bool = False,
    logs: str | os.PathLike[str] | None = None,
    card: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains an interpreter for a model as it is, and writes a checkpoint that the method `iavit` takes.

    The model is borrowed: it stays frozen and comes back as it was. It is read once on each image; training then works
    on what was read, and costs little. No labels are used. While training runs, a file ``<output>.training`` holds what
    an interrupted training goes on from; it is deleted at the end.

    Args:
        model: the model, or its adapter; training runs on its device.
        images: batches of normalised images (B, channels, H, W), or tuples that begin with them, all of one size.
        output: file to write, ending in ``.safetensors``; a card with the ending ``.json`` goes beside it.
        settings: the recipe; `IAViTSettings.images` of the images are read.
        validation: batches by which the best weights are chosen; by default a share of `images` that is not trained on.
        resume: go on from an interrupted training with the same output, model, images and settings, if there is one.
        logs: folder for the figures of the course as ``metrics.csv``.
        card: further entries of the record.
        progress: whether to show a progress bar.

    Returns:
        What the card holds: the entries of `card`, ``method``, ``model`` (kind, parameters, digests), ``interpreter``
        (its shape), ``with_model`` (False), ``training`` (the recipe), ``images`` (how many were trained on),
        ``history`` (an entry an evaluation), ``result`` (that of the weights written), ``wall_seconds``, ``versions``.

    Raises:
        InputError: `output` is no place for a checkpoint, or the images are not batches of images of one size.
        CheckpointError: what is to be resumed is broken, or of another training.
        UnsupportedModelError: the model has no patch tokens, no attention that the regulariser can look at, or a single
            output.
        VitExplainError: Lightning is not installed, or training was interrupted.
    """
    settings = settings if settings is not None else IAViTSettings()
    path = check_output(output)
    from .iavit_module import IAViTModule

    started = time.monotonic()
    adapter = adapt(model)
    readings = read_images(adapter, images, settings.images, attention=settings.reads_attention)
    if validation is None:
        kept, seen = _split(len(readings.tokens), settings)
        readings, held = rows_of(readings, seen), rows_of(readings, kept)
    else:
        held = read_images(adapter, validation, None, attention=settings.reads_attention)
    count, patches, width = readings.tokens.shape
    check_classes(adapter.model, readings.logits.shape[1])
    learner = InterpreterLearner(_interpreter(width, patches, readings.logits.shape[1], settings), settings)
    parts = [
        rows_of(held, slice(start, start + settings.batch_size))
        for start in range(0, len(held.tokens), settings.batch_size)
    ]
    identity = {"model": weights_digest(adapter.model), "data": _digest_of(readings, held), **settings.must_match()}
    module = IAViTModule(learner, parts, _state_file(path), identity)
    place = next(adapter.model.parameters()).device
    _fit(module, ReadingBatches(readings, settings), place, resume=resume, logs=logs, progress=progress)
    return _finished(module, path, adapter, {**(card or {}), "images": count}, started, with_model=False)


@torch.inference_mode(False)  # a caller's, in which nothing can be learnt
def train_iavit(
    model: nn.Module | ModelAdapter,
    examples: Sequence[Example],
    preprocessing: Preprocessing,
    output: str | os.PathLike[str],
    settings: IAViTSettings | None = None,
    *,
    validation: Sequence[Example] | None = None,
    resume: bool = False,
    logs: str | os.PathLike[str] | None = None,
    card: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains a copy of a model together with an interpreter, as the paper does, and writes both into one checkpoint.

    The model itself stays as it is; whether it begins with pretrained or with random weights is the caller's choice.
    `vitexplain.iavit.load_iavit` opens the checkpoint. While training runs, a file ``<output>.training`` holds what an
    interrupted training goes on from; it is deleted at the end.

    Args:
        model: the model, or its adapter; training runs on its device.
        examples: of which the picture and the first label are used.
        preprocessing: how pictures become the model's input.
        output: file to write, ending in ``.safetensors``; a card with the ending ``.json`` goes beside it.
        settings: the recipe.
        validation: examples by which the best weights are chosen; by default a share of `examples` that is not trained
            on. Test data have no business here.
        resume: go on from an interrupted training with the same output, model, data and settings, if there is one.
        logs: folder for the figures of the course as ``metrics.csv``.
        card: further entries of the record; ``architecture``, by which the model can be built again: a timm name, or
            arguments of `vitexplain.models.embedded.build_model`; and ``classes``, their names.
        progress: whether to show a progress bar.

    Returns:
        As of `train_interpreter`; ``with_model`` is True, and ``preprocessing`` is there.

    Raises:
        InputError: `output` is no place for a checkpoint, or an example cannot be read or has no class of the model; of
            `validation`, before training begins.
        CheckpointError: what is to be resumed is broken, or of another training.
        UnsupportedModelError: the model has no patch tokens, no attention that can be trained with, or a single output,
            or is not float32.
        VitExplainError: Lightning is not installed, or training was interrupted.
    """
    settings = settings if settings is not None else IAViTSettings()
    path = check_output(output)
    from .iavit_module import IAViTModule

    started = time.monotonic()
    learned = copy.deepcopy(unwrap(model) if isinstance(model, nn.Module) else model)
    adapter = adapt(learned)
    check_precision(adapter.model)
    examples, held = _with_validation(examples, validation, settings)
    reading = read_frozen(adapter, preprocessing([examples[0].image]), attention=settings.reads_attention)
    (_, patches, width), num_classes = reading.tokens.shape, reading.logits.shape[1]
    check_classes(adapter.model, num_classes)
    kept = _Repeated(held, preprocessing, num_classes, settings.batch_size)
    for _ in kept:  # one that cannot be used is to be known before there is work to lose
        pass
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(True)
    initial = weights_digest(adapter.model)
    learner = JointLearner(adapter, _interpreter(width, patches, num_classes, settings), settings)
    module = IAViTModule(
        learner,
        kept,
        _state_file(path),
        {
            "model": initial,
            "data": examples_digest(examples, held),
            "preprocessing": preprocessing.to_dict(),
            **settings.must_match(),
        },
    )
    place = next(adapter.model.parameters()).device
    batches = PictureBatches(examples, preprocessing, settings, num_classes)
    _fit(module, batches, place, resume=resume, logs=logs, progress=progress)
    more = {**(card or {}), "preprocessing": preprocessing.to_dict(), "images": len(examples), "initial": initial}
    return _finished(module, path, adapter, more, started, with_model=True)


class _Repeated(Iterable[LabelledImages]):
    """Batches of examples, prepared anew each time they are asked for."""

    def __init__(
        self, examples: Sequence[Example], preprocessing: Preprocessing, num_classes: int, batch_size: int
    ) -> None:
        self._arguments = examples, preprocessing, num_classes, batch_size

    def __iter__(self) -> Any:
        return labelled_batches(*self._arguments)


def _interpreter(width: int, patches: int, num_classes: int, settings: IAViTSettings) -> Interpreter:
    fixed = patches if settings.head == "position" else 0
    shape = InterpreterShape(width, num_classes, settings.head, fixed, settings.scale_logits)
    return fresh_interpreter(shape, settings.seed)


def _fit(
    module: IAViTModule,
    batches: Dataset[Any],
    place: torch.device,
    *,
    resume: bool,
    logs: str | os.PathLike[str] | None,
    progress: bool,
) -> None:
    from .iavit_module import numbered

    settings = module.learner.settings
    if resume and module.state.is_file():
        module.resume()
    with undisturbed(place):
        logged = max(0, module.step - 1)  # the step that was saved is evaluated once more
        fitting = trainer(place, logs, progress=progress, logged=logged)
        fitting.fit(module, numbered(batches, module.step, settings))
    if not module.finished:
        raise VitExplainError(interruption(module.step, module.state))


def _finished(
    module: IAViTModule,
    path: Path,
    adapter: ModelAdapter,
    card: Mapping[str, Any],
    started: float,
    *,
    with_model: bool,
) -> dict[str, Any]:
    """Writes the best weights, with their record."""
    if module.best is None:
        raise VitExplainError("training gave no loss that is a number; lower learning_rate")
    module.learner.load_state_dict(module.best["weights"])
    module.learner.eval()
    record = save_checkpoint(
        path,
        module.learner.interpreter,
        adapter,
        with_model=with_model,
        record={
            **card,
            "training": dataclasses.asdict(module.learner.settings),
            "history": module.history,
            "result": module.best["figures"],
            "wall_seconds": round(time.monotonic() - started, 1),
            "lightning": metadata.version("lightning"),
        },
    )
    module.state.unlink(missing_ok=True)
    return record


def _with_validation(
    examples: Sequence[Example], validation: Sequence[Example] | None, settings: IAViTSettings
) -> tuple[Sequence[Example], Sequence[Example]]:
    """What is trained on, and what is not."""
    if validation is not None:
        if not len(examples) or not len(validation):
            raise InputError("found no examples to train on or to choose by, expected at least one of each")
        return examples, validation
    kept, seen = _split(len(examples), settings)
    measured, trained = held_out(examples, [*kept, *seen], len(kept))
    if not len(trained):
        raise InputError(
            f"found {len(examples)} examples of the pictures that are kept to choose weights by, expected some of "
            "other pictures to train on: give more pictures, or a smaller validation_share"
        )
    return trained, measured


def _split(count: int, settings: IAViTSettings) -> tuple[list[int], list[int]]:
    """Places kept, and the others, in a random order that the seed decides."""
    held = max(1, round(settings.validation_share * count))
    if count - held < 1:
        raise InputError(f"found {count} images, expected at least 2: one to train on, and one to choose weights by")
    order = np.random.default_rng(settings.seed).permutation(count).tolist()
    return order[:held], order[held:]


def _digest_of(*readings: TrunkReading) -> str:
    """SHA-256 of what was read, by which a training knows its data again."""
    return hashlib.sha256(b"".join(each.logits.double().numpy().tobytes() for each in readings)).hexdigest()


def _state_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.training")
