"""The correction of one layer in mode "correct": the sums of its regression, its solutions, and the choice among them.

The regression is in :mod:`obc.recovery.normal_equations`, the order of the layers in :mod:`obc.recovery.correct`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from obc.recovery.compensation_options import CompensationOptions
from obc.recovery.compensation_report import CompensationReport, LayerCorrection
from obc.recovery.consumers import PrunedConsumer
from obc.recovery.layer_rows import (
    apply_change,
    columns_of,
    difference,
    drawn_rows,
    input_rows,
    inverse_scale,
    output_rows,
    stream_weights,
    valid_rows,
)
from obc.recovery.moments import RegressionMoments
from obc.recovery.normal_equations import NormalEquations, SingularError, WeightChange, smallest
from obc.recovery.stream_points import Call, of_same_tokens


@dataclass
class Layer:
    """A layer to correct, and what one run of the unpruned model showed about it."""

    name: str
    consumer: PrunedConsumer
    out_channels: Tensor | None
    summed: bool = False
    calls: int = 0
    scope: str = ""
    source: int = 0
    norm: _BatchNorm | None = None  # takes the intercept if the layer has no bias
    order: int = 2**31  # last if the first batch does not reach it

    def weight(self) -> Tensor:
        """The layer's weight, which others may have too."""
        weight: Tensor = getattr(self.consumer.module, self.consumer.layout.weight)
        return weight


@dataclass
class CorrectionSums:
    """Sums for one layer's regression over calibration and held-out batches, and the point's energy there."""

    fit: NormalEquations
    check: NormalEquations
    factors: Tensor | float = 1.0
    energy: float = 0.0
    reached: bool = False
    inputs: RegressionMoments | None = None  # used instead for a layer whose outputs overlap

    @classmethod
    def of(cls, consumer: PrunedConsumer) -> CorrectionSums:
        """Empty sums for the layer."""
        shape, device = columns_of(consumer.module, consumer.layout), next(consumer.module.parameters()).device
        return cls(NormalEquations(*shape, device), NormalEquations(*shape, device))


@dataclass
class LayerCorrections:
    """Collects the sums of layers on every batch, and corrects the layers by them.

    Attributes:
        options: those of the run.
        consumers: every layer of the run, by name.
        report: takes the result of every layer.
        batches: calibration batches, then held-out ones.
        calibration: the number of calibration batches.
        all_batches: the number of calibration batches on all processes.
    """

    options: CompensationOptions
    consumers: Mapping[str, PrunedConsumer]
    report: CompensationReport
    batches: Sequence[Any]
    calibration: int
    all_batches: int

    def add(self, layer: Layer, sums: CorrectionSums, full: Call, call: Call, index: int) -> None:
        """Add one call of a layer to its sums; skipped if the models ran it on different positions."""
        layout, module = layer.consumer.layout, layer.consumer.module
        kept = full.point.to(call.point.device)
        full, call = of_same_tokens(replace(full, x=kept, point=kept), call)
        target = full.point
        sums.reached = sums.reached or target.numel() > 0
        if layer.consumer.overlaps:
            if target.shape[0] == call.x.shape[0] and target.shape[2:] == call.x.shape[2:]:
                moments = sums.inputs = sums.inputs or layer.consumer.moments(paired=True)
                moments.add_inputs(layer.consumer.rows(target), layer.consumer.rows(call.x))
            return
        dim = 1 if layout.convolution else -1
        if layer.out_channels is not None and target.shape[dim] != call.point.shape[dim]:
            target = target.index_select(dim, layer.out_channels.to(target.device))
        if target.shape != call.point.shape:
            return
        positions = call.point.numel() // call.point.shape[dim]
        rows = drawn_rows(module, layout, positions, self.all_batches)
        if not layout.convolution:
            rows = valid_rows(self.batches[index], call.x, call.routing)
        inverse, sums.factors = inverse_scale(call.scale, call.point, dim)
        error = output_rows(layout, difference(target, call.point), rows)
        if inverse is not None:
            error = error * inverse.reshape(layout.groups, 1, -1)
        held_out = index >= self.calibration
        weighed = layer.summed and not layout.convolution
        weights = stream_weights(output_rows(layout, target, rows)) if weighed else None
        if call.routing is not None:  # the output enters the mixture's sum by its gate
            weights = call.routing.gates[rows].double().square()
        (sums.check if held_out else sums.fit).add(input_rows(module, layout, call.x, rows), error, weights)
        if held_out:
            squares = output_rows(layout, target, rows).double().square().sum((0, 2))
            sums.energy += float((squares if weights is None else squares * weights).sum())

    def solve(self, layer: Layer, sums: CorrectionSums) -> None:
        """Solve the layer's regression, choose by the held-out error, apply and report it."""
        if not self.options.processes.total(sums.reached)[0]:
            self.report.leave_unreached([*self.report.unreached, layer.name], self.consumers)
            return
        if sums.inputs is not None:
            self._reconstruct(layer, sums.inputs)
            return
        for equations in (sums.fit, sums.check):
            equations.gather(self.options.processes)
        (energy,) = self.options.processes.total(sums.energy)
        if sums.fit.rows == 0 or sums.check.rows == 0:
            batches = "calibration" if sums.fit.rows == 0 else "held-out"
            self.report.notes.append(
                f"{layer.name} stays naive: on no {batches} batch did the two models run it on the same positions"
            )
            self.report.layers[layer.name] = LayerCorrection(layer.summed, 0.0, 0.0, False, 0, 0.0)
            return
        try:
            changes = sums.fit.solved(self.options.ridges, layer.consumer.has_bias or layer.norm is not None)
        except SingularError as error:
            raise ValueError(f"{layer.name}: {error}") from error
        candidates: list[WeightChange | None] = [None, *changes]
        squares = torch.as_tensor(sums.factors, dtype=torch.float64, device=sums.check.energy.device).square()
        squares = squares if squares.dim() == 0 else squares.reshape(sums.check.energy.shape)
        errors = [sums.check.error(change) for change in candidates]
        best = smallest(errors)
        change = candidates[best]
        if change is not None:
            apply_change(layer.consumer.module, layer.consumer.layout, change, layer.norm)
        before, after = (float((error * squares).sum()) / (energy or 1.0) for error in (errors[0], errors[best]))
        self.report.layers[layer.name] = LayerCorrection(
            layer.summed, before, after, change is not None, sums.fit.rows, change.ridge if change else 0.0
        )

    def _reconstruct(self, layer: Layer, moments: RegressionMoments) -> None:
        """Reconstruct the input of a layer whose outputs overlap, which is not a matrix product of its input's rows."""
        moments.gather(self.options.processes)
        solution = moments.solve(min(self.options.ridges), intercept=False)
        layer.consumer.apply(solution)
        self.report.layers[layer.name] = LayerCorrection(
            False, solution.error_before, solution.error_after, True, moments.rows, solution.ridge
        )


def waves(layers: Sequence[Layer], max_bytes: int) -> Iterator[list[Layer]]:
    """Groups of layers that are solved together: they read the same tensor, and each has its own point.

    The sums of a group take at most ``max_bytes``, unless a single layer's take more.
    """
    wave: list[Layer] = []
    taken = 0
    for layer in layers:
        needed = 2 * NormalEquations.bytes_for(*columns_of(layer.consumer.module, layer.consumer.layout))
        together = wave and not (layer.summed or wave[-1].summed) and taken + needed <= max_bytes
        if wave and not (together and layer.source == wave[-1].source and layer.calls == wave[-1].calls == 1):
            yield wave
            wave, taken = [], 0
        wave.append(layer)
        taken += needed
    if wave:
        yield wave
