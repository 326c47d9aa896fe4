"""The table of docs/transformers_models.md: what was found of every model type of the transformers library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import transformers
from sweep_model import TASKS, Found

HEADER = """# Model types of the transformers library

`make sweep` builds every model type of these tasks from a shrunken config with random weights in float64, finds its
groups, and removes a random half of the units of each. A group is exact where the sliced model computes what the
model computes with these units masked. "error" is the largest relative difference. Every pruned model is saved and
loaded, and some of its scores are compared with explicit autograd. "Not run" counts groups of layers that the inputs
of the task don't reach.

Part of the table is checked by `make test`, all of it by `make nightly`.
"""
_WIDTHS = {"ffn", "expert_ffn", "experts"}
TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "seq2seq": "Sequence-to-sequence models",
    "image": "Image classification",
    "image-text": "Images and text to text",
}


def covered(found: Found) -> bool:
    """Whether groups are found in what mixes positions and in what follows it; of models that have only one of both,
    in that."""
    kinds = found.kinds.keys()
    return bool(kinds & _WIDTHS and kinds - _WIDTHS) or bool(kinds and not found.left_out)


def counts(rows: Sequence[Found]) -> str:
    """One sentence of counts."""
    built = [row for row in rows if not row.built]
    wrong = sum(bool(row.wrong) for row in rows)
    both = sum(covered(row) for row in built if not row.wrong)
    exact = sum(bool(row.kinds) and not row.wrong for row in built)
    return (
        f"{len(rows)} model types: {len(built)} built, of which {exact} have groups that are exact, {both} of them in "
        f"attention (or another mixer) and in feed-forward blocks; {wrong} wrong, {len(rows) - len(built)} not built."
    )


def table(found: Iterable[Found]) -> str:
    """The rows as Markdown, a section a task, with counts."""
    lines = [f"Version {transformers.__version__} of transformers."]
    by_task: dict[str, list[Found]] = {task: [] for task in TASKS}
    for row in found:
        by_task[row.task].append(row)
    for task, rows in by_task.items():
        if not rows:
            continue
        lines += ["", f"## {TITLES[task]}", "", counts(rows), ""]
        lines += ["| model type | exact groups | error | left out because | not built because |"]
        lines += ["| --- | --- | ---: | --- | --- |"]
        lines += [_row(row) for row in sorted(rows, key=lambda row: row.model_type)]
    return "\n".join(lines) + "\n"


def groups_of(found: Found) -> str:
    """How many groups of each kind, as the table says it."""
    said = [f"{count} {kind}" for kind, count in sorted(found.kinds.items())]
    said += [f"not run: {count} {kind}" for kind, count in sorted(found.unproved.items())]
    return ", ".join(said)


def _row(row: Found) -> str:
    reasons = "; ".join(sorted({_general(reason) for reason in row.left_out}))
    error = "" if row.error is None else f"{row.error:.0e}"
    cells = (row.model_type, groups_of(row), error, f"WRONG: {row.wrong}" if row.wrong else reasons, row.built)
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _general(reason: str) -> str:
    """A reason without the number of the layer, so that layers share it."""
    return " ".join(".".join("N" if part.isdigit() else part for part in word.split(".")) for word in reason.split())


def write_table(path: Path, found: Iterable[Found]) -> None:
    """Write the page."""
    path.write_text(f"{HEADER}\n{table(found)}")
