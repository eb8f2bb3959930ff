"""An export: what is stored is what the methods say, and nothing that happens on the way changes it."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deadly import Poisoned
from exported import LABELS, METHODS, contents, export, picture, pictures, prepared_by, tiny_model
from torch import Tensor

from vitexplain import (
    ExplanationWarning,
    ExportError,
    InputError,
    OptionError,
    TargetError,
    UnknownNameError,
    create_method,
    explain_with,
    open_export,
)
from vitexplain.export import ahead, folder, manifest, pipeline, run
from vitexplain.locking import locked
from vitexplain.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("images"), 10)


@pytest.fixture(scope="module")
def unbroken(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    export(images, folder, view="overlay")
    return folder


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each capture; the one grey image that every run begins with is left out."""
    sizes: list[int] = []
    before = pipeline.explain_quietly

    def spy(methods: Any, subject: Any, inputs: Tensor, *rest: Any) -> Any:
        if bool(inputs.any()):
            sizes.append(len(inputs))
        return before(methods, subject, inputs, *rest)

    monkeypatch.setattr(pipeline, "explain_quietly", spy)
    return sizes


# ------------------------------------------------------------------------------------------ what comes out


def test_scores_and_rows_are_those_of_the_methods(unbroken: Path, images: list[Path]) -> None:
    result, model = open_export(unbroken), tiny_model()
    assert (len(result), result.methods, result.complete, result.failures) == (10, METHODS, True, [])
    rows = result.table().to_pylist()
    assert [(row["image"], row["method"]) for row in rows] == [(image, name) for image in range(10) for name in METHODS]
    for number, file in enumerate(images):
        explanations = explain_with([create_method(name) for name in METHODS], model.subject, str(file))
        for explanation, row in zip(explanations, rows[2 * number :], strict=False):
            scores = explanation.scores[0].numpy()
            np.testing.assert_allclose(result.scores(number, explanation.method), scores, atol=1e-6)
            assert (row["path"], row["target"], row["error"], row["scale"]) == (str(file), 0, None, 1.0)
            best = int(explanation.logits.argmax())
            assert (row["class"], row["predicted"], row["label"]) == (best, best, LABELS[best])
            assert row["probability"] == row["predicted_probability"] == pytest.approx(float(explanation.probabilities))
            figures = [row[name] for name in ("minimum", "maximum", "mean", "std", "prefix_share")]
            expected = [
                scores.min(),
                scores.max(),
                scores.mean(),
                scores.std(),
                explanation.diagnostics["prefix_share"],
            ]
            assert figures == pytest.approx([float(each) for each in expected], rel=1e-4)
            assert (row["constant"], row["finite"]) == (False, True)


def test_the_manifest_says_what_was_run(unbroken: Path) -> None:
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert manifest["model"] == json.loads(json.dumps(tiny_model().identity()))
    assert manifest["methods"]["rollout"]["options"] == create_method("rollout").options
    assert manifest["methods"]["rollout"]["grid"] == [4, 6]
    assert manifest["settings"]["seed"] == 0
    assert manifest["images"] == {"given": 10, "failed": 0}
    (run,) = manifest["runs"]
    assert run["finished"] >= run["started"]
    assert run["versions"].keys() >= {"vitexplain", "torch", "timm", "zarr"}


def test_scores_are_a_sharded_zarr_group_of_version_3(unbroken: Path) -> None:
    import zarr

    group = zarr.open_group(unbroken / "scores.zarr", mode="r")
    assert sorted(group.array_keys()) == sorted(METHODS)
    for name in METHODS:
        array: Any = group[name]
        assert (array.metadata.zarr_format, array.shape, array.shards) == (3, (10, 1, 4, 6), (4, 1, 4, 6))
        assert array.dtype == np.float32
        files = [path for path in (unbroken / "scores.zarr" / name / "c").rglob("*") if path.is_file()]
        assert len(files) == 3


def test_views_are_the_overlays(unbroken: Path, images: list[Path], tmp_path: Path) -> None:
    import cv2

    result = export(images[:3], tmp_path, view="overlay", view_format="png")
    explanations = explain_with(
        [create_method(name) for name in METHODS], tiny_model().subject, list(map(str, images[:3]))
    )
    for row in result.table().to_pylist():
        stored = cv2.cvtColor(cv2.imread(str(tmp_path / row["view"])), cv2.COLOR_BGR2RGB)
        expected = explanations[METHODS.index(row["method"])].overlay()[row["image"]]
        assert np.abs(stored.astype(int) - expected).max() <= 1
        np.testing.assert_array_equal(result.overlay(row["image"], row["method"]), stored)
        assert f"{row['image']:07d}-{images[row['image']].stem}-{row['method']}-0-{row['class']}" in row["view"]
    lossy = {path.suffix for path in unbroken.glob("views/*/*")}
    assert lossy == {".jpg"}


def test_bare_heatmaps(images: list[Path], tmp_path: Path) -> None:
    from PIL import Image

    from vitexplain.render import UNSIGNED_COLORMAP, colourise

    result = export(images[:2], tmp_path, view="heatmap", view_format="webp")
    for row in result.table().to_pylist():
        with Image.open(tmp_path / row["view"]) as stored:
            assert stored.format == "WEBP"
            expected = colourise(result.heatmap(row["image"], row["method"]), UNSIGNED_COLORMAP)
            assert np.abs(np.asarray(stored).astype(int) - expected).mean() < 12  # lossy


def test_several_targets_of_every_image(images: list[Path], tmp_path: Path) -> None:
    result = export(images[:5], tmp_path, targets=["frog", 1, 5])
    assert result.settings.targets == (5, 1)
    rows = result.table().to_pylist()
    assert [row["label"] for row in rows[:4]] == ["frog", "dog"] * 2
    explanations = explain_with(
        [create_method(name) for name in METHODS], tiny_model().subject, str(images[4]), torch.tensor([[5, 1]])
    )
    for explanation in explanations:
        np.testing.assert_allclose(result.scores(4, explanation.method), explanation.scores[0], atol=1e-6)
        found = [row["probability"] for row in rows if (row["image"], row["method"]) == (4, explanation.method)]
        assert found == pytest.approx(explanation.probabilities[0].tolist())


def test_a_table_may_name_classes_for_some(images: list[Path], tmp_path: Path, explained: list[int]) -> None:
    table = tmp_path / "list.csv"
    lines = [f"{images[0]},fish", f"{images[1]},", f"{images[2]},3", f"{images[1]},0", f"{images[3]},unicorn"]
    table.write_text("\n".join(["path,target", *lines]))
    result = export(table, tmp_path / "out", methods=["tokentm"], batch_size=8, shard_size=8)
    assert explained == [1, 3]  # without a class, and with one
    model = tiny_model()
    for number, (file, target) in enumerate([(images[0], 3), (images[1], None), (images[2], 3), (images[1], 0)]):
        explanation = explain_with([create_method("tokentm")], model.subject, str(file), target)[0]
        np.testing.assert_allclose(result.scores(number, "tokentm"), explanation.scores[0], atol=1e-6)
    ((path, reason),) = result.failures
    assert (path, "unicorn" in reason, "row 5" in reason) == (str(images[3]), True, True)
    for targets in ([1], [1, 2]):  # instead of those of the table, also of one that names no class
        other = export(table, tmp_path / str(len(targets)), methods=["tokentm"], targets=targets)
        assert [(entry.path, entry.target) for entry in other.entries] == [(str(each), None) for each in images[:4]]
        assert other.table(["class"])["class"].to_pylist() == targets * 4
        expected = explain_with([create_method("tokentm")], model.subject, str(images[0]), 1)[0].scores[0]
        np.testing.assert_allclose(other.scores(0, "tokentm").reshape(-1, 4, 6)[0], expected, atol=1e-6)


def test_methods_twice_and_with_options(images: list[Path], tmp_path: Path) -> None:
    result = export(images[:2], tmp_path, methods=["rollout", create_method("rollout", head_fusion="max")])
    assert result.methods == ("rollout", "rollout-2")
    assert result.manifest["methods"]["rollout-2"]["options"]["head_fusion"] == "max"
    assert not np.allclose(result.scores(0, "rollout"), result.scores(0, "rollout-2"))


def test_refusals_before_anything_is_written(images: list[Path], tmp_path: Path) -> None:
    for changes, error in [
        ({"methods": []}, OptionError),
        ({"methods": ["rollou"]}, UnknownNameError),
        ({"targets": [7]}, TargetError),
        ({"targets": ["unicorn"]}, UnknownNameError),
        ({"dtype": "float64"}, OptionError),
        ({"view": "panel"}, OptionError),
        ({"shard_size": 0}, OptionError),
        ({"workers": True}, OptionError),
        ({"ray_workers": 0}, OptionError),
    ]:
        with pytest.raises(error):
            export(images, tmp_path / "out", **changes)
    with pytest.raises(InputError, match="no images"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ resumed


def test_again_nothing_is_computed(unbroken: Path, images: list[Path], explained: list[int]) -> None:
    before = contents(unbroken)
    export(images, unbroken, view="overlay", batch_size=2)
    assert explained == []
    assert contents(unbroken) == before


KILLED = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet, zarr  # once, and not in every life
from exported import export
from vitexplain import open_export
from vitexplain.export import folder, run

def counted(function):
    def call(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

for name in ("write_whole", "write_parquet", "_to_disk"):
    setattr(folder, name, counted(getattr(folder, name)))
images, output = map(Path, sys.argv[1:3])
for left in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        export(images, output, view="overlay")
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


def readable(folder: Path) -> dict[str, str]:
    """All that an export holds but last digits, and what follows from them: other processes or batches may round
    otherwise."""
    rounded = {key: re.sub(r"[0-9a-f]{64}", "…", str(value)) for key, value in contents(folder).items()}
    digits = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    return {key: digits.sub(lambda each: f"{float(each[0]):.3g}", value) for key, value in rounded.items()}


def test_killed_again_and_again_it_comes_to_the_same(unbroken: Path, images: list[Path], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    writes = ("5", "11", "22")  # among the first pictures; before the rows of a shard; in the second shard
    words = [sys.executable, "-W", "ignore", "-c", KILLED, str(images[0].parent), str(tmp_path), *writes]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not open_export(tmp_path).complete
    assert len(list((tmp_path / "rows").glob("*.parquet"))) >= 1
    (tmp_path / "rows" / ".x.part").write_bytes(b"left behind")
    export(images, tmp_path, view="overlay")
    assert readable(tmp_path) == readable(unbroken)
    for number in range(len(images)):
        for name in METHODS:
            found, expected = (open_export(each).scores(number, name) for each in (tmp_path, unbroken))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert not list(tmp_path.rglob(".*.part"))
    assert [run["finished"] is None for run in open_export(tmp_path).manifest["runs"]] == [True, True, True, False]


@pytest.mark.parametrize("fault", ["rows", "cut rows", "scores", "no scores", "view", "cut view"])
def test_a_shard_that_was_damaged_is_done_again(
    fault: str, unbroken: Path, images: list[Path], tmp_path: Path, explained: list[int]
) -> None:
    export(images, tmp_path, view="overlay")
    explained.clear()
    rows, scores = tmp_path / "rows" / "000001.parquet", tmp_path / "scores.zarr" / "tokentm" / "c" / "1/0/0/0"
    if fault == "rows":
        rows.unlink()
    elif fault == "cut rows":
        rows.write_bytes(rows.read_bytes()[:-20])
    elif fault == "scores":
        content = bytearray(scores.read_bytes())
        content[40] ^= 0xFF
        scores.write_bytes(bytes(content))
    elif fault == "no scores":
        scores.unlink()
    else:
        view = next((tmp_path / "views" / "000001").iterdir())
        view.unlink() if fault == "view" else view.write_bytes(view.read_bytes()[:-20])
    export(images, tmp_path, view="overlay")
    assert explained == [3, 1]
    assert contents(tmp_path) == contents(unbroken)


def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(
    unbroken: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, explained: list[int]
) -> None:
    before, calls = folder._to_disk, 0

    def full(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        before(path)

    monkeypatch.setattr(folder, "_to_disk", full)
    with pytest.raises(ExportError, match=r"No space left on device.*running again goes on"):
        export(images, tmp_path, view="overlay")
    monkeypatch.setattr(folder, "_to_disk", before)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["000000.parquet"]
    explained.clear()
    export(images, tmp_path, view="overlay")
    assert sum(explained) == 6
    assert contents(tmp_path) == contents(unbroken)


def test_interrupted_it_keeps_what_is_computed(
    unbroken: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = pipeline.explain_quietly, 0

    def interrupted(methods: Any, subject: Any, inputs: Tensor, *rest: Any) -> Any:
        nonlocal calls
        calls += bool(inputs.any())
        if calls == 4:  # in the second shard
            raise KeyboardInterrupt
        return before(methods, subject, inputs, *rest)

    threads = threading.active_count()
    monkeypatch.setattr(pipeline, "explain_quietly", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(images, tmp_path, view="overlay")
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["000000.parquet"]
    assert threading.active_count() == threads
    monkeypatch.setattr(pipeline, "explain_quietly", before)
    export(images, tmp_path, view="overlay")
    assert contents(tmp_path) == contents(unbroken)


def test_out_of_memory_halves_the_batch(
    unbroken: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitexplain import explainer

    before, sizes = explainer._explain_batch, []

    def small(methods: Any, subject: Any, inputs: Tensor, *rest: Any) -> Any:
        sizes.append(len(inputs))
        if len(inputs) > 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return before(methods, subject, inputs, *rest)

    monkeypatch.setattr(explainer, "_explain_batch", small)
    result = export(images, tmp_path, batch_size=4)
    assert 4 in sizes
    for number in range(10):
        np.testing.assert_allclose(
            result.scores(number, "tokentm"), open_export(unbroken).scores(number, "tokentm"), atol=1e-6
        )


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"methods": [create_method("rollout", head_fusion="max"), "tokentm"]},
            'rollout.options.head_fusion is "mean"',
        ),
        ({"methods": ["rollout"]}, 'methods.tokentm is .* there, and "none" now'),
        ({"targets": [1]}, "settings.targets is .* there, and .*1.* now"),
        ({"dtype": "float16"}, 'settings.dtype is "float32" there, and "float16" now'),
        ({"view": "none"}, "settings.view is"),
        ({"seed": 1}, "settings.seed is 0 there, and 1 now"),
        ({"shard_size": 5}, "settings.shard_size is 4 there, and 5 now"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    changes: dict[str, Any], difference: str, unbroken: Path, images: list[Path]
) -> None:
    before = contents(unbroken)
    with pytest.raises(ExportError, match=f"holds another export: .*{difference}"):
        export(images, unbroken, **{"view": "overlay", **changes})
    assert contents(unbroken) == before


def test_other_code_of_somebody_elses_method_in_the_same_folder_is_refused(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(images, tmp_path, methods=["rollout"])
    assert "code" not in json.loads((tmp_path / "manifest.json").read_text())["methods"]["rollout"]
    monkeypatch.setattr(manifest, "own_code", lambda kind: (kind.__name__,))
    with pytest.raises(ExportError, match=r'methods\.rollout\.code is "none" there, and "Rollout" now'):
        export(images, tmp_path, methods=["rollout"])


def test_other_weights_in_the_same_folder_are_refused(unbroken: Path, images: list[Path]) -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.model.parameters()).add_(1e-3)
    with pytest.raises(ExportError, match=r"model\.sha256 is .* there, and .* now"):
        export(images, unbroken, view="overlay", model=model)


def test_other_images_in_the_same_folder_are_refused(unbroken: Path, images: list[Path], tmp_path: Path) -> None:
    new = picture(tmp_path / "new.png")
    with pytest.raises(ExportError, match=r"begun with 10 images, now there are 11: 1 were not there.*new\.png"):
        export([*images, new], unbroken, view="overlay")
    with pytest.raises(ExportError, match=r"1 are missing \(such as .*009\.png"):
        export(images[:9], unbroken, view="overlay")
    with pytest.raises(ExportError, match="in another order"):
        export(images[::-1], unbroken, view="overlay")


def test_a_folder_in_use_is_refused(images: list[Path], tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ExportError, match="in use by another run"):
        export(images, tmp_path)


def test_results_among_the_images_are_no_images(tmp_path: Path, explained: list[int]) -> None:
    pictures(tmp_path, 3)
    for _ in range(2):
        assert len(export(tmp_path, tmp_path / "out", view="overlay")) == 3
    assert explained == [3]
    views = tmp_path / "out" / "views"
    with pytest.raises(InputError, match="results of earlier runs, which are left out"):
        export(views, tmp_path / "out")
    with pytest.raises(InputError, match="all images are views in the output folder"):
        export(next(views.glob("*/*.jpg")), tmp_path / "out")


def test_results_of_other_runs_are_no_images(tmp_path: Path, explained: list[int]) -> None:
    (tmp_path / "photos").mkdir()
    pictures(tmp_path / "photos", 3)
    export(tmp_path / "photos", tmp_path / "photos" / "out", view="overlay", view_format="png")
    assert len(export(tmp_path / "photos", tmp_path / "photos" / "other")) == 3
    assert len(export(str(tmp_path / "photos" / "**" / "*.png"), tmp_path / "photos" / "third")) == 3
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for _ in range(2):
        assert len(export(tmp_path / "link", tmp_path / "photos" / "fourth", view="overlay")) == 3
    assert explained == [3, 3, 3, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow text only in names")
def test_a_folder_whose_name_is_no_text(images: list[Path], tmp_path: Path, explained: list[int]) -> None:
    output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    for _ in range(2):
        result = export(images[:2], output, view="overlay")
    assert explained == [2]
    assert result.scores(0, "tokentm").shape == (4, 6)
    assert len(result.table()) == 4


def test_images_in_the_output_folder_are_images(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    for _ in range(2):
        assert len(export(tmp_path, tmp_path, view="overlay")) == 3


@pytest.mark.parametrize("name", ["rows", "views", "scores.zarr", "inputs.parquet"])
def test_a_folder_with_something_else_is_refused(name: str, images: list[Path], tmp_path: Path) -> None:
    theirs = tmp_path / name
    theirs.mkdir()
    (theirs / "file").write_text("theirs")
    with pytest.raises(ExportError, match=rf"holds {name} but .* no export that can be continued"):
        export(images, tmp_path)
    assert (theirs / "file").read_text() == "theirs"


def test_a_start_that_was_cut_short_is_begun_again(
    unbroken: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "circumstances", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(images, tmp_path, view="overlay")
    assert not (tmp_path / "manifest.json").exists()
    export(images, tmp_path, view="overlay")
    assert contents(tmp_path) == contents(unbroken)
    assert not (tmp_path / ".unfinished-start").exists()


# ------------------------------------------------------------------------------------------ images that fail


def test_a_bad_image_costs_nothing_but_itself(unbroken: Path, images: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    failed: list[tuple[str, str]] = []
    mixed = [*images[:2], bad, *images[2:], tmp_path / "gone.png"]
    table = tmp_path / "list.txt"
    table.write_text("\n".join(map(str, mixed)))
    result = export(table, tmp_path / "out", on_failure=lambda path, reason: failed.append((path, reason)))
    assert failed == result.failures
    assert [path for path, _ in failed] == [str(bad), str(tmp_path / "gone.png")]
    assert "not a picture" in failed[0][1]
    assert "cannot be opened" in failed[1][1]
    reference = open_export(unbroken)
    for number, file in enumerate(images):
        np.testing.assert_allclose(result.scores(str(file), "tokentm"), reference.scores(number, "tokentm"), atol=1e-6)
    rows = [row for row in result.table().to_pylist() if row["image"] == 2]
    assert len(rows) == 2
    assert all(row["class"] is None and row["mean"] is None and row["error"] for row in rows)
    with pytest.raises(InputError, match=r"image 2 was not explained: .*not a picture"):
        result.scores(2, "rollout")
    assert np.isnan(result.all_scores("rollout", 0)[2]).all()


def test_failed_images_are_tried_again_only_when_asked(
    images: list[Path], tmp_path: Path, explained: list[int]
) -> None:
    late = tmp_path / "late.png"
    table = tmp_path / "list.txt"
    table.write_text("\n".join(map(str, [*images[:5], late])))
    assert len(export(table, tmp_path / "out").failures) == 1
    picture(late)
    explained.clear()
    assert len(export(table, tmp_path / "out").failures) == 1
    assert explained == []
    result = export(table, tmp_path / "out", retry_failed=True)
    assert (explained, result.failures) == ([1], [])
    assert result.scores(5, "rollout").shape == (4, 6)


def test_pictures_that_find_no_room_cost_nothing_that_is_committed(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ExportError("no room")

    table, late = tmp_path / "list.txt", tmp_path / "late.png"
    table.write_text("\n".join(map(str, [*images[:2], late])))
    scores = export(table, tmp_path / "out", view="overlay").scores(0, "rollout")
    picture(late)
    monkeypatch.setattr(folder, "write_whole", full)
    with pytest.raises(ExportError, match="no room"):
        export(table, tmp_path / "out", view="overlay", retry_failed=True)
    np.testing.assert_array_equal(open_export(tmp_path / "out").scores(0, "rollout"), scores)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_committed_stays_when_others_are_tried_again(dtype: str, images: list[Path], tmp_path: Path) -> None:
    listed = [picture(tmp_path / f"{number}.png", number) for number in range(6)]
    table, settings = tmp_path / "list.txt", {"dtype": dtype, "view": "overlay"}
    table.write_text("\n".join(map(str, listed)))
    export(table, tmp_path / "whole", **settings)
    listed[4].rename(tmp_path / "away")
    assert [path for path, _ in export(table, tmp_path / "out", **settings).failures] == [str(listed[4])]
    for each in (*listed[:4], listed[5]):
        each.unlink()
    assert [path for path, _ in export(table, tmp_path / "out", retry_failed=True, **settings).failures] == [
        str(listed[4])
    ]
    (tmp_path / "away").rename(listed[4])
    assert export(table, tmp_path / "out", retry_failed=True, **settings).failures == []
    assert readable(tmp_path / "out") == readable(tmp_path / "whole")


def test_what_a_decoder_throws_is_a_reason(images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Preprocessing.view

    def breaks(self: Preprocessing, source: Any) -> Any:
        if str(source) == str(images[1]):
            raise MemoryError("too much")
        return before(self, source)

    monkeypatch.setattr(Preprocessing, "view", breaks)
    ((path, reason),) = export(images[:3], tmp_path).failures
    assert path == str(images[1])
    assert "MemoryError: too much" in reason


def test_a_picture_that_ends_its_reader_is_a_failed_image(unbroken: Path, images: list[Path], tmp_path: Path) -> None:
    model = prepared_by(Poisoned, victim=str(images[4]))
    result = export(images, tmp_path, model=model, isolate=True)
    ((path, reason),) = result.failures
    assert (path, "ended the process that read it" in reason) == (str(images[4]), True)
    for number in (0, 3, 5, 9):
        expected = open_export(unbroken).scores(number, "tokentm")
        np.testing.assert_allclose(result.scores(number, "tokentm"), expected, atol=1e-6)


def test_an_image_that_breaks_a_batch_is_found(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, culprit = pipeline.explain_quietly, tiny_model().preprocessing(images[1])

    def breaks(methods: Any, subject: Any, inputs: Tensor, *rest: Any) -> Any:
        if any(torch.equal(each, culprit) for each in inputs):
            raise TargetError("the model's logits hold NaN")
        return before(methods, subject, inputs, *rest)

    monkeypatch.setattr(pipeline, "explain_quietly", breaks)
    result = export(images[:3], tmp_path)
    ((path, reason),) = result.failures
    assert (path, "logits hold NaN" in reason) == (str(images[1]), True)
    assert result.scores(2, "tokentm").shape == (4, 6)


def test_constant_maps_are_said(images: list[Path], tmp_path: Path) -> None:
    model = tiny_model()
    head: Any = model.model
    with torch.no_grad():
        head.head.weight.zero_()
    with pytest.warns(ExplanationWarning, match="2 of 4 maps are constant: see the column 'constant'"):
        result = export(images[:2], tmp_path, model=model, methods=["rollout", "gradcam"])
    assert [row["constant"] for row in result.table().to_pylist()] == [False, True] * 2


# ------------------------------------------------------------------------------------------ the pipeline


def test_methods_that_draw_lots_have_a_stream_an_image(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    method = create_method("rollout")
    monkeypatch.setattr(type(method), "info", replace(method.info, stochastic=True))
    monkeypatch.setattr(
        type(method), "attribute", lambda self, capture: torch.rand(len(capture.images), capture.num_tokens)
    )
    first = export(images[:5], tmp_path / "a", methods=[method], batch_size=4)
    second = export(images[:5], tmp_path / "b", methods=[method], batch_size=1)
    other = export(images[:5], tmp_path / "c", methods=[method], seed=1)
    np.testing.assert_array_equal(first.all_scores("rollout", 0), second.all_scores("rollout", 0))
    assert not np.allclose(first.all_scores("rollout", 0), other.all_scores("rollout", 0))
    assert not np.allclose(first.scores(0, "rollout"), first.scores(1, "rollout"))


def test_only_a_few_batches_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    begun: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        results = ahead.ahead(begun.append, iter(range(100)), pool, depth=3)
        assert begun == []
        for number, _ in results:
            time.sleep(0.001)
            assert len(begun) <= number + 3
            if number == 20:
                break
        results.close()
    assert len(begun) < 30


def test_what_fails_in_the_background_is_raised() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def fails() -> None:
        raise ExportError("no room")

    with ThreadPoolExecutor(1) as pool:
        work = ahead.BoundedWork(pool, 1)
        work.give(fails)
        with pytest.raises(ExportError, match="no room"):
            work.give(lambda: None)
        work.finish()


def test_the_model_is_as_it_was(images: list[Path], tmp_path: Path) -> None:
    model = tiny_model()
    model.model.train()
    hooks = sum(len(module._forward_hooks) for module in model.model.modules())
    export(images[:3], tmp_path, model=model, view="overlay")
    assert model.model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.model.parameters())
    assert sum(len(module._forward_hooks) for module in model.model.modules()) == hooks
