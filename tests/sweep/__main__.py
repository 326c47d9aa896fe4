"""Sweep over the model types of the transformers library; writes docs/transformers.md.

python tests/sweep [--task causal ...] [--only llama ...] [--seconds 120] [--jobs 2] [--out docs/transformers.md]

Each model type runs in a process of its own, with a time limit: one that crashes or hangs says so in its row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # run as a folder, not as a package

import torch
import transformers
from sweep_model import TASKS, Found, examine
from transformers.models.auto import modeling_auto

START, END = "<!-- sweep -->", "<!-- end -->"


def _work(task: str, model_type: str, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - until the process ends
    pipe.send(asdict(examine(task, model_type)))


def swept(jobs: Sequence[tuple[str, str]], seconds: float, at_once: int) -> list[Found]:
    """What was found of every (task, model type), in their order."""
    context = multiprocessing.get_context("fork")  # transformers is imported once
    running: dict[int, tuple[Any, Any, float]] = {}
    found: dict[int, Found] = {}
    waiting = list(enumerate(jobs))
    while waiting or running:
        while waiting and len(running) < at_once:
            index, job = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(*job, theirs))
            process.start()
            theirs.close()
            running[index] = (process, ours, time.monotonic())
        for index, (process, pipe, started) in list(running.items()):
            late = time.monotonic() - started > seconds
            if pipe.poll(0.02):
                try:
                    found[index] = Found(**pipe.recv())
                except EOFError:
                    found[index] = Found(*jobs[index], built="the process ended without a word")
            elif late:
                process.kill()
                found[index] = Found(*jobs[index], built=f"not done after {seconds:.0f} s")
            if index in found:
                process.join()
                del running[index]
                print(f"{len(found)}/{len(jobs)}", json.dumps(asdict(found[index])), flush=True)
    return [found[index] for index in range(len(jobs))]


def table(found: Sequence[Found]) -> str:
    """The rows as Markdown, a section a task, with counts."""
    lines = [f"transformers {transformers.__version__}, `python tests/sweep`"]
    for task in TASKS:
        rows = [row for row in found if row.task == task]
        if not rows:
            continue
        exact = sum(not row.built and not row.wrong and bool(row.kinds) for row in rows)
        counts = Counter("not built" if row.built else "wrong" if row.wrong else "built" for row in rows)
        lines += [
            "",
            f"## {TASKS[task]}",
            "",
            f"{len(rows)} model types: {counts['built'] + counts['wrong']} built, {exact} with groups that are exact, "
            f"{counts['wrong']} wrong, {counts['not built']} not built.",
            "",
            "| model type | groups | error | left out, or why not built |",
            "| --- | --- | ---: | --- |",
        ]
        lines += [_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def _row(row: Found) -> str:
    groups = ", ".join(f"{count} {kind}" for kind, count in sorted(row.kinds.items()))
    reasons = "; ".join(sorted({_general(reason) for reason in row.left_out}))
    error = "" if row.error is None else f"{row.error:.0e}"
    said = row.wrong or (f"not built: {row.built}" if row.built else reasons)
    return f"| {row.model_type} | {groups} | {error} | {said.replace('|', '/')} |"


def _general(reason: str) -> str:
    """A reason without the number of the layer, so that layers share it."""
    return " ".join(".".join("N" if part.isdigit() else part for part in word.split(".")) for word in reason.split())


def main() -> None:
    """Sweep, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", nargs="*", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    names = {task: list(getattr(modeling_auto, f"{TASKS[task]}_NAMES")) for task in arguments.task}
    jobs = [
        (task, name) for task, types in names.items() for name in types if not arguments.only or name in arguments.only
    ]
    found = swept(jobs, arguments.seconds, arguments.jobs)
    written = table(found)
    print("\n".join(line for line in written.splitlines() if "model types:" in line))
    if arguments.out is not None:
        arguments.out.write_text("# Transformers, by model type\n\n" + written)
    wrong = [f"{row.task} {row.model_type}: {row.wrong}" for row in found if row.wrong]
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
