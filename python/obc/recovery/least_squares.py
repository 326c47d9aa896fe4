"""Modes "ls" and "seq" of compensation: every consumer's input is reconstructed from what is left of it.

Held-out batches choose among few candidates by the model's output: every layer with the same ridge from a small grid;
every layer with the ridge, or without compensation, that reconstructs its own input best; in mode "seq" also the
layer-by-layer result. If none brings the output closer to the unpruned model's, the model stays naive. This costs one
pass of the pruned model over the held-out batches per candidate, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.model.progress import LayerProgress
from obc.model.usable_batches import UsableBatches, all_finite
from obc.recovery.calibration import norm_reference, output_error, outputs, recalibrate_from, restorer, side_by_side
from obc.recovery.chain_parts import ChainPart, parts
from obc.recovery.compensation_options import CompensationOptions
from obc.recovery.compensation_report import CompensationReport, LayerCompensation
from obc.recovery.consumers import PrunedConsumer, in_execution_order
from obc.recovery.layer_rows import output_rows, stream_weights, valid_rows
from obc.recovery.moments import RegressionMoments
from obc.recovery.norm_reference import Target
from obc.recovery.normal_equations import SingularError
from obc.recovery.stream_points import Call, observe, of_same_tokens

_Moments = dict[str, RegressionMoments]  # by layer


@dataclass(frozen=True, eq=False)
class _Compensated:
    """A consumer's parameters after least squares, and what to report if they are kept."""

    parameters: list[Tensor]
    result: LayerCompensation
    decompressor: Tensor | None


@dataclass(frozen=True)
class _Candidate:
    """One way to compensate the model.

    Attributes:
        name: name in the report.
        layers: name of a consumer -> its state; missing ones stay naive.
        ridge: the ridge, if all layers share it.
    """

    name: str
    layers: Mapping[str, _Compensated] = field(default_factory=dict)
    ridge: float | None = None


class LeastSquaresRun:
    """One call of :func:`compensate`: every consumer's naive and compensated state, and the report."""

    def __init__(
        self,
        pruned: nn.Module,
        original: nn.Module,
        consumers: Mapping[str, PrunedConsumer],
        batches: tuple[UsableBatches, UsableBatches],
        norms: Sequence[_BatchNorm],
        options: CompensationOptions,
        bar: LayerProgress,
    ) -> None:
        self.pruned, self.original, self.options, self.bar = pruned, original, options, bar
        self.whole = ChainPart.whole((original, pruned), options.forward)
        self.calibration, self.held_out = batches
        self.norms = norms
        self.targets: Mapping[_BatchNorm, Target] = {}
        if norms:
            reference = norm_reference(original, self.calibration, options.forward)
            self.targets = reference.targets(pruned, options.plan, processes=options.processes)
        self.scopes: dict[str, str] = {}
        self.consumers, self.off_stream = self._look(consumers)
        self._put_norms_back = restorer(norms)
        self.expected = self._expected()
        self.held_out.refuse_many(options.processes.total)
        self.naive = {name: _copies(consumer.parameters()) for name, consumer in self.consumers.items()}
        self.report = CompensationReport(naive_error=self._error())

    def run(self) -> CompensationReport:
        """Compensate, decide, and give all processes the same result; after an error the model is naive again."""
        try:
            return self._run()
        except BaseException:
            self._put_all(_Candidate("naive"))
            self._put_norms_back()
            raise

    def _run(self) -> CompensationReport:
        self.bar.begin("regressing all layers at once", len(self.consumers))
        at_once = self._at_once()
        errors = self._try(at_once)
        best = min(at_once, key=lambda candidate: errors[candidate.name])
        if self.options.mode == "seq":
            ridge = min((one for one in at_once if one.ridge is not None), key=lambda one: errors[one.name]).ridge
            assert ridge is not None
            sequential = self._sequential(ridge)
            errors |= self._try([sequential])
            best = min(best, sequential, key=lambda candidate: errors[candidate.name])
        self.report.tried = errors
        self._settle(best, at_once[0])
        self.share()
        return self.report

    def _try(self, candidates: Iterable[_Candidate]) -> dict[str, float]:
        """The held-out output error with each candidate."""
        found = {}
        self.bar.begin("comparing outputs")
        for candidate in candidates:
            self._put_all(candidate)
            found[candidate.name] = self._error_recalibrated()
        return found

    def _settle(self, best: _Candidate, any_one: _Candidate) -> None:
        """Keep the best candidate, or leave the model naive if none brings the output closer."""
        report = self.report
        report.compensated_error = report.tried[best.name]
        self._put_all(best)
        report.final_error = self._error_recalibrated()
        report.norms_recalibrated = bool(self.norms)
        if not report.final_error < report.naive_error:
            best = _Candidate("naive")
            self._leave_naive()
        for name in any_one.layers:
            applied = best.layers.get(name)
            report.layers[name] = (applied or any_one.layers[name]).result
            if applied is None:
                report.layers[name] = replace(report.layers[name], applied=False)
            elif applied.decompressor is not None:
                report.decompressors[name] = applied.decompressor

    def _at_once(self) -> list[_Candidate]:
        """Candidates from the unpruned inputs of all consumers, collected together: one per ridge, and mixed."""
        found: dict[float, dict[str, _Compensated]] = {ridge: {} for ridge in self.options.ridges}
        unreached: list[str] = []
        for names in _chunks(self.consumers, self.options.max_bytes):
            fit, check = self._moments(names, self.whole, paired=False)
            unreached += [name for name in names if fit[name].rows == 0]
            for name in names:
                for ridge, layers in found.items() if fit[name].rows else ():
                    layers[name] = self._solve(name, fit[name], check[name], ridge)
                self.bar.update()
        self.report.leave_unreached(unreached, self.consumers)
        candidates = [_Candidate(f"ridge {ridge:g}", layers, ridge) for ridge, layers in found.items()]
        own = {
            name: min((layers[name] for layers in found.values()), key=lambda layer: layer.result.held_out)
            for name in self.consumers
            if name not in unreached
        }
        helping = {name: layer for name, layer in own.items() if layer.result.held_out < 1.0}
        if any(helping == candidate.layers for candidate in candidates):
            return candidates
        return [*candidates, _Candidate("own ridges", helping)]

    def _sequential(self, ridge: float) -> _Candidate:
        """Mode "seq": regress each consumer on the output of the compensated ones before it."""
        found = {}
        self._put_all(_Candidate("naive"))
        for part in self._parts():
            for name in part.layers:
                self._recalibrate()
                fit, check = self._moments([name], part, paired=True)
                layer = self._solve(name, fit[name], check[name], ridge)
                if layer.result.held_out < 1.0:
                    found[name] = layer
                else:
                    self._put(name, self.naive[name])
                self.bar.update()
        return _Candidate("layer by layer", found, ridge)

    def _parts(self) -> Iterator[ChainPart]:
        """The reached consumers, in parts of the models."""
        scopes = {name: scope for name, scope in self.scopes.items() if name not in self.report.unreached}
        self.bar.begin("layer by layer", len(scopes))
        options, batches = self.options, (self.calibration, self.held_out)
        return parts(
            (self.original, self.pruned), scopes, batches, options.forward, options.processes, bool(self.norms)
        )

    def _moments(self, names: Sequence[str], part: ChainPart, paired: bool) -> tuple[_Moments, _Moments]:
        taken = 2 * sum(self.consumers[name].bytes(paired) for name in names)
        self.report.moment_bytes = max(self.report.moment_bytes, taken)
        found = []
        for batches in (self.calibration, self.held_out):
            moments = {name: self.consumers[name].moments(paired) for name in names}
            for batch in batches:
                self._accumulate(moments, batches, batch, part, paired)
            batches.refuse_many(self.options.processes.total)
            for sums in moments.values():
                sums.gather(self.options.processes)
            found.append(moments)
        return found[0], found[1]

    def _accumulate(self, moments: _Moments, batches: UsableBatches, batch: Any, part: ChainPart, paired: bool) -> None:
        modules = {name: self.original.get_submodule(name) for name in moments}
        full = observe(partial(part.full, batch, batches.current), modules, self.off_stream).calls
        pruned: Mapping[str, list[Call]] = {}
        if paired:
            modules = {name: self.consumers[name].module for name in moments}
            pruned = observe(partial(part.pruned, batch, batches.current), modules, set(modules)).calls
        if not all_finite([[call.x for call in calls] for calls in (*full.values(), *pruned.values())]):
            batches.leave_out("a layer's input on it is not finite")
            return
        for name, calls in full.items():
            consumer = self.consumers[name]
            for call, arrived in zip(calls, pruned[name] if paired else [None] * len(calls), strict=True):
                if arrived is not None:
                    call, arrived = of_same_tokens(call, arrived)
                z = None if arrived is None else consumer.rows(arrived.x)
                x, weights = consumer.rows(call.x), None
                if not consumer.layout.convolution and consumer.repeat == 1:
                    rows = valid_rows(batch, call.x, call.routing)
                    x, z = x[rows], None if z is None else z[rows]
                    if name not in self.off_stream:
                        weights = stream_weights(output_rows(consumer.layout, call.point, rows))
                moments[name].add_inputs(x, z, weights)

    def _look(self, consumers: Mapping[str, PrunedConsumer]) -> tuple[dict[str, PrunedConsumer], set[str]]:
        """The consumers in order of execution; and those whose outputs enter no sum: no stream weights tokens."""
        processes = self.options.processes
        modules = {name: self.original.get_submodule(name) for name in consumers}
        batch = next(iter(self.calibration))
        calls = observe(partial(self.options.forward, self.original, batch), modules, set(), whole=self.original).calls
        summed = [name for name, own in calls.items() if all(call.summed for call in own)]
        off_stream = set(consumers).difference(processes.in_all(consumers, summed))
        ordered = in_execution_order(consumers, list(calls), processes)
        self.scopes = {name: name if name in off_stream else calls[name][0].scope for name in ordered}
        return ordered, off_stream

    def _solve(self, name: str, moments: RegressionMoments, check: RegressionMoments, ridge: float) -> _Compensated:
        """Solve and apply the consumer's least squares."""
        consumer = self.consumers[name]
        try:
            solution = moments.solve(ridge, consumer.intercept)
        except SingularError as error:
            raise ValueError(f"{name}: {error}") from error
        self._put(name, self.naive[name])
        consumer.apply(solution)
        decompressor = solution.decompressor.to(consumer.weight) if self.options.keep_decompressors else None
        before, after, held_out = solution.error_before, solution.error_after, check.relative_error(solution)
        result = LayerCompensation(before, after, held_out, applied=True, rows=moments.rows, ridge=solution.ridge)
        return _Compensated(_copies(consumer.parameters()), result, decompressor)

    def share(self) -> None:
        """Give all processes the first one's result: the last bits of a solution may differ between machines."""
        statistics = (buffer for norm in self.norms for buffer in norm.buffers())
        parameters = (parameter for consumer in self.consumers.values() for parameter in consumer.parameters())
        self.options.processes.share([*parameters, *statistics])

    def _leave_naive(self) -> None:
        """Restore everything, except for new norm statistics if they help on their own."""
        self._put_all(_Candidate("naive"))
        report = self.report
        report.final_error = self._error_recalibrated()
        if not report.final_error < report.naive_error:
            self._put_norms_back()
            report.final_error, report.norms_recalibrated = report.naive_error, False

    def _put(self, name: str, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.consumers[name].parameters(), values, strict=True):
            parameter.copy_(value)

    def _put_all(self, candidate: _Candidate) -> None:
        for name, naive in self.naive.items():
            layer = candidate.layers.get(name)
            self._put(name, naive if layer is None else layer.parameters)

    def _recalibrate(self) -> None:
        if self.norms:
            forward, processes = self.options.forward, self.options.processes
            recalibrate_from(self.pruned, self.norms, self.calibration, forward, processes, self.targets)

    def _error_recalibrated(self) -> float:
        self._recalibrate()
        return self._error()

    def _expected(self) -> list[list[Tensor]] | None:
        """The unpruned model's outputs on the held-out batches; None if they take too much memory."""
        found: list[list[Tensor]] | None = []
        taken = 0
        for batch in self.held_out:
            tensors = outputs(self.original, batch, self.options.forward)
            if not all_finite(tensors):
                self.held_out.leave_out("the model's outputs on it are not finite")
                continue
            taken += sum(tensor.nbytes for tensor in tensors)
            found = None if found is None or taken > self.options.max_bytes else [*found, tensors]
        return found

    def _error(self) -> float:
        forward = self.options.forward
        pairs: Iterable[tuple[list[Tensor], list[Tensor]]]
        if self.expected is None:
            pairs = side_by_side(self.pruned, self.original, self.held_out, forward)
        else:
            got = (outputs(self.pruned, batch, forward) for batch in self.held_out)
            pairs = zip(got, self.expected, strict=True)
        return output_error(pairs, self.options.processes)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _chunks(consumers: Mapping[str, PrunedConsumer], max_bytes: int) -> Iterator[list[str]]:
    """Split the consumers into runs whose moments fit into ``max_bytes``, at least one consumer each."""
    chunk: list[str] = []
    taken = 0
    for name, consumer in consumers.items():
        needed = 2 * consumer.bytes(paired=False)
        if chunk and taken + needed > max_bytes:
            yield chunk
            chunk, taken = [], 0
        chunk.append(name)
        taken += needed
    if chunk:
        yield chunk
