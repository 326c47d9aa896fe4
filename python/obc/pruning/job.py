"""The work of one ``obc.prune``: score, select, remove, step by step."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from obc.criteria import Jacobian, Subject
from obc.criteria.masked_model import Evaluation
from obc.criteria.parameter_rows import weights_outside_calls
from obc.criteria.protocol import name_of
from obc.criteria.refusals import said_of, scores_nothing
from obc.criteria.rows import read_rows
from obc.criteria.scoring import collected, scored
from obc.model.arguments import listed
from obc.model.evaluation import Run
from obc.model.processes import ALONE
from obc.model.progress import ProgressLog, progress_bar
from obc.model.usable import not_finite
from obc.pruning.arguments import Choice, Options
from obc.pruning.budgets import Budget
from obc.pruning.compensator import Compensator
from obc.pruning.final_proof import FinalProof, take_out_blocks
from obc.pruning.report import PruningReport, PruningResult, StepReport, timed
from obc.pruning.search_fitness import fitness_of
from obc.recovery.calibration import batch_norms, norm_reference, recalibrate_from
from obc.recovery.norm_reference import NormReference
from obc.selection import Costs
from obc.selection.caps import refuse_unknown
from obc.selection.checks import NARROW, FewRowsWarning, ShareWarning
from obc.selection.choice import BudgetError
from obc.selection.task import Task
from obc.selection.uniform import permitted_widths
from obc.statistics.errors import NothingToReadError
from obc.statistics.results import Statistics
from obc.structures.protocol import Structure, Unit

logger = logging.getLogger("obc")

# Costs are sums of large products in float64: a target met up to this is met.
_ROUNDING = 1e-9
_UNITS: tuple[Unit, Unit] = ("macs", "parameters")
_BLOCKS = " (residual blocks are the members, of one class, of an nn.ModuleList or nn.Sequential)"


class Job:
    """One call of :func:`prune`: scores, selects, removes, step by step."""

    def __init__(
        self,
        structure: Structure,
        subject: Subject,
        report: PruningReport,
        budget: Budget,
        choice: Choice,
        options: Options,
        final_proof: FinalProof | None = None,
    ) -> None:
        self.final_proof, self.compensator = final_proof, Compensator(structure, subject, options, report)
        self.structure, self.subject, self.report = structure, subject, report
        self.budget, self.choice, self.options = budget, choice, options
        self.widths = {group.name: group.size for group in structure.groups}
        self.least = choice.caps.least(self.widths)
        refuse_unknown("allocation", getattr(choice.allocation, "strengths", ()), self.widths)
        self._importance: Mapping[str, float] = {}
        self._evaluation: Evaluation | None = None
        self._norm_reference: NormReference | None = None
        self._few_rows = False  # whether a warning said so
        self.unpruned = {unit: structure.costs(unit).total() for unit in _UNITS}
        self.full = budget.counted(budget.costs(structure))
        subject.batches.on_left_out = report.warn
        report.left_out = dict(getattr(structure, "left_out", {}))
        report.budget = budget.unit
        report.note_known(budget.meters.known(structure), before=True)
        report.macs_before, report.parameters_before = (round(self.unpruned[unit]) for unit in _UNITS)

    def run(self) -> None:
        """Reach the share of every step, and fill the report."""
        if not self.widths:
            why = not_finite(self.subject.model) or _not_pruned(self.report.left_out)
            if not why and not self.structure.groups:
                name = type(self.structure).__name__
                why = f": {name} found no groups; without structure= obc.prune traces the model by example_inputs"
            raise ValueError(f"no layer can be pruned{why}")
        schedule = self.budget.schedule(self.options.steps, sum(self.widths.values()))
        self.check_reachable(schedule[-1])
        if self.options.recalibrate and batch_norms(self.subject.model):
            with timed(self.report, "recalibrate"):
                model, batches, forward = self.subject.model, self.subject.batches, self.subject.forward_fn
                self._norm_reference = norm_reference(model, batches, forward)
        log = ProgressLog("obc.prune", self.options.progress)
        self.subject.batches.on_batch = log.tick
        with progress_bar(self.options.progress, total=len(schedule), desc="prune", unit="step") as bar:
            for number, share in enumerate(schedule, 1):
                log.doing = f"step {number} of {len(schedule)}"
                self._step(share, schedule[-1])
                self._measure()
                left = f"{self.report.steps[-1].remaining:.3f} of the {self.budget.noun}"
                logger.info("obc.prune: step %d of %d: %s remain", number, len(schedule), left)
                if self.options.on_step is not None:
                    self.options.on_step(PruningResult(self.subject.model, self.structure.plan, self.report))
                bar.set_postfix_str(left)
                bar.update()
        log.doing = "after the last step"
        for name, (before, after) in self.report.widths.items():
            if 0 < after < NARROW * before:
                self.report.warn(f"{name!r} keeps {after} of {before} units; ignored_layers or min_units spare it")

    def finish(self, run: Run) -> None:
        """Compensate, take removed blocks out of their lists, and report the final model's costs and warnings.

        Args:
            run: runs a model on the first batch, to check that it computes the same without the blocks.
        """
        self.compensator.finish()
        self.report.note_known(self.budget.meters.known(self.structure), before=False)
        take_out_blocks(self.structure, run)
        for warning in getattr(self.structure, "warnings", ()):
            self.report.warn(warning)

    def _measure(self) -> None:
        report = self.report
        report.macs_after, report.parameters_after = (round(self.structure.costs(unit).total()) for unit in _UNITS)
        counted = sum(parameter.numel() for parameter in self.subject.model.parameters())
        if report.parameters_after != counted:
            self.report.warn(f"the structure counts {report.parameters_after} parameters, the model has {counted}")
            report.parameters_after = counted
        left = {group.name: group.size for group in self.structure.groups}
        report.widths = {name: (before, left.get(name, 0)) for name, before in self.widths.items()}

    def _step(self, share: float, last: float) -> None:
        costs = self.budget.costs(self.structure)
        counted = self.budget.counted(costs)
        excess = counted - share * self.full
        if excess <= _ROUNDING * self.full:  # the previous step went far enough
            self._note_step(share, {})
            return
        subject = replace(self.subject, groups=self.structure.groups)
        with timed(self.report, "score"):
            rows = self._rows(subject)
            subject.batches.refuse_many()
            for name, values in rows.items():
                self.report.note_scores(name, values.square().sum(0) if values.dim() == 2 else values)
        with timed(self.report, "select"):
            removed = self._select(rows, costs, excess, counted - last * self.full)
        with timed(self.report, "remove"):
            self.structure.remove(removed)
        if self.final_proof is not None:
            self.final_proof.note(removed)
        self._note_step(share, {name: len(units) for name, units in removed.items() if len(units)})
        self.compensator.undo()
        if self._norm_reference is not None:
            with timed(self.report, "recalibrate"):
                self._recalibrate(subject, self._norm_reference)
        self.compensator.step()

    def _recalibrate(self, subject: Subject, reference: NormReference) -> None:
        model, batches = subject.model, subject.batches
        targets = reference.targets(model, self.structure.plan, left_out=batches.left_out)
        recalibrate_from(model, batch_norms(model), batches, subject.forward_fn, ALONE, targets)

    def _note_step(self, target: float, removed: Mapping[str, int]) -> None:
        macs, parameters = (self.structure.costs(unit).total() / self.unpruned[unit] for unit in _UNITS)
        remaining = self.budget.counted(self.budget.costs(self.structure)) / self.full
        self.report.steps.append(StepReport(target, macs, parameters, removed, remaining))

    def _rows(self, subject: Subject) -> dict[str, Tensor]:
        """:meth:`measured`, with errors in terms of the allocation."""
        try:
            return self.measured(subject)
        except NothingToReadError as error:  # of a statistic that the criterion does not need
            allocation = type(self.choice.allocation).__name__
            raise ValueError(
                f"the allocation {allocation} follows the statistic {error.statistic!r}, but {error.reason}{_BLOCKS}; "
                "pass allocation='global' (all units compete), 'uniform' (equal shares), or a mapping of names of "
                "groups to strengths"
            ) from error

    def measured(self, subject: Subject) -> dict[str, Tensor]:
        """Per group, (N, units) rows for joint selection or (units,) scores for independent selection."""
        criterion, also = self.choice.criterion, tuple(getattr(self.choice.allocation, "needs", ()))
        if isinstance(criterion, Jacobian):
            rows = self._jacobian(subject)
        elif self.choice.selection == "joint":
            with said_of(criterion, subject.groups):
                rows = criterion.measure_rows(subject)
        else:
            rows, statistics = scored(criterion, subject, also)
            self.note_importance(statistics)
            also = ()
        if also:
            self.note_importance(collected([], also, subject))
        if not rows:
            raise scores_nothing(criterion, subject.groups, _not_pruned(self.report.left_out))
        if not getattr(criterion, "reads_parameters", False):
            said = f"{name_of(criterion)!r} does not read weights for which no layer is called; 'jacobian' does"
            outside = weights_outside_calls(subject.model, subject.groups, "gate")
            self.report.unscored.update((name, said) for name, _ in outside)
        for name in {group.name for group in subject.groups} - set(rows):
            self.report.left_out[name] = f"the criterion {name_of(criterion)!r} has nothing to score in it"
        return rows

    def _jacobian(self, subject: Subject) -> dict[str, Tensor]:
        found = read_rows(subject)
        self.report.unscored.update(found.unscored)
        joint = self.choice.selection == "joint"
        values = [
            group.gate_rows(found.rows) if joint else group.scores(found.rows, subject.slices)
            for group in subject.groups
        ]
        named = zip(subject.groups, values, strict=True)
        rows = {group.name: group_rows for group, group_rows in named if group_rows is not None}
        if rows and not any(bool(group_rows.any()) for group_rows in rows.values()):
            raise ValueError(
                "all rows are zero, so no choice is better than another: no loss depends on what can be "
                "pruned; check loss_fn, and rows='sample' with losses that couple samples (then rows='batch')"
            )
        return rows

    def note_importance(self, statistics: Statistics) -> None:
        """Keep what the allocation says of blocks by these statistics."""
        importance = getattr(self.choice.allocation, "importance", None)
        self._importance = {} if importance is None else importance(statistics)

    def _select(self, rows: Mapping[str, Tensor], costs: Costs, excess: float, goal: float) -> dict[str, Tensor]:
        """The units that the allocation removes to free ``excess`` of all steps' ``goal``; warns only once."""
        choice, limits = self.choice, self.choice.limits(self.structure, self.least)
        task = Task(
            rows,
            self.structure.groups,
            costs,
            excess,
            selection=choice.selection,
            shrinkage=choice.shrinkage,
            per_cost=choice.per_cost,
            min_units=limits.min_units,
            round_to=limits.round_to,
            full_widths=self.widths,
            families=limits.families,
            widths=limits.widths,
            goal=goal,
            importance=self._importance,
            evaluate=self._evaluate if getattr(choice.allocation, "evaluates", False) else None,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                removed = choice.allocation.select(task)
            except BudgetError as error:
                raise self._unreached(error, rows) from error
        self._evaluation = None  # it belongs to this step's model
        for warning in caught:
            few_rows = issubclass(warning.category, FewRowsWarning)
            if not (few_rows and self._few_rows) and not issubclass(warning.category, ShareWarning):
                self.report.warn(str(warning.message))
            self._few_rows = self._few_rows or few_rows
        return removed

    def _unreached(self, error: BudgetError, rows: Mapping[str, Tensor]) -> BudgetError:
        """The error in terms of what ``obc.prune`` was given."""
        scored, groups = len(rows), len(self.structure.groups)
        unscored = ""
        if scored < groups:
            name = name_of(self.choice.criterion)
            unscored = f", of which the criterion {name!r} scores {scored}; the others keep all units"
        return BudgetError(
            f"{self.budget.said} is out of reach with the allocation "
            f"{type(self.choice.allocation).__name__} over {groups} groups{unscored}: {error}. "
            f"Let more remain, or pass another allocation= or criterion=",
            error.reachable,
        )

    def _evaluate(self, removed: Mapping[str, Tensor]) -> float:
        """The loss of the model's output with these units masked."""
        if self._evaluation is None:
            search: Any = self.choice.allocation
            compensated = getattr(search, "compensated", False)
            subject = replace(self.subject, groups=self.structure.groups)
            metric: Any = getattr(search, "metric", "kl")
            self._evaluation = fitness_of(subject, metric, getattr(search, "batches", None), compensated)
        return self._evaluation.of_removed(removed)

    def check_reachable(self, share: float) -> None:
        """Refuse a budget that is out of reach even where every group keeps its minimum."""
        costs, limits = self.budget.costs(self.structure), self.choice.limits(self.structure, self.least)
        sizes = {group.name: group.size for group in self.structure.groups}
        smallest = [
            permitted_widths(size, limits.min_units[name], limits.round_to[name], limits.widths.get(name))[0]
            for name, size in sizes.items()
        ]
        least = self.budget.counted(costs, torch.tensor(smallest, dtype=torch.float64, device="cpu")) / self.full
        if least > share:
            widths = listed([f"{name!r}: {low} of {sizes[name]}" for name, low in zip(sizes, smallest, strict=True)])
            remedies = " or ".join(["let more remain", *(f"relax {limit}" for limit in self.choice.narrowing)])
            raise ValueError(
                f"{self.budget.said} is out of reach: {self.budget.described(least)} remain where each of the "
                f"{len(smallest)} groups that can be pruned keeps its minimum ({widths} units); {remedies}"
                f"{_not_pruned(self.report.left_out)}"
            )


def _not_pruned(left_out: Mapping[str, str]) -> str:
    """What was left out: of layers that differ in their number alone, the first, and how many more there are."""
    alike: dict[str, list[str]] = {}
    for name, why in left_out.items():
        alike.setdefault(re.sub(r"\d+", "#", f"{name}: {why}"), []).append(f"{name}: {why}")
    reasons = [first + (f" (and {len(more)} like it)" if more else "") for first, *more in alike.values()]
    return f" (not pruned: {'; '.join(reasons)})" if reasons else ""
