"""Optionally measures the time of a forward pass, before and after pruning."""

from __future__ import annotations

import functools

import torch
from torch import nn

from obc.model.errors import explained
from obc.model.evaluation import Run, device_of, evaluating
from obc.model.latency_table import device_name
from obc.model.shared_copy import shared_copy
from obc.model.timing import REPEATS, median_seconds
from obc.pruning.report import Change, PruningReport, timed


class MeasuredSpeed:
    """Keeps a copy of the unpruned model that shares its weights, and times both models in turns at the end.

    Args:
        model: the unpruned model.
        run: ``run(model)`` runs it on the first batch.
        report: receives ``speed``.
    """

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
