"""The command ``vitexplain bench``."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError

if TYPE_CHECKING:
    from .configuration import BenchConfiguration
    from .results import BenchResults

EXAMPLES = (
    "[b]Examples[/b]\n\n"
    "vitexplain bench --metrics energy_in_mask,pointing_game --limit 100\n\n"
    "vitexplain bench imagenet.yaml --output imagenet-bench\n\n"
    "vitexplain bench imagenet.yaml --limit 20 --output trial\n\n"
    "vitexplain bench --list"
)
_SOME_IMAGES_FAILED = 1


def bench_command(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file; options given here win over it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="scenes (embedded), timm:ARCHITECTURE or hf:REPOSITORY.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(metavar="FILE", help="Weights of --model.")] = None,
    labels: Annotated[str | None, typer.Option(metavar="FILE", help="Class names of --model.")] = None,
    preprocessing: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of --model, such as crop_mode=squash; may be repeated."),
    ] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Methods, or all.  \\[default: all]")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="X,Y", help="Metrics, or all.  \\[default: all]")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FORMAT:ROOT", help="Annotated images.  \\[default: scenes]")
    ] = None,
    data_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the reader of --data; may be repeated.")
    ] = None,
    select: Annotated[str | None, typer.Option(metavar="NAME", help="all, even or odd: positions of images.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="How many images, from the first.")] = None,
    target: Annotated[str | None, typer.Option(metavar="NAME", help="Class explained: predicted or label.")] = None,
    only_correct: Annotated[
        bool | None, typer.Option("--only-correct/--also-wrong", help="Leave out images that the model gets wrong.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of all randomness.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Images in one forward pass.")] = None,
    chunk_size: Annotated[int | None, typer.Option(metavar="N", help="Images computed and stored together.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="float32, bfloat16 or float16.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compiled/--uncompiled", help="Ask models compiled by torch.compile; for GPUs.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results go.")] = Path("vitexplain-bench"),
    recompute: Annotated[
        bool, typer.Option("--recompute", help="First throw away what the folder has stored.")
    ] = False,
    list_them: Annotated[bool, typer.Option("--list", help="List the metrics and exit.")] = False,
) -> None:
    """Measures methods on models and images; writes tables with intervals, curves, and a report.

    What an earlier run into the same folder measured is not measured again, unless something that determines it has
    changed. A newer version of vitexplain alone is no such change: --recompute begins anew.

    Exit code 0: all done; 1: some images could not be read; 2: the command cannot be carried out; 130: interrupted.
    """
    if list_them:
        typer.echo(describe_metrics())
        return
    from ..cli_values import read_preprocessing
    from .run import run_bench

    chosen_model = _mapping(name=model, checkpoint=checkpoint, labels=labels)
    if preprocessing:
        chosen_model["preprocessing"] = read_preprocessing(preprocessing)
    chosen_data = _mapping(select=select, limit=limit)
    if data_option:
        chosen_data["options"] = read_settings("--data-option", data_option)
    given = _mapping(
        methods=_names(methods),
        metrics=_names(metrics),
        target=target,
        only_correct=only_correct,
        seed=seed,
        batch_size=batch_size,
        chunk_size=chunk_size,
        device=device,
        dtype=dtype,
        compiled=compiled,
    )
    results = run_bench(configure(config, chosen_model, data, chosen_data, given), output, recompute=recompute)
    typer.echo(conclude(results))
    if results.run["left_out"]:
        raise typer.Exit(_SOME_IMAGES_FAILED)


def configure(
    config: Path | None, model: dict[str, Any], data: str | None, data_settings: dict[str, Any], given: dict[str, Any]
) -> BenchConfiguration:
    """The configuration of a file, with what the command line gives in its place.

    Args:
        config: YAML file, or None.
        model: settings of a model. With a name it replaces those of the file; without, they are of the file's one.
        data: ``FORMAT:ROOT`` that replaces the file's.
        data_settings: single settings of the data; of its options those that are named.
        given: single settings of the benchmark.

    Raises:
        OptionError: settings of a model without its name, and a file with several.
        VitExplainError: as `BenchConfiguration.from_mapping` and `read_mapping`.
    """
    from .configuration import BenchConfiguration
    from .configuration_file import read_mapping
    from .entries import DataEntry, ModelEntry

    given = {**given, **({"models": [model]} if "name" in model else {}), **_mapping(data=data)}
    settings = given if config is None else read_mapping(config).overridden(given)
    configuration = BenchConfiguration.from_mapping(settings)
    if model and "name" not in model:
        if len(configuration.models) > 1:
            raise OptionError(
                f"found {', '.join(f'--{name}' for name in model)} without --model, and several models in {config}: "
                f"{', '.join(each.label for each in configuration.models)}; say which with --model, or write it there"
            )
        one = ModelEntry.read(_updated(asdict(configuration.models[0]), model, "preprocessing"))
        configuration = replace(configuration, models=(one,))
    return replace(configuration, data=DataEntry.read(_updated(asdict(configuration.data), data_settings, "options")))


def describe_metrics() -> str:
    """The metrics as text: what each requires of the data, its figures and its options."""
    from ..metrics.catalogue import list_metrics, metric_info

    blocks = []
    for info in map(metric_info, list_metrics()):
        asked = sorted(info.requires & {"labels", "masks", "boxes"})
        lines = [f"{info.name}   {info.title}" + (f"; requires {', '.join(asked)}" if asked else "")]
        lines.append(f"    {info.paper}")
        for figure in info.figures:
            better = {True: "higher is better", False: "lower is better", None: "describes"}[figure.higher_is_better]
            chance = "" if figure.chance is None else f", chance {figure.chance:g}"
            lines.append(f"    {figure.name}   {figure.title} ({better}{chance})")
        lines += [f"    option {each.name}: {each.default}   {each.help} ({each.range})" for each in info.options]
        blocks.append("\n".join(map(_wrapped, lines)))
    return "\n\n".join(blocks)


def _wrapped(line: str) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(line, width, subsequent_indent="        ", drop_whitespace=True)


def conclude(results: BenchResults) -> str:
    """What a run came to, in a few lines: each metric's first figure for each method, and where the report is."""
    from .configuration import BenchConfiguration
    from .sections import make_sections

    lines: list[str] = []
    for section in make_sections(results.figures(), BenchConfiguration.from_mapping(results.run["configuration"])):
        lines.append(f"{section.name}: {section.figures[0].title}")
        lines += [f"  {line.method:<30} {line.cells[0].text}  n={line.cells[0].n}" for line in section.lines]
    return "\n".join([*lines, f"Report: {(results.folder / 'report.html').resolve()}"])


def read_settings(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts as a mapping, the values read as YAML reads them.

    Raises:
        OptionError: a text without ``=``, or a value that is no YAML.
    """
    from .extra import require

    require("yaml")
    import yaml

    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"{option}: found {text!r}, expected NAME=VALUE")
        try:
            settings[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise OptionError(f"{option}: found {value!r} for {name}, expected a plain value") from error
    return settings


def _names(text: str | None) -> list[str] | str | None:
    if text is None or text.strip() == "all":
        return text
    return [each.strip() for each in text.split(",") if each.strip()]


def _updated(settings: dict[str, Any], given: dict[str, Any], nested: str) -> dict[str, Any]:
    """The settings with those given in their place, one by one also in the mapping `nested`."""
    return {**settings, **given, nested: {**settings[nested], **given.get(nested, {})}}


def _mapping(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
