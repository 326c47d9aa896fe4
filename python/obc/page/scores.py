"""Sections of a page about scores: through the network, by layer, and how they were read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from obc.model.groups import Sided
from obc.page.charts import curves, exponents, figure, height, quantiles
from obc.page.document import Section
from obc.page.markup import Html, element, safe, table

_POINTS = 120  # points per curve; wider layers are drawn as this many quantiles
_STRIP_WIDTH, _STRIP_HEIGHT = 1000, 220


def score_sections(
    scores: Mapping[str, Sided], lines: Sequence[Sequence[str]], unscored: Collection[int]
) -> list[Section]:
    """The sections about a model's scores.

    Args:
        lines: the table of all modules, as for :func:`score_table`.
        unscored: line numbers of modules without scores.
    """
    strip = safe(
        element(
            "p",
            "Every module's smallest, median and largest score of its ",
            element("span", "out channels", class_="out"),
            ", in the model's order; logarithmic.",
        ),
        element("div", _strip(scores), class_="scroll wide", tabindex=0, role="region", aria_label="the network"),
    )
    layers = safe(
        element(
            "p",
            "Scores of ",
            element("span", "out", class_="out"),
            " and ",
            element("span", "in", class_="in"),
            " channels, each sorted, largest first; logarithmic. Channels at the bottom line score nothing.",
        ),
        element("div", *(_figure(name, scores[name]) for name in scores), class_="layers"),
    )
    return [
        Section("network", "Scores through the network", strip),
        Section("layers", "Scores of layers", layers),
        Section("coverage", "How scores were read", score_table(lines, unscored)),
    ]


def drawn(scores: Tensor | None) -> list[float]:
    """At most 120 of the finite scores, largest first."""
    return [] if scores is None else quantiles(scores, _POINTS)[::-1]


def _figure(name: str, channels: Sided) -> Html:
    """One module's two curves."""
    picture, bounds = curves({"out": drawn(channels.out_channels), "in": drawn(channels.in_channels)})
    sizes = [
        f"{values.numel()} {side}"
        for side, values in (("out", channels.out_channels), ("in", channels.in_channels))
        if values is not None
    ]
    return figure(picture, _name(name), element("br"), f"{', '.join(sizes)}; {bounds}")


def _strip(scores: Mapping[str, Sided]) -> Html:
    """Per module a bar from its smallest to its largest out-channel score, with a tick at the median."""
    spread = []
    for name in scores:
        values = drawn(scores[name].out_channels)
        if values:
            spread.append((name, values[-1], values[len(values) // 2], values[0]))
    low, high = exponents(value for _, *values in spread for value in values)
    step = _STRIP_WIDTH / max(1, len(spread))
    width = round(max(0.5, step * 0.7), 2)
    bars = []
    for index, (name, least, middle, most) in enumerate(spread):
        x = round(index * step, 2)
        bottom, tick, top = (height(value, low, high, _STRIP_HEIGHT) for value in (least, middle, most))
        bars.append(
            element(
                "g",
                element("title", f"{_name(name)}: {least:.2e}, {middle:.2e}, {most:.2e}"),
                element("rect", x=x, y=top, width=width, height=max(0.5, round(bottom - top, 1)), class_="spread"),
                element("rect", x=x, y=tick, width=width, height=1.5, class_="tick"),
            )
        )
    ends = [element("text", f"{10**high:.0e}", x=4, y=12), element("text", f"{10**low:.0e}", x=4, y=_STRIP_HEIGHT - 4)]
    label = "smallest, median and largest score of every module"
    return element("svg", *bars, *ends, viewBox=f"0 0 {_STRIP_WIDTH} {_STRIP_HEIGHT}", role="img", aria_label=label)


def score_table(lines: Sequence[Sequence[str]], unscored: Collection[int]) -> Html:
    """Every module: its channels, the range of its out-channel scores, and how it was read, or why not.

    Args:
        lines: a header, and one line per module.
        unscored: line numbers of the modules without scores.
    """
    head, *rows = lines
    marked = dict.fromkeys(unscored, "unscored")
    return table(head, rows, label="every module, and how it was read", words=True, marked=marked)


def _name(name: str) -> str:
    return name or "(model)"
