"""The command ``vitexplain compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError
from .run import METHODS

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
    top: Annotated[int, typer.Option(metavar="N", help="How many of the most probable classes.")] = 1,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="scenes (embedded), or timm:ARCHITECTURE; may be repeated.  \\[default: scenes]"
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
    """
    if output.suffix not in _SUFFIXES:
        raise OptionError(f"--output: found {str(output)!r}, expected a file ending in {', '.join(_SUFFIXES)}")
    names = model or ["scenes"]
    if against is not None and targets is None:
        raise OptionError("found --against without --targets, expected the classes that are explained against it")
    if len(names) > 1 and (checkpoint or labels):
        raise OptionError(f"found --checkpoint or --labels with {len(names)} models, expected one model")
    from ..cli_values import configure_methods, read_preprocessing
    from ..images import find_images
    from ..models.loading import load_model
    from .run import compare

    chosen = configure_methods(_listed(methods), option or [])
    files = find_images(images)
    common: dict[str, Any] = {"preprocessing": read_preprocessing(preprocessing or []), "device": device}
    models = [load_model(name, checkpoint=checkpoint, labels=labels, **common) for name in names]
    classes: Any = None if targets is None else _listed(targets)
    if against is not None:
        classes = (classes, [against] * len(classes))
    comparison = compare(models, files, chosen, classes, top=top, batch_size=batch_size)
    style: dict[str, Any] = {"faithfulness": faithfulness} if output.suffix == ".html" else {"view": view}
    comparison.save(output, share_scale=share_scale, **style)
    typer.echo(repr(comparison.table(faithfulness=faithfulness and output.suffix == ".html", cost=False)))
    typer.echo(f"Written: {output.resolve()}")


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]
