"""Command line; mirrors the Python API name for name."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from .errors import VitExplainError

EXIT_SOME_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Explains what Vision Transformers look at, and says how far to trust it.",
)
train_app = typer.Typer(no_args_is_help=True, help="Trains models and methods that learn.")
app.add_typer(train_app, name="train")


def main() -> None:
    """Entry point: errors raised on purpose become one line and an exit code, never a traceback."""
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
    try:
        app()
    except VitExplainError as error:
        _say(f"error: {error}")
        sys.exit(EXIT_USAGE)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        typer.echo(f"vitexplain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="[b]Example[/b]   vitexplain demo --output demo.png --scenes 4",
)
def demo(
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("vitexplain-demo/demo.png"),
    scenes: Annotated[int, typer.Option(help="How many scenes, 1 to 20.")] = 3,
    seed: Annotated[int, typer.Option(help="Which scenes: where to begin in the test split.")] = 0,
) -> None:
    """Draws several methods side by side on scenes with two objects; works offline, in seconds."""
    from .demo import make_demo

    shares = make_demo(output, num_scenes=scenes, seed=seed)
    typer.echo("Share of positive relevance on the explained object, mean over the maps shown:")
    for title, share in shares:
        typer.echo(f"  {title:<22}{share:6.1%}")
    typer.echo(f"Picture: {output.resolve()}")


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "vitexplain explain cat.jpg --model timm:vit_tiny_patch16_224 --checkpoint model.safetensors\n\n"
    "vitexplain explain photos/ --method rollout --method tokentm --target 282 --target 243 --output maps\n\n"
    "vitexplain explain 'shots/*.png' --method rollout --option head_fusion=max --option start_layer=1",
)
def explain(
    images: Annotated[list[str], typer.Argument(help="Image files, folders or patterns.")],
    model: Annotated[str, typer.Option(help="scenes (embedded) or timm:ARCHITECTURE.")] = "scenes",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights: .safetensors, or a torch state dict. Default: the hub's.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Class names: JSON list, or one a line.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method; may be repeated.  [default: tokentm]")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, an option of the methods that have it; may be repeated.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Class to explain, index or name; may be repeated.  [default: the predicted class]"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("vitexplain-output"),
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    size: Annotated[str | None, typer.Option(help="Input size HxW, instead of the model's own.")] = None,
    mean: Annotated[str | None, typer.Option(help="R,G,B mean in [0, 1], instead of the model's own.")] = None,
    std: Annotated[str | None, typer.Option(help="R,G,B deviation, instead of the model's own.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bicubic, bilinear, …")] = None,
    crop_fraction: Annotated[float | None, typer.Option(help="Share of the resized image that the crop keeps.")] = None,
    crop_mode: Annotated[str | None, typer.Option(help="center, squash or border.")] = None,
) -> None:
    """Explains images: for each an overlay PNG and raw scores per map, and one JSON record.

    A file that cannot be read is reported and left out; the others are still done. Exit code 0: all done;
    1: some images failed; 2: the command cannot be carried out.
    """
    from .explain_files import explain_files
    from .images import find_images
    from .models.loading import load_model

    asked = {
        "size": _numbers("size", size, int, "x"),
        "mean": _numbers("mean", mean, float, ","),
        "std": _numbers("std", std, float, ","),
        "interpolation": interpolation,
        "crop_fraction": crop_fraction,
        "crop_mode": crop_mode,
    }
    preprocessing = {name: value for name, value in asked.items() if value is not None}
    methods = _configured(method or ["tokentm"], option or [])
    files = find_images(images)
    loaded = load_model(model, checkpoint=checkpoint, labels=labels, preprocessing=preprocessing, device=device)
    targets = [loaded.class_index(each) for each in target or ()]
    done, failures = explain_files(files, loaded, methods, targets, output, batch_size=batch_size)
    for failure in failures:
        _say(f"error: {failure}")
    typer.echo(f"{done} of {len(files)} images explained. Results: {output.resolve()}")
    if failures:
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
def methods() -> None:
    """Lists the methods: cost, whether the map depends on the class, options, paper."""
    from .registry import list_methods, method_info

    for name in list_methods():
        info = method_info(name)
        kind = "class-specific" if info.class_specific else "the same for every class"
        typer.echo(typer.style(name, bold=True) + f"   {info.title}; {kind}; {info.passes} (forward, backward)")
        typer.echo(f"    {info.paper}")
        for each in info.options:
            typer.echo(f"    --option {each.name}={each.default}   {each.help} ({each.range})")
        typer.echo()


@app.command(epilog="[b]Example[/b]   vitexplain models 'vit_small*'")
def models(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of timm architecture names.")] = "*",
) -> None:
    """Lists the models that can be explained; each architecture is built (without weights) to find out."""
    from .models.loading import EMBEDDED, list_architectures

    typer.echo(f"{EMBEDDED}   embedded: a small ViT trained on procedural scenes, works offline")
    for name, note in list_architectures(pattern):
        typer.echo(f"{name}   {note}".rstrip())


@train_app.command(
    "classifier",
    epilog="[b]Example[/b]   vitexplain train classifier --output scenes.safetensors",
)
def train_classifier_command(
    output: Annotated[Path, typer.Option(help="Weights to write (.safetensors); a .json of the same name goes along.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.  [default: the shipped recipe's]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed.  [default: the shipped recipe's]")] = None,
) -> None:
    """Trains the embedded scenes classifier from nothing, by the recipe of the shipped weights."""
    from .training.classifier import ClassifierSettings, train_classifier

    changes: dict[str, Any] = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    record = train_classifier(output, ClassifierSettings(**changes))
    typer.echo(f"Test accuracy {record['accuracy']['test']:.1%}. Weights: {output.resolve()}")


def _configured(names: list[str], options: list[str]) -> list[Any]:
    """Each method with those of the options that it has; an option that none has is an error."""
    from .registry import create_method, method_info

    given = dict(_assignment(each) for each in options)
    infos = [method_info(name) for name in names]
    known = {each.name for info in infos for each in info.options}
    from .errors import UnknownNameError

    for name in given:
        if name not in known:
            raise UnknownNameError.listing(f"option of {', '.join(info.name for info in infos)}", name, known)
    return [
        create_method(info.name, **{each.name: given[each.name] for each in info.options if each.name in given})
        for info in infos
    ]


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"found {text!r}, expected NAME=VALUE", param_hint="--option")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def _numbers(name: str, text: str | None, kind: type, separator: str) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(each) for each in text.split(separator))
    except ValueError:
        form = separator.join("123" if kind is int else "0.5" for _ in range(2 if kind is int else 3))
        raise click.BadParameter(f"found {text!r}, expected numbers like {form}", param_hint=f"--{name}") from None
