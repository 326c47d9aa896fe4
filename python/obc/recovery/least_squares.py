"""Modes "ls" and "seq" of compensation: every consumer's input reconstructed from what is left of it.

Held-out batches decide: a layer keeps its compensation only where the pruned model's output, on batches that no
regression saw, comes closer to the unpruned model's by it. A single layer can do much harm although its own input is
reconstructed well; each is therefore judged with all others compensated, where their errors no longer hide its own.
They also decide whether channels that few positions carry are left naive (:mod:`obc.recovery.moments`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.model.evaluation import ForwardFn
from obc.model.usable_batches import UsableBatches, all_finite
from obc.recovery.calibration import inputs, output_error, outputs, recalibrate_norms, streamed_error
from obc.recovery.compensation_report import CompensationReport, LayerCompensation
from obc.recovery.consumers import Consumer
from obc.recovery.moments import Fit, Moments, SingularError
from obc.recovery.processes import Processes

# Kurtosis limits that are tried: none, and energy at less than a twentieth of the positions, which catches what fires
# at one special token a sentence. Held-out batches choose between both.
_KURTOSIS_LIMITS = (math.inf, 20.0)


@dataclass(frozen=True)
class Options:
    """Arguments of :func:`obc.recovery.compensate` that modes "ls" and "seq" use."""

    forward: ForwardFn
    ridge: float
    sequential: bool
    max_bytes: int
    keep_decompressors: bool
    processes: Processes


@dataclass(frozen=True)
class _Compensated:
    """A consumer's parameters after its least squares, and what is reported about it."""

    parameters: list[Tensor]
    fit: Fit
    rows: int
    decompressor: Tensor | None


class LeastSquaresRun:
    """One call of :func:`compensate`: every consumer's naive and compensated state, and the report."""

    def __init__(
        self,
        pruned: nn.Module,
        original: nn.Module,
        consumers: Mapping[str, Consumer],
        batches: tuple[UsableBatches, UsableBatches],
        norms: Sequence[_BatchNorm],
        options: Options,
    ) -> None:
        self.pruned, self.original, self.consumers, self.options = pruned, original, consumers, options
        self.calibration, self.held_out = batches
        self.norms, self.norm_states = norms, [copy.deepcopy(norm.state_dict()) for norm in norms]
        self.expected = self._expected()
        self.held_out.refuse_many(options.processes.total)
        self.naive = {name: _copies(consumer.parameters()) for name, consumer in consumers.items()}
        self.compensated: dict[str, _Compensated] = {}
        self.second: dict[str, _Compensated] = {}
        self.report = CompensationReport(naive_error=self._error())

    def run(self, bar: Any) -> CompensationReport:
        """Compensate, decide, and give all processes the same result."""
        bar.total = self.steps
        self.compensate(bar)
        self.decide(bar)
        self.share()
        return self.report

    @property
    def steps(self) -> int:
        """Steps of the progress bar."""
        passes = 2 + len(_KURTOSIS_LIMITS) * self.options.sequential
        return passes * len(self.consumers)

    def compensate(self, bar: Any) -> None:
        """Give every consumer the solution with the lowest held-out error; keep the second best beside it."""
        ranked: list[tuple[float, float, dict[str, _Compensated]]] = []
        for limit, candidate in self._candidates(bar):
            self._put_all({name: done.parameters for name, done in candidate.items()})
            ranked = sorted([*ranked, (self._error_recalibrated(), limit, candidate)], key=lambda entry: entry[0])[:2]
        (self.report.compensated_error, _, self.compensated), (_, _, self.second) = ranked
        self._put_all({name: done.parameters for name, done in self.compensated.items()})

    def _candidates(self, bar: Any) -> Iterator[tuple[float, dict[str, _Compensated]]]:
        yield from zip(_KURTOSIS_LIMITS, self._at_once(bar), strict=True)
        if self.options.sequential:
            for limit in _KURTOSIS_LIMITS:
                yield limit, self._sequential(limit, bar)

    def _at_once(self, bar: Any) -> list[dict[str, _Compensated]]:
        """Mode "ls", for each kurtosis limit: from the unpruned model's inputs of all consumers, collected together."""
        found: list[dict[str, _Compensated]] = [{} for _ in _KURTOSIS_LIMITS]
        for names in _chunks(self.consumers, self.options.max_bytes):
            moments = self._moments(names, paired=False)
            for name in names:
                for candidate, limit in zip(found, _KURTOSIS_LIMITS, strict=True):
                    candidate[name] = self._solve(name, moments[name], limit)
                bar.update()
        return found

    def _sequential(self, limit: float, bar: Any) -> dict[str, _Compensated]:
        """Mode "seq": each consumer regressed on what those before it, compensated, hand on."""
        found = {}
        self._put_all(self.naive)
        for name in self.consumers:
            self._recalibrate()
            found[name] = self._solve(name, self._moments([name], paired=True)[name], limit)
            bar.update()
        return found

    def _moments(self, names: Sequence[str], paired: bool) -> dict[str, Moments]:
        moments = {name: self.consumers[name].moments(paired) for name in names}
        taken = sum(self.consumers[name].bytes(paired) for name in names)
        self.report.moment_bytes = max(self.report.moment_bytes, taken)
        for batch in self.calibration:
            self._accumulate(moments, batch, paired)
        self.calibration.refuse_many(self.options.processes.total)
        for sums in moments.values():
            sums.gather(self.options.processes)
        return moments

    def _accumulate(self, moments: Mapping[str, Moments], batch: Any, paired: bool) -> None:
        full = inputs(self.original, list(moments), batch, self.options.forward)
        pruned = inputs(self.pruned, list(moments), batch, self.options.forward) if paired else {}
        if not all_finite((list(full.values()), list(pruned.values()))):
            self.calibration.leave_out("a layer's input on it is not finite")
            return
        for name, calls in full.items():
            rows = self.consumers[name].rows
            arriving = [rows(z) for z in pruned[name]] if paired else [None] * len(calls)
            for x, z in zip(calls, arriving, strict=True):
                moments[name].add(rows(x), z)

    def _solve(self, name: str, moments: Moments, limit: float) -> _Compensated:
        """The consumer's least squares, applied."""
        consumer = self.consumers[name]
        if moments.samples == 0:
            raise ValueError(
                f"no calibration batch reached {name}; pass batches and a forward_fn that call it as a module, "
                f"or leave the layers before it unpruned"
            )
        try:
            solution = moments.solve(self.options.ridge, consumer.intercept, limit)
        except SingularError as error:
            raise ValueError(
                f"{name}: {error}; it saw {moments.samples} positions for {consumer.positions.shape[1]} kept channels: "
                f"pass more batches or a larger ridge"
            ) from error
        self._put(name, self.naive[name])
        consumer.apply(solution)
        decompressor = solution.decompressor.to(consumer.weight) if self.options.keep_decompressors else None
        return _Compensated(_copies(consumer.parameters()), solution.fit, moments.samples, decompressor)

    def decide(self, bar: Any) -> None:
        """Undo harmful compensations, or take the second best solution: best change first, while the error falls."""
        report = self.report
        error = report.compensated_error
        state: dict[str, _Compensated | None] = dict(self.compensated)
        alone: dict[tuple[str, bool], float] = {}  # the error after one change: to naive, or else to the second best
        for name, done in self.compensated.items():
            for to_naive in (True, False):
                self._put(name, self.naive[name] if to_naive else self.second[name].parameters)
                alone[name, to_naive] = self._error_recalibrated()
            self._put(name, done.parameters)
            bar.update()
        for name, to_naive in sorted(alone, key=alone.__getitem__):
            if alone[name, to_naive] >= report.compensated_error:
                break
            before, state[name] = state[name], None if to_naive else self.second[name]
            self._put_state(name, state[name])
            if (changed := self._error_recalibrated()) < error:
                error = changed
            else:
                state[name] = before
                self._put_state(name, before)
        report.final_error = self._error_recalibrated()
        report.norms_recalibrated = bool(self.norms)
        if not report.final_error < report.naive_error:
            state = dict.fromkeys(state)
            self._leave_naive()
        for name, applied in state.items():
            fit = (applied or self.compensated[name]).fit
            report.layers[name] = LayerCompensation(
                fit.error_before,
                fit.error_after,
                alone[name, True],
                applied is not None,
                (applied or self.compensated[name]).rows,
                fit.ridge,
                fit.left_out,
            )
            if applied is not None and applied.decompressor is not None:
                report.decompressors[name] = applied.decompressor

    def share(self) -> None:
        """Give all processes the first one's result: on unlike machines the last bits of a solution may differ."""
        statistics = (buffer for norm in self.norms for buffer in norm.buffers())
        parameters = (parameter for consumer in self.consumers.values() for parameter in consumer.parameters())
        self.options.processes.share([*parameters, *statistics])

    def _leave_naive(self) -> None:
        """Restore everything, except for new norm statistics where those alone help."""
        self._put_all(self.naive)
        report = self.report
        report.final_error = self._error_recalibrated()
        if not report.final_error < report.naive_error:
            for norm, state in zip(self.norms, self.norm_states, strict=True):
                norm.load_state_dict(state)
            report.final_error, report.norms_recalibrated = report.naive_error, False

    def _put(self, name: str, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.consumers[name].parameters(), values, strict=True):
            parameter.copy_(value)

    def _put_state(self, name: str, state: _Compensated | None) -> None:
        self._put(name, self.naive[name] if state is None else state.parameters)

    def _put_all(self, values: Mapping[str, Sequence[Tensor]]) -> None:
        for name in self.consumers:
            self._put(name, values[name])

    def _recalibrate(self) -> None:
        if self.norms:
            group = self.options.processes.group
            recalibrate_norms(self.pruned, self.calibration, self.options.forward, process_group=group)

    def _error_recalibrated(self) -> float:
        self._recalibrate()
        return self._error()

    def _expected(self) -> list[list[Tensor]] | None:
        """The unpruned model's outputs on the held-out batches; None where they take too much memory."""
        found: list[list[Tensor]] | None = []
        taken = 0
        for batch in self.held_out:
            (tensors,) = outputs(self.original, [batch], self.options.forward)
            if not all_finite(tensors):
                self.held_out.leave_out("the model's outputs on it are not finite")
                continue
            taken += sum(tensor.nbytes for tensor in tensors)
            found = None if found is None or taken > self.options.max_bytes else [*found, tensors]
        return found

    def _error(self) -> float:
        forward, processes = self.options.forward, self.options.processes
        if self.expected is None:
            return streamed_error(self.pruned, self.original, self.held_out, forward, processes)
        got = (outputs(self.pruned, [batch], forward)[0] for batch in self.held_out)
        return output_error(got, self.expected, processes)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _chunks(consumers: Mapping[str, Consumer], max_bytes: int) -> Iterator[list[str]]:
    """Runs of consumers whose moments fit into ``max_bytes`` together; one at a time where a single one does not."""
    chunk: list[str] = []
    taken = 0
    for name, consumer in consumers.items():
        needed = consumer.bytes(paired=False)
        if chunk and taken + needed > max_bytes:
            yield chunk
            chunk, taken = [], 0
        chunk.append(name)
        taken += needed
    if chunk:
        yield chunk
