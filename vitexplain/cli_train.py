"""The commands ``vitexplain train …``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .training.command_options import read_values
from .training.iavit_command import EXAMPLES as IAVIT_EXAMPLES
from .training.iavit_command import train_iavit_command
from .training.patch_masks_command import EXAMPLES, train_pm_command

train_app = typer.Typer(no_args_is_help=True, help="Trains models and methods that learn.")


@train_app.command("classifier", epilog="[b]Example[/b]\n\nvitexplain train classifier --output scenes.safetensors")
def train_classifier_command(
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Weights to write (.safetensors); a .json of the same name goes along."),
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Training steps.  \\[default: the shipped recipe's]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed.  \\[default: the shipped recipe's]")] = None,
) -> None:
    """Trains the embedded scenes classifier from nothing, by the recipe of the shipped weights."""
    from .training.classifier import ClassifierSettings, train_classifier

    changes: dict[str, Any] = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    record = train_classifier(output, ClassifierSettings(**changes))
    typer.echo(f"Test accuracy {record['accuracy']['test']:.1%}. Weights: {output.resolve()}")


@train_app.command(
    "diffmask",
    epilog="[b]Examples[/b]\n\n"
    "vitexplain train diffmask --model scenes --data scenes --output gates.safetensors\n\n"
    "vitexplain train diffmask --model timm:vit_base_patch16_224 --data photos/ --output gates.safetensors "
    "--device cuda --precision bf16-mixed --batch-size 128 --resume",
)
def train_diffmask_command(
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Gates to write (.safetensors); a .json of the same name goes along.")
    ],
    data: Annotated[str, typer.Option(metavar="PATH", help="Folder or 'pattern*' of pictures, or scenes.")],
    objects: Annotated[int, typer.Option(min=0, max=2, metavar="N", help="In each of the scenes; 0: one or two.")] = 1,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="scenes (embedded), timm:ARCHITECTURE or hf:REPOSITORY.")
    ] = "scenes",
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of the model.  \\[default: the model's own]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Training steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures in a step, on each device.")] = 32,
    margin: Annotated[float | None, typer.Option(metavar="NATS", help="How far the output may change.")] = None,
    constraint: Annotated[
        str | None, typer.Option(metavar="NAME", help="distribution; or class or evidence, for maps of a class.")
    ] = None,
    released: Annotated[bool, typer.Option("--released", help="Train as the published code does.")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A field of DiffMaskSettings; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed.")] = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …")] = "cpu",
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="How many GPUs.")] = 1,
    precision: Annotated[str, typer.Option(metavar="NAME", help="32-true, bf16-mixed or 16-mixed.")] = "32-true",
    workers: Annotated[int, typer.Option(min=0, metavar="N", help="Processes that read pictures.")] = 0,
    logs: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where figures of the course go.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted training.")] = False,
) -> None:
    """Trains the gates of Vision DiffMask on a model, for `explain --method diffmask --option checkpoint=FILE`."""
    from .models.loading import load_model
    from .training.diffmask import DiffMaskSettings, train_diffmask
    from .training.picture_batches import PictureBatches

    asked = {"steps": steps, "margin": margin, "constraint": constraint, "seed": seed}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    plain = {each.name: each.default for each in fields(DiffMaskSettings) if not isinstance(each.default, tuple)}
    changes |= read_values("--set", setting or (), plain)
    settings = DiffMaskSettings.released(**changes) if released else DiffMaskSettings(**changes)
    loaded = load_model(model, checkpoint=checkpoint, device=device)
    reading = {"batch_size": batch_size, "seed": seed, "workers": workers, "objects": objects}
    images = PictureBatches.of(data, loaded.preprocessing, **reading)
    card = train_diffmask(
        loaded.subject.adapter,
        images,
        output,
        settings,
        resume=resume,
        logs=logs,
        precision=precision,
        devices=devices,
        progress=True,
    )
    result = card["result"]
    typer.echo(
        f"Step {result['step']}: {result['kept']:.1%} of patches kept, divergence {result['divergence']:.3f}, "
        f"agreement {result['agreement']:.1%}. Gates: {output.resolve()}"
    )


train_app.command("pm", epilog=EXAMPLES)(train_pm_command)
train_app.command("iavit", epilog=IAVIT_EXAMPLES)(train_iavit_command)
