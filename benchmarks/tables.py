"""The published tables, made from ``benchmarks/results``: ``make bench-tables``, or ``python -m benchmarks.tables``.

README.md and the pages of docs/ hold blocks

    <!-- table operators -->
    ...
    <!-- end -->

whose inside is written here and nowhere else. A block is named after one of ``SUMMARIES`` (of
:mod:`benchmarks.summaries`), or "cases FILE" for every case of a result file of the harness, or "rows FILE" for a file
whose results are a list of rows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.markdown import TableError, markdown, read, source
from benchmarks.summaries import SUMMARIES

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"<!-- table (?P<name>[^>]+?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """The files that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(text: str, results: Path = RESULTS) -> str:
    """``text`` with every block regenerated."""
    return _BLOCK.sub(lambda found: _block(found["name"], results), text)


def names(text: str) -> list[str]:
    """The blocks of a page."""
    return [found["name"] for found in _BLOCK.finditer(text)]


def _block(name: str, results: Path) -> str:
    kind, _, file = name.partition(" ")
    if name in SUMMARIES:
        content = SUMMARIES[name](results)
    elif kind == "cases" and file:
        content = all_cases(read(results, file))
    elif kind == "rows" and file:
        content = all_rows(read(results, file))
    else:
        raise TableError(f"no table is named {name!r}; known are {', '.join(SUMMARIES)}, 'cases FILE' and 'rows FILE'")
    return f"<!-- table {name} -->\n{content}\n<!-- end -->"


# --- whole files ---------------------------------------------------------------------------------------------------


def all_cases(content: Mapping[str, Any]) -> str:
    """Every case of a file: times with percentiles, rate, ratio to the baseline, share of the limit."""
    parts = []
    for case in content["cases"]:
        rows, limit = case["providers"], case["limit"]
        flops = case.get("flops", 0)
        head = ["", "median ms", "p20 - p80", "GFLOP/s" if flops else "GB/s", f"x {case['baseline']}", f"of {limit}"]
        with_memory = any("peak_mib" in row for row in rows.values())
        head += ["MiB above the model"] * with_memory
        lines = []
        for name, row in rows.items():
            rate = flops / row["median_ms"] / 1e6 if flops else row["gb_per_s"]
            baseline = row["against_baseline"]
            ratio = f"{baseline['paired_median']:.2f} [{baseline['q25']:.2f}, {baseline['q75']:.2f}]"
            share = f"{rows[limit]['median_ms'] / row['median_ms']:.0%}"
            spread = f"{row['p20_ms']:.3f} - {row['p80_ms']:.3f}"
            memory = [f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-"] if with_memory else []
            lines.append([name, f"{row['median_ms']:.3f}", spread, f"{rate:.1f}", ratio, share, *memory])
        void = "".join(f"\n\nVoid: {reason}." for reason in case["void"])
        void += "".join(f"\n\nNot run: {way}: {why}." for way, why in case.get("refused", {}).items())
        facts = source(case["provenance"]) if "provenance" in case else ""
        parts.append(f"**{case['name']}**\n\n{markdown(head, lines)}{void}{facts}")
    return "\n\n".join(parts) + source(content["provenance"])


def all_rows(content: Mapping[str, Any]) -> str:
    """The rows of a file, one column a field that any of them has."""
    rows = content.get("rows") or content.get("results") or content.get("cases")
    if not rows or "providers" in rows[0]:
        raise TableError("the file has no rows; is it one of cases?")
    fields = {name: None for row in rows for name, value in row.items() if not isinstance(value, (list, dict))}
    head = [name for name in fields if not (name == "name" and "way" in fields)]
    lines = [[_cell(row.get(name)) for name in head] for row in rows]
    return markdown(head, lines) + source(content["provenance"])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Fill the tables of the pages.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page would change")
    arguments = parser.parse_args(argv)
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            new = filled(text)
        except TableError as error:
            raise SystemExit(f"{page.name}: {error}") from error
        if new != text:
            stale.append(page)
            if not arguments.check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'differs from the results' if arguments.check else 'written'}")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
