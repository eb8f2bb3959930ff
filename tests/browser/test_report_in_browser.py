"""The report as a reader meets it: opened from a file, in a browser, with pointer and keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitexplain import Comparison, compare
from vitexplain.data.scenes import SPLITS, make_scene

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    pictures = [Image.fromarray(make_scene(index, num_objects=2).image) for index in SPLITS["test"][:2]]
    return compare("scenes", pictures, ["rollout", "gradcam", "tokentm"], top=2)


@pytest.fixture(scope="module")
def file(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparison.save(tmp_path_factory.mktemp("page") / "report.html", cost=False)


@pytest.fixture
def page(watched: Any, file: Path) -> Any:
    watched.page.goto(file.as_uri())
    yield watched.page
    assert watched.errors == []
    assert watched.requests == [file.as_uri()]


def opacity(page: Any) -> float:
    return float(page.locator(".map img.smooth").first.evaluate("image => getComputedStyle(image).opacity"))


def test_the_slider_changes_the_opacity_also_by_keyboard(page: Any) -> None:
    slider = page.get_by_label("Opacity")
    assert opacity(page) == pytest.approx(0.85)
    slider.fill("30")
    assert opacity(page) == pytest.approx(0.3)
    slider.press("ArrowRight")
    assert opacity(page) == pytest.approx(0.31)
    assert page.locator("#opacity-value").inner_text() == "31 %"


def test_methods_are_switched_off_and_on(page: Any) -> None:
    maps, curves, rows = (
        page.locator(".map:visible"),
        page.locator("polyline:visible"),
        page.locator("tbody tr:visible"),
    )
    before = maps.count(), curves.count(), rows.count()
    assert before[:2] == (2 * 2 * 3, 2 * 2 * 3 * 2)
    box = page.get_by_label("Grad-CAM").first
    box.uncheck()
    assert (maps.count(), curves.count()) == (2 * 2 * 2, 2 * 2 * 2 * 2)
    assert rows.count() == before[2] - 4
    box.press(" ")
    assert (maps.count(), curves.count(), rows.count()) == before


def test_patches_are_shown_unsmoothed(page: Any) -> None:
    shown = page.locator(".map img.patches:visible")
    assert shown.count() == 0
    page.get_by_label("Patches, unsmoothed").check()
    assert shown.count() == 12
    assert shown.first.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [12, 12]


def test_the_pointer_reads_the_score_of_a_patch(page: Any, comparison: Comparison) -> None:
    view = page.locator(".map").nth(4)  # second class of the first image, Grad-CAM
    box = view.bounding_box()
    view.hover(position={"x": box["width"] * 7.5 / 12, "y": box["height"] * 4.5 / 12})
    score = float(comparison["gradcam"].scores[0, 1, 4, 7])
    text = page.locator("#readout").inner_text()
    assert text.startswith("Grad-CAM, ")
    assert text.endswith("at row 5, column 8")
    assert float(text.split(": ")[1].split(" at")[0]) == pytest.approx(score, rel=1e-3)


def test_the_keyboard_reads_patches_and_asks_for_attention(page: Any, comparison: Comparison) -> None:
    view = page.locator(".map").first
    view.focus()
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
        view.press(key)
    text = page.locator("#readout").inner_text()
    assert text.endswith("at row 6, column 5")
    assert float(text.split(": ")[1].split(" at")[0]) == pytest.approx(
        float(comparison["rollout"].scores[0, 0, 5, 4]), rel=1e-3
    )
    for _ in range(20):
        view.press("ArrowLeft")
    assert page.locator("#readout").inner_text().endswith("at row 6, column 1")
    assert page.locator(".attention:visible").count() == 0
    view.press("Enter")
    assert "row 6, column 1" in page.locator(".attention:visible h4").inner_text()


def test_a_click_shows_the_attention_of_the_patch_in_each_block(page: Any) -> None:
    view = page.locator(".map").nth(1)
    box = view.bounding_box()
    view.click(position={"x": box["width"] * 2.5 / 12, "y": box["height"] * 3.5 / 12})
    panel = page.locator(".attention:visible")
    assert panel.count() == 1
    assert panel.locator("canvas").count() == 6
    read = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 12, 12).data]"
    pixels = panel.locator("canvas").first.evaluate(read)
    assert max(pixels[3::4]) == 255, "the highest patch is opaque"
    before = panel.locator(".share").first.inner_text()
    panel.get_by_role("button", name="prefix token 1").click()
    assert panel.locator("h4").inner_text() == "What prefix token 1 attends to, block by block"
    assert panel.locator(".share").first.inner_text() != before


def test_light_and_dark(page: Any) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(colour) == "rgb(20, 23, 27)"


def test_a_narrow_screen_does_not_scroll_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
