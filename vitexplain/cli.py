"""Command line; mirrors the Python API name for name."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .app.command import app_command
from .bench.command import EXAMPLES, bench_command
from .cli_output import SOME_FAILED, say, say_error
from .cli_train import train_app
from .comparison.command import EXAMPLES as COMPARE_EXAMPLES
from .comparison.command import compare_command
from .errors import ExplanationWarning, OptionError, UnknownNameError, VitExplainError, is_out_of_memory
from .export.command import EXAMPLES as EXPORT_EXAMPLES
from .export.command import export_command

EXIT_NOT_CARRIED_OUT = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point of the command ``vitexplain``."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # signs that its encoding lacks are to end no command
    app()


class _Commands(TyperGroup):
    """Errors raised on purpose become one line and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _spoken():
                return super().invoke(ctx)
        except VitExplainError as error:
            say_error(error)
        except (MemoryError, RuntimeError) as error:  # torch has a class of its own on a GPU, and none on the CPU
            if not is_out_of_memory(error):
                raise
            say_error(f"out of memory ({type(error).__name__}). Try a smaller --batch-size, --size or model")
        except BrokenPipeError:
            if not _nobody_reads():
                raise
            raise typer.Exit from None
        except KeyboardInterrupt as interruption:
            known = " ".join(str(interruption).splitlines())
            say(f"interrupted; {known or 'results finished before this are complete'}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        raise typer.Exit(EXIT_NOT_CARRIED_OUT)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Explains what Vision Transformers look at, and says how far to trust it.",
)
app.add_typer(train_app, name="train")


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


@app.command(epilog="[b]Example[/b]\n\nvitexplain demo --output demo.png --scenes 4")
def demo(
    output: Annotated[Path, typer.Option(metavar="FILE", help="PNG file to write.")] = Path("vitexplain-demo/demo.png"),
    scenes: Annotated[int, typer.Option(metavar="N", help="How many scenes, 1 to 20.")] = 3,
    seed: Annotated[int, typer.Option(metavar="N", help="Which scenes: where to begin in the test split.")] = 0,
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
    "vitexplain explain cat.jpg\n\n"
    "vitexplain explain photos/ --model timm:vit_tiny_patch16_224 --target zebra\n\n"
    "vitexplain explain a.png --model timm:vit_tiny_patch16_224 --checkpoint a.pt\n\n"
    "vitexplain explain '*.png' --method rollout --method tokentm --output maps\n\n"
    "vitexplain explain a.png --method rollout --option head_fusion=max",
)
def explain(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders or 'patterns*'.")],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="scenes, scenes-pm, timm:ARCHITECTURE or hf:REPOSITORY.")
    ] = "scenes",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Weights: .safetensors, or a torch state dict.  \\[default: the model's own]"
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names: JSON, or text with one a line.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Method; may be repeated.  \\[default: auto]")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option, for the methods that have it; may be repeated."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS", help="What to explain, index or name; may be repeated.  \\[default: the predicted class]"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results go.")] = Path("vitexplain-output"),
    boxes: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Draw boxes around what is hotter than this share of the map's highest."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Draw over whole photographs, dimmed where the model did not look.")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images at a time.")] = 8,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …")] = "cpu",
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Input size, one number if square, instead of the model's own. Plain ViTs of timm are brought to it.",
        ),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Mean in 0 to 1, instead of the model's own.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Standard deviation, instead of the model's own.")
    ] = None,
    interpolation: Annotated[str | None, typer.Option(metavar="NAME", help="bicubic, bilinear, …")] = None,
    crop_fraction: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Part of the resized image that the crop keeps.")
    ] = None,
    crop_mode: Annotated[str | None, typer.Option(metavar="NAME", help="center, squash or border.")] = None,
    preprocessing: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any of these settings, such as size=96x96; may be repeated."),
    ] = None,
) -> None:
    """Explains images: an overlay PNG and raw scores (.npy) for each map, one JSON record for each image.

    A file that cannot be read is reported and left out; the others are still done. Pictures that earlier runs of
    explain and export wrote are left out, too, where a folder or a pattern is searched for images.

    Exit code 0: all done; 1: some images failed; 2: the command cannot be carried out; 130: interrupted.
    """
    from .automatic import NAME as AUTOMATIC
    from .automatic import automatic
    from .cli_values import configure_methods, read_numbers, read_preprocessing, read_size
    from .explain_files import explain_to_folder
    from .images import find_images
    from .models.loading import load_model
    from .own_pictures import is_own_picture

    asked = {
        "size": read_size(size),
        "mean": read_numbers("--mean", mean, float, ",", 3),
        "std": read_numbers("--std", std, float, ",", 3),
        "interpolation": interpolation,
        "crop_fraction": crop_fraction,
        "crop_mode": crop_mode,
    }
    settings = read_preprocessing(preprocessing or [])
    twice = sorted(settings.keys() & {name for name, value in asked.items() if value is not None})
    if twice:
        raise OptionError(f"found {twice[0]} in --preprocessing and in an option of its own, expected it once")
    settings |= {name: value for name, value in asked.items() if value is not None}
    methods = configure_methods(method, option or []) if method and method != [AUTOMATIC] else None
    files = find_images(images, leave_out=is_own_picture)
    loaded = load_model(model, checkpoint=checkpoint, labels=labels, preprocessing=settings, device=device)
    methods = methods or configure_methods([automatic(loaded.subject).info.name], option or [])
    targets = [loaded.class_index(each) for each in target or ()]
    done, failures = explain_to_folder(
        files,
        loaded,
        methods,
        targets,
        output,
        batch_size=batch_size,
        box_threshold=boxes,
        whole=whole,
        on_failure=say_error,
    )
    typer.echo(f"{done} of {len(files)} images explained. Results: {output.resolve()}")
    if failures:
        raise typer.Exit(SOME_FAILED)


@app.command(epilog="[b]Example[/b]\n\nvitexplain methods 'grad*'")
def methods(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Shell pattern of names.")] = "*",
) -> None:
    """Lists the methods: cost, whether the map depends on the class, options, paper."""
    import fnmatch

    from .registry import list_methods, method_info

    names = fnmatch.filter(list_methods(), pattern)
    for name in names or [method_info(pattern).name]:  # a name may be spelled in other ways
        info = method_info(name)
        kind = "class-specific" if info.class_specific else "the same for every class"
        heading = _wrapped(f"{name}   {info.title}; {kind}; {info.passes} (forward, backward)", 0, 4)
        typer.echo(typer.style(name, bold=True) + heading.removeprefix(name))
        typer.echo(_wrapped(info.paper, 4, 4))
        for each in info.options:
            typer.echo(_wrapped(f"--option {each.name}={each.default}   {each.help} ({each.range})", 4, 8))
        typer.echo()


@app.command(epilog="[b]Example[/b]\n\nvitexplain models 'vit_small*'")
def models(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Shell pattern of architecture names.")] = "*",
) -> None:
    """Lists the models that can be explained; each transformer of timm is built (without weights) to find out.

    Other architectures, such as ResNets, are counted, and not built: most of them are explained by their last feature
    map, with Grad-CAM and what else needs no attention.
    """
    from .models.loading import list_models, other_architectures

    found = False
    for name, note in list_models(pattern):
        typer.echo(f"{name}   {note}".rstrip())
        found = True
    others = other_architectures(pattern)
    if others:
        some = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        say(
            f"{len(others)} other architectures of timm match {pattern!r} ({some}). They are not built here; most are "
            "explained by their last feature map, with Grad-CAM and what else needs no attention: see "
            "docs/architecture.md"
        )
    elif not found:
        raise UnknownNameError(
            f"no model that can be explained matches {pattern!r}; `vitexplain models` lists them all"
        )


app.command("bench", epilog=EXAMPLES)(bench_command)
app.command("app")(app_command)
app.command("compare", epilog=COMPARE_EXAMPLES)(compare_command)
app.command("export", epilog=EXPORT_EXAMPLES)(export_command)


def _nobody_reads() -> bool:
    """Whether what reads the output has enough, as ``head`` has; the rest then goes nowhere."""
    try:
        print(flush=True)  # only writing shows it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


class _SayHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def _spoken() -> Iterator[None]:
    """Our warnings as one line each, and our progress messages; other people's stay theirs."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, ExplanationWarning):
            say(f"warning: {' '.join(str(message).splitlines())}")
        else:
            before(message, category, *place, **more)

    logger, handler = logging.getLogger("vitexplain"), _SayHandler()
    level = logger.level
    with warnings.catch_warnings():
        before = warnings.showwarning
        warnings.showwarning = show
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def _wrapped(text: str, indent: int, further: int) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(text, width, initial_indent=" " * indent, subsequent_indent=" " * further)
