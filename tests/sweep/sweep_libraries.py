"""Sweep over networks of other libraries; writes docs/library_models.md.

python tests/sweep/sweep_libraries.py [--library pytorchcv ...] [--only resnet10 ...] [--write docs/library_models.md]

Every file ``library_NAME.py`` beside this one names what to install (``PACKAGES``) and yields the architectures
(``architectures()``); ``--packages`` prints the names for pip. Each architecture runs in a process of its own. A row is
written to ``--rows`` (build/libraries.jsonl) when it is done, and rows that are there already are kept: an interrupted
sweep is resumed by the same command.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
from sweep_library_table import summary, write_page
from sweep_networks import Architecture, Seen, examine
from sweep_processes import forked

ROOT = Path(__file__).parents[2]
FILES = {path.stem.removeprefix("library_"): path for path in sorted(Path(__file__).parent.glob("library_*.py"))}


def library(name: str) -> ModuleType:
    """The file of a library; it imports the library in ``architectures()`` only."""
    return importlib.import_module(f"library_{name}")


def packages(names: Sequence[str]) -> list[str]:
    """What pip has to install for these libraries."""
    return sorted({package for name in names for package in library(name).PACKAGES})


def version(name: str) -> str:
    """Of the first package of a library."""
    return importlib.metadata.version(library(name).PACKAGES[0].partition("=")[0])


def rows_of(path: Path, names: Sequence[str]) -> dict[tuple[str, str], Seen]:
    """The rows of a file, of the installed versions of these libraries; of several about one architecture the last."""
    versions, seen = {name: version(name) for name in names}, {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        if row.pop("version") == versions.get(row["library"]):
            seen[row["library"], row["name"]] = Seen(**row)
    return seen


def said(seen: Seen) -> str:
    """A row in one line."""
    if seen.wrong or seen.built:
        return f"WRONG: {seen.wrong}" if seen.wrong else f"not built: {seen.built}"
    half = "" if seen.half is None else f", half of each leaves {seen.half:.2f}"
    pruned = f"pruned to {seen.pruned:.2f}" if seen.pruned is not None else f"refused: {seen.refused}"
    left_out = sum(seen.left_out.values())
    return f"{seen.groups} groups, {left_out} left out{half}, {pruned}, {seen.seconds:.0f} s"


def main() -> None:
    """Sweep, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", nargs="*", choices=tuple(FILES), default=list(FILES))
    parser.add_argument("--only", nargs="*", default=[], help="architectures, or beginnings of their names with *")
    parser.add_argument("--again", choices=("all", "wrong", "unbuilt", "refused"), help="rows that are not kept")
    parser.add_argument("--seconds", type=float, default=240, help="of CPU time for each architecture")
    parser.add_argument("--gigabytes", type=float, default=5, help="for each architecture")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--for", dest="time", type=float, default=float("inf"), help="begin none after so many seconds")
    parser.add_argument("--rows", type=Path, default=ROOT / "build" / "libraries.jsonl")
    parser.add_argument("--write", type=Path, help="the page, as Markdown")
    parser.add_argument("--packages", action="store_true", help="print what pip has to install, and end")
    arguments = parser.parse_args()
    if arguments.packages:
        print("\n".join(packages(arguments.library)))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments.rows.parent.mkdir(exist_ok=True)
    wanted: dict[tuple[str, str], Architecture] = {
        (name, one.name): one for name in arguments.library for one in library(name).architectures()
    }
    if arguments.only:
        wanted = {job: one for job, one in wanted.items() if _is_named(job[1], arguments.only)}
    kept = {
        job
        for job, row in rows_of(arguments.rows, arguments.library).items()
        if not (arguments.only or arguments.again == "all")
        and not (row.wrong and arguments.again == "wrong")
        and not (row.built and arguments.again == "unbuilt")
        and not (row.refused and arguments.again == "refused")
    }
    missing, started = [job for job in wanted if job not in kept], time.monotonic()
    while missing and time.monotonic() - started < arguments.time:
        piece, missing = missing[: 4 * arguments.jobs], missing[4 * arguments.jobs :]
        limits = arguments.seconds, arguments.gigabytes
        results = forked(piece, lambda job: asdict(examine(job[0], wanted[job])), limits, arguments.jobs)
        for job, row, ended in results:
            late = ended.startswith("not done")
            seen = Seen(**row) if not ended else Seen(*job, refused=ended) if late else Seen(*job, wrong=ended)
            with arguments.rows.open("a") as file:
                file.write(json.dumps({"version": version(job[0])} | asdict(seen)) + "\n")
            print(f"{' '.join(job)}: {said(seen)}", flush=True)
    rows = [row for job, row in rows_of(arguments.rows, arguments.library).items() if job in wanted]
    print(summary(rows))
    if missing:
        print(f"{len(missing)} are not swept yet: the same command resumes")
    if arguments.write is not None:
        write_page(arguments.write, rows, {name: version(name) for name in arguments.library})
    wrong = [f"wrong: {row.library} {row.name}: {row.wrong}" for row in rows if row.wrong]
    print("\n".join(wrong))
    sys.exit(bool(wrong or missing))


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return any(name == one or (one.endswith("*") and name.startswith(one[:-1])) for one in patterns)


if __name__ == "__main__":
    main()
