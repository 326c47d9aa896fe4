"""The table of ``bench_real``: methods down, shares across, each with its paired difference to the reference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

REFERENCE = "jacobian+correct"
_SAME = ("model", "kinds", "calibration", "test", "length")

Case = Mapping[str, Any]


def tables(cases: Sequence[Case]) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of every model and size, the lines aligned."""
    for title, head, rows in parts(cases):
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        yield (
            title,
            ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]],
        )


def parts(cases: Sequence[Case]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of every model and size."""
    kinds = dict.fromkeys(tuple(case[name] for name in _SAME) for case in cases)
    for same in kinds:
        found = [case for case in cases if tuple(case[name] for name in _SAME) == same]
        unpruned = [case["shown"] for case in found if case["selection"] == "none"]
        pruned = [case for case in found if case["selection"] != "none"]
        draws, samples = len({case["draw"] for case in found}), len(found[0]["losses"])
        pieces = f"{same[2]} x {same[4]} tokens" if found[0]["what"] == "perplexity" else f"{same[2]} batches"
        title = (
            f"{same[0]}{'' if same[1] == 'all' else ', ' + same[1]}: {found[0]['what']}; {pieces} to "
            f"calibrate, {samples} samples to test, {draws} draw{'s' * (draws > 1)}; unpruned "
            f"{statistics.mean(unpruned):.4g}"
        )
        shares = sorted({case["share"] for case in pruned})
        methods = dict.fromkeys(method_of(case) for case in pruned)
        head = ["method", *(f"{share:.1%}" for share in shares)]
        yield title, head, [[method, *(_cell(pruned, method, share, draws) for share in shares)] for method in methods]


def method_of(case: Case) -> str:
    return f"{case['selection']}+{case['compensation']}"


def _cell(cases: Sequence[Case], method: str, share: float, draws: int) -> str:
    """Mean over the draws, their number if it is below the title's, and the paired difference."""
    mine = {case["draw"]: case for case in cases if method_of(case) == method and case["share"] == share}
    if not mine:
        return "-"
    shown = f"{statistics.mean(case['shown'] for case in mine.values()):.4g}"
    reference = {case["draw"]: case for case in cases if method_of(case) == REFERENCE and case["share"] == share}
    if len(mine) < draws:
        shown += f" [{len(mine)} draw{'s' * (len(mine) > 1)}]"
    if method == REFERENCE or not set(mine) <= set(reference):
        return shown
    difference, error = paired(list(mine.values()), [reference[draw] for draw in mine])
    return f"{shown} ({difference:+.3f} ± {error:.3f})"


def paired(mine: Sequence[Case], theirs: Sequence[Case]) -> tuple[float, float]:
    """Mean difference of the losses over the samples of all draws, and its standard error."""
    differences = [
        a - b
        for one, other in zip(mine, theirs, strict=True)
        for a, b in zip(one["losses"], other["losses"], strict=True)
    ]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else float("nan")
    return statistics.mean(differences), error
