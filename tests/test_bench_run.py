"""Benchmarks on the embedded scenes: resumed, extended, and as far as model and data allow."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitexplain import (
    CheckpointError,
    ExplanationWarning,
    InputError,
    Method,
    OptionError,
    UnsupportedModelError,
    create_method,
    explain_with,
    load_model,
    registry,
)
from vitexplain.bench import chunk_run, figures, open_results, run_bench
from vitexplain.bench.configuration import BenchConfiguration
from vitexplain.bench.results import BenchResults
from vitexplain.bench.store import CellStore
from vitexplain.capture import Capture
from vitexplain.data import batches
from vitexplain.data.catalogue import open_dataset
from vitexplain.data.scenes import CLASS_NAMES
from vitexplain.images import load_image
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.metric import MetricBatch
from vitexplain.metrics.predictor import Predictor
from vitexplain.metrics.tally import Tally
from vitexplain.models.shipped import ASSETS

ROOT = Path(__file__).resolve().parents[1]
TINY: dict[str, Any] = {
    "methods": ["rollout", "tokentm"],
    "metrics": ["energy_in_mask", {"name": "deletion", "steps": 4}],
    "data": {"format": "scenes", "limit": 5},
    "chunk_size": 2,
    "batch_size": 2,
}


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RESAMPLES", 50)
    monkeypatch.setattr(figures, "PERMUTATIONS", 99)


def bench(folder: Path, recompute: bool = False, **changes: Any) -> BenchResults:
    return run_bench(BenchConfiguration.from_mapping({**TINY, **changes}), folder, recompute=recompute)


def rows_of(results: BenchResults) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = results._read("results.parquet", {}).to_pylist()
    return rows


def outcome(results: BenchResults) -> str:
    """All that must not depend on how a run came about, NaN equal to NaN."""
    return repr((rows_of(results), results.figures()))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "RESAMPLES", 50)
        patch.setattr(figures, "PERMUTATIONS", 99)
        folder = tmp_path_factory.mktemp("unbroken")
        bench(folder)
    return folder


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """The methods and number of images of each capture."""
    calls: list[tuple[list[str], int]] = []
    before = chunk_run.explain_quietly

    def spy(methods: Any, subject: Any, images: Tensor, *rest: Any) -> Any:
        calls.append(([method.info.name for method in methods], len(images)))
        return before(methods, subject, images, *rest)

    monkeypatch.setattr(chunk_run, "explain_quietly", spy)
    return calls


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The metric and number of images of each measurement."""
    calls: list[tuple[str, int]] = []
    before = chunk_run.measure

    def spy(metric: Any, batch: MetricBatch) -> Any:
        calls.append((metric.info.name, len(batch)))
        return before(metric, batch)

    monkeypatch.setattr(chunk_run, "measure", spy)
    return calls


# ------------------------------------------------------------------------------------------ what comes out


def test_statistics_are_those_of_the_metric_on_the_methods_maps(unbroken: Path) -> None:
    results, model = open_results(unbroken), load_model("scenes")
    examples = open_dataset("scenes")
    chosen = [examples[index] for index in range(5)]
    inputs = model.preprocessing([each.image for each in chosen])
    methods = [create_method("rollout"), create_method("tokentm")]
    masks = torch.from_numpy(np.stack([each.mask for each in chosen if each.mask is not None]))
    for method, explanation in zip(methods, explain_with(methods, model.subject, inputs), strict=True):
        batch = MetricBatch(
            explanation.scores, explanation.targets, inputs, Predictor.of(model.subject), masks=masks, boxes=None
        )
        for metric, label in (
            (create_metric("energy_in_mask"), "energy_in_mask"),
            (create_metric("deletion", steps=4), "deletion (steps=4)"),
        ):
            tally = Tally(metric)
            tally.update(batch)
            found = results.statistics("scenes", method.info.name, label)
            assert set(found) == set(tally.rows) - {"broken", "constant", "tied"}
            for name, values in found.items():
                np.testing.assert_allclose(values, tally.rows[name], rtol=2e-3, atol=1e-5)
            first, *_ = [row for row in results.figures() if (row.method, row.metric) == (method.info.name, label)]
            assert first.value == pytest.approx(tally.compute().figures[first.figure], rel=2e-3)
            assert first.low <= first.value <= first.high
            assert (first.n, first.images, first.position) == (5, 5, 0)
    targets = [row["target"] for row in rows_of(results) if (row["method"], row["statistic"]) == ("rollout", "energy")]
    assert targets == explanation.logits.argmax(1).tolist()


def test_the_table_of_rows(unbroken: Path) -> None:
    results = open_results(unbroken)
    rows = rows_of(results)
    assert len(rows) == 5 * 2 * len({(row["metric"], row["statistic"]) for row in rows})
    assert [row["image"] for row in rows[:5]] == [f"test/{index:06d}" for index in range(5)]
    curves = [row for row in rows if row["values"] is not None]
    assert curves
    assert all(row["value"] is None and len(row["values"]) == 5 for row in curves)
    chosen = results.rows(method="tokentm", statistic="energy")
    assert len(chosen) == 5
    assert set(results.table(method="tokentm")["method"]) == {"tokentm"}


def test_without_pandas_rows_are_mappings(unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitexplain.bench import results as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    rows = BenchResults.open(unbroken).table(method="rollout", figure="energy")
    assert [row["metric"] for row in rows] == ["energy_in_mask"]
    assert rows[0]["n"] == 5


def test_the_record_says_what_was_run(unbroken: Path) -> None:
    run = json.loads((unbroken / "run.json").read_text())
    assert run["configuration"]["chunk_size"] == 2
    assert run["models"][0]["sha256"] == load_model("scenes").identity()["sha256"]
    assert run["models"][0]["images"] == {"given": 5, "used": 5, "failed": 0, "with_label": 5, "correct": 5}
    assert [each["method"] for each in run["costs"]] == ["rollout", "tokentm"]
    assert all(each["seconds"] > 0 and each["ratio"] > 0.5 for each in run["costs"])
    assert run["metrics"][1]["options"]["steps"] == 4
    assert (run["left_out"], run["not_applicable"]) == ([], [])


def test_nothing_to_open_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no finished results in .*run\.json missing"):
        open_results(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        open_results(tmp_path)


# ------------------------------------------------------------------------------------------ killed and resumed

KILLED = """
import os, signal, sys
from pathlib import Path
from vitexplain.bench import figures, run_bench, store
from vitexplain.bench.configuration import BenchConfiguration
import json
figures.RESAMPLES, figures.PERMUTATIONS = 50, 99
left, before = int(sys.argv[3]), os.fsync
def fsync(file):
    global left
    before(file)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # written, but not yet at its place
os.fsync = fsync
run_bench(BenchConfiguration.from_mapping(json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def test_killed_again_and_again_it_comes_to_the_same(unbroken: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = -1
    for writes in (3, 6, 8):
        words = [sys.executable, "-c", KILLED, json.dumps(TINY), str(tmp_path), str(writes)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "run.json").exists()
        cells = len(list((tmp_path / "cells").glob("*/*.parquet")))
        assert cells > before
        before = cells
    assert list((tmp_path / "cells").glob("*/.*.part"))
    resumed = bench(tmp_path)
    assert resumed.run["cells"]["kept"] > 0
    assert outcome(resumed) == outcome(open_results(unbroken))
    assert not list((tmp_path / "cells").glob("*/.*.part"))


def test_again_nothing_is_computed(unbroken: Path, explained: list[Any], measured: list[Any]) -> None:
    before = outcome(open_results(unbroken))
    again = bench(unbroken)
    assert (explained, measured) == ([], [])
    assert again.run["cells"] == {"computed": 0, "kept": 12}
    assert outcome(again) == before


def test_what_is_new_is_computed_alone(tmp_path: Path, explained: list[Any], measured: list[Any]) -> None:
    small = {"metrics": ["energy_in_mask"], "data": {"format": "scenes", "limit": 4}}
    bench(tmp_path, methods=["rollout"], **small)
    assert explained == [(["rollout"], 2)] * 2
    explained.clear()
    measured.clear()
    bench(tmp_path, methods=["tokentm", "rollout", "gradcam"], **small)  # one capture for both new ones
    assert explained == [(["tokentm", "gradcam"], 2)] * 2
    assert measured == [("energy_in_mask", 2)] * 4
    explained.clear()
    measured.clear()
    bench(tmp_path, methods=["rollout"], metrics=["energy_in_mask", "auprc"], data=small["data"])
    assert explained == []  # the maps are stored
    assert measured == [("auprc", 2)] * 2
    explained.clear()
    measured.clear()
    bench(tmp_path, methods=["rollout"], metrics=["auprc"], data={"format": "scenes", "limit": 5})
    assert explained == [(["rollout"], 1)]  # the fifth image
    assert measured == [("auprc", 1)]


@pytest.mark.parametrize(
    ("changes", "explains", "measures"),
    [
        ({"methods": [{"name": "rollout", "head_fusion": "max"}]}, 2, 2),
        ({"metrics": [{"name": "auprc", "label": "another"}]}, 0, 0),
        ({"methods": [{"name": "rollout", "label": "another"}]}, 0, 0),
        ({"metrics": [{"name": "energy_in_mask"}]}, 0, 2),
        ({"models": [{"name": "scenes", "label": "another"}]}, 0, 0),
        ({"models": [{"preprocessing": {"mean": [0.4, 0.5, 0.5]}}]}, 2, 2),
        ({"dtype": "bfloat16"}, 2, 2),
        ({"target": "label"}, 2, 2),
        ({"only_correct": True}, 2, 2),
        ({"chunk_size": 4}, 1, 1),
        ({"data": {"format": "scenes", "limit": 4, "select": "odd"}}, 2, 2),
        ({"seed": 1}, 0, 0),  # neither draws lots
        ({"batch_size": 1}, 0, 0),
        ({"compiled": True}, 0, 0),
    ],
)
def test_what_determines_a_result_decides_what_is_computed(
    tmp_path: Path,
    changes: dict[str, Any],
    explains: int,
    measures: int,
    explained: list[Any],
    measured: list[Any],
) -> None:
    small = {"methods": ["rollout"], "metrics": ["auprc"], "data": {"format": "scenes", "limit": 4}}
    bench(tmp_path, **small)
    explained.clear()
    measured.clear()
    bench(tmp_path, **{**small, **changes})
    assert (len(explained), len(measured)) == (explains, measures)


def test_a_metric_that_draws_lots_follows_the_seed(tmp_path: Path, measured: list[Any]) -> None:
    drawing = {"methods": ["rollout"], "metrics": [{"name": "faithfulness_correlation", "draws": 5}]}
    first = rows_of(bench(tmp_path, **drawing))
    other = rows_of(bench(tmp_path, **drawing, seed=1))
    assert len(measured) == 6
    assert [row["value"] for row in first] != [row["value"] for row in other]


def test_changed_data_is_noticed(tmp_path: Path, explained: list[Any]) -> None:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(generator.integers(0, 256, (96, 96, 3), np.uint8)).save(images / name)
    settings = {"methods": ["rollout"], "metrics": [{"name": "deletion", "steps": 4}], "chunk_size": 1}
    data = {"format": "folder", "root": str(tmp_path / "data")}
    bench(tmp_path / "out", **settings, data=data)
    assert len(explained) == 2
    Image.fromarray(generator.integers(0, 256, (96, 96, 3), np.uint8)).save(images / "b.png")
    bench(tmp_path / "out", **settings, data=data)
    assert len(explained) == 3


@pytest.mark.parametrize("damage", [b"", b"PAR1 and nothing that follows", None])
def test_a_damaged_cell_is_computed_again(unbroken: Path, tmp_path: Path, damage: bytes | None) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(unbroken, folder)
    cells = sorted((folder / "cells").glob("*/*.parquet"))
    for path in cells:
        whole = path.read_bytes()
        middle = len(whole) // 3
        path.write_bytes(whole[:middle] + b"\x00damage\x00" + whole[middle + 8 :] if damage is None else damage)
    found = bench(folder)
    assert found.run["cells"]["kept"] == 0
    assert outcome(found) == outcome(open_results(unbroken))


def test_recompute_begins_anew(tmp_path: Path, explained: list[Any]) -> None:
    small = {"methods": ["rollout"], "metrics": ["auprc"]}
    first = outcome(bench(tmp_path, **small))
    explained.clear()
    again = bench(tmp_path, recompute=True, **small)
    assert len(explained) == 3
    assert again.run["cells"]["kept"] == 0
    assert outcome(again) == first


def test_a_failed_end_leaves_no_results_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitexplain.bench import run

    bench(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(run, "write_figures", fail)
    with pytest.raises(OSError, match="disk full"):
        bench(tmp_path)
    with pytest.raises(InputError, match="no finished results"):
        open_results(tmp_path)


# ------------------------------------------------------------------------------------------ what does not apply


@pytest.fixture
def registered() -> Iterator[Mapping[str, Any]]:
    """The registry, as it was afterwards."""
    registry.list_methods()  # loads what there is
    before = dict(registry._methods)
    yield registry._methods
    registry._methods.clear()
    registry._methods.update(before)


def test_a_method_that_a_model_does_not_allow_is_listed_and_the_rest_goes_on(tmp_path: Path, registered: Any) -> None:
    @registry.register_method("refuser", title="R", paper="P", class_specific=False, passes="1F")
    @dataclass(frozen=True)
    class Refuser(Method):
        def attribute(self, capture: Capture) -> Tensor:
            raise UnsupportedModelError("found a plain transformer, expected another")

    found = bench(tmp_path, methods=["rollout", "refuser"], metrics=["auprc"])
    assert {row.method for row in found.figures()} == {"rollout"}
    assert found.run["not_applicable"] == [
        {
            "model": "scenes",
            "method": "refuser",
            "metric": None,
            "reason": "found a plain transformer, expected another",
        }
    ]
    assert "| scenes | refuser | all | found a plain transformer" in (tmp_path / "report.md").read_text()
    with pytest.raises(InputError, match="nothing remains to be measured: refuser: found a plain transformer"):
        bench(tmp_path / "alone", methods=["refuser"], metrics=["auprc"])


OF_SOMEBODY_ELSE = """
from dataclasses import dataclass
from vitexplain import Method, register_method

@register_method("theirs", title="T", paper="P", class_specific=False, passes="1F")
@dataclass(frozen=True)
class Theirs(Method):
    def attribute(self, capture):
        return capture.seed_row() + capture.images.mean((1, 2, 3), keepdim=True)[:, 0, 0] * {factor}
"""


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
def test_a_method_of_somebody_elses_is_run_again_when_its_code_changed(
    tmp_path: Path, registered: Any, explained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    asked = {"methods": ["theirs"], "metrics": ["auprc"]}

    def again(factor: int) -> int:
        (tmp_path / "their_module.py").write_text(OF_SOMEBODY_ELSE.format(factor=factor))
        sys.modules.pop("their_module", None)
        importlib.import_module("their_module")
        explained.clear()
        bench(tmp_path / "results", **asked)
        return len(explained)

    assert again(1) > 0
    assert again(1) == 0
    assert again(100) > 0
    sys.modules.pop("their_module")


def test_a_method_that_draws_lots_does_so_for_each_image(tmp_path: Path, registered: Any) -> None:
    @registry.register_method("lots", title="L", paper="P", class_specific=False, passes="1F", stochastic=True)
    @dataclass(frozen=True)
    class Lots(Method):
        def attribute(self, capture: Capture) -> Tensor:
            return torch.rand(len(capture.images), 12, 12) + torch.from_numpy(np.random.rand(12, 12)).float()

    def values(folder: Path, **changes: Any) -> list[float]:
        rows = rows_of(bench(folder, methods=["lots"], metrics=["auprc"], **changes))
        return [row["value"] for row in rows if row["statistic"] == "auprc"]

    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    first = values(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[union-attr]
    assert len(set(first)) == 5
    assert values(tmp_path / "b", chunk_size=5) == first
    assert values(tmp_path / "a", seed=1) != first
    assert values(tmp_path / "a") == first


def test_what_the_data_lacks_is_listed(tmp_path: Path) -> None:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 96, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    data = {"format": "folder", "root": str(tmp_path / "data")}
    metrics = ["energy_in_mask", "pointing_game", {"name": "deletion", "steps": 4}]
    with pytest.warns(ExplanationWarning, match=r"scenes leaves out 'broken\.png': "):
        found = bench(tmp_path / "out", metrics=metrics, data=data)
    reasons = {(each["metric"], each["method"]): each["reason"] for each in found.run["not_applicable"]}
    assert reasons["energy_in_mask", None] == "it requires masks, which the data does not have"
    assert "masks or boxes" in reasons["pointing_game", "rollout"]
    assert {row.metric for row in found.figures()} == {"deletion (steps=4)"}
    assert [each["image"] for each in found.run["left_out"]] == ["broken.png"]
    assert found.run["models"][0]["images"]["used"] == 3
    assert {row["image"] for row in rows_of(found)} == {"0.png", "1.png", "2.png"}
    report = (tmp_path / "out" / "report.html").read_text()
    assert "broken.png" in report
    assert "which the data does not have" in report
    with pytest.warns(ExplanationWarning), pytest.raises(InputError, match=r"nothing remains .*requires masks"):
        bench(tmp_path / "none", metrics=["energy_in_mask"], data=data)
    for number in range(3):
        (images / f"{number}.png").unlink()
    with pytest.warns(ExplanationWarning), pytest.raises(InputError, match=r"nothing remains to be measured: .*broken"):
        bench(tmp_path / "broken", data=data)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Four pictures with boxes, as an annotated data set."""
    root = tmp_path / "annotated"
    (root / "images").mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 90, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    return root


def annotate(root: Path, **changed: int) -> dict[str, Any]:
    """Settings of a benchmark on the pictures of a folder, whose third record says something else of its size."""
    records = [{"file": f"{number}.png", "boxes": [[5, 5, 40, 40]], "w": 90, "h": 70} for number in range(4)]
    records[2].update(changed)
    (root / "annotations.json").write_text(json.dumps(records))
    return {"methods": ["rollout"], "metrics": ["energy_in_box"], "data": f"annotated:{root}", "chunk_size": 2}


@pytest.mark.parametrize("broken", [["2.png"], ["2.png", "3.png"]])
def test_a_disk_that_did_not_answer_is_asked_again(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: list[str], explained: list[Any]
) -> None:
    settings = annotate(photographs)
    with monkeypatch.context() as patch:

        def load(source: Any, **options: Any) -> Any:
            if Path(source).name in broken:
                raise InputError(f"{source} cannot be opened: Stale file handle")
            return load_image(source, **options)

        patch.setattr(batches, "load_image", load)
        with pytest.warns(ExplanationWarning, match="leaves out"):
            found = bench(tmp_path / "out", **settings)
        assert [each["image"] for each in found.run["left_out"]] == broken
    explained.clear()
    again = bench(tmp_path / "out", **settings)
    assert again.run["left_out"] == []
    assert [count for _, count in explained] == [2], "the other chunk is kept"
    assert outcome(again) == outcome(bench(tmp_path / "fresh", **settings))
    assert bench(tmp_path / "out", **settings).run["cells"]["computed"] == 0


def test_a_size_that_was_corrected_is_noticed(photographs: Path, tmp_path: Path) -> None:
    with pytest.warns(ExplanationWarning, match="leaves out"):
        found = bench(tmp_path / "out", **annotate(photographs, w=91))
    assert [each["image"] for each in found.run["left_out"]] == ["2.png"]
    assert bench(tmp_path / "out", **annotate(photographs)).run["left_out"] == []


def test_names_that_are_no_text_are_written_out(photographs: Path, tmp_path: Path) -> None:
    os.rename(photographs / "images" / "1.png", os.fsencode(photographs / "images") + b"/caf\xe9.png")
    settings = {**annotate(photographs), "metrics": [{"name": "deletion", "steps": 4}]}
    found = bench(tmp_path / "out", **{**settings, "data": f"folder:{photographs}"})
    assert {row["image"] for row in rows_of(found)} == {"0.png", "2.png", "3.png", "caf\\udce9.png"}


def test_images_without_what_a_metric_requires_are_unmeasured(tmp_path: Path) -> None:
    examples = open_dataset("scenes")
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    boxes = ["file,x0,y0,x1,y1"]
    for index in range(4):
        example = examples[index]
        example.image.save(tmp_path / "data" / "images" / f"{index}.png")  # type: ignore[union-attr]
        if index in (0, 3):
            assert example.boxes is not None
            boxes.append(f"{index}.png," + ",".join(str(int(each)) for each in example.boxes[0]))
    (tmp_path / "data" / "boxes.csv").write_text("\n".join(boxes) + "\n")
    (tmp_path / "data" / "masks").rmdir()
    data = {"format": "folder", "root": str(tmp_path / "data")}
    found = bench(tmp_path / "out", metrics=["energy_in_box"], data=data, methods=["rollout"])
    known = [row["value"] == row["value"] for row in rows_of(found) if row["statistic"] == "energy"]
    assert known == [True, False, False, True]
    assert [(row.n, row.unmeasured, row.images) for row in found.figures()] == [(2, 2, 4)] * 2


@pytest.mark.parametrize(
    ("metric", "figure", "counts"),
    [
        ({"name": "positive_perturbation", "steps": 3}, "accuracy_auc", set()),  # the last image has no class
        ("pointing_game", "hit_rate", {1}),  # masks are taken before boxes, and the last image alone has one
    ],
)
def test_another_selection_that_shows_metrics_something_else_mixes_nothing(
    tmp_path: Path, metric: Any, figure: str, counts: set[int]
) -> None:
    records = []
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for index in range(4):
        example = open_dataset("scenes")[index]
        assert example.boxes is not None
        assert example.mask is not None
        example.image.save(tmp_path / "data" / "images" / f"{index}.png")  # type: ignore[union-attr]
        records.append({"file": f"{index}.png", "classes": example.labels[0], "boxes": example.boxes.tolist()})
    Image.fromarray((example.mask == 1).astype(np.uint8)).save(tmp_path / "data" / "masks" / "3.png")
    records[-1] |= {"classes": None, "mask": "3.png"}
    (tmp_path / "data" / "annotations.json").write_text(json.dumps(records))
    data = {"format": "annotated", "root": str(tmp_path / "data")}
    few = bench(tmp_path / "out", methods=["rollout"], metrics=[metric], data={**data, "limit": 2})
    assert {row.figure: row.n for row in few.figures()}[figure] == 2
    both: dict[str, Any] = {"methods": ["rollout", "raw_attention"], "metrics": [metric], "data": data}
    resumed, fresh = bench(tmp_path / "out", **both), bench(tmp_path / "fresh", **both)
    assert outcome(resumed) == outcome(fresh)
    assert {row.n for row in resumed.figures() if row.figure == figure} == counts


def test_only_correct_and_labels(tmp_path: Path) -> None:
    data = {"format": "scenes", "limit": 12, "options": {"objects": 2}}
    settings = {"methods": ["tokentm"], "metrics": ["energy_in_mask"], "data": data, "chunk_size": 5}
    every = rows_of(bench(tmp_path, **settings))
    correct = rows_of(bench(tmp_path, **settings, only_correct=True))
    labels = rows_of(bench(tmp_path, **settings, target="label"))
    right = [row["image"] for row in every if row["prediction"] == row["label"]]
    assert 0 < len(right) < len(every)
    assert [row["image"] for row in correct] == right
    assert [row["target"] for row in labels] == [row["label"] for row in every]
    scenes = open_dataset("scenes", objects=2)
    energies = [row for row in labels if row["statistic"] == "energy"]
    assert [row["label"] for row in energies] == [scenes[index].labels[0] for index in range(12)]
    same = {row["image"]: row["value"] for row in every if row["statistic"] == "energy"}
    assert all(
        row["value"] == pytest.approx(same[row["image"]], rel=1e-3) for row in correct if row["statistic"] == "energy"
    )


def test_classes_of_another_model_are_refused(tmp_path: Path) -> None:
    images = tmp_path / "data" / "images" / "n02123045"
    images.mkdir(parents=True)
    Image.new("RGB", (96, 96), (90, 0, 0)).save(images / "a.png")
    data = {"format": "folder", "root": str(tmp_path / "data")}
    with pytest.raises(InputError, match=r"is of class 281, expected 0 to 11: the model has 12 classes"):
        bench(tmp_path / "out", data=data)
    (tmp_path / "names.json").write_text(json.dumps(CLASS_NAMES))
    images.rename(images.with_name("heart"))
    found = bench(
        tmp_path / "out",
        models={"labels": str(tmp_path / "names.json")},
        data=data,
        target="label",
        metrics=["class_sensitivity"],
    )
    assert {row["target"] for row in rows_of(found)} == {CLASS_NAMES.index("heart")}


def test_several_models(tmp_path: Path) -> None:
    models = [{"name": "scenes"}, {"name": "scenes", "label": "dimmed", "preprocessing": {"mean": [0.7, 0.7, 0.7]}}]
    found = bench(tmp_path, models=models, metrics=["auprc"])
    assert [each["label"] for each in found.run["models"]] == ["scenes", "dimmed"]
    values = {row.model: row.value for row in found.figures() if row.figure == "auprc" and row.method == "tokentm"}
    assert values["scenes"] != values["dimmed"]


def test_missing_weights_are_found_before_anything_is_computed(tmp_path: Path, explained: list[Any]) -> None:
    models = ["scenes", {"name": "timm:vit_tiny_patch16_224", "label": "second", "checkpoint": str(tmp_path / "no.pt")}]
    with pytest.raises(CheckpointError, match=r"'second': no file .*no\.pt"):
        bench(tmp_path / "out", models=models)
    assert explained == []


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"the model 'odd': .*97x97"):
        bench(tmp_path, models={"label": "odd", "preprocessing": {"size": [97, 97]}})


def test_the_store_lies_in_the_folder(unbroken: Path) -> None:
    assert {path.name for path in unbroken.iterdir()} == {
        *(".lock", "cells", "figures.parquet", "plots", "report.html", "report.md", "results.parquet", "run.json"),
    }
    assert all(CellStore(unbroken / "cells").read(path.stem) is not None for path in unbroken.glob("cells/*/*.parquet"))


def test_gates_trained_again_under_the_same_name_are_noticed(tmp_path: Path) -> None:
    gates = tmp_path / "gates.safetensors"
    for suffix in (".safetensors", ".json"):
        shutil.copy((ASSETS / "scenes_diffmask").with_suffix(suffix), gates.with_suffix(suffix))
    chosen: dict[str, Any] = {
        "methods": [{"name": "diffmask", "checkpoint": str(gates)}],
        "metrics": ["energy_in_mask"],
        "data": {"format": "scenes", "limit": 2},
    }
    before = rows_of(bench(tmp_path / "results", **chosen))
    assert rows_of(bench(tmp_path / "results", **chosen)) == before
    with safe_open(gates, "pt") as file:
        about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({name: -tensor for name, tensor in weights.items()}, gates, metadata=about)
    assert rows_of(bench(tmp_path / "results", **chosen)) != before
