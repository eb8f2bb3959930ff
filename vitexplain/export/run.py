"""An export from beginning to end: what is missing in a folder is computed and committed, shard by shard."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import ExplanationWarning, InputError
from ..files import save_json, write_parquet
from ..locking import locked
from ..method import Method
from ..own_pictures import VIEWS
from ..registry import create_method
from .ahead import BoundedWork
from .entries import Entry
from .entry_table import read_entries, table_of_entries
from .extra import require
from .folder import ExportFolder
from .inputs import Place, list_entries
from .manifest import LAYOUT, check_entries, check_same, circumstances, describe, now, read_manifest
from .pipeline import Pipeline, ShardTask
from .results import HeatmapExport
from .settings import ExportSettings, labelled
from .shard import ShardResult
from .tables import TableColumns

if TYPE_CHECKING:
    from ..models.loading import LoadedModel

_WAITING_COMMITS = 2


def export_heatmaps(
    inputs: Place | Sequence[Place],
    output: str | os.PathLike[str],
    *,
    model: LoadedModel | str = "scenes",
    methods: Sequence[Method | str] = ("tokentm",),
    targets: Sequence[int | str] = (),
    columns: TableColumns | None = None,
    on_failure: Callable[[str, str], object] | None = None,
    **settings: Any,
) -> HeatmapExport:
    """Explains images into a folder; what an earlier run into it has committed is kept.

    Scores are stored on the patch grid (`HeatmapExport` reads them back); pictures are made where asked for. A run
    that is killed, interrupted or out of room loses at most the shards it was working on.

    Args:
        inputs: files, folders, patterns, lists, tables, tar shards, URLs; see `vitexplain.export.inputs.list_entries`.
        output: the folder. One process at a time.
        model: from `load_model`, or a name that it takes.
        methods: names, or configured methods; one forward serves all.
        targets: classes explained for every image, indices or names; by default the one its table names, or else the
            predicted one.
        columns: how tables are read.
        on_failure: called with path and reason of each image that fails in this run.
        **settings: fields of `vitexplain.export.settings.ExportSettings`.

    Raises:
        InputError: an input is not there or holds no images.
        ExportError: the folder is in use, holds another export, or cannot be written to.
        OptionError: a setting that cannot be taken.
        VitExplainError: in another kind, where a method cannot explain the model, or a class is none of its classes.
    """
    require("zarr", "pyarrow", "filelock")
    loaded = _loaded(model)
    chosen = labelled([create_method(each) if isinstance(each, str) else each for each in methods])
    indices = tuple(dict.fromkeys(loaded.class_index(str(each)) for each in targets))
    asked = ExportSettings(targets=indices, **settings)
    named = columns or TableColumns()
    if indices:  # in every image, whatever its table says
        named = replace(named, target=None)
    entries = _no_views(list_entries(inputs, named, loaded.class_index), output)
    pipeline = Pipeline(loaded, chosen, asked)
    folder = ExportFolder(Path(output), asked, loaded.labels)
    with locked(folder.path):
        manifest = _begin(folder, pipeline, entries)
        tasks = _tasks(entries, asked.shard_size)
        missing = [replace(task, positions=left) for task in tasks if (left := folder.missing(task))]
        _compute(pipeline, folder, missing, len(entries), on_failure)
        failures = folder.failures(range(len(tasks)))
        manifest["images"]["failed"] = len(failures)
        manifest["runs"][-1]["finished"] = now()
        save_json(manifest, folder.manifest)
    result = HeatmapExport.open(folder.path)
    _warn_of_flat_maps(result)
    return result


def _no_views(entries: Sequence[Entry], output: str | os.PathLike[str]) -> list[Entry]:
    """The images that are no views of an earlier run into the same folder, which may be among those that are named."""
    views = os.path.join(os.path.abspath(output), VIEWS, "")
    kept = [entry for entry in entries if not entry.location.startswith(views)]
    if not kept:
        raise InputError(f"all images are views in the output folder {os.fspath(output)!r}; give others")
    return kept


def _begin(folder: ExportFolder, pipeline: Pipeline, entries: Sequence[Entry]) -> dict[str, Any]:
    """Begins an export, or makes sure that it is this one that goes on; returns the manifest, with this run in it."""
    described = describe(pipeline.model, pipeline.methods, pipeline.shapes, pipeline.settings)
    folder.tidy()
    if folder.manifest.exists():
        manifest = read_manifest(folder.manifest)
        check_same({name: manifest.get(name) for name in described}, described, folder.path)
        check_entries(read_entries(folder.inputs), entries, folder.path)
    else:
        folder.claim()
        folder.create_arrays(len(entries), pipeline.shapes)
        write_parquet(table_of_entries(entries), folder.inputs)
        manifest = {"layout": LAYOUT, **described, "images": {"given": len(entries), "failed": None}, "runs": []}
    manifest["runs"].append(circumstances(pipeline.settings, str(pipeline.model.device)))
    save_json(manifest, folder.manifest)
    folder.unfinished_start.unlink(missing_ok=True)
    return manifest


def _tasks(entries: Sequence[Entry], shard_size: int) -> list[ShardTask]:
    starts = range(0, len(entries), shard_size)
    return [ShardTask.whole(index, start, entries[start : start + shard_size]) for index, start in enumerate(starts)]


def _compute(
    pipeline: Pipeline,
    folder: ExportFolder,
    missing: Sequence[ShardTask],
    total: int,
    on_failure: Callable[[str, str], object] | None,
) -> None:
    """Computes shards and commits each in the background, while the next ones are computed."""
    by_index: Mapping[int, ShardTask] = {task.index: task for task in missing}
    kept = total - sum(len(task.positions) for task in missing)
    with (
        tqdm(total=total, initial=kept, unit="image", disable=None) as progress,
        ThreadPoolExecutor(1, "commit") as committer,
    ):
        commits = BoundedWork(committer, _WAITING_COMMITS)
        results = _results(pipeline, missing, progress.update)
        try:
            for result in results:
                task = by_index[result.index]
                if on_failure is not None:
                    for entry, reason in zip(task.entries, result.errors, strict=True):
                        if reason:
                            on_failure(entry.path, reason)
                commits.give(partial(folder.commit, task, result))
        finally:
            results.close()
            commits.finish()  # what is computed is kept, also where the run ends here


def _results(
    pipeline: Pipeline, missing: Sequence[ShardTask], progress: Callable[[int], object]
) -> Generator[ShardResult, None, None]:
    if pipeline.settings.engine == "ray":
        from .ray_engine import run_on_ray

        return run_on_ray(pipeline, missing, progress)
    return pipeline.run(missing, progress)


def _loaded(model: LoadedModel | str) -> LoadedModel:
    if isinstance(model, str):
        from ..models.loading import load_model

        return load_model(model)
    return model


def _warn_of_flat_maps(result: HeatmapExport) -> None:
    for name, text in (("constant", "constant"), ("finite", "NaN or infinite")):
        found = result.count_maps(name, name == "constant")
        if found:
            warnings.warn(
                f"{found} of {len(result) * result.maps_per_image} maps are {text}: see the column {name!r} of the "
                "table",
                ExplanationWarning,
                stacklevel=4,
            )
