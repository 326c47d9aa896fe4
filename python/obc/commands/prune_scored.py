"""Prunes a local transformers directory by the scores in a file, without a forward pass."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import obc
from obc.commands import data, model_directory, prune_directory, pruned_directory
from obc.commands.allocation_option import allocation_of_text
from obc.commands.common import UsageError, folder, require
from obc.commands.report import load as load_scores
from obc.commands.run_log import say
from obc.criteria import get, scores_from
from obc.criteria.protocol import CriterionError
from obc.model.evaluation import Run
from obc.model.plan import PruningPlan
from obc.pruning.arguments import chosen_allocation
from obc.pruning.budgets import Budget
from obc.pruning.measured import MeasuredSpeed
from obc.pruning.report import PruningReport, provenance
from obc.recovery.mean_bias import absorb_means
from obc.scoring import Scores
from obc.selection.allocation import Global
from obc.selection.caps import Caps, refuse_unknown
from obc.selection.choice import BudgetError
from obc.selection.task import Task
from obc.statistics import StatisticsError
from obc.structures.protocol import Limits

_BATCHES, _IMAGES = 32, 4  # of --compensate, and images of a batch


def run(parsed: argparse.Namespace, budget: Budget, caps: Mapping[str, Any]) -> int:
    """Prune ``parsed.target`` to the budget and write it to ``parsed.out``."""
    require(model_directory.PACKAGES)
    if parsed.compensate == "none":
        parsed.compensate = None
    source = Path(parsed.target)
    _check(parsed)
    folder(parsed.out)
    scores = _scores(parsed.scores) if parsed.criterion is None else _statistics(parsed.scores)
    directory = model_directory.load(source, parsed.dtype, model_directory.device_of(parsed.device))
    model = directory.model
    try:
        if isinstance(scores, Scores):
            scores.verify(model)
        structure = prune_directory.structure_of(parsed, model)
        limits = _limits(structure, caps)
        run_first = _on_first_batch(parsed, model, source)
        budget = budget.ready(structure, run_first, parsed.round_to)
        original = copy.deepcopy(model) if parsed.compensate else model
        before, report = dict(model.state_dict()), _report(parsed, structure, budget)
        names = [group.name for group in structure.groups]
        speed = MeasuredSpeed(model, run_first, report) if parsed.measure else None
        if isinstance(scores, Scores):
            chosen = _chosen(structure, limits, scores, budget, report)
        else:
            chosen = _by_criterion(structure, limits, scores, budget, parsed, report)
        structure.remove(chosen)
        structure.plan.verify(before, model)
    except BudgetError as error:
        least = 1 - error.reachable / budget.counted(budget.costs(structure))
        option = f"--{budget.said.replace('_', '-').replace('=', ' ')}"
        unscored = [name for name in report.left_out if name in names]
        raise UsageError(
            f"{option} is out of reach: {budget.described(least)} remain if every prunable group keeps its least width"
            + (f", and all units of {', '.join(unscored)}, which have no scores" if unscored else "")
        ) from error
    except (ValueError, obc.PruningError) as error:
        raise UsageError(str(error)) from error
    _note_result(report, structure, budget)
    if parsed.compensate:
        say(_compensate(parsed, model, original, structure.plan, report))
    structure.compact()
    if speed is not None:
        speed.finish(model)
    say(report)
    pruned_directory.write(structure, report, budget.meters.table, directory, parsed.out)
    return 0


def _check(parsed: argparse.Namespace) -> None:
    if parsed.compensate and parsed.data is None:
        raise UsageError("--compensate needs --data: a .txt or .jsonl file, or a folder of images")
    if parsed.criterion is None and parsed.allocation is not None:
        raise UsageError("--allocation of a model directory needs --criterion, and the statistics in --scores")


def _report(parsed: argparse.Namespace, structure: Any, budget: Budget) -> PruningReport:
    """The report before anything is removed."""
    choices = {
        "directory": parsed.target,
        "scores": parsed.scores,
        "budget": budget.said,
        "criterion": parsed.criterion or "jacobian",
        "allocation": parsed.allocation or ("uniform" if parsed.uniform else "global"),
        "compensate": parsed.compensate,
        "seed": parsed.seed,
        "MACs": "of one token",
    }
    macs, parameters = (round(structure.costs(unit).total()) for unit in ("macs", "parameters"))
    report = PruningReport(
        budget=budget.unit,
        macs_before=macs,
        parameters_before=parameters,
        widths={group.name: (group.size, group.size) for group in structure.groups},
        left_out=dict(structure.left_out),
        unproved={"the whole model": "a directory is pruned by its scores without a forward pass"},
        provenance=provenance(structure.model, choices),
    )
    report.note_known(budget.meters.known(structure), before=True)
    return report


def _on_first_batch(parsed: argparse.Namespace, model: nn.Module, source: Path) -> Run:
    """A function that runs a model on the first batch of ``--data``, for measuring latency and speed."""
    measured = parsed.latency is not None and parsed.latency_table is None
    if (measured or parsed.measure) and parsed.data is None:
        what = "--measure" if parsed.measure else "--latency without --latency-table"
        raise UsageError(f"{what} needs --data: a forward pass on its first batch is timed")
    if not (measured or parsed.measure):
        return lambda _: None
    batch = _batches(parsed, model, source, 1)[0]
    return lambda one: model_directory.outputs(one, batch)


def _note_result(report: PruningReport, structure: Any, budget: Budget) -> None:
    report.note_known(budget.meters.known(structure), before=False)
    report.macs_after, report.parameters_after = (
        round(structure.costs(unit).total()) for unit in ("macs", "parameters")
    )
    now = {group.name: group.size for group in structure.groups}
    report.widths = {name: (before, now.get(name, 0)) for name, (before, _) in report.widths.items()}
    report.left_out |= structure.left_out
    report.warnings = list(structure.warnings)


def _scores(path: Path) -> Scores:
    try:
        return load_scores(path)
    except UsageError as error:
        try:
            statistics = obc.Statistics.load(path)
        except (OSError, ValueError):
            raise error from None
        raise UsageError(
            f"--scores {path} is not a score file but one of statistics ({statistics}); pass --criterion too, one that "
            "needs these (obc criteria lists them)"
        ) from None


def _statistics(path: Path) -> obc.Statistics:
    try:
        return obc.Statistics.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--criterion needs statistics, obc score --statistics: {error}") from error


def _by_criterion(
    structure: Any,
    limits: Limits,
    statistics: obc.Statistics,
    budget: Budget,
    parsed: argparse.Namespace,
    report: PruningReport,
) -> dict[str, Tensor]:
    """The units to remove according to a criterion from statistics."""
    criterion: str = parsed.criterion
    found = get(criterion)
    if hasattr(found, "measure"):
        raise UsageError(f"--criterion {criterion} runs the model itself; pass module:function instead of a directory")
    given = None if parsed.allocation is None else allocation_of_text(parsed.allocation)
    chosen = chosen_allocation(given, found)
    refuse_unknown("allocation", getattr(chosen, "strengths", ()), [group.name for group in structure.groups])
    importance = getattr(chosen, "importance", None)
    try:
        scores = scores_from(found, structure.groups, statistics, structure.model)
    except StatisticsError as error:
        raise UsageError(f"{error}, or collect them by obc score MODEL_DIR --statistics {criterion}") from error
    except CriterionError as error:
        raise UsageError(f"{error}; choose other groups with --kinds") from error
    for group in structure.groups:
        if group.name in scores:
            report.note_scores(group.name, scores[group.name])
        else:
            report.left_out[group.name] = f"the criterion {criterion!r} scores nothing in it from {parsed.scores}"
    task = _task(structure, limits, scores, budget)
    per_cost, measured = getattr(found, "per_cost", True), {} if importance is None else importance(statistics)
    return chosen.select(replace(task, per_cost=per_cost, importance=measured))


def _limits(structure: Any, caps: Mapping[str, Any]) -> Limits:
    limits: Limits = structure.limits
    least = Caps.of(caps.get("max_pruning_ratio", 1.0), caps.get("protected_blocks", 0)).least(
        {group.name: group.size for group in structure.groups}
    )
    return replace(limits, min_units={name: max(units, limits.min_units.get(name, 1)) for name, units in least.items()})


def _chosen(structure: Any, limits: Limits, scores: Scores, budget: Budget, report: PruningReport) -> dict[str, Tensor]:
    """The units to remove: sets of them if the file has rows, else one by one."""
    groups = structure.groups
    joint = bool(scores.rows)
    values: dict[str, Tensor]
    if joint:
        rows = ((group.name, group.gate_rows(scores.rows)) for group in groups)
        values = {name: found for name, found in rows if found is not None}
    else:
        values = dict(scores.group(groups, slices="gate"))
    if not values:
        remedy = "score this model"
        if groups and all(group.is_depth for group in groups):
            remedy = "pass obc score --statistics, and obc prune --criterion, a criterion of blocks (see obc criteria)"
        raise UsageError(f"none of the groups that can be pruned has scores; {remedy}")
    for name, units in values.items():
        report.note_scores(name, units.square().sum(0) if joint else units)
    report.left_out |= {
        group.name: "it has no scores" for group in groups if group.is_depth and group.name not in values
    }
    task = _task(structure, limits, values, budget)
    return Global().select(replace(task, selection="joint" if joint else "independent"))


def _task(structure: Any, limits: Limits, scores: Mapping[str, Tensor], budget: Budget) -> Task:
    """What an allocation has to solve, so that the budget is met."""
    assert budget.share is not None
    costs = budget.costs(structure)
    return Task(
        scores,
        structure.groups,
        costs,
        (1 - budget.share) * budget.counted(costs),
        min_units=limits.min_units,
        round_to=limits.round_to,
        families=limits.families,
        widths=limits.widths,
    )


def _batches(parsed: argparse.Namespace, original: nn.Module, source: Path, count: int) -> list[Any]:
    size, length = _IMAGES if parsed.data.is_dir() else 1, prune_directory.SEQUENCE
    return data.batches(parsed, original, source, "label-free", count=count, size=size, length=length, seed=parsed.seed)


def _compensate(
    parsed: argparse.Namespace, model: Any, original: nn.Module, plan: PruningPlan, report: PruningReport
) -> str:
    """Compensate ``model`` in place from ``--data``, and print the result in one line."""
    batches = _batches(parsed, original, Path(parsed.target), _BATCHES)
    say(f"compensating ({parsed.compensate}) on {len(batches)} batches of {data.shape_of(batches[0])}")
    if parsed.compensate == "mean":
        report.means = means = absorb_means(model, original, plan, batches, model_directory.outputs)
        report.parameters_after = sum(parameter.numel() for parameter in model.parameters())
        report.warnings += means.warnings
        return f"{len(means.absorbed)} biases took over means, {len(means.created)} of them new"
    try:
        found = obc.compensate(model, original, plan, batches, model_directory.outputs, mode=parsed.compensate)
    except ValueError as error:
        raise UsageError(f"--compensate: {error}") from error
    report.compensation = found
    return (
        f"compensated ({parsed.compensate}): held-out output error {found.naive_error:.4f} -> "
        f"{found.final_error:.4f}, {found.seconds:.1f} s"
    )
