"""Pruning a local transformers directory by the scores in a file, without a forward pass."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import obc
from obc.commands import checkpoints, data
from obc.commands.common import REPORT_FILES, UsageError, folder, require
from obc.commands.report import load as load_scores
from obc.commands.run_log import say
from obc.criteria import get, scores_from
from obc.model.plan import PruningPlan
from obc.pruning.arguments import Budget, chosen_allocation
from obc.pruning.provenance import provenance
from obc.pruning.report import PruningReport
from obc.recovery.mean_bias import absorb_means
from obc.scoring import Scores
from obc.selection import select
from obc.selection.allocation import Task
from obc.selection.choice import BudgetError
from obc.selection.uniform import select_uniform
from obc.structures.transformers.saving import PLAN_FILE

_CALIBRATION_BATCHES = 32
_CALIBRATION_BATCH = 4


def run(parsed: argparse.Namespace, budget: Budget) -> int:
    """Prune ``parsed.target`` to the budget and write it to ``parsed.out``."""
    require(checkpoints.PACKAGES)
    source, out = Path(parsed.target), parsed.out
    if parsed.scores is None:
        raise UsageError(f"--scores is missing: score the directory first, obc score {source} --data FILE")
    if parsed.compensate and parsed.data is None:
        raise UsageError("--compensate needs --data: a .txt or .jsonl file, or a folder of images")
    if out.resolve() == source.resolve():
        raise UsageError(f"--out {out} is the model's own directory; choose another")
    if parsed.criterion is None and parsed.allocation is not None:
        raise UsageError("--allocation of a model directory needs --criterion, and the statistics in --scores")
    scores = load_scores(parsed.scores) if parsed.criterion is None else _statistics(parsed.scores)
    checkpoint = checkpoints.load(source, parsed.dtype, checkpoints.device_of(parsed.device))
    model = checkpoint.model
    from obc.structures.transformers import TransformersStructure

    try:
        if isinstance(scores, Scores):
            scores.verify(model)
        structure = TransformersStructure(model, uniform=bool(parsed.uniform), round_to=parsed.round_to)
        original = copy.deepcopy(model) if parsed.compensate else model
        before, report = dict(model.state_dict()), _report(parsed, structure, budget)
        if isinstance(scores, Scores):
            chosen = _chosen(structure, scores, budget, report)
        else:
            chosen = _by_criterion(structure, scores, budget, parsed.criterion, parsed.allocation, report)
        structure.remove(chosen)
        structure.plan.verify(before, model)
    except BudgetError as error:
        least = 1 - error.reachable / budget.counted(structure.costs(budget.unit))
        raise UsageError(
            f"--{budget.argument} {budget.share:g} is out of reach: {least:.4f} remain where every group that can be "
            "pruned keeps its least"
        ) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    _note_result(report, structure)
    kinds = {group.name: group.kind for group in structure.groups}
    shares = report.macs_after / report.macs_before, report.parameters_after / report.parameters_before
    say(f"MACs a token: {shares[0]:.1%} remain; parameters: {shares[1]:.1%}")
    say(*(f"  {name} ({kinds[name]}): {was} -> {now}" for name, (was, now) in report.widths.items()))
    say(*(f"  {name}: not pruned: {why}" for name, why in report.left_out.items()))
    if parsed.compensate:
        say(_compensate(parsed, model, original, structure.plan, report))
        if set(model.state_dict()) != set(before):
            structure.config_refused = "layers have biases now that no config can say"
    _save(model, structure, source, folder(out))
    report.save(out / REPORT_FILES[1])
    say(f"as a page: obc report {out}")
    return 0


def _report(parsed: argparse.Namespace, structure: Any, budget: Budget) -> PruningReport:
    """What is known before anything is removed."""
    choices = {
        "directory": parsed.target,
        "scores": parsed.scores,
        "budget": f"{budget.argument}={budget.share:g}",
        "criterion": parsed.criterion or "jacobian",
        "allocation": parsed.allocation or ("uniform" if parsed.uniform else "global"),
        "compensate": parsed.compensate,
        "seed": parsed.seed,
        "MACs": "of one token",
    }
    macs, parameters = (round(structure.costs(unit).total()) for unit in ("macs", "parameters"))
    return PruningReport(
        budget=budget.unit,
        macs_before=macs,
        parameters_before=parameters,
        widths={group.name: (group.size, group.size) for group in structure.groups},
        left_out=dict(structure.left_out),
        unproved={"the whole model": "a directory is pruned by its scores without a forward pass"},
        provenance=provenance(structure.model, choices),
    )


def _note_result(report: PruningReport, structure: Any) -> None:
    """What remains."""
    report.macs_after, report.parameters_after = (
        round(structure.costs(unit).total()) for unit in ("macs", "parameters")
    )
    now = {group.name: group.size for group in structure.groups}
    report.widths = {name: (before, now[name]) for name, (before, _) in report.widths.items()}
    report.left_out, report.warnings = dict(structure.left_out), list(structure.warnings)


def _statistics(path: Path) -> obc.Statistics:
    """The statistics of a file."""
    try:
        return obc.Statistics.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--criterion needs statistics, obc score --statistics: {error}") from error


def _by_criterion(
    structure: Any,
    statistics: obc.Statistics,
    budget: Budget,
    criterion: str,
    allocation: str | None,
    report: PruningReport,
) -> dict[str, Tensor]:
    """The units to remove by a criterion of statistics."""
    found, limits, costs = get(criterion), structure.limits, structure.costs(budget.unit)
    if hasattr(found, "measure"):
        raise UsageError(f"--criterion {criterion} runs the model itself: prune by a module:function")
    chosen = chosen_allocation(allocation, found)
    importance = getattr(chosen, "importance", None)
    scores = scores_from(found, structure.groups, statistics, structure.model)
    if not scores:
        raise UsageError(f"--criterion {criterion} scores no group of this model")
    for name, units in scores.items():
        report.note_scores(name, units)
    task = Task(
        scores,
        structure.groups,
        costs,
        (1 - budget.share) * budget.counted(costs),
        per_cost=getattr(found, "per_cost", True),
        min_units=limits.min_units,
        round_to=limits.round_to,
        families=limits.families,
        widths=limits.widths,
        importance={} if importance is None else importance(statistics),
    )
    return chosen.select(task)


def _chosen(structure: Any, scores: Scores, budget: Budget, report: PruningReport) -> dict[str, Tensor]:
    """The units to remove: sets of them where the file has rows, else one by one."""
    groups, costs, limits = structure.groups, structure.costs(budget.unit), structure.limits
    joint = bool(scores.rows)
    values: dict[str, Tensor]
    if joint:
        rows = ((group.name, group.gate_rows(scores.rows)) for group in groups)
        values = {name: found for name, found in rows if found is not None}
    else:
        values = dict(scores.group(groups, slices="gate"))
    if not values:
        raise UsageError("the scores have nothing of any group that can be pruned; score the model itself")
    for name, units in values.items():
        report.note_scores(name, units.square().sum(0) if joint else units)
    freed = (1 - budget.share) * budget.counted(costs)
    selection = "joint" if joint else "independent"
    options: dict[str, Any] = {"selection": selection, "min_units": limits.min_units, "round_to": limits.round_to}
    if limits.families:
        return select_uniform(values, costs, freed, limits.families, widths=limits.widths, **options)
    return select(values, costs, freed, **options)


def _compensate(
    parsed: argparse.Namespace, model: Any, original: nn.Module, plan: PruningPlan, report: PruningReport
) -> str:
    """Compensate ``model`` in place from ``--data``, and say in a line what came of it."""
    batches = data.batches(
        parsed.data,
        original,
        Path(parsed.target),
        "label-free",
        count=_CALIBRATION_BATCHES,
        size=_CALIBRATION_BATCH,
        seq_len=parsed.seq_len,
        seed=parsed.seed,
    )
    if parsed.compensate == "mean":
        report.means = means = absorb_means(model, original, plan, batches, checkpoints.outputs)
        report.parameters_after = sum(parameter.numel() for parameter in model.parameters())
        report.warnings += means.warnings
        lines = [f"{len(means.absorbed)} biases took over means, {len(means.created)} of them new", *means.warnings]
        return "\n".join(lines)
    try:
        found = obc.compensate(model, original, plan, batches, checkpoints.outputs, mode=parsed.compensate)
    except ValueError as error:
        raise UsageError(f"--compensate: {error}") from error
    report.compensation = found
    return (
        f"compensated ({parsed.compensate}): held-out output error {found.naive_error:.4f} -> "
        f"{found.final_error:.4f}, {found.seconds:.1f} s"
    )


def _save(model: Any, structure: Any, source: Path, out: Path) -> None:
    """Write the model as ``from_pretrained`` loads it, or else as ``load_pruned`` does; the tokenizer beside it."""
    from obc.structures.transformers import save_pruned

    if structure.config_refused is None:
        model.save_pretrained(out)
        structure.plan.save(out / PLAN_FILE)
        say(f"written: {out}; from_pretrained loads it")
    else:
        save_pruned(model, structure.plan, out)
        say(f"written: {out}; obc.structures.transformers.load_pruned loads it: {structure.config_refused}")
    tokenizer = data.tokenizer_of(source)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
