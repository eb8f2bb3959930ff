"""The app as a server: many visitors at once, bad uploads, files that are nobody's business."""

from __future__ import annotations

import base64
import io
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_process import running
from PIL import Image

from vitexplain import compare, load_model
from vitexplain.app.fragments import maps_html
from vitexplain.data.scenes import SPLITS, make_scene

pytestmark = pytest.mark.browser
VISITORS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with running(folder) as found:
        yield found
    assert list(folder.iterdir()) == [], "nothing is left behind"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"scene-{index}.png" for index in range(VISITORS)]
    for file, index in zip(files, SPLITS["test"][:VISITORS], strict=True):
        Image.fromarray(make_scene(index, num_objects=2).image).save(file)
    return files


def visitor(address: str, **settings: Any) -> Any:
    """A visitor with the patience that busy machines ask for, whose page has begun."""
    from gradio_client import Client

    client = Client(address, verbose=False, httpx_kwargs={"timeout": 300}, **settings)
    client.predict(api_name="/begin")
    return client


def upload(picture: Path) -> Any:
    """A file as the client sends it."""
    from gradio_client import handle_file

    return handle_file(picture)


def visit(address: str, picture: Path) -> tuple[list[int], str]:
    """Uploads a picture and explains its second most probable class: this, and the maps."""
    client = visitor(address)
    try:
        _, classes = client.predict(upload(picture), api_name="/upload")
        targets = [index for _, index in classes["choices"][1:2]]
        maps, _, _ = client.predict(methods=["rollout", "gradcam"], classes=targets, api_name="/explain")
        return targets, maps
    finally:
        client.close()


def test_many_visitors_at_once_each_get_their_own_maps(address: str, pictures: list[Path]) -> None:
    with ThreadPoolExecutor(VISITORS) as pool:
        results = list(pool.map(lambda picture: visit(address, picture), pictures))
    first, second = (_drawn(maps) for _, maps in results[:2])
    assert all(np.abs(one - other).mean() > 1 for one, other in zip(first, second, strict=True)), "alike"
    model = load_model("scenes")
    for picture, (targets, maps) in zip(pictures, results, strict=True):
        expected = compare(model, [picture], ["rollout", "gradcam"], targets=targets)
        assert [case.target for case in expected.cases] == targets
        drawn = zip(_drawn(maps), _drawn(maps_html(expected, "overlay", True, False)), strict=True)
        for shown, own in drawn:  # the server may run on another number of threads, whose rounding is another
            assert np.abs(shown - own).max() <= 8  # one step of a coefficient of the JPEG
            assert np.abs(shown - own).mean() < 0.01


def _drawn(maps: str) -> list[np.ndarray]:
    """The picture and its two maps as they are shown, in grey levels."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', maps)
    assert len(found) == 3
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB"), np.float64) for each in found]


def test_a_bad_upload_is_told_and_the_app_lives_on(address: str, pictures: list[Path], tmp_path: Path) -> None:
    from gradio_client.exceptions import AppError

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing of the kind")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    client = visitor(address)
    for name, message in (("broken.png", "not a picture|broken"), ("huge.png", "400000000 pixels")):
        with pytest.raises(AppError, match=message) as error:
            client.predict(upload(tmp_path / name), api_name="/upload")
        assert str(tmp_path) not in str(error.value)
    client.close()
    targets, _ = visit(address, pictures[0])
    assert len(targets) == 1


def test_listens_on_this_machine_alone(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))  # would be taken if the app listened everywhere


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(Path(__file__).resolve()), "setup.cfg", "../setup.cfg", "https://example.org/a.png"]
)
def test_no_file_of_the_server_is_handed_out(address: str, path: str) -> None:
    import httpx

    assert httpx.get(f"{address}gradio_api/file={path}", timeout=300).status_code == 403


def test_a_path_instead_of_an_upload_is_refused(address: str) -> None:
    import httpx

    file: Any = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    joined = {"data": [None, file], "fn_index": _number(address, "upload"), "session_hash": "intruder"}
    assert httpx.post(f"{address}gradio_api/queue/join", json=joined, timeout=300).status_code == 200
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash=intruder", timeout=300) as answer:
        text = next(line for line in answer.iter_lines() if "process_completed" in line)
    assert '"success":false' in text.replace(" ", "")
    assert "root" not in text
    assert "expired" not in text, "the function was not called"
    assert "no file that was uploaded to this app" in text


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (None, "no picture was sent: choose one"),
        ("text", "no file that was uploaded to this app, or not of the form"),
    ],
)
def test_what_is_no_upload_is_answered_by_a_message(address: str, sent: Any, said: str) -> None:
    from gradio_client.exceptions import AppError

    client = visitor(address)
    with pytest.raises(AppError, match=said):
        client.predict(sent, api_name="/upload")
    client.close()


def test_a_class_is_explained_that_is_named(address: str) -> None:
    client = visitor(address)
    maps, _, _ = client.predict(methods=["rollout"], classes=[], named="star", api_name="/explain")
    assert "star" in maps
    client.close()


@pytest.mark.parametrize("route", ["queue/join", "run/upload", "api/upload", "call/upload", "call/v2/upload"])
def test_an_address_instead_of_an_upload_is_refused(address: str, route: str) -> None:
    import httpx

    file: Any = {"path": "https://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
    values: Any = {"file": file} if "v2" in route else {"data": [None, file], "fn_index": _number(address, "upload")}
    answer = httpx.post(f"{address}gradio_api/{route}", json={**values, "session_hash": "intruder"}, timeout=300)
    assert (answer.status_code, answer.text) == (403, "this server fetches nothing from elsewhere")


def test_a_page_whose_server_was_restarted_is_told_to_be_reloaded(address: str, pictures: list[Path]) -> None:
    from gradio_client.exceptions import AppError

    client = visitor(address)
    client.reset_session()  # unknown from now on, like the page
    with pytest.raises(AppError, match="reload the page"):
        client.predict(upload(pictures[0]), api_name="/upload")
    client.close()


def _number(address: str, name: str) -> int:
    import httpx

    endpoints = httpx.get(f"{address}config", timeout=300).json()["dependencies"]
    (found,) = [each["id"] for each in endpoints if each["api_name"] == name]
    return int(found)


def test_downloads_are_whole_and_go_with_their_visitor(
    address: str, folder: Path, pictures: list[Path], tmp_path: Path
) -> None:
    client = visitor(address, download_files=str(tmp_path / "got"))
    client.predict(upload(pictures[0]), api_name="/upload")
    client.predict(methods=["rollout"], classes=[0], api_name="/explain")
    result = client.predict(api_name="/files")
    assert list(folder.glob("vitexplain-app-*/*/comparison.html"))
    client.close()
    files = {Path(file).name: Path(file) for file in result["value"]}
    assert set(files) == {"comparison.html", "comparison.png", "scores.npz"}
    assert files["comparison.html"].read_text().rstrip().endswith("</html>")
    with Image.open(files["comparison.png"]) as picture:
        assert picture.width > picture.height
    latest = time.monotonic() + 30
    while list(folder.glob("vitexplain-app-*/*/comparison.html")):
        assert time.monotonic() < latest, "the files of a visitor who has left are still there"
        time.sleep(0.2)
