"""Reading an export back: precision, tables, pictures on demand, one file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import LABELS, export, pictures, tiny_model

from vitexplain import (
    ExportError,
    InputError,
    UnknownNameError,
    VitExplainError,
    create_method,
    explain_with,
    open_export,
)
from vitexplain.export import extra, single_file
from vitexplain.export.folder import quantised
from vitexplain.export.results import HeatmapExport
from vitexplain.export.shard import MapShape, ShardResult


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("images"), 6)


@pytest.fixture(scope="module")
def result(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> HeatmapExport:
    """Six images and one that fails, two targets, half precision."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "in").mkdir()
    table = folder / "in" / "list.txt"
    table.write_text("\n".join(map(str, [*images[:2], "gone.png", *images[2:]])))
    return export(table, folder / "out", targets=[1, "fox"], dtype="float16")


def test_scores_by_number_and_by_path(result: HeatmapExport, images: list[Path]) -> None:
    assert result.scores(3, "tokentm").shape == (2, 4, 6)
    np.testing.assert_array_equal(result.scores(3, "tokentm"), result.scores(str(images[2]), "tokentm"))
    np.testing.assert_array_equal(result.all_scores("tokentm", 0)[3], result.scores(3, "tokentm"))
    for image, message in ((7, "found image 7, expected 0 to 6"), ("x", "found 0 images with the path 'x'")):
        with pytest.raises(InputError, match=message):
            result.scores(image, "tokentm")
    with pytest.raises(UnknownNameError, match="did you mean 'tokentm'"):
        result.scores(0, "tokentmm")


def test_half_precision_is_relative_to_each_map(result: HeatmapExport, images: list[Path]) -> None:
    methods = [create_method(name) for name in result.methods]
    for number in (0, 5):
        file = str(images[number if number < 2 else number - 1])
        for explanation in explain_with(methods, tiny_model().subject, file, torch.tensor([[1, 4]])):
            expected = explanation.scores[0].numpy()
            error = np.abs(result.scores(number, explanation.method) - expected).max((1, 2))
            assert (error <= 2**-11 * np.abs(expected).max((1, 2))).all()
            assert error.max() > 0


@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1.0, 3e4, 1e6, 1e30])
def test_no_magnitude_is_lost_in_half_precision(magnitude: float) -> None:
    scores = np.random.default_rng(0).standard_normal((3, 2, 4, 5)).astype(np.float32) * np.float32(magnitude)
    scores[1] = 0
    stored, scales = quantised(scores, "float16")
    assert stored.dtype == np.float16
    back = stored.astype(np.float32) * scales[:, :, None, None]
    assert np.abs(back - scores).max() <= 2**-11 * np.abs(scores).max()
    assert (back[1] == 0).all()
    assert all(math.frexp(each)[0] == 0.5 for each in scales.reshape(-1).tolist())


def test_broken_scores_stay_broken_and_no_others() -> None:
    scores = np.ones((1, 1, 2, 2), np.float32)
    scores[0, 0, 0] = [np.nan, np.inf]
    stored, scales = quantised(scores, "float16")
    back = stored.astype(np.float32) * scales[0, 0]
    np.testing.assert_array_equal(back, scores)


def test_the_table_for_pandas(result: HeatmapExport) -> None:
    frame = result.frame()
    assert len(frame) == 7 * 2 * 2
    assert frame[frame["error"].isna()]["label"].unique().tolist() == [LABELS[1], LABELS[4]]
    assert frame[frame["error"].notna()]["image"].unique().tolist() == [2]
    assert result.table(["image", "mean"]).column_names == ["image", "mean"]
    mean = [float(result.scores(0, "rollout")[k].mean()) for k in (0, 1)]
    assert frame["mean"][:2].tolist() == pytest.approx(mean, rel=1e-3)


def test_heatmaps_and_overlays_on_demand(result: HeatmapExport, images: list[Path]) -> None:
    (explanation,) = explain_with(
        [create_method("tokentm")], tiny_model().subject, str(images[0]), torch.tensor([[1, 4]])
    )
    np.testing.assert_allclose(result.heatmap(0, "tokentm"), explanation.heatmap()[0], atol=2e-3)
    assert result.heatmap(0, "tokentm", (8, 9)).shape == (2, 8, 9)
    difference = result.overlay(0, "tokentm", alpha=0.5).astype(int) - explanation.overlay(alpha=0.5)[0]
    assert np.abs(difference).max() <= 3


def test_one_file_npz(result: HeatmapExport, tmp_path: Path) -> None:
    with np.load(result.save(tmp_path / "all.npz"), allow_pickle=False) as arrays:
        check_one_file(result, {name: arrays[name] for name in arrays.files})


def test_one_file_hdf5(result: HeatmapExport, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="HDF5 needs the extra 'export'")
    with h5py.File(result.save(tmp_path / "all.h5")) as file:
        arrays = {name: file[name][()] for name in ("class", "probability")}
        arrays |= {name: file[name].asstr()[()] for name in ("path", "error")}
        arrays |= {f"scores/{method}": file["scores"][method][()] for method in result.methods}
    check_one_file(result, arrays)


def check_one_file(result: HeatmapExport, arrays: dict[str, np.ndarray]) -> None:
    assert arrays["path"].tolist() == [entry.path for entry in result.entries]
    assert arrays["class"].tolist() == [[-1, -1] if number == 2 else [1, 4] for number in range(7)]
    assert [bool(each) for each in arrays["error"]] == [number == 2 for number in range(7)]
    assert np.isnan(arrays["probability"][2]).all()
    for method in result.methods:
        scores = arrays[f"scores/{method}"]
        assert scores.dtype == np.float32
        assert np.isnan(scores[2]).all()
        for number in (0, 1, 3, 4, 5, 6):
            np.testing.assert_array_equal(scores[number], result.scores(number, method))


def test_one_file_is_refused(result: HeatmapExport, images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found suffix '.csv'.*expected \.npz, \.h5"):
        result.save(tmp_path / "all.csv")
    unfinished = export(images, tmp_path / "out")
    (tmp_path / "out" / "rows" / "000001.parquet").unlink()
    with pytest.raises(InputError, match="is not finished"):
        unfinished.save(tmp_path / "all.npz")
    assert "unfinished" in repr(unfinished)
    assert unfinished.scores(0, "rollout").shape == (4, 6)
    with pytest.raises(InputError, match="shard 1 is not computed yet"):
        unfinished.scores(4, "rollout")


def test_one_file_is_whole_or_not_there(result: HeatmapExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single_file, "_write_scores", full)
    with pytest.raises(ExportError, match="No space left"):
        result.save(tmp_path / "all.h5")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_no_process(result: HeatmapExport, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (0, 1_000, 3_000, 6_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(ExportError, match=r"cannot write .*all\.h5': OSError"):
                result.save(tmp_path / "all.h5")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list(tmp_path.iterdir())


def test_a_heatmap_of_a_method_that_is_not_there(result: HeatmapExport) -> None:
    for view in (result.heatmap, result.overlay):
        with pytest.raises(UnknownNameError, match="no method in this export called 'gradcam'"):
            view(0, "gradcam")


def test_what_is_no_export(tmp_path: Path, images: list[Path]) -> None:
    with pytest.raises(InputError, match=r"no export in .*manifest\.json is missing"):
        open_export(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        open_export(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"layout": 99}))
    with pytest.raises(InputError, match="has layout 99, expected 1"):
        open_export(tmp_path)
    done = export(images[:1], tmp_path / "out")
    (tmp_path / "out" / "inputs.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match=r"cannot read .*inputs\.parquet"):
        open_export(done.folder)


def test_a_shard_survives_the_way_between_processes(images: list[Path]) -> None:
    shapes = {"a": MapShape((2, 3), ("prefix_share",), False), "b": MapShape((4, 1), ("constant",), True)}
    shard = ShardResult.empty(7, 2, 2, shapes)
    shard.scores["a"][1] = np.arange(12).reshape(2, 2, 3)
    shard.errors[0] = "»broken«\ud800"
    shard.views[1, "b", 1] = b"\x00\xff"
    back = ShardResult.unpack(shard.pack())
    assert (back.index, back.errors, back.views) == (7, shard.errors, shard.views)
    assert list(back.scores) == ["a", "b"]
    for found, expected in ((back.scores, shard.scores), (back.columns, shard.columns)):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name], equal_nan=True) for name in expected)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, images: list[Path], tmp_path: Path) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name in ("zarr", "pyarrow") else name)
    with pytest.raises(VitExplainError, match=r"needs zarr, pyarrow.*pip install 'vitexplain\[export\]'"):
        export(images, tmp_path)
