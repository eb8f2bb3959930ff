"""The Ray engine: the same results as the local one, also where workers die. Needs the extra ``ray``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deadly import Deadly
from exported import contents, export, pictures, prepared_by

from vitexplain import VitExplainError

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    # Ray leaves sockets and processes to the garbage collector, and warns of its own next defaults
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two cores of this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray = pytest.importorskip("ray", reason="the Ray engine is tested where Ray is installed")
        with pytest.MonkeyPatch.context() as patch:  # workers find this package, and what the tests define
            patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            yield ray
            ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    pictures(folder, 10)
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def test_workers_go_on_where_one_process_stopped_and_where_one_of_them_dies(
    cluster: Any, images: Path, tmp_path: Path
) -> None:
    before = contents(export(images, tmp_path / "out", view="overlay").folder)
    for shard in (1, 2):
        (tmp_path / "out" / "rows" / f"{shard:06d}.parquet").unlink()
    (tmp_path / "out" / "scores.zarr" / "tokentm" / "c" / "1/0/0/0").unlink()
    model = prepared_by(Deadly, marker=str(tmp_path / "died"))
    result = export(images, tmp_path / "out", view="overlay", engine="ray", ray_workers=2, model=model)
    assert (tmp_path / "died").exists()
    assert cluster.is_initialized()  # it was here before
    assert contents(tmp_path / "out") == before
    assert [path for path, _ in result.failures] == [str(images / "bad.png")]
    assert [run["engine"] for run in result.manifest["runs"]] == ["local", "ray"]


def test_without_ray_it_says_what_to_install(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitexplain.export import extra

    before = extra.find_spec
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "ray" else before(name))
    with pytest.raises(VitExplainError, match=r"needs ray.*pip install 'vitexplain\[ray\]'"):
        export(images, tmp_path, engine="ray")
