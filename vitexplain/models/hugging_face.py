"""Image classifiers of Hugging Face transformers, from the hub or folders, with what their image processor does."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..errors import CheckpointError, OptionError, UnsupportedModelError
from ..preprocessing import INTERPOLATIONS, Preprocessing
from .hub import OFFLINE, is_cached, offline_cause, quiet
from .labels import read_labels
from .weights import first_line

PREFIX = "hf:"
"""Of such names; a repository or a folder follows."""

_ELSEWHERE = (
    "In Python, explain what its own processor makes of images: get_explainer(method, model)(processor(images, "
    "return_tensors='pt'))"
)
_LEVELS = 3.0
"""Of 255: how far two ways to resize may differ, on average, on a smooth picture."""

_logger = logging.getLogger(__name__)


def load_classifier(name: str) -> tuple[nn.Module, str, list[str] | None, Preprocessing]:
    """A classifier with its weights, in single precision.

    Args:
        name: ``hf:REPOSITORY`` of the hub, or ``hf:FOLDER`` that ``save_pretrained`` wrote. No code of a repository is
            run, and weights are read from safetensors alone.

    Returns:
        The model; where its weights came from; class names, where its configuration has some; and its preprocessing.

    Raises:
        OptionError: transformers is not installed.
        CheckpointError: something is missing, cannot be read or fetched; or the weights have no classifier.
        UnsupportedModelError: its processor does what `Preprocessing` cannot.
    """
    if find_spec("transformers") is None:
        raise OptionError(f"{name} needs transformers: pip install transformers")
    place = os.path.expanduser(name.removeprefix(PREFIX))
    local = os.path.isdir(place)
    if not local and not is_cached(place):
        cause = offline_cause()
        if cause:
            raise CheckpointError(
                f"{name} could not be fetched ({cause}), and there is no folder {place!r}. Give a folder that "
                f"save_pretrained wrote, or {OFFLINE}"
            )
        _logger.info("fetching %s from the hub", name)
    transformers: Any = import_module("transformers")
    try:
        with quiet("huggingface_hub"), quiet("transformers"):
            model, report = transformers.AutoModelForImageClassification.from_pretrained(
                place, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
            processor = transformers.AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # each of transformers' layers raises its own
        raise CheckpointError(
            f"{name} cannot be loaded ({type(error).__name__}: {first_line(error)}); expected a model for image "
            "classification with config.json, model.safetensors and preprocessor_config.json"
        ) from error
    absent = sorted({*report["missing_keys"], *(str(each) for each in report["mismatched_keys"])})
    if absent:
        raise CheckpointError(
            f"the weights of {name} lack {', '.join(absent[:3])}{', …' if len(absent) > 3 else ''}, which would be "
            f"random in a {type(model).__name__}; expected a model that was trained to classify images. Image-text "
            "models explain texts: vitexplain.models.image_text.ImageTextModel"
        )
    names = {int(index): label for index, label in model.config.id2label.items()}
    plain = all(label == f"LABEL_{index}" for index, label in names.items())
    labels = None if plain else read_labels(names)
    return model.float().eval(), place if local else f"hub:{place}", labels, read_processor(processor, name)


def read_processor(processor: Any, name: str) -> Preprocessing:
    """What an image processor does, as `Preprocessing`; compared with it on a picture, to about a level of 255.

    Args:
        processor: of transformers.
        name: of the model, for messages.

    Raises:
        UnsupportedModelError: it does something else.
    """
    said = processor.to_dict()
    try:
        found = _settings(said)
        picture = _smooth_picture()
        theirs = np.asarray(processor(picture, return_tensors="pt")["pixel_values"][0], np.float64)
        ours = found(picture).double().numpy()
        if theirs.shape != ours.shape:
            raise ValueError(f"it makes inputs {theirs.shape}, not {ours.shape}")
        levels = 255 * np.abs(theirs - ours) * np.array(found.std)[:, None, None]
        if not levels.mean() <= _LEVELS:
            raise ValueError(f"what it makes of a picture differs by {levels.mean():.0f} levels of 255 on average")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"how {name} prepares pictures cannot be followed: {said.get('image_processor_type')} is not a resize, a "
            f"crop and a normalisation as vitexplain knows them ({type(error).__name__}: {first_line(error)}). "
            f"{_ELSEWHERE}"
        ) from error
    return found


def _settings(said: Mapping[str, Any]) -> Preprocessing:
    """What the settings of a processor say; whether it is so is seen on a picture.

    Raises:
        KeyError, TypeError, ValueError: they say something else.
    """
    size, crop, fraction = said["size"], said.get("crop_size"), said.get("crop_pct")
    normalises = said.get("do_normalize", True)
    if "shortest_edge" in size:
        shorter = int(size["shortest_edge"])
        if said.get("do_center_crop") and crop:
            target, resized, mode = _sides(crop), (shorter, shorter), "center"
        elif fraction and shorter < 384:  # ConvNeXt's way: larger ones are squashed
            target, resized, mode = (shorter, shorter), (int(shorter / fraction),) * 2, "center"
        else:
            target, resized, mode = (shorter, shorter), (shorter, shorter), "squash"
    else:
        resized, mode = _sides(size), "squash"
        target = _sides(crop) if said.get("do_center_crop") and crop else resized
    return Preprocessing(
        size=target,
        mean=tuple(said["image_mean"]) if normalises else (0.0, 0.0, 0.0),
        std=tuple(said["image_std"]) if normalises else (1.0, 1.0, 1.0),
        interpolation=_interpolation(said["resample"]),
        crop_fraction=_fraction(target, resized),
        crop_mode=mode,
    )


def _sides(size: Mapping[str, int]) -> tuple[int, int]:
    return int(size["height"]), int(size["width"])


def _interpolation(resample: int) -> str:
    return next(name for name, known in INTERPOLATIONS.items() if known == int(resample))


def _fraction(target: tuple[int, int], resized: tuple[int, int]) -> float:
    """The crop fraction that makes pictures of a size `resized` before the crop; see `Preprocessing`."""
    exact = target[0] / resized[0]
    for fraction in (exact, target[0] / (resized[0] + 0.5)):  # the division may fall short of a whole number
        if tuple(math.floor(side / fraction) for side in target) == resized:
            return fraction
    raise ValueError(f"a crop of {target} from {resized} has no one fraction")


def _smooth_picture() -> Image.Image:
    """Wider than high, each channel another, so that what goes where is seen."""
    rows, columns = np.linspace(0, 1, 300)[:, None], np.linspace(0, 1, 430)[None]
    channels = rows + 0 * columns, columns + 0 * rows, (1 - rows) * columns
    return Image.fromarray((20 + 210 * np.stack(channels, -1)).astype(np.uint8))
