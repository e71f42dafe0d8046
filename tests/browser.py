"""A real browser for tests of pages: Chromium, driven by playwright. Without either, the tests are skipped by name."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ALONE = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
PHONE = {"width": 390, "height": 800}


class Tab(NamedTuple):
    """A page of the browser, with what it said and whom it asked."""

    page: object  # playwright's Page
    said: list[str]  # console messages and uncaught exceptions
    asked: list[str]  # addresses of all requests


@contextlib.contextmanager
def browsing() -> Iterator[object]:
    """playwright's Browser."""
    if BROWSER is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'dfactory[dev]'"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=[*ALONE, *QUIET])
        yield browser
        browser.close()


@contextlib.contextmanager
def tab(browser, url: str, **options) -> Iterator[Tab]:
    """The page at `url` in a tab of its own."""
    with contextlib.closing(browser.new_context(**options)) as context:
        page, said, asked = context.new_page(), [], []
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda problem: said.append(str(problem)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        yield Tab(page, said, asked)
