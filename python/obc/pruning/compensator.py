"""Compensation inside ``obc.prune``: once at the end, or after every step, so that the next step scores its result."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch

from obc.model.errors import explained
from obc.model.evaluation import ForwardFn
from obc.model.names import named_tensors
from obc.model.usable_batches import UsableBatches
from obc.pruning.arguments import Compensation
from obc.pruning.report import PruningReport, timed
from obc.recovery.compensate import compensate as compensate_model
from obc.recovery.fusion import fuse_units
from obc.recovery.mean_bias import absorb_means
from obc.structures.protocol import Structure


class Compensator:
    """Keeps a copy of the unpruned model, and compensates for what was removed.

    Every compensation starts from the weights that pruning leaves, sliced from the unpruned model's. An earlier one
    only affects which units are removed next.

    Args:
        structure: the structure of the unpruned model.
        how: the argument ``compensate`` of ``obc.prune``.
        every_step: compensate after every step.
        batches: calibration batches.
        forward: returns the outputs to preserve.
        recalibrate: re-estimate BatchNorm statistics after weights changed.
        report: receives the time, and the report of the last compensation.
        progress: show a progress bar.

    Raises:
        PruningError: the model can't be copied.
    """

    def __init__(
        self,
        structure: Structure,
        how: Compensation,
        every_step: bool,
        batches: UsableBatches,
        forward: ForwardFn,
        recalibrate: bool,
        report: PruningReport,
        progress: bool | None,
    ) -> None:
        remedy = "prune with compensate=None, then obc.compensate with an unpruned model of your own"
        with explained(structure.model, "copying it (copy.deepcopy)", remedy):
            self.original = copy.deepcopy(structure.model)
        self.structure, self.groups, self.model = structure, structure.groups, structure.model
        self.how, self.every_step, self.progress = how, every_step, progress
        self.batches, self.forward, self.recalibrate, self.report = batches, forward, recalibrate, report
        self._states = self.original.state_dict()

    def undo(self) -> None:
        """Restore the weights that pruning leaves, before the next compensation."""
        if self.every_step:
            self.structure.plan.put_slices(self._states, self.model)

    def step(self) -> None:
        """Compensate, if every step is."""
        if self.every_step:
            self._run()

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Inside the block the model is as pruning leaves it, for verification."""
        if not self.every_step:
            yield
            return
        found = [(tensor, tensor.clone()) for _, _, _, tensor in named_tensors(self.model)]
        self.undo()
        yield
        with torch.no_grad():
            for tensor, value in found:
                tensor.copy_(value)

    def finish(self) -> None:
        """Compensate, unless the last step did."""
        if not self.every_step:
            self._run()

    def _run(self) -> None:
        model, original, plan, report = self.model, self.original, self.structure.plan, self.report
        with timed(report, "compensate"):
            if self.how == "mean":
                report.means = absorb_means(model, original, plan, self.batches, self.forward)
                report.warnings += report.means.warnings
            elif self.how == "fusion":
                report.fusion = fuse_units(model, original, plan, self.groups)
            else:
                report.compensation = compensate_model(
                    model,
                    original,
                    plan,
                    self.batches,
                    self.forward,
                    mode=self.how,
                    recalibrate_norms=self.recalibrate,
                    progress=self.progress,
                )
