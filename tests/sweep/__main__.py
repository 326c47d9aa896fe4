"""Sweep over the model types of the transformers library; writes docs/transformers_models.md.

python tests/sweep [--task causal ...] [--only llama ...] [--for 400] [--write docs/transformers_models.md]

Each model type runs in a process of its own, with limits of time and memory: one that crashes or hangs says so in its
row. A row is written to ``--rows`` (build/sweep.jsonl) when it is done, and rows that are there already are kept: an
interrupted sweep is resumed by the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from sweep_model import TASKS, Found, examine, model_types
from sweep_processes import forked
from sweep_table import table, write_table

ROOT = Path(__file__).parents[2]


def _import_everything() -> None:
    """Import what models import when they are built and run, once for all processes that are forked off later."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    examine("causal", "llama")


def swept(
    jobs: Sequence[tuple[str, str]],
    known: Mapping[tuple[str, str], str],
    rows: Path,
    limits: tuple[float, float],
    at_once: int,
) -> None:
    """Examine every (task, model type) and append what was found to ``rows``.

    Args:
        jobs: in this order.
        known: digests of groups; of a model type whose groups have it, the row that is there is written again.
        rows: a file of one JSON object a line.
        limits: seconds of CPU time and GiB for each.
        at_once: processes.
    """
    before = rows_of(rows)

    def work(job: tuple[str, str]) -> dict[str, Any] | None:
        found = examine(*job, known.get(job))
        return None if found is None else asdict(found)

    for done, (job, received, ended) in enumerate(forked(jobs, work, limits, at_once), 1):
        found = Found(*job, wrong=ended) if ended else before[job] if received is None else Found(**received)
        line = json.dumps({"transformers": transformers.__version__} | asdict(found))
        with rows.open("a") as file:
            file.write(line + "\n")
        said = found.wrong or found.built or " ".join(f"{n} {kind}" for kind, n in found.kinds.items())
        print(f"{done}/{len(jobs)} {' '.join(job)}: {said}", flush=True)


def rows_of(path: Path) -> dict[tuple[str, str], Found]:
    """The rows of a file, of this version of transformers; of several about one model type the last."""
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        if row.pop("transformers") == transformers.__version__:
            found[row["task"], row["model_type"]] = Found(**row)
    return found


def main() -> None:
    """Sweep, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="*", default=[], help="model types")
    parser.add_argument(
        "--again",
        choices=("all", "changed", "wrong", "unbuilt"),
        help="rows that are not kept; changed: those whose groups are found otherwise now, or were not built",
    )
    parser.add_argument("--seconds", type=float, default=120, help="of CPU time for each model type")
    parser.add_argument("--gigabytes", type=float, default=4, help="for each model type")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--for", dest="time", type=float, default=float("inf"), help="begin none after so many seconds")
    parser.add_argument("--rows", type=Path, default=ROOT / "build" / "sweep.jsonl")
    parser.add_argument("--write", type=Path, help="the table, as Markdown")
    arguments = parser.parse_args()
    jobs = [
        (task, name)
        for task in arguments.task
        for name in model_types(task)
        if not arguments.only or name in arguments.only
    ]
    arguments.rows.parent.mkdir(exist_ok=True)
    before = rows_of(arguments.rows)
    again = {
        job
        for job, row in before.items()
        if arguments.again in ("all", "changed")
        or (arguments.again and row.wrong)
        or (arguments.again == "unbuilt" and row.built)
        or arguments.only
    }
    missing = [job for job in jobs if job not in before or job in again]
    known = {job: row.groups for job, row in before.items() if arguments.again == "changed" and not row.wrong}
    _import_everything()
    started = time.monotonic()
    while missing and time.monotonic() - started < arguments.time:
        piece, missing = missing[: 4 * arguments.jobs], missing[4 * arguments.jobs :]
        swept(piece, known, arguments.rows, (arguments.seconds, arguments.gigabytes), arguments.jobs)
    found = [row for job, row in rows_of(arguments.rows).items() if job in set(jobs)]
    print("\n".join(line for line in table(found).splitlines() if "model types" in line))
    if missing:
        print(f"{len(missing)} are not swept yet: the same command resumes")
    if arguments.write is not None:
        write_table(arguments.write, found)
    wrong = [f"wrong: {row.task} {row.model_type}: {row.wrong}" for row in found if row.wrong]
    print("\n".join(wrong))
    sys.exit(bool(wrong or missing))


if __name__ == "__main__":
    main()
