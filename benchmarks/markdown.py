"""The parts of published tables: Markdown of lines, the results they come from, and the line that says which run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class TableError(ValueError):
    """A block can't be filled; the message names it and says what to run."""


def read(results: Path, name: str) -> dict[str, Any]:
    """One result file."""
    path = results / f"{name}.json"
    if not path.exists():
        raise TableError(f"there is no {path.name} in {path.parent.name}; run the benchmark that writes it with --out")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def source(facts: Mapping[str, Any]) -> str:
    """The source of the figures."""
    return (
        f"\n\n<sub>`{facts['command']}`: {facts['cpu']}, {facts['threads']} of {facts['logical_cpus']} logical CPUs, "
        f"torch {facts['torch']}, {facts['repeats']} rounds, {facts['date'][:10]}, commit {facts['commit'][:12]}</sub>"
    )
