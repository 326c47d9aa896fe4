"""The table of :mod:`benchmarks.bench_depth`: blocks, branches and widths that go, and what their removal costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BASELINE = "widths, jacobian"


def table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Perplexity, its logarithm's difference to widths alone, and what went."""
    lines = ["| share | removed | perplexity | difference of the loss to widths | blocks, branches gone |"]
    lines.append("| ---: | --- | ---: | ---: | --- |")
    for share in sorted({case["share"] for case in cases}):
        share_cases = [case for case in cases if case["share"] == share]
        base = {case["draw"]: case["losses"] for case in share_cases if case["method"] == BASELINE}
        for method in dict.fromkeys(case["method"] for case in share_cases):
            method_cases = [case for case in share_cases if case["method"] == method]
            losses = [loss for case in method_cases for loss in case["losses"]]
            paired = [
                one - other
                for case in method_cases
                for one, other in zip(case["losses"], base.get(case["draw"], []), strict=False)
            ]
            gone = "; ".join(f"{case.get('blocks', 0)}, {case.get('branches', 0)}" for case in method_cases)
            difference = "-"
            if len(paired) > 1:
                error = statistics.stdev(paired) / math.sqrt(len(paired))
                difference = f"{statistics.mean(paired):+.3f} ± {error:.3f}"
            lines.append(
                f"| {share:.0%} | {method} | {math.exp(statistics.mean(losses)):.2f} | {difference} | {gone} |"
            )
    return lines
