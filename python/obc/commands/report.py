"""``obc report``: draws a pruning, or a score file, as one self-contained page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from obc.commands.common import REPORT_FILES, UsageError, add_command, refusing, writable
from obc.files import atomic_write, made_folder, refuse_unfinished
from obc.page.document import Section, document
from obc.page.markup import facts
from obc.page.scores import score_sections
from obc.pruning.report import PruningReport
from obc.scoring import Scores

_DESCRIPTION = """\
Write one self-contained HTML page. It loads no other file and runs no script.

obc report PRUNED_DIR | report.json   a whole pruning: budgets before and after, widths, scores, what was left out and
                                      why, what was proved, what compensation did, provenance; with --scores also every
                                      layer's scores
obc report scores.safetensors         a score file: every layer's scores, and how they were read"""


def add(commands: Any) -> None:
    """Add ``obc report`` to the subparsers."""
    report = add_command(commands, "report", run, "draw a pruning, or a score file, as one HTML page", _DESCRIPTION)
    report.add_argument(
        "source",
        type=Path,
        metavar="PRUNED_DIR | FILE",
        help="what obc prune wrote, a report (PruningReport.save), or a score file (obc score, Scores.save)",
    )
    report.add_argument("--scores", type=Path, help="the score file of the unpruned model, for the page of a pruning")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="(default: %(default)s)")


def load(path: Path) -> Scores:
    """The scores of a file.

    Raises:
        UsageError: it can't be read.
    """
    with refusing(OSError, ValueError):
        return Scores.load(path)


def run(parsed: argparse.Namespace) -> int:
    """Write the page, completely or not at all."""
    source = _file(parsed.source)
    if source.suffix == ".json":
        content, said = _pruning(source, parsed.scores)
    elif parsed.scores is not None:
        raise UsageError("--scores is for the page of a pruning; pass PRUNED_DIR or its report.json first")
    else:
        scores = load(source)
        content, said = score_page(scores, source.name), f"{len(scores)} modules"
    with made_folder(writable(parsed.out).parent), atomic_write(parsed.out) as file:
        file.write(content.encode())
    print(f"{said} drawn in {parsed.out}")
    return 0


def _file(source: Path) -> Path:
    """The file itself, or the report in a folder."""
    if not source.exists():
        raise UsageError(f"there is no file or folder {source}; pass what obc prune or obc score wrote")
    if not source.is_dir():
        return source
    refuse_unfinished(source, UsageError)
    found = [source / name for name in REPORT_FILES if (source / name).is_file()]
    if not found:
        raise UsageError(f"{source} holds no report ({' or '.join(REPORT_FILES)}); obc prune writes one")
    return found[0]


def _pruning(source: Path, scores: Path | None) -> tuple[str, str]:
    further: list[Section] = []
    if scores is not None:
        found = load(scores)
        further = score_sections(found, found.table(), found.unscored_lines())
    with refusing(OSError, ValueError):
        report = PruningReport.load(source)
    return report.html(further), f"{len(report.widths)} groups"


def score_page(scores: Scores, source: str) -> str:
    """The page of ``scores``, which were read from the file ``source``."""
    unscored = scores.unscored_lines()
    listed = {
        "file": source,
        "modules scored": len(scores),
        "unscored": len(unscored),
        "rows": scores.num_rows,
        **{key: value for key, value in scores.metadata.items() if key != "rows"},
        "kind of rows": scores.metadata.get("rows", "unknown"),
    }
    title = f"Scores of {scores.metadata.get('model', 'a model')}"
    return document(title, score_sections(scores, scores.table(), unscored), facts(listed))
