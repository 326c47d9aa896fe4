"""``obc report``: the page is whole, escapes what it prints, and reaches for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from obc import cli
from obc.commands.report_page import page
from obc.scoring import ChannelScores, Scores

HOSTILE = "<script>document.title='run'</script>"
QUOTED = '"><img src=x onerror="document.title=1">'
VOID = {"meta", "br", "img", "link", "hr"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def scores() -> Scores:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(300, generator=generator)
    channels = {
        "layers.0": ChannelScores(values, values[:40]),
        HOSTILE: ChannelScores(torch.tensor([0.0, 1e-9, float("nan"), 3.0])),
        "single": ChannelScores(torch.tensor([2.0]), torch.tensor([0.0])),
        "empty": ChannelScores(torch.empty(0)),
    }
    coverage = dict.fromkeys(channels, "gate") | {QUOTED: "unscored: <b>never</b> called"}
    metadata = {"model": HOSTILE, "rows": "batch", "obc": "1.0", QUOTED: QUOTED}
    return Scores(channels, num_rows=50, coverage=coverage, metadata=metadata)


class Page(HTMLParser):
    """Every tag with its attributes, the visible text of every table cell; fails where tags don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_every_module_is_drawn_and_listed() -> None:
    found = Page(page(scores(), "scores.safetensors"))
    figures = [attributes for tag, attributes in found.tags if tag == "figure"]
    assert len(figures) == len(scores())
    rows = [found.cells[start : start + 7] for start in range(0, len(found.cells), 7)]
    assert [row[0] for row in rows] == list(scores().coverage)
    assert rows[0][1:3] == ["300", "40"]
    values = scores()["layers.0"].out_channels
    assert rows[0][3:] == [f"{values.min():.2e}", f"{values.median():.2e}", f"{values.max():.2e}", "gate"]
    assert rows[-1] == [QUOTED, "", "", "", "", "", "unscored: <b>never</b> called"]
    assert [attributes.get("class") for tag, attributes in found.tags if tag == "tr"][-1] == "unscored"


def test_names_are_escaped_and_nothing_is_fetched_or_run() -> None:
    text = page(scores(), QUOTED)
    found = Page(text)
    assert {tag for tag, _ in found.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "dl", "dt", "dd", "p", "span", "div"),
        *("svg", "g", "rect", "polyline", "text", "figure", "figcaption", "br", "table", "tr", "th", "td"),
    }
    attributes = {name for _, found_here in found.tags for name in found_here}
    assert not {name for name in attributes if name.startswith("on")} | attributes & {"src", "href", "data", "action"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert any("default-src 'none'" in (of.get("content") or "") for tag, of in found.tags if tag == "meta")
    assert HOSTILE in "".join(found.text)


def test_curves_fall_and_stay_inside() -> None:
    found = Page(page(scores(), "s"))
    lines = [attributes["points"].split() for tag, attributes in found.tags if tag == "polyline"]
    assert len(lines) == 5  # out and in of the first, out of the second, both of the third, none of the empty one
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line]
        assert len(points) >= 2
        assert all(0 <= x <= 240 and 0 <= y <= 90 for x, y in points)
        assert [y for _, y in points] == sorted(y for _, y in points)  # measured from the top


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "scores.safetensors", tmp_path / "new" / "report.html"
    scores().save(file)
    assert cli.main(["report", str(file), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == page(Scores.load(file), "scores.safetensors")
    assert capsys.readouterr().out == f"4 modules drawn in {out}\n"


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no score file at"), (b"<html>", "is not a score file")], ids=["missing", "foreign"]
)
def test_the_command_refuses_what_is_no_score_file(
    content: bytes | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "scores.safetensors", tmp_path / "report.html"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["report", str(file), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("obc report: ")
    assert reason in err
    assert not out.exists()


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine; html.parser reads the page in the tests above"
)
def test_a_browser_shows_it_without_running_anything(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(scores(), QUOTED), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    picture = tmp_path / "page.png"
    ran = subprocess.run(
        [CHROMIUM, *options, f"--screenshot={picture}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Content Security Policy" not in ran.stderr  # nothing was tried that the policy had to refuse
    dom = Page(ran.stdout)
    assert sum(tag == "figure" for tag, _ in dom.tags) == len(scores())
    assert not any(tag in ("script", "img") for tag, _ in dom.tags)
    title = re.search(r"<title>(.*?)</title>", ran.stdout)
    assert title is not None
    assert title[1].startswith("Scores of &lt;script&gt;")
    assert picture.read_bytes().startswith(b"\x89PNG")
