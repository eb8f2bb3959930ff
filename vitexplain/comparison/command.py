"""The command ``vitexplain compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cli_output import SOME_FAILED, say_error
from ..errors import InputError, OptionError
from .run import METHODS

if TYPE_CHECKING:
    from ..models.loading import LoadedModel

EXAMPLES = (
    "[b]Examples[/b]\n\n"
    "vitexplain compare cat.jpg\n\n"
    "vitexplain compare cat.jpg --methods rollout,gradcam,tokentm --targets 'tabby,tiger cat' "
    "--model timm:vit_tiny_patch16_224 --output cat.html\n\n"
    "vitexplain compare '*.png' --top 2 --view patches --output patches.png"
)
_SUFFIXES = (".html", ".png", ".pdf")


def compare_command(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders or 'patterns*'.")],
    methods: Annotated[str, typer.Option(metavar="A,B", help="Methods side by side.")] = ",".join(METHODS),
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option, for the methods that have it; may be repeated."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="Classes, by index or name.  \\[default: the most probable ones]"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="X", help="A class that each of --targets is explained against, by index or name."),
    ] = None,
    top: Annotated[
        int | None, typer.Option(metavar="N", help="How many of the most probable classes.  \\[default: 1]")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="scenes (embedded), timm:ARCHITECTURE or hf:REPOSITORY; may be repeated.  \\[default: scenes]",
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="Weights, where there is one model.")] = None,
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="Class names, where there is one model.")] = None,
    preprocessing: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of every model, such as crop_mode=squash; may be repeated."),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="What to write: .html a report, .png or .pdf a picture.")
    ] = Path("vitexplain-compare/report.html"),
    view: Annotated[
        str, typer.Option(metavar="NAME", help="Of a picture: overlay, heatmap, contours, mask, box or patches.")
    ] = "overlay",
    share_scale: Annotated[
        bool, typer.Option("--share-scale", help="One range of colours for all maps of a method.")
    ] = False,
    faithfulness: Annotated[
        bool, typer.Option(help="In a report: measure deletion, insertion and SaCo of each map.")
    ] = True,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images at a time.")] = 8,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …")] = "cpu",
) -> None:
    """Puts methods, classes and models side by side: a report to look into, or a picture.

    The report is one HTML file that needs nothing else: opacity and methods to switch, patch values under the pointer,
    what each patch attends to, curves of deletion and insertion, agreement and cost.

    A file that cannot be read is reported and left out.

    Exit code 0: all done; 1: some images failed; 2: the command cannot be carried out; 130: interrupted.
    """
    if output.suffix not in _SUFFIXES:
        raise OptionError(f"--output: found {str(output)!r}, expected a file ending in {', '.join(_SUFFIXES)}")
    names = model or ["scenes"]
    if against is not None and targets is None:
        raise OptionError("found --against without --targets, expected the classes that are explained against it")
    if top is not None and targets is not None:
        raise OptionError("found --top with --targets, expected one of them: --top is for the most probable classes")
    if len(names) > 1 and (checkpoint or labels):
        raise OptionError(f"found --checkpoint or --labels with {len(names)} models, expected one model")
    from ..cli_values import configure_methods, read_preprocessing
    from ..files import check_place
    from ..images import find_images
    from ..models.loading import load_model
    from ..own_pictures import is_own_picture
    from .run import compare

    chosen = configure_methods(_listed(methods), option or [])
    files = find_images(images, leave_out=lambda file: file.resolve() == output.resolve() or is_own_picture(file))
    check_place(output)
    common: dict[str, Any] = {"preprocessing": read_preprocessing(preprocessing or []), "device": device}
    models = [load_model(name, checkpoint=checkpoint, labels=labels, **common) for name in names]
    classes: Any = None if targets is None else _listed(targets)
    if against is not None:
        _check_contrast(classes, against, models)
        classes = (classes, [against] * len(classes))
    pictures = _readable(files)
    comparison = compare(models, pictures, chosen, classes, top=1 if top is None else top, batch_size=batch_size)
    style: dict[str, Any] = {"faithfulness": faithfulness} if output.suffix == ".html" else {"view": view}
    comparison.save(output, share_scale=share_scale, **style)
    typer.echo(repr(comparison.table(faithfulness=faithfulness and output.suffix == ".html", cost=False)))
    typer.echo(f"Written: {output.resolve()}")
    if len(pictures) < len(files):
        typer.echo(f"{len(pictures)} of {len(files)} images compared")
        raise typer.Exit(SOME_FAILED)


def _check_contrast(classes: Sequence[str], against: str, models: Sequence[LoadedModel]) -> None:
    """Makes sure that no class is to be explained against itself.

    Raises:
        OptionError: one is.
        VitExplainError: as `LoadedModel.class_index`.
    """
    for model in models:
        same = [each for each in classes if model.class_index(each) == model.class_index(against)]
        if same:
            raise OptionError(
                f"found --targets {same[0]!r} and --against {against!r}, which are one class, expected another to "
                "explain it against"
            )


def _readable(files: Sequence[Path]) -> list[Any]:
    """The pictures of files, named by them; of each file that is none it is said why.

    Raises:
        InputError: there are no others.
    """
    from ..images import load_image

    pictures: list[Any] = []
    for file in files:
        try:
            picture: Any = load_image(file)
        except InputError as error:
            say_error(error)
            continue
        picture.filename = str(file)  # by which it is called in the report
        pictures.append(picture)
    if not pictures:
        raise InputError(f"none of {len(files)} images can be read, expected at least one that can")
    return pictures


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]
