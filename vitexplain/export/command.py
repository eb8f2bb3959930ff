"""The command ``vitexplain export``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..cli_output import SOME_FAILED, say_error

EXAMPLES = (
    "[b]Examples[/b]\n\n"
    "vitexplain export photos/ --methods rollout,tokentm --output maps\n\n"
    "vitexplain export list.csv --model timm:vit_tiny_patch16_224 --view overlay --output maps\n\n"
    "vitexplain export 'shards/*.tar' --dtype float16 --output maps --also maps.h5\n\n"
    "vitexplain export photos/ --engine ray --ray-workers 4 --output maps"
)


def export_command(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT", help="Images, folders, 'patterns*', lists (.txt), tables (.csv, .parquet), .tar, URLs."
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results go, or go on.")],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="scenes (embedded), timm:ARCHITECTURE or hf:REPOSITORY.")
    ] = "scenes",
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="Weights of --model.")] = None,
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="Class names of --model.")] = None,
    preprocessing: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of --model, such as crop_mode=squash; may be repeated."),
    ] = None,
    methods: Annotated[str, typer.Option(metavar="A,B", help="Methods; one forward serves all.")] = "tokentm",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option, for the methods that have it; may be repeated."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS",
            help="What to explain in every image, index or name; may be repeated.  "
            "\\[default: the table's target, else the predicted class]",
        ),
    ] = None,
    path_column: Annotated[str, typer.Option(metavar="NAME", help="Column of tables with the paths.")] = "path",
    target_column: Annotated[str, typer.Option(metavar="NAME", help="Column of tables with the class.")] = "target",
    root: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where relative paths of tables start.  \\[default: the table's folder]"),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="How scores are stored: float32 or float16.")] = "float32",
    view: Annotated[str, typer.Option(metavar="NAME", help="Pictures: none, overlay or heatmap.")] = "none",
    view_format: Annotated[str, typer.Option(metavar="NAME", help="jpeg, png or webp.")] = "jpeg",
    also: Annotated[
        Path | None, typer.Option(metavar="FILE", help="In the end, all scores in one file: .npz or .h5.")
    ] = None,
    shard_size: Annotated[int, typer.Option(metavar="N", help="Images committed together.")] = 256,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images in one forward pass.")] = 32,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Threads that read pictures.  \\[default: by the cores]")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of methods that draw lots.")] = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …")] = "cpu",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try images again that failed in an earlier run; the others stay.")
    ] = False,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Read in processes: a picture that ends its decoder is a failed image.")
    ] = False,
    engine: Annotated[str, typer.Option(metavar="NAME", help="local, or ray: many processes or machines.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster to join.  \\[default: this machine]")
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes of the Ray engine.  \\[default: by GPUs or cores]")
    ] = None,
) -> None:
    """Exports heatmaps of many images: scores as a Zarr group, a Parquet table, and pictures if asked for.

    Run again into the same folder, it goes on where it stopped. Images that cannot be explained are listed with their
    reason and left out; the others are still done.

    Exit code 0: all done; 1: some images failed; 2: the command cannot be carried out; 130: interrupted.
    """
    from ..cli_values import configure_methods, read_preprocessing
    from ..files import check_place
    from ..models.loading import load_model
    from .run import export_heatmaps
    from .single_file import check_kind
    from .tables import TableColumns

    if also is not None:
        check_kind(also)
        check_place(also)
    loaded = load_model(
        model,
        checkpoint=checkpoint,
        labels=labels,
        preprocessing=read_preprocessing(preprocessing or []),
        device=device,
    )
    result = export_heatmaps(
        inputs,
        output,
        model=loaded,
        methods=configure_methods([each.strip() for each in methods.split(",") if each.strip()], option or []),
        targets=target or [],
        columns=TableColumns(path_column, target_column, _absolute(root)),
        on_failure=lambda path, reason: say_error(reason),
        dtype=dtype,
        view=view,
        view_format=view_format,
        shard_size=shard_size,
        batch_size=batch_size,
        seed=seed,
        retry_failed=retry_failed,
        isolate=isolate,
        engine=engine,
        ray_address=ray_address,
        ray_workers=ray_workers,
        **({} if workers is None else {"workers": workers}),
    )
    if also is not None:
        result.save(also)
    failed = len(result.failures)
    typer.echo(f"{len(result) - failed} of {len(result)} images explained. Results: {output.resolve()}")
    if failed:
        typer.echo(f"{failed} failed: see the column 'error' of the table in {output / 'rows'}")
        raise typer.Exit(SOME_FAILED)


def _absolute(root: str | None) -> str | None:
    from .storage import is_url

    return root if root is None or is_url(root) else os.path.abspath(root)
