"""Writes docs/criteria.md, the table of all criteria, from what they say about themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from obc.criteria import CRITERIA
from obc.criteria.elsewhere import ELSEWHERE, WITH_CRITERION

PAGE = Path(__file__).parent / "criteria.md"

_HEAD = """# Criteria

`obc.prune(criterion=NAME)`; options go to the object: `criterion=obc.criteria.SlimGPT(...)`. Notation for unit u of a
group: W is the weight of a consumer or producer, x the input of a consumer, g a gradient, r a row. The least
important unit has the lowest score. This page is written by `python docs/criteria_table.py`.

"needs": *weights* only; *forward* passes; *gradients* of any loss, also without labels; *labels*: published with a
loss on labels, but any loss works.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *([_cell(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _named(thing: Any) -> str:
    """A name that ``obc.prune`` takes, or the class of an object."""
    if thing is None:
        return "-"
    return f"`{thing if isinstance(thing, str) else type(thing).__name__}`"


def _systems() -> list[list[str]]:
    """Every system that has a criterion: its name, and what that does not cover."""
    about = {criterion.name: criterion.about for criterion in CRITERIA}
    lines = []
    for system, (name, options) in WITH_CRITERION.items():
        said = about[name]
        assert said is not None
        works = f"`{name}`" + (f", {options}" if options else "")
        lines.append([system, works, said.missing or "-"])
    return lines


def page() -> str:
    """The text of the page."""
    known = [(criterion, criterion.about) for criterion in CRITERIA if criterion.about is not None]
    all_of_them = [
        [f"`{one.name}`", about.system, f"`{about.formula}`", about.passes, about.kinds] for one, about in known
    ]
    published = [
        [
            f"`{one.name}`",
            about.source,
            ", ".join(f"`{need if isinstance(need, str) else need.name}`" for need in one.needs) or "-",
            _named(one.allocation),
            _named(one.update),
        ]
        for one, about in known
    ]
    differs = [[f"`{one.name}`", about.differs or "-", about.missing or "-"] for one, about in known]
    differs = [line for line in differs if line[1:] != ["-", "-"]]
    parts = [
        _HEAD,
        _table(["name", "system", "score of a unit", "needs", "units"], all_of_them),
        "## Where they come from\n\nThe allocation that a criterion was published with is used unless\n"
        "`obc.prune(allocation=...)` says otherwise. The update is the value for `compensate=...`.\n",
        _table(["name", "source", "statistics", "allocation", "update"], published),
        "## Where the published code differs, and what is not covered\n",
        _table(["name", "published code", "not covered"], differs),
        f"## Systems of the field\n\n{len(WITH_CRITERION)} have a criterion here, tested against their formula:\n",
        _table(["system", "works", "does not, and why"], _systems()),
        "## Other systems\n\nThese have no criterion of their own here:\n",
        _table(["system", "what works", "what does not, and why"], [[name, *said] for name, said in ELSEWHERE.items()]),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
