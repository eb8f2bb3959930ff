"""The command ``vitexplain train iavit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .command_options import open_training_data, read_values, training_options

if TYPE_CHECKING:
    from ..models.loading import LoadedModel
    from .iavit_settings import IAViTSettings

EXAMPLES = (
    "[b]Examples[/b]\n\n"
    "vitexplain train iavit --output scenes-iavit.safetensors\n\n"
    "vitexplain train iavit --model timm:vit_tiny_patch16_224 --data photos/ --output interpreter.safetensors\n\n"
    "vitexplain train iavit --joint --model timm:vit_tiny_patch16_224 --data imagefolder:train "
    "--output iavit.safetensors\n\n"
    "vitexplain train iavit --joint --data cifar10:data --architecture img_size=32 --architecture patch_size=4 "
    "--architecture num_classes=10 --architecture embed_layer=linear --output cifar10.safetensors"
)

SCENES_SETTINGS: Mapping[str, Any] = {"images": 1_500, "steps": 600, "batch_size": 32, "learning_rate": 2e-3}
"""What the recipe changes for the embedded model as it is: the shipped interpreter's."""

NEW_MODEL: Mapping[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "num_classes": 1000,
    "drop_path_rate": 0.0,
    "embed_layer": "linear",
}
"""What ``--architecture`` can say of a model with random weights, and what it is where nothing is said."""


def train_iavit_command(
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Weights to write (.safetensors); a .json of the same name goes along."),
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="scenes (embedded), or timm:ARCHITECTURE.")] = "scenes",
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of the model.  \\[default: the model's own]")
    ] = None,
    data: Annotated[
        str,
        typer.Option(metavar="PATH", help="FORMAT:ROOT, or scenes; without --joint also a folder or 'pattern*'."),
    ] = "scenes",
    data_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="For the reader of --data; repeated.  \\[default: its training split]"),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Train the model, too, on the labels of --data, as the paper does.")
    ] = False,
    architecture: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="With --joint: begin with a new ViT of random weights; repeated."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A field of IAViTSettings; may be repeated."),
    ] = None,
    released: Annotated[bool, typer.Option("--released", help="Train as the published code does.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted training.")] = False,
    logs: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where metrics.csv goes.")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …")] = "cpu",
) -> None:
    """Trains the interpreter of IA-ViT for a model as it is, or with --joint both together, for the method iavit."""
    from .iavit import IAViTSettings, train_iavit, train_interpreter

    if architecture and not joint:
        raise OptionError("--architecture begins with random weights, which only --joint trains: add --joint")
    fields = {each.name: each.default for each in dataclasses.fields(IAViTSettings)}
    shipped = model == "scenes" and checkpoint is None and not joint and not released
    changes = {**(SCENES_SETTINGS if shipped else {}), **read_values("--set", setting or (), fields)}
    settings = IAViTSettings.released(**changes) if released else IAViTSettings(**changes)
    loaded, described = _model(model, checkpoint, architecture, device, settings.seed)
    more: dict[str, Any] = {"resume": resume, "logs": logs, "progress": True}
    if joint:
        examples = open_training_data(data, data_option or (), loaded, count=settings.images)
        described["classes"] = loaded.labels and list(loaded.labels)
        record = train_iavit(
            loaded.subject.adapter, examples, loaded.preprocessing, output, settings, card=described, **more
        )
    else:
        images = _images(data, data_option or (), loaded, settings)
        record = train_interpreter(loaded.subject.adapter, images, output, settings, **more)
    result = record["result"]
    names = {"accuracy": "predictor_right", "interpreter's accuracy": "interpreter_right", "agreement": "agreement"}
    shares = ", ".join(f"{name} {result[key]:.1%}" for name, key in names.items() if key in result)
    typer.echo(
        f"Step {result['step']}, on images kept from training: {shares}, regulariser {result['regularisation']:.4f}. "
        f"Weights: {output.resolve()}"
    )


def _model(
    name: str, checkpoint: Path | None, architecture: Sequence[str] | None, device: str, seed: int
) -> tuple[LoadedModel, dict[str, Any]]:
    """The model to begin with, and what a checkpoint says of it, so that it can be built again."""
    from ..models.loading import EMBEDDED, EMBEDDED_FOR_PM, load_model

    if architecture:
        return _new_model({**NEW_MODEL, **read_values("--architecture", architecture, NEW_MODEL)}, device, seed)
    loaded = load_model(name, checkpoint=checkpoint, device=device)
    if name not in (EMBEDDED, EMBEDDED_FOR_PM):  # which are of one architecture
        return loaded, {"architecture": name.removeprefix("timm:")}
    from ..models.embedded import read_checkpoint_card, scenes_card

    card = scenes_card() if checkpoint is None else read_checkpoint_card(checkpoint)
    return loaded, {"architecture": card["architecture"]}


def _new_model(arguments: dict[str, Any], device: str, seed: int) -> tuple[LoadedModel, dict[str, Any]]:
    """A Vision Transformer with the random weights that a seed decides, and its arguments."""
    import torch

    from ..models import adapt
    from ..models.embedded import build_model
    from ..models.loading import LoadedModel
    from ..preprocessing import Preprocessing
    from ..randomness import begin_at
    from ..subject import Subject

    if arguments["embed_layer"] == "linear":
        del arguments["embed_layer"]
    with torch.random.fork_rng(devices=[]):
        begin_at(seed, torch.device("cpu"))  # the same each time, or no training could be resumed
        model = build_model(arguments)
    model = model.to(device)
    side = arguments["img_size"]
    middle = (0.5, 0.5, 0.5)
    subject = Subject(adapt(model), Preprocessing((side, side), middle, middle, crop_fraction=1.0))
    return LoadedModel("new", model, subject, "random", arguments["num_classes"]), {"architecture": arguments}


def _images(data: str, options: Sequence[str], loaded: LoadedModel, settings: IAViTSettings) -> Any:
    """Batches of images without labels, in a random order."""
    from ..data import dataset_info, open_dataset
    from ..data.batches import load_examples
    from ..data.scenes import SPLITS
    from ..data.selection import one_a_picture, shuffled
    from ..options import configure
    from .picture_batches import SCENES, SCENES_AT_MOST, PictureBatches

    reading = {"batch_size": settings.batch_size, "seed": settings.seed}
    if data == SCENES:  # pictures, of which each would be an example for every object in it
        told = training_options(data, options, count=SCENES_AT_MOST)
        chosen = configure(dataset_info(data).reader, told).options
        seeds = SPLITS[chosen["split"]][: chosen["count"]]
        return PictureBatches(seeds, loaded.preprocessing, objects=chosen["objects"], **reading)
    if ":" in data:
        told = training_options(data, options, count=settings.images)
        examples = one_a_picture(shuffled(open_dataset(data, labels=loaded.labels, **told), settings.seed))
        batches = load_examples(examples, loaded.preprocessing, batch_size=settings.batch_size)
        return (batch.inputs for batch in batches)
    if options:
        raise OptionError(
            f"found --data-option {options[0]} together with the pictures {data!r}, which have no reader: write --data "
            "FORMAT:ROOT, or leave it out"
        )
    return PictureBatches.of(data, loaded.preprocessing, **reading)
