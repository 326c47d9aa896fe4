"""Recovery of a pruned network without training: BatchNorm recalibrated, or compensated by least squares."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from obc.demo.data import Split
from obc.model.hooks import replaced
from obc.recovery import PruningPlan, compensate, recalibrate_norms
from obc.recovery.calibration import batch_norms

CALIBRATION_IMAGES = 200  # of the training split, without their labels
CALIBRATION_BATCH = 100

RAW, RECALIBRATED, LEAST_SQUARES, SEQUENTIAL = "raw", "BN recalibrated", "compensated (ls)", "compensated (seq)"
WAYS = (RAW, RECALIBRATED, LEAST_SQUARES, SEQUENTIAL)


def calibration(split: Split) -> list[Tensor]:
    """The first images of ``split`` in batches, without labels."""
    return list(split.images[:CALIBRATION_IMAGES].split(CALIBRATION_BATCH))


def recovered(
    pruned: nn.Module, original: nn.Module, plan: PruningPlan, split: Split, measure: Callable[[nn.Module], float]
) -> Mapping[str, float | None]:
    """``measure`` of the pruned network, and of a copy recovered in each of ``WAYS``; ``pruned`` is unchanged.

    The result is None if a way does not apply: without BatchNorm there is nothing to recalibrate.
    """
    batches = calibration(split)
    values: dict[str, float | None] = {RAW: measure(pruned), RECALIBRATED: None}
    if batch_norms(pruned):
        model = copy.deepcopy(pruned)
        recalibrate_norms(model, batches)
        values[RECALIBRATED] = measure(model)
    for way, mode in ((LEAST_SQUARES, "ls"), (SEQUENTIAL, "seq")):
        model = copy.deepcopy(pruned)
        # Without the warning that "seq" takes many passes: here they take a second.
        with replaced(logging.getLogger("obc.compensate"), disabled=True):
            compensate(model, original, plan, batches, mode=mode, progress=False)  # type: ignore[arg-type]
        values[way] = measure(model)
    return values
