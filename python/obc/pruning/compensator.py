"""Compensation inside ``obc.prune``: once at the end, or after every step, so that the next step scores its result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from obc.criteria import Subject
from obc.model.errors import explained
from obc.model.names import named_tensors
from obc.model.shared_copy import deep_copy
from obc.pruning.arguments import Options
from obc.pruning.report import PruningReport, timed
from obc.recovery.compensate import compensate as compensate_model
from obc.recovery.fusion import fuse_units
from obc.recovery.mean_bias import absorb_means
from obc.structures.protocol import Structure


class Compensator:
    """Keeps a copy of the unpruned model, and compensates for what was removed; without ``compensate`` does neither.

    Every compensation starts from the weights that pruning leaves, sliced from the unpruned model's. An earlier one
    only affects which units are removed next.

    Args:
        structure: the structure of the unpruned model.
        subject: its batches calibrate, and its forward function returns the outputs to preserve.
        options: how the weights are compensated, whether after every step, and whether BatchNorm statistics are
            re-estimated afterwards.
        report: receives the time, and the report of the last compensation.

    Raises:
        PruningError: the model can't be copied.
    """

    def __init__(self, structure: Structure, subject: Subject, options: Options, report: PruningReport) -> None:
        self._original: nn.Module | None = None
        remedy = "prune with compensate=None, then obc.compensate with an unpruned model of your own"
        if options.compensate is not None:
            with explained(structure.model, "copying it (copy.deepcopy)", remedy):
                self._original = deep_copy(structure.model)
        self.structure, self.groups, self.model = structure, structure.groups, structure.model
        self.batches, self.forward = subject.batches, subject.forward_fn
        self.options, self.every_step, self.report = options, options.compensate_every_step, report
        self._states = {} if self._original is None else self._original.state_dict()

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
        model, original, plan, report = self.model, self._original, self.structure.plan, self.report
        if original is None:
            return
        with timed(report, "compensate"):
            if self.options.compensate == "mean":
                report.means = absorb_means(model, original, plan, self.batches, self.forward)
                report.warnings += report.means.warnings
            elif self.options.compensate == "fusion":
                report.fusion = fuse_units(model, original, plan, self.groups)
            else:
                how: Any = {"mode": self.options.compensate, "recalibrate_norms": self.options.recalibrate}
                found = compensate_model(
                    model, original, plan, self.batches, self.forward, progress=self.options.progress, **how
                )
                report.compensation = found
