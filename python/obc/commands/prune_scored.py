"""Prunes a local transformers directory by the scores in a file, without a forward pass."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import obc
from obc.commands import data, model_directory, prune_directory, pruned_directory
from obc.commands.allocation_option import allocation_of_text
from obc.commands.common import UsageError, folder, refusing, require
from obc.commands.report import load as load_scores
from obc.commands.run_log import say
from obc.criteria import Subject, get, scores_from
from obc.criteria.protocol import CriterionError
from obc.model.evaluation import Run
from obc.model.plan import PruningPlan
from obc.model.usable_batches import UsableBatches
from obc.pruning.arguments import Choice, Options, chosen_allocation
from obc.pruning.budgets import Budget
from obc.pruning.job import Job
from obc.pruning.measured import MeasuredSpeed
from obc.pruning.report import PruningReport, provenance
from obc.recovery.mean_bias import absorb_means
from obc.scoring import Scores
from obc.selection.caps import Caps
from obc.selection.choice import BudgetError
from obc.statistics import StatisticsError

_BATCHES, _IMAGES = 32, 4  # of --compensate, and images of a batch
_ONE_STEP = Options(steps=1, progress=False)


def run(parsed: argparse.Namespace, budget: Budget) -> int:
    """Prune ``parsed.target`` to the budget and write it to ``parsed.out``."""
    require(model_directory.PACKAGES)
    if parsed.compensate == "none":
        parsed.compensate = None
    source = Path(parsed.target)
    _check(parsed)
    folder(parsed.out)
    found = _scores(parsed.scores) if parsed.criterion is None else _statistics(parsed.scores)
    directory = model_directory.load(source, parsed.dtype, model_directory.device_of(parsed.device))
    model = directory.model
    try:
        if isinstance(found, Scores):
            found.verify(model)
        choice = _choice(parsed, found)
        structure = prune_directory.structure_of(parsed, model)
        run_first = _on_first_batch(parsed, model, source)
        budget = budget.ready(structure, run_first, parsed.round_to)
        original = copy.deepcopy(model) if parsed.compensate else model
        before, report = dict(model.state_dict()), _report(parsed, model, budget)
        speed = MeasuredSpeed(model, run_first, report) if parsed.measure else None
        subject = Subject(model, (), UsableBatches(()), model_directory.outputs, model_directory.outputs)
        job = _ScoredJob(found, parsed, structure, subject, report, budget, choice, _ONE_STEP)
        job.run()
        structure.plan.verify(before, model)
    except BudgetError as error:
        least = budget.described(1 - error.reachable / job.full)
        option = f"--{budget.said.replace('_', '-').replace('=', ' ')}"
        unscored = ", ".join(name for name in report.left_out if name in job.widths)
        raise UsageError(
            f"{option} is out of reach: {least} remain if every prunable group keeps its least width"
            + (f", and all units of {unscored}, which have no scores" if unscored else "")
        ) from error
    except (ValueError, obc.PruningError) as error:
        raise UsageError(str(error)) from error
    report.note_known(budget.meters.known(structure), before=False)
    report.warnings += structure.warnings
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


def _choice(parsed: argparse.Namespace, found: Scores | obc.Statistics) -> Choice:
    """How units are chosen: sets of them if a score file has rows, else one by one."""
    criterion = get(parsed.criterion or "jacobian")
    if parsed.criterion is not None and hasattr(criterion, "measure"):
        raise UsageError(
            f"--criterion {parsed.criterion} runs the model itself; pass module:function instead of a directory"
        )
    said = None if parsed.allocation is None else allocation_of_text(parsed.allocation)
    allocation = chosen_allocation(said, criterion)
    if getattr(allocation, "evaluates", False):
        raise UsageError(f"--allocation {parsed.allocation} measures the model: it is for --data, not for --scores")
    ratio = 1.0 if parsed.max_pruning_ratio is None else parsed.max_pruning_ratio
    caps = Caps.of(ratio, parsed.protected_blocks or 0)
    selection: Any = "joint" if isinstance(found, Scores) and found.rows else "independent"
    return Choice(criterion, allocation, selection, "gate", getattr(criterion, "per_cost", True), None, 1, None, caps)


def _report(parsed: argparse.Namespace, model: nn.Module, budget: Budget) -> PruningReport:
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
    unproved = {"the whole model": "a directory is pruned by its scores without a forward pass"}
    return PruningReport(unproved=unproved, provenance=provenance(model, choices))


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
    with refusing(OSError, ValueError, start="--criterion needs statistics, obc score --statistics: "):
        return obc.Statistics.load(path)


class _ScoredJob(Job):
    """Takes from a file what other jobs measure."""

    def __init__(self, found: Scores | obc.Statistics, parsed: argparse.Namespace, *job: Any) -> None:
        super().__init__(*job)
        self._found, self._parsed = found, parsed

    def check_reachable(self, share: float) -> None:
        """The allocation finds out, which knows the groups that have scores."""

    def measured(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`obc.pruning.job.Job.measured`."""
        groups, found = subject.groups, self._found
        if isinstance(found, Scores):
            values, why = self._scored(found), "it has no scores"
        else:
            values = self._by_criterion(found)
            why = f"the criterion {self._parsed.criterion!r} scores nothing in it from {self._parsed.scores}"
        self.report.left_out |= {group.name: why for group in groups if group.name not in values}
        return values

    def _scored(self, scores: Scores) -> dict[str, Tensor]:
        groups = self.structure.groups
        if self.choice.selection == "joint":
            rows = ((group.name, group.gate_rows(scores.rows)) for group in groups)
            values = {name: found for name, found in rows if found is not None}
        else:
            values = dict(scores.group(groups, slices="gate"))
        if not values:
            remedy = "score this model"
            if groups and all(group.is_depth for group in groups):
                remedy = (
                    "pass obc score --statistics, and obc prune --criterion, a criterion of blocks (see obc criteria)"
                )
            raise UsageError(f"none of the groups that can be pruned has scores; {remedy}")
        return values

    def _by_criterion(self, statistics: obc.Statistics) -> dict[str, Tensor]:
        criterion = self.choice.criterion
        try:
            scores = scores_from(criterion, self.structure.groups, statistics, self.structure.model)
        except StatisticsError as error:
            remedy = f"or collect them by obc score MODEL_DIR --statistics {self._parsed.criterion}"
            raise UsageError(f"{error}, {remedy}") from error
        except CriterionError as error:
            raise UsageError(f"{error}; choose other groups with --kinds") from error
        self.note_importance(statistics)
        return scores


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
    with refusing(ValueError, start="--compensate: "):
        found = obc.compensate(model, original, plan, batches, model_directory.outputs, mode=parsed.compensate)
    report.compensation = found
    return (
        f"compensated ({parsed.compensate}): held-out output error {found.naive_error:.4f} -> "
        f"{found.final_error:.4f}, {found.seconds:.1f} s"
    )
