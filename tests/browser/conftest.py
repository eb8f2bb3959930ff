"""The app served, and a headless Chromium to drive pages.

Without Playwright these tests are skipped, and so are those of pages without Chromium. VITEXPLAIN_BROWSER=required
fails where either is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "browser: serves the app or drives pages in Chromium; VITEXPLAIN_BROWSER=required fails where it is missing",
    )


@dataclass
class Watched:
    """A page and all that it logged and asked for.

    Attributes:
        page: Playwright's page.
        errors: what went to the console as an error or warning, and uncaught errors.
        requests: addresses asked for, without ``data:`` and ``blob:``.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


REQUIRED = os.environ.get("VITEXPLAIN_BROWSER") == "required"


@pytest.fixture(scope="session", autouse=True)
def _playwright() -> None:
    if not REQUIRED:
        pytest.importorskip("playwright", reason="the app is served and pages are driven where Playwright is installed")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser of Playwright, or the system's."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None and not REQUIRED:
        pytest.skip("pages are driven where Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def watched(chromium: Any) -> Iterator[Watched]:
    """A page of its own, in a light scheme, that notes everything."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    found = Watched(context.new_page())
    found.page.on("console", lambda each: each.type in ("error", "warning") and found.errors.append(each.text))
    found.page.on("pageerror", lambda each: found.errors.append(str(each)))
    found.page.on("request", lambda each: each.url.startswith(("data:", "blob:")) or found.requests.append(each.url))
    yield found
    context.close()
