"""What a forward pass on the first batch takes before and after pruning: MACs, and on request the time."""

from __future__ import annotations

import functools

import torch
from torch import nn

from obc.model.errors import PruningError, explained
from obc.model.evaluation import Run, device_of, evaluating
from obc.model.latency_table import device_name
from obc.model.shared_copy import shared_copy
from obc.model.timing import REPEATS, median_seconds
from obc.pruning.report import Change, PruningReport, timed
from obc.structures.counted_macs import counted_macs
from obc.structures.protocol import Structure

# Larger differences between the predicted and the measured share cause a warning.
_DIFFERENT = 0.01


class MeasuredMacs:
    """Counts the unpruned model's MACs, calibrates the structure's prediction, and counts again at the end.

    Args:
        structure: the structure of the unpruned model.
        run: ``run(model)`` runs it on the first batch.
        report: receives ``macs_measured``, and a warning if nothing can be counted.
    """

    def __init__(self, structure: Structure, run: Run, report: PruningReport) -> None:
        self._run, self._report = run, report
        self._before, failed = 0.0, None
        try:
            with timed(report, "count"):
                counted = counted_macs(structure.model, run)
        except PruningError as error:
            failed = error
        if failed is not None:
            with evaluating(structure.model):
                run(structure.model)  # raises its own error if it fails without being counted too
            report.warn(f"MACs could not be counted, and are those that the structure predicts: {failed}")
            return
        self._before = sum(counted.values())
        if (calibrate := getattr(structure, "calibrate", None)) is not None:
            calibrate(counted)

    def finish(self, model: nn.Module) -> None:
        """Count the pruned model's MACs; warn if their share differs from the predicted one."""
        report = self._report
        if not self._before:
            return
        with timed(report, "count"):
            report.macs_measured = sum(counted_macs(model, self._run).values()) / self._before
        predicted = report.macs_after / report.macs_before if report.macs_before else 1.0
        if abs(report.macs_measured - predicted) > _DIFFERENT:
            report.warn(
                f"{report.macs_measured:.3f} of the MACs on the first batch remain, but {predicted:.3f} were predicted"
            )


class MeasuredSpeed:
    """Keeps a copy of the unpruned model that shares its weights, and times both models in turns at the end."""

    def __init__(self, model: nn.Module, run: Run, report: PruningReport) -> None:
        self._run, self._report = run, report
        with explained(model, "copying it (copy.deepcopy)", "prune with measure=False, and time the models yourself"):
            self._unpruned = shared_copy(model)

    def finish(self, pruned: nn.Module) -> None:
        """Time both models, and report the medians."""
        device, models = device_of(pruned), (self._unpruned, pruned)
        with timed(self._report, "measure"), evaluating(*models), torch.no_grad():
            before, after = median_seconds([functools.partial(self._run, one) for one in models], device)
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        counted = f"seconds of a forward pass on the first batch, {device_name(pruned)}{threads}, medians of {REPEATS}"
        self._report.speed = Change(before, after, counted)
