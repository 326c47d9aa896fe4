"""Writes a pruned transformers directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from obc.commands import budget_options, data
from obc.commands.common import REPORT_FILES, folder
from obc.commands.model_directory import ModelDirectory
from obc.commands.run_log import say
from obc.files import whole_folder
from obc.model.latency_table import LatencyTable
from obc.model.plan import PruningPlan
from obc.pruning.report import PruningReport
from obc.structures.transformers.saving import PLAN_FILE, save_pruned


def write(
    structure: Any, report: PruningReport, table: LatencyTable | None, directory: ModelDirectory, out: Path
) -> None:
    """Write the structure's model for ``from_pretrained``, or else for ``load_pruned``, with the tokenizer and report.

    Args:
        table: latencies, if some were measured.
        directory: the model's directory; if it was a pruned one, the plan is written in terms of the unpruned model.
    """
    out, model = folder(out), structure.model
    plan = structure.plan if directory.plan is None else structure.plan.after(directory.plan)
    directory.restore_cache()
    refused = structure.config_refused
    if report.means is not None and report.means.created:
        refused = "layers have biases now that no config can express"
    with whole_folder(out) as stage:
        save(model, plan, directory.path, stage, by_plan=refused is not None)
        if table is not None:
            table.save(stage / budget_options.TABLE_FILE)
        report.save(stage / REPORT_FILES[1])
    say_written(out, refused)


def save(model: Any, plan: PruningPlan | None, source: Path, out: Path, by_plan: bool) -> None:
    """Save the model with the tokenizer of ``source``; ``by_plan``: in the form that ``load_pruned`` loads."""
    if by_plan and plan is not None:
        save_pruned(model, plan, out)
    else:
        model.save_pretrained(out)
        if plan is not None:
            plan.save(out / PLAN_FILE)
    data.copy_tokenizer(source, out)


def say_written(out: Path, refused: str | None) -> None:
    """Print what loads the folder; ``refused`` says why it is not ``from_pretrained``, if it is not."""
    loader = (
        f"obc.structures.transformers.load_pruned loads it{refused and ': ' + refused.partition(':')[0]}"
        if refused is not None
        else "from_pretrained loads it"
    )
    say(f"written: {out}; {loader}")
    if (out / REPORT_FILES[1]).is_file():
        say(f"as a page: obc report {out}")
