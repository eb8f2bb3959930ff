"""Running a benchmark: everything that is missing in a folder, then its tables and report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data.catalogue import open_dataset
from ..errors import CheckpointError, InputError
from ..files import make_folder, save_json
from ..keys import digest
from ..locking import locked
from ..metrics.tally import Rows, concatenate
from ..options import Configurable
from ..randomness import seeded
from .chunk_run import Plan
from .configuration import BenchConfiguration
from .extra import require
from .figures import CONFIDENCE, PERMUTATIONS, RESAMPLES, FigureRow, compute_figures, figure_rows
from .image_set import ImageSet
from .model_run import ModelOutcome, run_model
from .report import write_report
from .results import RUN, BenchResults, Measured, write_figures, write_rows
from .store import CellStore, Columns

_PACKAGES = ("torch", "timm", "numpy", "pillow", "scipy", "captum")


def run_bench(
    configuration: BenchConfiguration, output: str | os.PathLike[str], *, recompute: bool = False
) -> BenchResults:
    """Measures what is missing in a folder, and writes its tables and report.

    Results are stored chunk by chunk. A run that was interrupted, or killed, goes on where it was; one with more
    methods, metrics, models or images computes what is new. A stored result counts as long as all that determines it is
    the same: weights, preprocessing and precision, images and annotations, which kinds of these metrics are shown,
    target, options, seeds of what draws lots, the modules of methods and metrics of somebody else's. Not among these
    are the versions of this and other packages, the device, and whether models were compiled, which are noted.

    The folder gets ``results.parquet`` (statistics of each image), ``figures.parquet`` (figures with intervals and
    ranks), ``run.json`` (what was run), ``report.html`` and ``report.md`` with ``plots/``, and ``cells/`` with what is
    stored.

    Args:
        configuration: what to measure.
        output: the folder.
        recompute: whether stored results are thrown away first.

    Raises:
        OptionError: a variable of the environment is not set, or a setting does not suit a model.
        InputError: the data cannot be read, or nothing remains to be measured.
        CheckpointError: weights are missing or do not fit.
        ExportError: another run uses the folder, or it cannot be written to.
    """
    require()
    expanded = configuration.expanded()
    _check_files(expanded)
    folder = make_folder(output)
    # loading a model draws its first weights, which must not move the caller's generators
    with locked(folder), seeded(expanded.seed, torch.device("cpu")):
        started = time.perf_counter()
        store = CellStore(folder / "cells")
        store.tidy()
        if recompute:
            store.clear()
        examples = open_dataset(expanded.data.spec, **_reader_options(expanded))
        plan = Plan(
            expanded,
            {entry.label: _seeded(entry, expanded.seed).create() for entry in expanded.methods},
            {entry.label: _seeded(entry, expanded.seed).create() for entry in expanded.metrics},
            ImageSet(examples, expanded.data),
            store,
            {"vitexplain": _version("vitexplain"), "torch": torch.__version__, "device": expanded.device},
        )
        with tqdm(total=len(expanded.models) * len(plan.images), unit="image", disable=None) as progress:
            outcomes = [run_model(plan, entry, progress) for entry in expanded.models]
        _check_something_remains(outcomes)
        return _conclude(folder, configuration, plan, outcomes, getattr(examples, "notes", ()), started)


def _conclude(
    folder: Path,
    configuration: BenchConfiguration,
    plan: Plan,
    outcomes: list[ModelOutcome],
    notes: tuple[str, ...],
    started: float,
) -> BenchResults:
    figures: list[FigureRow] = []
    pairs = [(outcome, metric) for outcome in outcomes for metric in plan.metrics]
    for outcome, metric in tqdm(pairs, desc="comparing", unit="metric", disable=None, leave=False):
        figures += _figures(plan, outcome, metric)
    (folder / RUN).unlink(missing_ok=True)  # until all files belong together again, there are no results to open
    write_rows(folder, _measured(plan, outcomes))
    write_figures(folder, figures)
    record = _record(configuration, plan, outcomes, notes)
    record["seconds"] = time.perf_counter() - started
    results = BenchResults(folder, record)
    write_report(results, configuration)
    save_json(record, folder / RUN)
    return results


def _figures(plan: Plan, outcome: ModelOutcome, metric: str) -> list[FigureRow]:
    """The figures of all methods by one metric; resampling takes a while, so they are stored too."""
    cells = {method: keys for (method, each), keys in outcome.cells.items() if each == metric}
    if not cells:
        return []
    chosen = plan.metrics[metric]
    settings = [CONFIDENCE, RESAMPLES, PERMUTATIONS, plan.configuration.seed]
    taking_part = outcome.predictions["image"][outcome.predictions["used"]].tolist()
    key = digest("figures", chosen.info.name, chosen.options, sorted(cells.items()), taking_part, settings)
    columns = plan.store.read(key)
    if columns is None:
        rows = {method: _rows(plan.store, keys) for method, keys in cells.items()}
        columns = compute_figures(chosen, rows, plan.configuration.seed)
        plan.store.write(key, columns, {**plan.circumstances, "cell": "figures", "metric": metric})
    return figure_rows(outcome.label, metric, chosen, columns, list(plan.methods))


def _measured(plan: Plan, outcomes: list[ModelOutcome]) -> Iterator[Measured]:
    for outcome in outcomes:
        used = outcome.predictions["used"]
        images: Columns = {name: values[used] for name, values in outcome.predictions.items()}
        for (method, metric), keys in outcome.cells.items():
            yield Measured(outcome.label, method, metric, images, _rows(plan.store, keys))


def _rows(store: CellStore, keys: list[str]) -> Rows:
    parts = []
    for key in keys:
        columns = store.read(key)
        if columns is None:
            raise InputError(f"the stored result {str(store.path(key))!r} was damaged during the run; run again")
        parts.append({name: values for name, values in columns.items() if name != "image"})
    return concatenate(parts)


def _record(
    configuration: BenchConfiguration, plan: Plan, outcomes: list[ModelOutcome], notes: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "configuration": configuration.to_mapping(),
        "methods": _described(plan.methods),
        "metrics": _described(plan.metrics),
        "models": [{"label": each.label, **each.identity, "images": _counts(each)} for each in outcomes],
        "data": {"images": len(plan.images), "sha256": plan.images.key, "notes": list(notes)},
        "left_out": [
            {"model": each.label, "image": name, "reason": reason}
            for each in outcomes
            for name, reason in each.failures
        ],
        "not_applicable": [asdict(refusal) for each in outcomes for refusal in each.refusals],
        "costs": [
            {"model": each.label, "method": method, "ratio": cost["seconds"] / cost["forward_seconds"], **cost}
            for each in outcomes
            for method, cost in each.costs.items()
        ],
        "statistics": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "permutations": PERMUTATIONS},
        "cells": dict(plan.counts),
        "versions": {
            **{name: _version(name) for name in ("vitexplain", *_PACKAGES)},
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _described(chosen: Mapping[str, Configurable]) -> list[dict[str, Any]]:
    return [
        {
            "label": label,
            "name": each.info.name,
            "title": each.info.title,
            "paper": each.info.paper,
            "options": each.options,
        }
        for label, each in chosen.items()
    ]


def _counts(outcome: ModelOutcome) -> dict[str, int]:
    found = outcome.predictions
    known = (found["label"] >= 0) & (found["prediction"] >= 0)
    return {
        "given": len(found["image"]),
        "used": int(found["used"].sum()),
        "failed": len(outcome.failures),
        "with_label": int(known.sum()),
        "correct": int((known & (found["label"] == found["prediction"])).sum()),
    }


def _check_files(configuration: BenchConfiguration) -> None:
    """Finds out now, not after the first model's hours, that the second one's weights are not there."""
    for entry in configuration.models:
        if entry.checkpoint is not None and not Path(entry.checkpoint).is_file():
            raise CheckpointError(
                f"the model {entry.label!r}: no file {entry.checkpoint!r}; give the path of its weights, or leave "
                "'checkpoint' out to fetch them"
            )


def _check_something_remains(outcomes: list[ModelOutcome]) -> None:
    if any(outcome.cells for outcome in outcomes):
        return
    reasons = [reason for outcome in outcomes for _, reason in outcome.failures]
    reasons += [
        f"{refusal.metric or refusal.method}: {refusal.reason}" for outcome in outcomes for refusal in outcome.refusals
    ]
    if not reasons:
        reasons = ["the models get none of the images right, and only_correct leaves out the others"]
    raise InputError(f"nothing remains to be measured: {'; '.join(dict.fromkeys(reasons))}")


def _reader_options(configuration: BenchConfiguration) -> dict[str, Any]:
    """What the reader is told; class names are those of the models where these have one file of them."""
    files = {entry.labels for entry in configuration.models}
    common = {"labels": files.pop()} if len(files) == 1 else {}
    return {name: value for name, value in {**common, **configuration.data.options}.items() if value is not None}


def _seeded(entry: Any, seed: int) -> Any:
    """The entry, with the benchmark's seed where it draws lots and names no seed of its own."""
    has_seed = any(option.name == "seed" for option in entry.create().info.options)
    return type(entry)(entry.name, {"seed": seed, **entry.options}, entry.label) if has_seed else entry


def _version(package: str) -> str:
    if package == "vitexplain":
        from .. import __version__

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
