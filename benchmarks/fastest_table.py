"""The measured table of obc.backends.fastest, from results of benchmarks/gpu.sh:

    python -m benchmarks.fastest_table benchmarks/results/gpu-nvidia-h200.json

prints ``FASTEST``, to be pasted into python/obc/backends/fastest.py, where it stays with the results that it is of. An
entry is an exception: the backend that the general order puts second was at least 3 % faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from obc.backends.fastest import PREFERENCE, SIZES

# Two runs of one kernel on one machine differ by about this much: a smaller lead is no reason for an exception.
LEAD = 0.97

DTYPES = {"f32": "torch.float32", "f64": "torch.float64", "bf16": "torch.bfloat16", "f16": "torch.float16"}


def exceptions(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], str]:
    """(operator, dtype, size) -> backend, of the rows of the section ``defaults``.

    Raises:
        ValueError: a row names a dtype or size that the table does not know, or lacks the time of a backend.
    """
    default, other = PREFERENCE["cuda"][:2]
    found = {}
    for row in rows:
        if row["dtype"] not in DTYPES or row["size"] not in SIZES:
            raise ValueError(f"unknown dtype or size in {dict(row)}; known are {', '.join((*DTYPES, *SIZES))}")
        times = {name: row.get(f"{name}_us") for name in (default, other)}
        missing = [name for name, time in times.items() if time is None]
        if missing:
            raise ValueError(f"no time of {' and '.join(missing)} in {dict(row)}: run benchmarks/gpu.sh with both")
        if times[other] < LEAD * times[default]:
            found[row["operator"], row["dtype"], row["size"]] = other
    return found


def source(found: Mapping[tuple[str, str, str], str], results: str) -> str:
    """The table as Python source."""
    lines = [f"# Measured: {results}, section defaults.", "FASTEST: dict[tuple[str, torch.dtype, str], str] = {"]
    order = {name: place for place, name in enumerate((*DTYPES, *SIZES))}
    for operator, dtype, size in sorted(found, key=lambda key: (key[0], order[key[1]], order[key[2]])):
        lines.append(f'    ("{operator}", {DTYPES[dtype]}, "{size}"): "{found[operator, dtype, size]}",')
    return "\n".join([*lines, "}"]) if found else "\n".join([lines[0], lines[1] + "}"])


def main(arguments: list[str] | None = None) -> int:
    """Print the table of one results file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fastest_table", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("results", type=Path)
    path = parser.parse_args(arguments).results
    rows = json.loads(path.read_text())["sections"].get("defaults", [])
    if not rows:
        parser.error(f"{path} has no rows of the section 'defaults': run benchmarks/gpu.sh")
    try:
        print(source(exceptions(rows), path.name))
    except ValueError as error:
        parser.error(f"{path}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
