"""The Ray engine: the same results as the local one, also where workers die. Needs the extra ``ray``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadly import Deadly
from exported import contents, export, pictures, prepared_by

from vitexplain import VitExplainError, open_export

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


def _closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def _environment() -> dict[str, str]:
    """Of processes that share a cluster by its address and a token."""
    ours = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, **ours, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}


def _command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`vitexplain export` in a process of its own: this one has joined a cluster already."""
    return subprocess.run(
        [sys.executable, "-m", "vitexplain", "export", *map(str, arguments), "--batch-size", "2", "--engine", "ray"],
        capture_output=True,
        text=True,
        timeout=240,
        env=_environment(),
    )


@pytest.mark.usefixtures("cluster")
def test_a_cluster_is_joined_by_its_address(images: Path, tmp_path: Path) -> None:
    port = _closed_port()
    address = f"127.0.0.1:{port}"
    started = f"start --head --block --num-cpus=2 --port={port} --include-dashboard=false --disable-usage-stats"
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *started.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        start_new_session=True,
    )
    try:
        for _ in range(120):
            with socket.socket() as knocking:
                if knocking.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert head.poll() is None, "the cluster did not start"
            time.sleep(0.5)
        photographs = sorted(images.glob("00*.png"))
        done = _command(*photographs, "--methods", "rollout", "--output", tmp_path / "ray", "--ray-address", address)
        assert done.returncode == 0, done.stdout + done.stderr
        assert head.poll() is None  # the cluster lives on
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # asked to stop, it would drain for half a minute
        head.wait()
    local = export(photographs, tmp_path / "local", model="scenes", methods=("rollout",), batch_size=2, shard_size=10)
    joined = open_export(tmp_path / "ray")
    assert joined.complete
    np.testing.assert_allclose(joined.all_scores("rollout", 0), local.all_scores("rollout", 0), atol=1e-6)


@pytest.mark.usefixtures("cluster")
def test_a_cluster_that_is_not_there_is_an_error(images: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{_closed_port()}"
    done = _command(images / "000.png", "--output", tmp_path / "out", "--ray-address", address)
    assert done.returncode == 2
    assert "cannot be reached" in " ".join(done.stderr.split())
