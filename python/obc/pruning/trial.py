"""Which criterion prunes this network better, found by trying: each prunes a copy to the whole budget at once.

The Jacobian Criterion counts what removal does to the loss, ``kfac_obs`` what is left of it after least squares. Where
1x1 convolutions read many channels that can replace each other, as in inverted residuals, the second is often better;
where 3x3 convolutions read the channels, or in language models, it can be worse. So neither is taken on trust.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from obc.criteria import Subject
from obc.criteria.protocol import CriterionError, name_of
from obc.criteria.registry import get
from obc.model.groups import ChannelGroup
from obc.model.layouts import layout_of
from obc.model.shared_copy import deep_copy
from obc.pruning.arguments import Choice, Options
from obc.pruning.budgets import Budget
from obc.pruning.job import Job
from obc.pruning.report import PruningReport, timed
from obc.selection.choice import BudgetError
from obc.structures.protocol import Structure

OTHER = "kfac_obs"
# It inverts a matrix of this many rows for every layer that reads a group; of wider layers that takes too long.
_WIDEST = 4096


def better_criterion(
    choice: Choice, structure: Structure, subject: Subject, budget: Budget, options: Options, report: PruningReport
) -> Choice:
    """``choice``, or the same with ``kfac_obs`` if that leaves the smaller output error after compensation.

    The error is that of :func:`obc.compensate` on its held-out batches, of copies pruned to the budget in one step.
    Only an open choice is tried, with compensation by least squares and where 1x1 convolutions read a whole group.
    """
    groups = structure.groups
    regressed = options.compensate in ("correct", "ls", "seq")
    if not (choice.open and regressed and hasattr(structure, "twin") and read_by_pointwise(groups, structure.model)):
        return choice
    choices = choice, replace(choice, criterion=get(OTHER), selection="independent")
    errors: dict[str, float] = {}
    with timed(report, "try"):
        for one in choices:
            try:
                errors[name_of(one.criterion)] = _error(one, structure, subject, budget, options, report)
            except (CriterionError, BudgetError) as error:
                if one is choice:
                    raise
                report.warn(f"the criterion {OTHER!r} was not tried: {error}")
    found = min(choices[: len(errors)], key=lambda one: errors[name_of(one.criterion)])
    said = ", ".join(f"{name} {error:.4g}" for name, error in errors.items())
    report.provenance |= {"criterion": name_of(found.criterion), "selection": found.selection, "criteria tried": said}
    return found


class _TrialReport(PruningReport):
    """Keeps its warnings to itself: those that hold for the chosen criterion come again when it prunes the model."""

    def warn(self, warning: str) -> None:
        """Note a warning."""
        self.warnings.append(warning)


def read_by_pointwise(groups: Sequence[ChannelGroup], model: nn.Module) -> bool:
    """Whether some group is read by 1x1 convolutions alone, and no group by a layer too wide for ``kfac_obs``."""
    modules: Mapping[str, Any] = dict(model.named_modules())
    found = False
    for group in groups:
        named = [modules.get(part.module) for part in group.slices if part.side == "in"]
        readers = [(layout, one) for one in named if one is not None and (layout := layout_of(one)) is not None]
        if any(layout.sizes(one.weight)[1] > _WIDEST for layout, one in readers):
            return False
        pointwise = [layout.groups == 1 and set(getattr(one, "kernel_size", ())) == {1} for layout, one in readers]
        found = found or (len(pointwise) == len(named) > 0 and all(pointwise))
    return found


def _error(
    choice: Choice, structure: Any, subject: Subject, budget: Budget, options: Options, report: PruningReport
) -> float:
    """The output error on held-out batches of a copy that is pruned by ``choice`` in one step and compensated."""
    model = deep_copy(structure.model)
    twin, trial = structure.twin(model), _TrialReport()
    subject = replace(subject, model=model, confirmed={})
    options = replace(options, steps=1, compensate_every_step=False, on_step=None, progress=False)
    job = Job(twin, subject, trial, budget, choice, options)
    subject.batches.on_left_out = report.warn  # a batch stays left out
    job.run()
    job.compensator.finish()
    assert trial.compensation is not None
    return trial.compensation.final_error
