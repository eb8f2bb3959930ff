"""Models by name: the embedded ones, timm's with weights from the hub or from files, and those of transformers."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import (
    CheckpointError,
    ExplanationWarning,
    InputError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
)
from ..preprocessing import Preprocessing
from ..subject import Subject
from . import adapt, hugging_face
from .fingerprint import weights_digest
from .hub import fetch_pretrained
from .labels import find_class, imagenet_labels, read_labels
from .saved_form import saved_form, set_input_size
from .weights import first_line, load_strictly, read_state

EMBEDDED = "scenes"
EMBEDDED_FOR_PM = "scenes-pm"
_PREFIX = "timm:"
_TIMM_MODULES = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vitamin",
    "deit",
    "beit",
    "eva",
    "naflexvit",
    "swin_transformer",
    "swin_transformer_v2",
    "cait",
)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with everything needed to explain it.

    Attributes:
        name: what was asked for, e.g. ``"scenes"`` or ``"timm:vit_tiny_patch16_224"``.
        model: the module, in evaluation mode.
        subject: adapter, preprocessing and labels.
        weights: where the weights came from: ``"embedded"``, ``"hub:REPOSITORY"`` or a path.
        num_classes: how many outputs it has.
    """

    name: str
    model: nn.Module
    subject: Subject
    weights: str
    num_classes: int

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become the model's input."""
        if self.subject.preprocessing is None:
            raise InputError(f"the preprocessing of {self.name} is not known; load the model with load_model")
        return self.subject.preprocessing

    @property
    def labels(self) -> Sequence[str] | None:
        """Class names, where known."""
        return self.subject.labels

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def identity(self) -> dict[str, Any]:
        """What tells this model from others, JSON-able: name, weights, SHA-256 of their content, preprocessing."""
        return {
            "name": self.name,
            "weights": self.weights,
            "sha256": weights_digest(self.model),
            "num_classes": self.num_classes,
            "preprocessing": self.preprocessing.to_dict(),
        }

    def class_index(self, label: str) -> int:
        """The class that a user names: an index, a full label, or a comma-separated part of one ("zebra").

        Raises:
            TargetError: the index is out of range.
            UnknownNameError: no class, or several, have this name.
        """
        return find_class(label, self.labels, self.num_classes)


def load_model(
    name: str = EMBEDDED,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | Sequence[str] | Mapping[int, str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """A model by name, ready to be explained.

    Args:
        name: ``"scenes"``, the embedded model; ``"scenes-pm"``, the same trained on a few masks for the method `pm`;
            ``"timm:ARCHITECTURE"``, with weights from the hub, or from `checkpoint` with no network;
            ``"hf:REPOSITORY"``, an image classifier of transformers from the hub; or ``"hf:FOLDER"``, one that
            ``save_pretrained`` wrote.
        checkpoint: `.safetensors`, or a `.pt`/`.pth`/`.bin` state dict (read with ``weights_only=True``). Its
            classifier says how many classes there are. The input size is what the card beside it says, or what the
            position embedding tells: a square, or else the one in `preprocessing`. For the embedded models, what
            ``vitexplain train`` wrote.
        labels: class names in order or by index, or a file of them: JSON list, JSON object by index, or one name a
            line. By default those in the card of an embedded model's `checkpoint`, or ImageNet's, where the number of
            classes is that of one of its sets.
        preprocessing: fields of `Preprocessing` to override, e.g. ``{"mean": (0.5, 0.5, 0.5)}``. By default what the
            model was trained with, as the card that ``vitexplain train`` wrote beside `checkpoint` says, or timm. Plain
            transformers of timm are brought to another ``size``: their position embedding is resampled.
        device: where to put the model; the CPU by default.

    Raises:
        UnknownNameError: no such model.
        UnsupportedModelError: the architecture is not supported.
        CheckpointError: weights are missing, unreadable, or do not fit; or the hub cannot be reached.
        InputError: the labels do not fit the model.
        OptionError: the device is not there, or a preprocessing setting does not suit the model.
    """
    place = _device("cpu" if device is None else device)
    given = None if labels is None else read_labels(labels)
    if name in (EMBEDDED, EMBEDDED_FOR_PM):
        model, weights, names, prepare = _embedded_model(name, checkpoint)
    elif name.startswith(_PREFIX):
        trained = _trained_with(checkpoint)
        said, asked = None if trained is None else trained.size, _size_in(preprocessing or {})
        model, weights = _timm_model(name, checkpoint, said, asked)
        names, prepare = imagenet_labels(model), trained or Preprocessing.from_timm(model)
    elif name.startswith(hugging_face.PREFIX):
        if checkpoint is not None:
            raise OptionError(
                f"found the checkpoint {os.fspath(checkpoint)!r} for {name}, expected none: weights come from the "
                f"folder or repository that it names ({hugging_face.PREFIX}FOLDER)"
            )
        model, weights, names, prepare = hugging_face.load_classifier(name)
    else:
        raise UnknownNameError(
            f"no model called {name!r}. Known: {EMBEDDED} and {EMBEDDED_FOR_PM} (embedded), {_PREFIX}ARCHITECTURE "
            f"(for instance {_PREFIX}vit_tiny_patch16_224; `vitexplain models` lists them), "
            f"{hugging_face.PREFIX}REPOSITORY_OR_FOLDER"
        )
    prepare = prepare.replace(**(preprocessing or {}))
    try:
        set_input_size(model, prepare.size)
        adapter = adapt(model.eval().to(place))
        adapter.grid(prepare.size)
    except InputError as error:
        raise OptionError(
            f"{name} cannot take inputs of {prepare.size[0]}x{prepare.size[1]} pixels: {error}. Leave the size out "
            "for the model's own, or choose another"
        ) from error
    num_classes = _count_classes(name, model)
    found = names if given is None else given
    if found is not None and len(found) != num_classes:
        raise InputError(
            f"found {len(found)} labels, expected {num_classes}, one for each class of {name}: pass so many as labels"
        )
    return LoadedModel(name, model, Subject(adapter, prepare, found), weights, num_classes)


def list_models(pattern: str = "*") -> Iterator[tuple[str, str]]:
    """Models that can be explained: the embedded ones, and timm's transformers, each built (without weights) to see.

    Others of timm's architectures are not among them; see `other_architectures`.

    Args:
        pattern: shell pattern of names, with or without ``timm:``.

    Yields:
        Name as `load_model` takes it, and a note: "" if every method works exactly, else what does not.
    """
    if fnmatch.fnmatch(EMBEDDED, pattern):
        yield EMBEDDED, "embedded: a small ViT trained on procedural scenes, works offline"
    if fnmatch.fnmatch(EMBEDDED_FOR_PM, pattern):
        yield EMBEDDED_FOR_PM, "embedded: the same, trained on a few masks for the method pm"
    for name in fnmatch.filter(_architectures(), pattern.removeprefix(_PREFIX)):
        try:
            model = _without_weights(name)
            adapter = adapt(model)
        except UnsupportedModelError:
            continue
        notes = [] if model.num_classes else ["no classifier: its outputs are features"]
        if adapter.approximate is not None:
            notes.append(f"approximate: {adapter.approximate}")
        try:
            adapter.seed(adapter.num_prefix_tokens + 1)
        except UnsupportedModelError as error:
            notes.append(str(error).split(";")[0])
        yield f"{_PREFIX}{name}", "; ".join(notes)


def other_architectures(pattern: str) -> list[str]:
    """Names of timm's architectures that match, beyond those `list_models` looks through; none of them is built.

    They are ConvNets, pyramids and others. `load_model` takes those that have a feature map that all of the score goes
    through, for Grad-CAM and what else needs no attention.

    Args:
        pattern: shell pattern of names, with or without ``timm:``.
    """
    import timm

    looked_through = set(_architectures())
    names = fnmatch.filter(timm.list_models(), pattern.removeprefix(_PREFIX))
    return [f"{_PREFIX}{name}" for name in names if name not in looked_through]


def _embedded_model(
    name: str,
    checkpoint: str | os.PathLike[str] | None,
) -> tuple[nn.Module, str, Sequence[str] | None, Preprocessing]:
    from ..data.scenes import CLASS_NAMES, MEAN, STD
    from .embedded import load_checkpoint, load_patch_mask_model, load_scenes_model, read_checkpoint_card

    shipped = load_scenes_model if name == EMBEDDED else load_patch_mask_model
    model = shipped() if checkpoint is None else load_checkpoint(os.fspath(checkpoint))
    card = {} if checkpoint is None else read_checkpoint_card(Path(checkpoint))
    names = CLASS_NAMES if model.num_classes == len(CLASS_NAMES) else None
    fields = card.get("preprocessing")
    if fields is None:
        shape = card.get("input_size", (3, *cast("Any", model).patch_embed.img_size))
        fields = {"size": tuple(shape[1:]), "mean": card.get("mean", MEAN), "std": card.get("std", STD)}
        fields["crop_fraction"] = 1.0
    prepare = _card_preprocessing(fields, checkpoint)
    return model, "embedded" if checkpoint is None else str(checkpoint), card.get("classes", names), prepare


def _trained_with(checkpoint: str | os.PathLike[str] | None) -> Preprocessing | None:
    """How the pictures were prepared that a timm model was trained on, where `vitexplain train` wrote its weights."""
    if checkpoint is None:
        return None
    try:
        card = json.loads(Path(checkpoint).with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it is somebody else's
        return None
    fields = card.get("preprocessing") if isinstance(card, dict) else None
    known = {each.name for each in dataclasses.fields(Preprocessing)}
    if not isinstance(fields, dict) or not {"size", "mean", "std"} <= fields.keys() <= known:
        return None
    return _card_preprocessing(fields, checkpoint)


def _card_preprocessing(fields: Mapping[str, Any], checkpoint: str | os.PathLike[str] | None) -> Preprocessing:
    """The preprocessing of the fields that a card says or implies."""
    try:
        return Preprocessing(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the card of {str(checkpoint)!r} has a preprocessing that cannot be used ({error}); expected the fields "
            "of Preprocessing: correct them, or train again"
        ) from error


def _timm_model(
    name: str,
    checkpoint: str | os.PathLike[str] | None,
    said: tuple[int, int] | None,
    asked: tuple[int, int] | None,
) -> tuple[nn.Module, str]:
    """A model of timm, and where its weights came from; input sizes that its card says and the user names."""
    import timm

    architecture = name.removeprefix(_PREFIX)
    if not timm.is_model(architecture):
        close = _similar(architecture.split(".")[0], _architectures())
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
        raise UnknownNameError(
            f"timm has no architecture called {architecture!r}{hint}. `vitexplain models` lists them"
        )
    try:
        timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        plain, _, tag = architecture.partition(".")
        tags = [each.partition(".")[2] for each in timm.list_models(f"{plain}.*", pretrained=True)]
        raise UnknownNameError.listing(f"pretrained tag of {plain}", tag, tags) from error
    plain_model = _check_architecture(architecture)
    if checkpoint is None:
        return fetch_pretrained(architecture)
    state = read_state(checkpoint)
    model = timm.create_model(architecture, **saved_form(state, plain_model, said, asked))
    load_strictly(model, state, str(checkpoint))
    return model, str(checkpoint)


def _size_in(preprocessing: Mapping[str, Any]) -> tuple[int, int] | None:
    """The input size among settings that are not checked yet."""
    size = preprocessing.get("size")
    if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return None


def _check_architecture(architecture: str) -> nn.Module:
    """The architecture, for looking at. One that no adapter fits is refused, before anything is fetched.

    What has no adapter of its own is recognised by watching it run, which takes weights; random ones will do.

    Raises:
        UnsupportedModelError: no adapter fits.
    """
    import timm

    model = _without_weights(architecture)
    try:
        adapt(model)
    except UnsupportedModelError:
        try:
            adapt(timm.create_model(architecture))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{_PREFIX}{architecture} is not supported: {error}") from error
    return model


def _without_weights(architecture: str) -> nn.Module:
    """The architecture, for looking at; of one block where it can be made so short."""
    import timm

    with torch.device("meta"):
        try:
            model: nn.Module = timm.create_model(architecture, depth=1)
        except (TypeError, ValueError, AssertionError):
            model = timm.create_model(architecture)
    return model


def _architectures() -> list[str]:
    import timm

    return [name for module in _TIMM_MODULES for name in timm.list_models(module=module)]


def _count_classes(name: str, model: nn.Module) -> int:
    """How many outputs there are; says so where they are no classes."""
    classes = int(getattr(model, "num_classes", getattr(model, "num_labels", 0)))  # timm's, transformers'
    if classes:
        return classes
    warnings.warn(
        f"{name} has no classifier: its outputs are features, so classes and probabilities mean nothing. Use methods "
        "that do not depend on the class, or weights that were fine-tuned",
        ExplanationWarning,
        stacklevel=3,
    )
    return int(getattr(model, "num_features", 0))


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise OptionError(
            f"the device {str(device)!r} cannot be used ({first_line(error)}); available: {', '.join(there)}"
        ) from error
    return place


def _similar(name: str, known: Sequence[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=3, cutoff=0.6)
