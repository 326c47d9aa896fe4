"""``obc report``: the pages are whole, escape what they print, and reach for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import HOSTILE, QUOTED, Page, assert_harmless, report, scores

from obc import Kept, PruningPlan, cli
from obc.commands.report import score_page
from obc.page.markup import Html, element
from obc.pruning import PruningReport, ReportError
from obc.scoring import Scores

SECTIONS = ["budgets", "widths", "scores", "left-out", "proof", "compensation", "steps", "warnings", "provenance"]


def test_markup_escapes_everything_but_markup() -> None:
    inner = element("b", "<i>&")
    assert inner == "<b>&lt;i&gt;&amp;</b>"
    assert element("p", inner, "<", class_='"', hidden=True, title=None) == (
        '<p class="&quot;" hidden><b>&lt;i&gt;&amp;</b>&lt;</p>'
    )
    assert isinstance(inner, Html)
    assert not isinstance(inner + "<script>", Html)  # added to a string it is a string, and is escaped


# --- scores ---------------------------------------------------------------------------------------------------


def test_every_module_is_drawn_and_listed() -> None:
    found = Page(score_page(scores(), "scores.safetensors"))
    assert len(found.attributes("figure")) == len(scores())
    rows = found.rows[1:]
    assert [row[0] for row in rows] == list(scores().coverage)
    assert rows[0][1:3] == ["300", "40"]
    values = scores()["layers.0"].out_channels
    assert values is not None
    assert rows[0][3:] == [f"{values.min():.2e}", f"{values.median():.2e}", f"{values.max():.2e}", "gate"]
    assert rows[-1] == [QUOTED, "", "", "", "", "", "unscored: <b>never</b> called"]
    assert found.attributes("tr")[-1].get("class") == "unscored"


def test_curves_fall_and_stay_inside() -> None:
    found = Page(score_page(scores(), "s"))
    lines = [(attributes["points"] or "").split() for attributes in found.attributes("polyline")]
    assert len(lines) == 5  # out and in of the first, out of the second, both of the third, none of the empty one
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line]
        assert len(points) >= 2
        assert all(0 <= x <= 240 and 0 <= y <= 90 for x, y in points)
        assert [y for _, y in points] == sorted(y for _, y in points)  # measured from the top


# --- a pruning ------------------------------------------------------------------------------------------------


def section_of(page: str, key: str) -> str:
    """The markup of a section."""
    return page.split(f'<section id="{key}"')[1].split("</section>")[0]


def test_the_page_of_a_pruning_has_every_section_with_its_figures() -> None:
    page = report().html()
    found = Page(page)
    assert [part["id"] for part in found.attributes("section")] == SECTIONS
    assert [link["href"] for link in found.attributes("a")][1:] == [f"#{key}" for key in SECTIONS]
    expected = {
        "budgets": ["1,000 → 498", "49.8%", "800 → 300", "37.5%", "50.0% remain"],
        "widths": ["64 → 32", "50.0%", "10 → 1", "4,096 → 4,096", "width:50.0%"],
        "scores": ["32 of 64 removed", "9 of 10 removed", "polyline"],
        "left-out": ["Not pruned", "Not scored"],
        "proof": ["2.0e-07", "3.0e-04", "groups tried and right"],
        "compensation": ["0.3100", "0.1100", "0.4000 → 0.1000", "input", "left naive", "stream", "0.0001"],
        "steps": ["0.690", "25", "1.25"],
        "warnings": ["keeps 1 of 10 units"],
    }
    for key, figures in expected.items():
        for figure in figures:
            assert figure in section_of(page, key), (key, figure)


def test_an_empty_report_has_every_section_too() -> None:
    page = PruningReport().html()
    assert [part["id"] for part in Page(page).attributes("section")] == SECTIONS
    for key, said in (
        ("widths", "No group was pruned."),
        ("scores", "no scores"),
        ("left-out", "Every group that was found could be pruned."),
        ("proof", "Not compared"),
        ("compensation", "not compensated"),
        ("steps", "no steps"),
        ("warnings", "None."),
    ):
        assert said in section_of(page, key)


@pytest.mark.parametrize(
    "page", [score_page(scores(), QUOTED), report().html(), report()._repr_html_(), scores()._repr_html_()],
    ids=["scores", "pruning", "pruning in a notebook", "scores in a notebook"],
)  # fmt: skip
def test_names_are_escaped_and_nothing_is_fetched_or_run(page: str) -> None:
    found = assert_harmless(page)
    assert HOSTILE in "".join(found.text)


@pytest.mark.parametrize("page", [score_page(scores(), QUOTED), report().html()], ids=["scores", "pruning"])
def test_pages_refuse_scripts_and_are_reachable_by_keyboard(page: str) -> None:
    found = Page(page)
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in found.attributes("meta"))
    assert any(meta.get("name") == "viewport" for meta in found.attributes("meta"))
    anchors = {attributes.get("id") for _, attributes in found.tags}
    assert {(link["href"] or "")[1:] for link in found.attributes("a")} <= anchors
    scrolling = [part for part in found.attributes("div") if "scroll" in (part.get("class") or "")]
    assert scrolling
    assert all(part["tabindex"] == "0" and part["role"] == "region" and part["aria-label"] for part in scrolling)
    assert all(picture.get("aria-label") for picture in found.attributes("svg"))


# --- files ----------------------------------------------------------------------------------------------------


def test_a_report_is_read_back_as_it_was(tmp_path: Path) -> None:
    report().save(tmp_path / "report.json")
    found = PruningReport.load(tmp_path / "report.json")
    assert found == report()
    assert found.html() == report().html()


def _damaged(change: Any) -> bytes:
    fields = json.loads(json.dumps({"format": "obc.PruningReport/1", **report().as_dict()}))
    change(fields)
    return json.dumps(fields).encode()


DAMAGED = {
    "foreign": (b"<html>", "is not a report"),
    "list": (b"[]", "is not a report"),
    "format": (_damaged(lambda fields: fields.update(format="another/1")), "its format is not"),
    "number": (_damaged(lambda fields: fields.update(macs_after=HOSTILE)), "macs_after: expected"),
    "unknown": (_damaged(lambda fields: fields.update(script=HOSTILE)), "expected the fields of PruningReport"),
    "step": (_damaged(lambda fields: fields["steps"][0].pop("target")), "StepReport has no 'target'"),
    "width": (_damaged(lambda fields: fields["widths"].update(a=[1])), "widths: expected"),
    "layer": (_damaged(lambda fields: fields["compensation"]["layers"].update(a={})), "compensation: layers: "),
    "budget": (_damaged(lambda fields: fields.update(budget="joules")), "budget: expected"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_report_is_refused(kind: str, tmp_path: Path) -> None:
    content, reason = DAMAGED[kind]
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ReportError, match=reason):
        PruningReport.load(tmp_path / "report.json")


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_of_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "scores.safetensors", tmp_path / "new" / "report.html"
    scores().save(file)
    assert cli.main(["report", str(file), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == score_page(Scores.load(file), "scores.safetensors")
    assert capsys.readouterr().out == f"4 modules drawn in {out}\n"


@pytest.mark.parametrize("as_folder", [False, True])
def test_the_command_writes_the_page_of_a_pruning_with_scores(as_folder: bool, tmp_path: Path) -> None:
    report().save(tmp_path / "report.json")
    scores().save(tmp_path / "s.safetensors")
    source, out = tmp_path if as_folder else tmp_path / "report.json", tmp_path / "page.html"
    arguments = ["report", str(source), "--scores", str(tmp_path / "s.safetensors"), "--out", str(out)]
    assert cli.main(arguments) == 0
    page = out.read_text(encoding="utf-8")
    assert_harmless(page)
    own, last = SECTIONS[:-1], SECTIONS[-1]
    assert [part["id"] for part in Page(page).attributes("section")] == [*own, "network", "layers", "coverage", last]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("s.safetensors", None, "there is no file or folder"),
        ("s.safetensors", b"<html>", "is not a score file"),
        ("report.json", None, "there is no file or folder"),
        ("report.json", b"{}", "is not a report"),
        ("", None, "holds no report"),
    ],
)
def test_the_command_refuses_what_it_cannot_draw(
    name: str, content: bytes | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / name, tmp_path / "page.html"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["report", str(file), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("obc report: ")
    assert reason in err
    assert not out.exists()


def test_a_plan_shows_itself_in_a_notebook() -> None:
    plan = PruningPlan({HOSTILE: Kept(torch.arange(3)), "next": Kept(None, torch.arange(2))})
    found = assert_harmless(plan._repr_html_())
    assert found.rows[1:] == [[HOSTILE, "3", "all"], ["next", "all", "2"]]
