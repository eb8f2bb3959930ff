"""The command ``vitexplain train pm``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, OptionError
from .command_options import open_training_data, read_values

if TYPE_CHECKING:
    from ..data.example import Example

EXAMPLES = (
    "[b]Examples[/b]\n\n"
    "vitexplain train pm --output scenes-pm.safetensors\n\n"
    "vitexplain train pm --model timm:vit_tiny_patch16_224 --data imagefolder:train --annotated folder:masks "
    "--output pm.safetensors\n\n"
    "vitexplain train pm --share 0.2 --pseudo-masks spectral_cut --set steps=500 --output pm.safetensors"
)
_EMBEDDED = ("scenes", "scenes-pm")
_TRAINING_SCENES = 10_000
_SHARE = 0.01

SCENES_SETTINGS: Mapping[str, Any] = {
    "distillation": True,
    "steps": 300,
    "batch_size": 16,
    "learning_rate": 2e-4,
    "head_rate": 1e-3,
    "layer_decay": 0.8,
    "smallest_crop": 0.6,
}
"""What the recipe changes for the embedded model, which is small, and knows the training scenes' labels by heart."""


def train_pm_command(
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Weights to write (.safetensors); a .json of the same name goes along."),
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="scenes, scenes-pm, timm:ARCHITECTURE or hf:REPOSITORY.")
    ] = "scenes",
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights to begin with.  \\[default: the model's own]")
    ] = None,
    data: Annotated[str, typer.Option(metavar="FORMAT:ROOT", help="Images with labels; of scenes, 10000.")] = "scenes",
    data_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="For the reader of --data; repeated.  \\[default: its training split]"),
    ] = None,
    annotated: Annotated[
        str | None,
        typer.Option(metavar="FORMAT:ROOT", help="Images with masks or boxes.  \\[default: a --share of --data]"),
    ] = None,
    annotated_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="The same for --annotated.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of --data, how much is used with its masks.  \\[default: 0.01]"),
    ] = None,
    pseudo_masks: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Guess the masks: spectral_cut, or a method's map of the label."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A field of PatchMaskSettings; may be repeated."),
    ] = None,
    validation: Annotated[
        int, typer.Option(min=0, metavar="N", help="Kept from --annotated, at random, to measure on: whole pictures.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted training.")] = False,
    logs: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where metrics.csv goes.")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …")] = "cpu",
) -> None:
    """Trains a model's classifier to name the object of each patch, from labels and a few masks, for the method pm."""
    from ..data.selection import apart_from, held_out
    from ..models.loading import load_model
    from .patch_mask_settings import PatchMaskSettings
    from .patch_masks import train_patch_masks
    from .pseudo_masks import with_pseudo_masks

    _check_annotated(annotated, annotated_option or (), share)
    defaults = {each.name: each.default for each in dataclasses.fields(PatchMaskSettings)}
    started = {**(SCENES_SETTINGS if model in _EMBEDDED else {}), **read_values("--set", setting or (), defaults)}
    settings = PatchMaskSettings(**started)
    loaded = load_model(model, checkpoint=checkpoint, device=device)
    labelled = open_training_data(data, data_option or (), loaded, count=_TRAINING_SCENES)
    if annotated is None:
        masked, labelled = _split(labelled, _SHARE if share is None else share, settings.seed)
    else:
        masked = open_training_data(annotated, annotated_option or (), loaded, count=None, name="--annotated-option")
    kept: Sequence[Example] = []
    if validation:
        kept, masked = held_out(masked, _random_order(masked, settings.seed), validation)
        if annotated in (None, data):  # the same pictures, which are not to be trained on by their labels either
            labelled = apart_from(labelled, kept)
    if not len(masked):
        raise InputError(f"found {len(kept)} images with masks, all kept by --validation; expected some to train on")
    if pseudo_masks is not None:
        masked = with_pseudo_masks(masked, loaded.model, loaded.preprocessing, pseudo_masks)
    record = train_patch_masks(
        loaded.subject.adapter,
        labelled,
        masked,
        loaded.preprocessing,
        output,
        settings,
        validation=kept or None,
        resume=resume,
        logs=logs,
        card=_card(model, checkpoint),
        progress=True,
    )
    last = record["history"][-1]
    typer.echo(f"Loss of classes {last['classification_loss']:.3f}, of masks {last['mask_loss']:.3f}.")
    if record["after"]:
        for name in ("before", "after"):
            found = record[name]
            typer.echo(
                f"{name:<6} accuracy {found['accuracy']:.1%}, PxAP {found['pixel_average_precision']:.1%} "
                f"(chance {found['chance']:.1%})"
            )
    typer.echo(f"Weights: {output.resolve()}. Explain with --method pm --option score={record['score']}")


def _check_annotated(annotated: str | None, options: Sequence[str], share: float | None) -> None:
    """Refuses options that would not count.

    Raises:
        OptionError: options of a reader that there is not, or a share of what is not shared.
    """
    if annotated is None and options:
        raise OptionError(
            f"found --annotated-option {options[0]} without --annotated, whose reader it is for: add --annotated "
            "FORMAT:ROOT, or write --data-option"
        )
    if annotated is not None and share is not None:
        raise OptionError(
            f"found --share {share} together with --annotated {annotated}: images with masks are a share of --data, "
            "or those of --annotated; leave one of the two out"
        )


def _split(examples: Sequence[Example], share: float, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """A random share of the examples, and the others."""
    from ..data.selection import chosen

    count = round(share * len(examples))
    if not 0 < count < len(examples):
        raise OptionError(f"--share: found {share}, which is {count} of {len(examples)} images; expected some, not all")
    order = _random_order(examples, seed)
    return chosen(examples, order[:count]), chosen(examples, order[count:])


def _random_order(examples: Sequence[Example], seed: int) -> list[int]:
    """Readers list examples by class."""
    import numpy as np

    order: list[int] = np.random.default_rng(seed).permutation(len(examples)).tolist()
    return order


def _card(model: str, checkpoint: Path | None) -> dict[str, Any]:
    """What a checkpoint of the embedded model says about itself, so that it can be built again."""
    if model not in _EMBEDDED:
        return {}
    from ..models.embedded import read_checkpoint_card, scenes_card

    card = scenes_card() if checkpoint is None else read_checkpoint_card(checkpoint)
    return {name: card[name] for name in ("architecture", "classes", "mean", "std", "input_size") if name in card}
