"""Shared by the tests of pages: hostile names, a reader that checks the markup, a page of every kind."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from typing import Any

import torch

from obc.pruning import PruningReport, StepReport
from obc.pruning.report import Change
from obc.recovery import CompensationReport, LayerCompensation, LayerCorrection
from obc.scoring import ChannelScores, Scores
from obc.structures.proof import Proof

HOSTILE = "<script>document.title='run'</script>"
QUOTED = '"><img src=x onerror="document.title=1">'
VOID = {"meta", "br", "img", "link", "hr"}
# Everything that a page may consist of.
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "h1", "h2", "h3", "a"),
    *("dl", "dt", "dd", "p", "span", "div", "ul", "li", "code", "figure", "figcaption", "br"),
    *("svg", "g", "rect", "polyline", "line", "text", "table", "thead", "tbody", "tr", "th", "td"),
}
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


def report() -> PruningReport:
    """A report with something in every field, and hostile names wherever a name can stand."""
    found = PruningReport(
        macs_before=1000,
        macs_after=498,
        macs_measured=0.5,
        parameters_before=800,
        parameters_after=300,
        known={"latency": Change(0.5, 0.25, HOSTILE), HOSTILE: Change(1e6, 0.0, QUOTED)},
        speed=Change(0.5, 0.25, HOSTILE),
        widths={"layers.0": (64, 32), HOSTILE: (10, 1), f"model.layers.{'very_' * 30}long": (4096, 4096)},
        steps=[
            StepReport(0.7, 0.69, 0.6, {"layers.0": 16}, 0.69),
            StepReport(0.5, 0.498, 0.375, {HOSTILE: 9, "layers.0": 16}, 0.498),
        ],
        seconds={"score": 1.25, "select": 0.01},
        unscored={QUOTED: HOSTILE},
        left_out={HOSTILE: QUOTED},
        warnings=[f"{QUOTED} keeps 1 of 10 units"],
        proof=Proof(proved=["layers.0"], left_out={HOSTILE: QUOTED}, error=1e-7, tolerance=1e-4, passes=8, seconds=0.5),
        error=2e-7,
        tolerance=3e-4,
        unproved={QUOTED: HOSTILE},
        compensation=CompensationReport(
            layers={
                "layers.1": LayerCompensation(0.4, 0.1, 0.3, True, 512, 1e-4),
                HOSTILE: LayerCorrection(True, 0.2, 0.25, False, 512, 0.0),
            },
            naive_error=0.31,
            compensated_error=0.12,
            final_error=0.11,
            norms_recalibrated=True,
            notes=[HOSTILE],
        ),
        provenance={"model": HOSTILE, QUOTED: QUOTED},
    )
    found.note_scores("layers.0", torch.rand(64, generator=torch.Generator().manual_seed(0)))
    found.note_scores(HOSTILE, torch.tensor([0.0, -1.0, float("inf"), 2.0]))
    return found


class Page(HTMLParser):
    """Every tag with its attributes, the visible text of every table cell; fails where tags don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_harmless(text: str) -> Page:
    """Nothing of the page runs or is fetched, whatever the names in it."""
    found = Page(text)
    assert {tag for tag, _ in found.tags} <= TAGS
    attributes: set[Any] = {name for _, found_here in found.tags for name in found_here}
    assert not {name for name in attributes if name.startswith("on")}
    assert not attributes & {"src", "data", "action", "srcset", "formaction"}
    assert all((link["href"] or "").startswith("#") for link in found.attributes("a"))
    assert not any(word in text for word in ("url(", "@import", "https:", "http:"))
    return found
