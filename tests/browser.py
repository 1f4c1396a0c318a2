"""A headless Chromium for the tests of the page; they are skipped where none is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

PAGE = Path(__file__).resolve().parents[1] / "edge_runtime" / "gateway" / "ui" / "index.html"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_MS = 10_000.0


def find_chromium() -> str | None:
    """Path of the browser: `CHROMIUM`, else the first of `NAMES` on PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the tests of a module: with it, an event loop runs in this thread."""
    path = find_chromium()
    if path is None:
        pytest.skip(f"no Chromium on PATH ({', '.join(NAMES)}) or in CHROMIUM; on Debian: chromium-headless-shell")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Page]:
    """An empty page in a context of its own. Errors of scripts fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="no-preference")
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []
