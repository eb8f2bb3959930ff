"""The parts of the app, without a server: limits, option controls, sessions, files, fragments, the page's events."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import math
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitexplain import (
    CheckpointError,
    InputError,
    OptionError,
    UnknownNameError,
    VitExplainError,
    create_method,
    list_methods,
    method_info,
)
from vitexplain.app.command import app_command
from vitexplain.app.fragments import figures_html, maps_html, preview_html
from vitexplain.app.guard import OutsideRefused
from vitexplain.app.limits import Limits, read_upload
from vitexplain.app.option_form import Control, configured, controls_of, offered_methods
from vitexplain.app.serving import serve
from vitexplain.app.session import TOP, Session
from vitexplain.app.shelf import Shelf
from vitexplain.app.uploads import Uploads
from vitexplain.data.scenes import SPLITS, make_scene


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture(scope="module")
def scene() -> bytes:
    return png(Image.fromarray(make_scene(SPLITS["test"][0], num_objects=2).image))


@pytest.fixture(scope="module")
def session(shelf: Shelf, scene: bytes) -> Session:
    return Session(shelf.model("scenes"), Limits()).with_picture(scene, "scene.png")


class TestLimits:
    def test_a_picture_within_them_is_read(self, tmp_path: Path, scene: bytes) -> None:
        (tmp_path / "a.png").write_bytes(scene)
        assert read_upload(tmp_path / "a.png", Limits()) == scene

    @pytest.mark.parametrize(
        ("content", "limits", "message"),
        [
            (b"\x89PNG\r\n\x1a\n broken", Limits(), "not a picture|broken"),
            (b"", Limits(), "empty"),
            (b"%PDF-1.4", Limits(), "PDF"),
            (b"x" * 2000, Limits(image_bytes=1999), "0.0 MB, expected at most"),
            (png(Image.new("1", (20_000, 20_000))), Limits(), "400000000 pixels"),
        ],
    )
    def test_others_are_refused_by_a_message_with_the_name_and_without_a_path(
        self, tmp_path: Path, content: bytes, limits: Limits, message: str
    ) -> None:
        (tmp_path / "secret-place").mkdir()
        (tmp_path / "secret-place" / "holiday.png").write_bytes(content)
        with pytest.raises(InputError, match=f"^holiday.png.*({message})") as error:
            read_upload(tmp_path / "secret-place" / "holiday.png", limits)
        assert "secret-place" not in str(error.value)

    def test_a_file_that_is_gone_is_asked_for_again(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="choose the picture again"):
            read_upload(tmp_path / "gone.png", Limits())


class TestOptionForm:
    @pytest.mark.parametrize("name", offered_methods())
    def test_every_method_comes_out_as_it_is_by_default(self, name: str) -> None:
        controls = list(controls_of(name))
        (method,) = configured([name], controls, [each.settings["value"] for each in controls])
        assert method == create_method(name)
        asked = {each.option for each in controls}
        for field in dataclasses.fields(method_info(name).method):
            free_text = isinstance(field.default, str) and not field.metadata["choices"]
            assert (field.name in asked) != free_text

    def test_what_must_be_trained_is_not_offered(self) -> None:
        assert set(offered_methods()) == set(list_methods()) - set(list_methods(trainable=True))
        assert "diffmask" not in offered_methods()

    def test_entries_are_read_by_the_type_of_the_default(self) -> None:
        assert Control("", "", 0.5).read(1) == 1.0
        assert Control("", "", 1.0).read("2.5") == 2.5
        assert Control("", "", 1.0).read("tokens") == "tokens"
        assert Control("", "", 3).read(None) == 3
        assert Control("", "", True).read(False) is False

    def test_chosen_methods_get_their_own_options(self) -> None:
        controls = [Control("rollout", "head_fusion", "mean"), Control("gradcam", "relu", True)]
        methods = configured(["gradcam", "rollout"], controls, ["max", False])
        assert methods == [create_method("gradcam", relu=False), create_method("rollout", head_fusion="max")]
        with pytest.raises(OptionError, match="head_fusion"):
            configured(["rollout"], controls, ["median", True])


class TestSession:
    def test_the_most_probable_classes_are_offered(self, session: Session) -> None:
        assert len(session.probable) == TOP
        values = [value for _, _, value in session.probable]
        assert values == sorted(values, reverse=True)
        assert session.probable[0][1] == "mug"

    def test_compares_what_was_chosen(self, session: Session) -> None:
        classes = [index for index, _, _ in session.probable[:2]]
        made = session.compared([create_method("rollout"), create_method("tokentm")], classes).made()
        assert [case.target for case in made.cases] == classes
        assert made.images == ["scene.png"]

    def test_another_picture_or_model_forgets_the_comparison(self, session: Session, scene: bytes) -> None:
        made = session.compared([create_method("rollout")], [0])
        for changed in (made.with_picture(scene, "b.png"), made.with_model(session.model)):
            with pytest.raises(InputError, match="press Explain"):
                changed.made()

    def test_a_class_may_be_named_beside_those_that_are_chosen(self, session: Session) -> None:
        first = session.probable[0][0]
        assert session.chosen([first], " ") == [first]
        assert session.chosen([first], "Star") == [first, session.model.class_index("star")]
        assert session.chosen([first], str(first)) == [first]
        with pytest.raises(UnknownNameError, match=r"no class called 'strar' \(did you mean 'star'"):
            session.chosen([first], "strar")

    def test_what_is_missing_is_asked_for(self, session: Session, shelf: Shelf) -> None:
        with pytest.raises(OptionError, match="no methods"):
            session.compared([], [0])
        with pytest.raises(OptionError, match="no class"):
            session.compared([create_method("rollout")], [])
        empty = Session(shelf.model("scenes"), Limits())
        assert empty.probable == []
        with pytest.raises(InputError, match="no picture yet"):
            empty.compared([create_method("rollout")], [0])

    def test_the_preview_is_small(self, shelf: Shelf) -> None:
        large = png(Image.new("RGB", (1600, 800), "teal"))
        found = Session(shelf.model("scenes"), Limits()).with_picture(large, "large.png")
        assert max(found.preview().size) == 420
        assert found.picture.size == (1600, 800)


class TestShelf:
    def test_keeps_a_few_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vitexplain.app import shelf as module

        loaded: list[str] = []
        monkeypatch.setattr(module, "load_model", lambda name, device: loaded.append(name) or name)
        shelf = Shelf(size=2)
        for name in ("a", "b", "a", "c", "a", "b"):
            shelf.model(name)
        assert loaded == ["a", "b", "c", "b"]

    def test_weights_of_a_visitor_are_not_kept_and_errors_name_no_path(self, shelf: Shelf, tmp_path: Path) -> None:
        (tmp_path / "own.safetensors").write_bytes(b"nonsense")
        with pytest.raises(CheckpointError, match=r"'own\.safetensors'") as error:
            shelf.with_weights("timm:vit_tiny_patch16_224", tmp_path / "own.safetensors")
        assert str(tmp_path) not in str(error.value)
        assert shelf.model("scenes").weights == "embedded"


class TestUploads:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "digest" / "a.png"
        path.parent.mkdir()
        path.write_bytes(b"content")
        return path

    def test_go_with_the_last_visitor(self, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        uploads = Uploads(tmp_path)
        uploads.note("one", file)
        uploads.note("two", file)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 120)
        uploads.forget("one")
        assert file.exists()
        uploads.forget("two")
        assert not file.parent.exists()

    def test_what_may_be_just_arriving_for_another_stays(self, tmp_path: Path, file: Path) -> None:
        uploads = Uploads(tmp_path)
        uploads.note("one", file)
        uploads.forget("one")
        assert file.exists()

    def test_files_to_download_are_the_visitors_own(self, tmp_path: Path) -> None:
        uploads = Uploads(tmp_path)
        first, other = uploads.own_folder("one"), uploads.own_folder("two")
        (first / "report.html").write_text("x")
        second = uploads.own_folder("one")
        assert not first.exists(), "earlier files are removed"
        uploads.forget("one")
        assert (second.exists(), other.exists()) == (False, True)
        assert os.listdir(tmp_path) == [other.name]


class TestFragments:
    def test_class_specific_maps_change_with_the_class_and_others_stay(self, session: Session) -> None:
        import re

        methods = [create_method(name) for name in ("rollout", "gradcam", "tokentm")]
        made = session.compared(methods, [index for index, _, _ in session.probable[:2]]).made()
        for view in ("overlay", "patches"):
            text = maps_html(made, view, smooth=False, share_scale=view == "overlay")
            assert text.count(f"<strong>Input</strong> {session.model.name}") == 2
            found = re.findall(r'src="(data:[^"]+)" alt="[^"]+" data-method="(\w+)" data-target="(\d+)"', text)
            assert len(found) == 6
            pictures = {(method, target): source for source, method, target in found}
            assert len(set(pictures.values())) == 5
            first, second = (str(case.target) for case in made.cases)
            assert pictures["rollout", first] == pictures["rollout", second]
        assert "the same for every class" in text

    def test_names_are_text(self, scene: bytes, session: Session) -> None:
        picture = Image.new("RGB", (8, 8))
        assert "<b>" not in preview_html(picture, "<b>bold</b>")
        labels = ["<script>x</script>"] * 12
        subject = dataclasses.replace(session.model.subject, labels=labels)
        spoiled = dataclasses.replace(session, model=dataclasses.replace(session.model, subject=subject))
        made = spoiled.compared([create_method("rollout")], [0]).made()
        assert "<script>" not in maps_html(made, "overlay", True, False)
        assert "<script>" not in figures_html(made)

    def test_figures_are_those_of_the_table(self, session: Session) -> None:
        made = session.compared([create_method("gradcam")], [session.probable[0][0]]).made()
        (row,) = made.table(cost=False).rows
        text = figures_html(made)
        for name in ("deletion", "insertion", "saco"):
            assert f">{row[name]:.3f}<" in text
        assert np.isnan(row["agreement"])


class TestPage:
    @pytest.fixture
    def page(self, shelf: Shelf, tmp_path: Path) -> Any:
        from vitexplain.app.page import Page

        return Page(shelf, Limits(), Uploads(tmp_path))

    def test_begins_with_the_model_and_the_picture_that_it_shows(self, page: Any, scene: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(scene)
        begun, preview, _ = page._begin(None)
        assert (begun.model.name, begun.content) == ("scenes", page.examples[0][0])
        assert begun.name in preview
        taken, _, classes = page._take_upload(begun, str(tmp_path / "a.png"), SimpleNamespace(session_hash="one"))
        assert (taken.model, taken.name) == (begun.model, "a.png")
        assert len(classes["choices"]) == TOP
        assert page._draw(taken, "overlay", True, False) == ""

    @pytest.mark.parametrize(
        "event",
        [
            lambda page, file, request: page._take_upload(None, file, request),
            lambda page, file, request: page._take_example(None, SimpleNamespace(index=0)),
            lambda page, file, request: page._take_model(None, "timm:none", None, request),
            lambda page, file, request: page._explain(None, ["rollout"], [0], "overlay", True, False, ""),
            lambda page, file, request: page._draw(None, "overlay", True, False),
            lambda page, file, request: page._measure(None),
            lambda page, file, request: page._make_files(None, request),
        ],
        ids=["upload", "example", "model", "explain", "draw", "measure", "files"],
    )
    def test_once_it_has_expired_nothing_is_explained_by_another_model(
        self, page: Any, scene: bytes, tmp_path: Path, event: Callable[..., Any]
    ) -> None:
        import gradio as gr

        (tmp_path / "a.png").write_bytes(scene)
        with pytest.raises(gr.Error, match=r"this page has expired.*reload"):
            event(page, str(tmp_path / "a.png"), SimpleNamespace(session_hash="one"))

    def test_no_picture_is_told(self, page: Any) -> None:
        import gradio as gr

        with pytest.raises(gr.Error, match="no picture was sent: choose one"):
            page._take_upload(page._begin(None)[0], None, SimpleNamespace(session_hash="one"))

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory"),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ],
    )
    def test_what_does_not_fit_into_memory_is_told(self, error: Exception) -> None:
        import gradio as gr

        from vitexplain.app.page import told

        with pytest.raises(gr.Error, match="choose a smaller model"), told():
            raise error

    def test_what_nobody_foresaw_is_no_message_to_visitors(self) -> None:
        from vitexplain.app.page import told

        with pytest.raises(RuntimeError, match="shapes"), told():
            raise RuntimeError("shapes cannot be multiplied")


def answered(method: str, path: str, body: bytes = b"", kind: str = "application/json") -> tuple[int, bytes]:
    """The status of a request that comes in two pieces, and what of its body reached the app behind the guard."""
    pieces = [
        {"type": "http.request", "body": body[:9], "more_body": True},
        {"type": "http.request", "body": body[9:], "more_body": False},
    ]
    reached: list[bytes] = []
    sent: list[MutableMapping[str, Any]] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            reached.append(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200})

    async def receive() -> MutableMapping[str, Any]:
        return pieces.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    request = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", kind.encode())]}
    with ThreadPoolExecutor(1) as other:  # this thread may have a loop already, where a browser was driven from it
        other.submit(lambda: asyncio.run(OutsideRefused(behind)(request, receive, send))).result()  # type: ignore[arg-type]
    return sent[0]["status"], b"".join(reached)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gradio_api/file=https://example.org/a.png", 403),
        ("/gradio_api/file=HTTP%3A//example.org/a.png", 403),
        ("/gradio_api/proxy=https://example.org/", 403),
        ("/gradio_api/file=/srv/a.png", 200),
        ("/", 200),
    ],
)
def test_the_server_fetches_nothing_for_its_visitors(path: str, status: int) -> None:
    assert answered("GET", path)[0] == status


@pytest.mark.parametrize("path", ["queue/join", "run/upload", "call/upload", "call/v2/upload", "stream/1"])
@pytest.mark.parametrize("address", ["http://example.org/a.png", "https://example.org/a.png", "HTTPS://example.org"])
def test_nor_where_an_address_stands_for_an_upload(path: str, address: str) -> None:
    file = {"path": address, "meta": {"_type": "gradio.FileData"}}
    for values in ([None, file], [None, [{"deeper": [file]}]], {"file": file}):
        body = json.dumps({"data": values, "session_hash": "intruder"})
        assert answered("POST", f"/gradio_api/{path}", body.encode()) == (403, b"")
        assert answered("POST", f"/gradio_api/{path}", body.replace("h", "\\u0068").encode("utf-16")) == (403, b"")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"data": [{"path": "/a/b.png", "url": "http://127.0.0.1/b.png", "size": null}]}', "application/json"),
        (b'{"data": ["https://example.org", {"path": null}, {"path": ["http:"]}]}', "application/json"),
        (b"", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'--line\r\n{"path": "http://example.org"}\r\n--line--', "multipart/form-data; boundary=line"),
    ],
    ids=["upload", "texts", "nothing", "deep", "file"],
)
def test_other_values_reach_the_app_as_they_were_sent(body: bytes, kind: str) -> None:
    assert answered("POST", "/gradio_api/queue/join", body, kind) == (200, body)


def test_ctrl_c_says_that_the_app_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitexplain.app.command.serve", lambda **_: nullcontext("http://127.0.0.1:7860/"))
    monkeypatch.setattr(time, "sleep", pressed)
    with pytest.raises(KeyboardInterrupt, match="the app has stopped"):
        app_command(browser=False)


@pytest.mark.parametrize("limit", [math.nan, math.inf, 0.0, -3.0])
@pytest.mark.parametrize("name", ["megabytes", "megapixels"])
def test_limits_that_are_none_are_refused(name: str, limit: float) -> None:
    with pytest.raises(OptionError, match=rf"--{name} is .*, expected a number above 0"):
        app_command(**{name: limit}, browser=False)


@pytest.mark.parametrize("port", [None, 70_000])
def test_a_port_that_cannot_be_had_is_told(port: int | None) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(VitExplainError, match="choose another port"), serve(port=port or other.getsockname()[1]):
            pytest.fail("the app runs")
