"""Markup that a name can't break: every string is escaped unless it is markup already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any


class Html(str):
    """Markup, which goes into a page unchanged. Created by the functions of this package, never from a name."""

    __slots__ = ()


# Elements without content, which have no end tag.
_VOID = frozenset({"meta", "br", "rect", "polyline", "line"})


def safe(*content: object) -> Html:
    """Join the parts: markup unchanged, everything else escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in content))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """One element.

    >>> element("td", "<b>", class_="name")
    '<td class="name">&lt;b&gt;</td>'

    Args:
        tag: name of the tag, chosen by the caller.
        content: content of the element; escaped unless it is :class:`Html`.
        attributes: ``class_`` stands for class, other underscores for hyphens. None omits an attribute, True gives it
            no value; everything else is escaped.
    """
    written = ""
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        written += f" {name}" if value is True else f' {name}="{escape(str(value))}"'
    if tag in _VOID:
        return Html(f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{safe(*content)}</{tag}>")


def facts(values: Mapping[str, object]) -> Html:
    """A list of names with their values."""
    return element("dl", *(safe(element("dt", name), element("dd", value)) for name, value in values.items()))


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    label: str,
    words: bool = False,
    marked: Mapping[int, str] | None = None,
) -> Html:
    """A table whose first column names the row; on a narrow page it scrolls sideways.

    Args:
        head: headings of the columns.
        rows: cells, as many per row as there are columns.
        label: what the table contains, for screen readers.
        words: the last column is text, not a number.
        marked: index of a row -> its class.
    """
    marks = marked or {}
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
            class_=marks.get(number),
        )
        for number, row in enumerate(rows)
    ]
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    whole = element("table", top, element("tbody", *lines), class_="words" if words else None)
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label)


def reasons(found: Mapping[str, str], nothing: str) -> Html:
    """A list of names with a reason each, or the sentence ``nothing`` if it is empty."""
    if not found:
        return element("p", nothing)
    return element("ul", *(element("li", element("code", name), ": ", why) for name, why in found.items()))


def number(value: Any) -> str:
    """An integer, even a whole float, with separators; other numbers with three digits; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, int) or value.is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}"
