"""One self-contained page: no scripts, nothing loaded, for light and dark, narrow and wide screens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from obc.page.markup import Html, element, safe

# Whatever a name or file contains, the browser must neither run nor fetch anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

# Colour-blind readers can tell orange and blue apart (Okabe and Ito); the dark ones are lighter.
_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --soft: #f3f3f3; --rule: #d4d4d4; --out: #b34700;
  --in: #0060a0; --bad: #fdecea; --good: #11633a; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --back: #16181b; --soft: #24282d; --rule: #454b52;
  --out: #ff9d57; --in: #6cb8ee; --bad: #4a2320; --good: #7fd6a4; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--text);
  background: var(--back); overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; }
a { color: var(--in); } :focus-visible { outline: 3px solid var(--in); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; } .skip:focus { position: static; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .5rem 0; list-style: none; }
nav a { display: inline-block; padding: .3rem 0; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0 1rem; margin: .5rem 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .92em ui-monospace, monospace; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92em; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--rule); font-weight: 400; }
.words td { white-space: nowrap; } .words td:last-child { white-space: normal; }
thead th { font-weight: 600; vertical-align: bottom; }
th:first-child, .words td:last-child, .words thead th:last-child { text-align: left; }
tbody th { min-width: 9rem; max-width: 26rem; overflow-wrap: anywhere; }
.unscored, .bad { background: var(--bad); }
.verdict { font-weight: 600; } .verdict.good { color: var(--good); } .verdict.poor { color: var(--out); }
.obc-before, .obc-after { display: block; height: .8em; border-radius: 2px; } .obc-before { min-width: 1px; }
.obc-before { background: var(--rule); } .obc-after { background: var(--in); }
td:has(> .obc-before) { width: 40%; min-width: 7rem; text-align: left; }
svg { display: block; width: 100%; height: auto; background: var(--soft); }
.line { fill: none; stroke-width: 1.5; stroke: var(--in); } .line.out { stroke: var(--out); }
.spread { fill: var(--out); opacity: .5; } .tick { fill: var(--text); }
.mark { stroke: var(--text); stroke-dasharray: 3 3; }
.wide svg { min-width: 40rem; }
svg text { fill: var(--text); font-size: 11px; }
.layers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85em; overflow-wrap: anywhere; }
span.out { color: var(--out); } span.in { color: var(--in); }
@media (max-width: 40rem) { body { padding: .6rem; } th, td { padding: 3px 5px; }
  dl { grid-template-columns: minmax(0, 1fr); } dd { margin: 0 0 .4rem; } tbody th { min-width: 7rem; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        key: its anchor, chosen by the caller.
        title: its heading.
        content: its content.
    """

    key: str
    title: str
    content: Html


# Notebooks have their own colours: only bars are styled, in the colour of the text.
_FRAGMENT_STYLE = """
.obc .obc-before, .obc .obc-after { display: block; height: .8em; background: currentColor; }
.obc .obc-before { opacity: .35; } .obc td:has(> .obc-before) { min-width: 10rem; }
"""


def fragment(*content: object) -> str:
    """A fragment for another page, such as a notebook's output."""
    return element("div", element("style", Html(_FRAGMENT_STYLE)), *content, class_="obc")


def document(title: str, sections: Sequence[Section], head: Html | None = None) -> str:
    """The whole page.

    Args:
        title: title of the page; it is escaped.
        sections: sections in order; links to them come first.
        head: content between the title and the links.
    """
    links = element(
        "nav",
        element("ul", *(element("li", element("a", part.title, href=f"#{part.key}")) for part in sections)),
        aria_label="Sections",
    )
    parts = [
        element(
            "section",
            element("h2", part.title, id=f"{part.key}-title"),
            part.content,
            id=part.key,
            aria_labelledby=f"{part.key}-title",
        )
        for part in sections
    ]
    top = safe(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Html(_STYLE)),
    )
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", title), head or Html(""), links),
        element("main", *parts, id="content", tabindex=-1),
    )
    return safe(Html("<!DOCTYPE html>\n"), element("html", element("head", top), body, lang="en"), Html("\n"))
