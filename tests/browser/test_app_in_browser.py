"""The app as a visitor meets it, in a browser: from a picture to maps, a second class, a download, and mishaps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from app_process import running
from PIL import Image

from vitexplain.data.scenes import SPLITS, make_scene

pytestmark = pytest.mark.browser
METHODS = ("Attention rollout", "Grad-CAM", "TokenTM")
PATIENCE = 60_000  # milliseconds; machines that test are busy


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("temporary")) as found:
        yield found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "my-scene.png"
    Image.fromarray(make_scene(SPLITS["test"][1], num_objects=2).image).save(file)
    return file


@pytest.fixture
def page(watched: Any, address: str) -> Iterator[Any]:
    watched.page.set_default_timeout(PATIENCE)
    watched.page.goto(address)
    watched.page.locator(".vx-preview img").wait_for()
    yield watched.page
    assert all(each.startswith((address, address.replace("http", "ws"))) for each in watched.requests)


def upload(page: Any, file: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(file)


def choose(page: Any, *titles: str) -> None:
    """Makes these, and no others, the chosen methods."""
    page.locator(".remove-all").click()
    box = page.get_by_label("Methods", exact=True)
    for title in titles:
        box.fill(title)
        page.get_by_role("option", name=title, exact=True).click()


def maps(page: Any) -> dict[tuple[str, str], str]:
    """Sources of the maps by method and class, once the page shows them."""
    found = page.locator(".vx-grid img[data-method]").evaluate_all(
        "images => images.map(image => [image.dataset.method, image.dataset.target, image.src])"
    )
    return {(method, target): source for method, target, source in found}


def explain(page: Any, count: int) -> dict[tuple[str, str], str]:
    before = page.locator(".vx-maps").count() and page.locator(".vx-maps").inner_html()
    page.get_by_role("button", name="Explain").click()
    page.wait_for_function(
        "([count, before]) => document.querySelectorAll('.vx-grid img[data-method]').length == count"
        " && document.querySelector('.vx-maps').innerHTML != before",
        arg=[count, before],
    )
    return maps(page)


def test_from_a_picture_to_maps_a_second_class_and_a_download(page: Any, scene: Path, tmp_path: Path) -> None:
    upload(page, scene)
    page.get_by_text("my-scene.png").last.wait_for()
    page.locator("figcaption", has_text="my-scene.png").wait_for()
    choose(page, *METHODS)
    first = explain(page, 3)
    assert len(set(first.values())) == 3, "three different maps"
    assert len({target for _, target in first}) == 1

    boxes = page.locator("input[type=checkbox][name]")
    page.get_by_label("key 78%").uncheck()
    page.get_by_label("mug 11%").check()
    assert boxes.count() >= 6
    second = explain(page, 3)
    (one,), (other,) = ({target for _, target in found} for found in (first, second))
    assert one != other
    assert first["rollout", one] == second["rollout", other], "rollout knows no class"
    for method in ("gradcam", "tokentm"):
        assert first[method, one] != second[method, other]

    page.get_by_role("button", name="Measure faithfulness").click()
    page.locator(".vx-figures table").wait_for()
    assert page.locator(".vx-figures tbody tr").count() == 3

    page.get_by_role("button", name="Make files to download").click()
    link = page.locator("a[download='comparison.html']")
    link.wait_for()
    with page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "report.html")
    assert "Attention rollout" in (tmp_path / "report.html").read_text()


def test_an_option_changes_its_method_alone(page: Any) -> None:
    choose(page, "Attention rollout", "Grad-CAM")
    before = explain(page, 2)
    page.get_by_role("button", name="Options of the methods").click()
    fusion = page.get_by_label("head fusion").locator("visible=true").first
    fusion.click()
    page.get_by_role("option", name="max", exact=True).click()
    after = explain(page, 2)
    (target,) = {target for _, target in before}
    assert before["rollout", target] != after["rollout", target]
    assert before["gradcam", target] == after["gradcam", target]


def test_another_view_needs_no_new_explanation(page: Any) -> None:
    choose(page, "Attention rollout")
    before = explain(page, 1)
    page.get_by_label("View").click()
    page.get_by_role("option", name="patches").click()
    page.wait_for_function(
        "before => document.querySelector('.vx-grid img[data-method]').src != before", arg=next(iter(before.values()))
    )


def test_an_example_is_chosen(page: Any) -> None:
    before = page.locator(".vx-preview img").get_attribute("src")
    page.locator("button.thumbnail-item, .grid-container button").nth(2).click()
    page.wait_for_function("before => document.querySelector('.vx-preview img').src != before", arg=before)


def test_mishaps_are_told_and_the_app_lives_on(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing of the kind")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    for name, message in (("broken.png", "Expected"), ("huge.png", "400000000 pixels")):
        upload(page, tmp_path / name)
        told = page.locator(".toast-body", has_text=message)
        told.wait_for()
        told.get_by_test_id("toast-close").click()
        told.wait_for(state="detached")
        page.get_by_text("Drop File Here").first.wait_for()
    choose(page, "Attention rollout")
    assert len(explain(page, 1)) == 1


def test_nothing_chosen_is_told(page: Any) -> None:
    page.locator(".remove-all").click()
    page.get_by_role("button", name="Explain").click()
    page.locator(".toast-body", has_text="choose at least one").wait_for()
