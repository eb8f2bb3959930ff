"""Makes the picture of the app in the documentation: ``python tests/browser/app_picture.py docs/images/app.jpg``."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from app_process import running

PATIENCE = 120_000
"""Milliseconds."""


def fill(page: Page) -> None:
    """The first example, explained for its two likeliest classes by the methods that the page starts with."""
    page.set_default_timeout(PATIENCE)
    page.locator(".vx-preview img").wait_for()
    page.locator("input[type=checkbox][name]").nth(1).wait_for()
    for index in range(2):
        page.locator("input[type=checkbox][name]").nth(index).check()
    page.get_by_role("button", name="Explain").click()
    page.wait_for_function("document.querySelectorAll('.vx-grid img[data-method]').length >= 6")
    page.get_by_role("button", name="Measure faithfulness").click()
    page.locator(".vx-figures table").wait_for()


def main(output: Path) -> None:
    """Writes the whole page, 1280 pixels wide.

    Args:
        output: file to write, whose name ends as its format.
    """
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        fill(page)
        page.screenshot(path=Path(folder) / "page.png", full_page=True)
        browser.close()
        Image.open(Path(folder) / "page.png").convert("RGB").save(output, quality=92)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
