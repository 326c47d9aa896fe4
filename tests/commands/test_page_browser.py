"""The pages of ``obc report`` in headless Chromium: light and dark, at a phone's width, by keyboard."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import CHROMIUM, HOSTILE, QUOTED, report, scores
from playwright.sync_api import sync_playwright

from obc.commands.report import score_page

PHONE, DESKTOP = (390, 844), (1280, 900)
PAGES = {"pruning": lambda: report().html(), "scores": lambda: score_page(scores(), QUOTED)}
# Without these Debian's Chromium connects to its update servers, and refuses to run as root.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        reason = "there is no Chromium on this machine; make browser installs Debian's"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield opened
        opened.close()


class Tab:
    """A page in a browser, with everything that it said or asked for."""

    def __init__(self, browser: Any, file: Path, size: tuple[int, int], scheme: str = "light") -> None:
        viewport = dict(zip(("width", "height"), size, strict=True))
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def screenshot(self) -> tuple[int, int]:
        """(width, height) of a picture of the whole page."""
        picture = self.page.screenshot(full_page=True)
        assert picture.startswith(b"\x89PNG")
        return struct.unpack(">II", picture[16:24])  # type: ignore[return-value]


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("kind", PAGES)
def test_the_page_in_a_browser(kind: str, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGES[kind](), encoding="utf-8")
    pictures, backgrounds = {}, {}
    for size in (DESKTOP, PHONE):
        for scheme in ("light", "dark"):
            tab = Tab(browser, file, size, scheme)
            page = tab.page
            assert page.title().endswith(HOSTILE)
            ids = page.eval_on_selector_all("section", "parts => parts.map(part => part.id)")
            assert len(ids) == file.read_text().count("<section")
            assert all(page.locator(f"#{key}-title").is_visible() for key in ids)
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "the page scrolls sideways"
            assert page.locator("script, img, iframe").count() == 0
            backgrounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            pictures[size, scheme] = tab.screenshot()
            assert tab.said == []  # no error, and nothing that the page's policy had to refuse
            assert tab.requests == [file.as_uri()]
            page.close()
    assert backgrounds["light"] == "rgb(255, 255, 255)"
    assert backgrounds["dark"] != backgrounds["light"]
    for size in (DESKTOP, PHONE):
        assert pictures[size, "light"] == pictures[size, "dark"]
        assert pictures[size, "light"][0] == size[0]
    assert pictures[PHONE, "light"][1] > pictures[DESKTOP, "light"][1] > DESKTOP[1]  # narrower is longer


CONTRAST = """
() => {
  const light = rgb => { const [r, g, b] = rgb.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b }
  const back = element => { for (let e = element; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c }
    return 'rgb(255, 255, 255)' }
  return [...document.querySelectorAll('p, a:not(.skip), h1, h2, h3, td, th, dt, dd, li, code, span.out, span.in')]
    .filter(e => e.innerText.trim())
    .map(e => [light(getComputedStyle(e).color), light(back(e))].sort((a, b) => a - b))
    .map(pair => (pair[1] + 0.05) / (pair[0] + 0.05))
}
"""


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", PAGES)
def test_text_has_the_contrast_that_wcag_asks_for(kind: str, scheme: str, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGES[kind](), encoding="utf-8")
    tab = Tab(browser, file, DESKTOP, scheme)
    ratios = tab.page.evaluate(CONTRAST)
    tab.page.close()
    assert len(ratios) > 20
    assert min(ratios) >= 4.5


def test_everything_is_reached_by_keyboard(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(report().html(), encoding="utf-8")
    page = Tab(browser, file, PHONE).page
    focus = "document.activeElement.getAttribute('href') || document.activeElement.getAttribute('aria-label')"
    page.keyboard.press("Tab")
    assert page.evaluate(focus) == "#content"
    box = page.locator(".skip").bounding_box()
    assert box is not None
    assert box["x"] >= 0  # where it has the focus it is seen
    wanted = page.eval_on_selector_all(
        "nav a, .scroll", "parts => parts.map(part => part.getAttribute('href') || part.getAttribute('aria-label'))"
    )
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focus))
    assert reached == wanted
    page.locator("nav a").last.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#provenance"
    assert page.locator("#provenance-title").is_visible()
    page.close()
