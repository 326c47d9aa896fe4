"""Compensation without training: consumers of pruned channels take over, by least squares, what those carried.

Held-out batches decide: a layer keeps its compensation only where the pruned model's output, on batches that no
regression saw, comes closer to the unpruned model's by it. A single layer can do much harm although its own input is
reconstructed well; each is therefore judged with all others compensated, where their errors no longer hide its own.
They also decide whether channels that few positions carry are left naive (:mod:`obc.recovery.moments`).
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from obc import ops
from obc.model.evaluation import ForwardFn, call_on_batch, evaluating
from obc.model.kept import Kept, PlanError
from obc.model.layouts import Layout, is_compiled, is_depthwise, layout_of, split_by_group
from obc.model.names import named_modules
from obc.model.plan import PruningPlan
from obc.model.slicing import original_tensor, sliced
from obc.model.usable_batches import UsableBatches, all_finite
from obc.recovery.calibration import batch_norms, channel_rows, finite_outputs, inputs, output_error, outputs
from obc.recovery.calibration import recalibrate_norms as recalibrate
from obc.recovery.moments import Fit, Moments, SingularError, Solution
from obc.recovery.processes import Processes

# One batch in so many is held out. Fewer make the decision noisier, more take rows from the regression.
_HELD_OUT = 5
# Kurtosis limits that are tried: none, and energy at less than a twentieth of the positions, which catches what fires
# at one special token a sentence. On MiniLM at half its width the held-out error fell from 0.122 to 0.092 (JC) and from
# 0.302 to 0.241 (L1) by it; a limit of 12 left too much naive.
_KURTOSIS_LIMITS = (math.inf, 20.0)


@dataclass(frozen=True)
class LayerCompensation:
    """What compensation did for one consumer.

    Attributes:
        input_error_before: E |x - naive|^2 / E |x|^2 of its reconstructed input on the calibration batches.
        input_error_after: the same with the decompressor.
        output_error_naive: of the model's output on the held-out batches, with this layer naive and all others
            compensated.
        applied: whether the layer kept its compensation.
        rows: how many input positions the regression saw.
        ridge: the relative ridge that was used; larger than the one asked for where Cholesky needed it.
        left_out: dropped channels that stayed naive because few positions carry them.
    """

    input_error_before: float
    input_error_after: float
    output_error_naive: float
    applied: bool
    rows: int
    ridge: float
    left_out: int


@dataclass
class CompensationReport:
    """What :func:`compensate` did.

    Errors are relative squared errors of the model's output against the unpruned model's on the held-out batches.

    Attributes:
        layers: per consumer, in the order of execution.
        naive_error: before anything.
        compensated_error: with every layer compensated in one way.
        final_error: at the end; never above ``naive_error``.
        norms_recalibrated: whether BatchNorm statistics were estimated anew; not where the model has none, it was not
            asked for, or the held-out error is lower without.
        decompressors: D of every layer that kept its compensation, in the form that ``equivalent_pruning`` takes; only
            where asked for.
        moment_bytes: the largest memory that the running sums took.
        seconds: wall time.
    """

    layers: dict[str, LayerCompensation] = field(default_factory=dict)
    naive_error: float = 0.0
    compensated_error: float = 0.0
    final_error: float = 0.0
    norms_recalibrated: bool = False
    decompressors: dict[str, Tensor] = field(default_factory=dict)
    moment_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{'layer':40} {'input error':>16}   output error if naive"]
        for name, layer in self.layers.items():
            errors = f"{layer.input_error_before:.4f} -> {layer.input_error_after:.4f}   {layer.output_error_naive:.4f}"
            lines.append(f"{name:40} {errors}{'' if layer.applied else ' (left naive)'}")
        errors = f"naive {self.naive_error:.4f}, all {self.compensated_error:.4f}, final {self.final_error:.4f}"
        return "\n".join([*lines, f"held-out output error: {errors}"])


def compensate(
    pruned_model: nn.Module,
    original_model: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    mode: Literal["ls", "seq"] = "ls",
    ridge: float = 1e-4,
    recalibrate_norms: bool = True,
    max_bytes: int = 2**31,
    keep_decompressors: bool = False,
    process_group: Any = None,
    progress: bool | None = None,
) -> CompensationReport:
    """Compensate ``pruned_model`` in place from unlabelled batches; it keeps its shapes and its parameter names.

    Every consumer of pruned channels gets the weight W D with D = S + (E[x zT] - S E[z zT]) (E[z zT] + lambda I)^-1
    (:mod:`obc.recovery.moments`), and its bias, where it has one, the rest of the mean. A convolution that pads with
    zeros is regressed through zero instead: its padding has no mean.

    mode="ls": z is the kept part of the unpruned model's x; one pass over the batches for all layers.
    mode="seq": layer by layer in the order of execution, z being what the pruned model, compensated so far, hands on:
    errors don't compound. Two passes per layer, with and without the channels that few positions carry; the solution of
    "ls" stays where the held-out batches like it better.

    Every fifth batch, at least one, is held out and decides about each layer, after the BatchNorm statistics were
    estimated anew. That takes two passes over the held-out batches per layer (over all batches where there are
    BatchNorms). Memory: the running sums take 8 (in * kept + 3 in + kept) bytes per layer ("seq": + 8 kept^2, one
    layer at a time), besides the batches, both models' outputs on the held-out ones and four copies of the consumers.

    Args:
        pruned_model: as pruning left it; its device and dtype are those of ``original_model``.
        original_model: the unpruned model; unchanged.
        plan: what pruning kept.
        batches: calibration batches, at least two; a list is made of them, because they are used several times. Those
            on which something is not finite are left out and named.
        forward_fn: ``forward_fn(model, batch)`` returns what is to be preserved, tensors in any nesting; by default
            :func:`obc.model.evaluation.call_on_batch`, which takes batches such as (inputs, labels).
        mode: "ls" or "seq".
        ridge: relative to the mean diagonal of E[z zT].
        recalibrate_norms: estimate BatchNorm statistics anew whenever weights changed.
        max_bytes: limit for the running sums of mode "ls": layers beyond it take further passes over the batches.
        keep_decompressors: keep every D, in * kept numbers a layer, in the report.
        process_group: every process of this group holds the same models and passes batches of its own, not necessarily
            as many; sums, errors and BatchNorm statistics are those of all of them, and all end with the same model.
        progress: show a progress bar; None shows it in a terminal only.

    Raises:
        PlanError: the plan doesn't describe the consumers' weights.
        ValueError: an unknown mode, a negative ridge, fewer than two batches, more than a tenth of them not finite, a
            consumer that no batch reached, a Gram matrix that is singular in spite of the ridge, or a compiled or
            parametrised model.
    """
    start = time.perf_counter()
    if mode not in ("ls", "seq"):
        raise ValueError(f"mode must be 'ls' or 'seq', got {mode!r}")
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")
    for role, model in (("pruned", pruned_model), ("original", original_model)):
        if is_compiled(model):
            raise ValueError(f"the {role} model is compiled; pass the model itself and compile after compensation")
    processes = Processes(process_group, next((p.device for p in original_model.parameters()), None))
    usable = UsableBatches.of(batches)
    calibration, held_out = _split(usable, processes)
    forward = forward_fn or call_on_batch
    with evaluating(pruned_model, original_model), torch.no_grad():
        consumers = _consumers(pruned_model, original_model, plan)
        called = list(inputs(original_model, list(consumers), next(iter(calibration)), forward))
        ordered = _ordered(consumers, called, processes)
        norms = batch_norms(pruned_model) if recalibrate_norms else []
        disable = None if progress is None else not progress
        options = _Options(forward, ridge, mode == "seq", max_bytes, keep_decompressors, processes)
        run = _Run(pruned_model, original_model, ordered, (calibration, held_out), norms, options)
        with tqdm(total=run.steps, desc="compensate", unit="layer", disable=disable) as bar:
            run.compensate(bar)
            run.decide(bar)
        run.share()
    _warn_of_few_rows(run)
    run.report.seconds = time.perf_counter() - start
    return run.report


def _warn_of_few_rows(run: _Run) -> None:
    kept = {name: consumer.positions.shape[1] for name, consumer in run.consumers.items()}
    rows = {name: layer.rows for name, layer in run.report.layers.items()}
    if few := [
        f"{name} ({rows[name]} positions for {kept[name]} channels)" for name in rows if rows[name] < kept[name]
    ]:
        warnings.warn(
            f"fewer calibration positions than kept channels, so that the ridge decides: {', '.join(few)}; "
            f"pass more batches",
            stacklevel=3,
        )


def _split(usable: UsableBatches, processes: Processes) -> tuple[UsableBatches, UsableBatches]:
    """(calibration, held out): every fifth batch is held out, the last one where there are fewer."""
    batches = usable.numbered()
    (fewest,) = processes.least([len(batches)])  # all processes raise where one must: none is left waiting
    if fewest < 2:
        raise ValueError(f"compensate got {fewest} batches; pass at least two: one of them is held out to decide")
    if len(batches) < _HELD_OUT:
        return usable.part(batches[:-1]), usable.part(batches[-1:])
    calibration = [batch for index, batch in enumerate(batches) if (index + 1) % _HELD_OUT]
    return usable.part(calibration), usable.part(batches[_HELD_OUT - 1 :: _HELD_OUT])


@dataclass
class _Consumer:
    """A layer whose inputs were pruned."""

    module: nn.Module
    layout: Layout
    weight: Tensor  # kept out channels, all in channels
    positions: Tensor  # (blocks, kept in / blocks): the kept channels inside their block
    size: int  # channels of a block before pruning
    repeat: int

    @property
    def intercept(self) -> bool:
        module: Any = self.module
        padded = self.layout.convolution and module.padding_mode == "zeros" and module.padding not in ("valid", 0)
        padded = padded and (isinstance(module.padding, str) or any(module.padding))
        return module.bias is not None and not padded and not (self.layout.convolution and self.layout.transposed)

    def bytes(self, paired: bool) -> int:
        return Moments.bytes_for(len(self.positions), self.size, self.positions.shape[1], paired)

    def moments(self, paired: bool) -> Moments:
        return Moments(self.positions, self.size, paired)

    def rows(self, x: Tensor) -> Tensor:
        return channel_rows(x, self.layout, self.repeat)

    def parameters(self) -> list[Tensor]:
        module: Any = self.module
        return [parameter.detach() for parameter in (module.weight, module.bias) if parameter is not None]

    def apply(self, solution: Solution) -> None:
        """weight = W D; bias += W intercept."""
        decompressor = solution.decompressor.to(self.weight)
        if self.layout.transposed:
            folded = ops.fold(self.weight, decompressor.mT, None, self.layout.groups)
        else:
            folded = ops.fold(self.weight, None, decompressor, self.layout.groups, self.repeat)
        module: Any = self.module
        module.weight.copy_(folded)
        if solution.intercept is not None:
            module.bias += self._through(solution.intercept)

    def _through(self, constant: Tensor) -> Tensor:
        """What the layer makes of an input that is ``constant`` (in,) at every position."""
        weight = (self.weight.transpose(0, 1) if self.layout.transposed else self.weight).double()
        per_channel = (
            weight.flatten(2).sum(2) if self.layout.convolution else weight.unflatten(1, (-1, self.repeat)).sum(2)
        )
        blocks = per_channel.unflatten(0, (self.layout.groups, -1))
        through = blocks @ constant.to(blocks).reshape(self.layout.groups, -1, 1)
        return through.flatten().to(self.weight.dtype)


def _consumers(pruned_model: nn.Module, original_model: nn.Module, plan: PruningPlan) -> dict[str, _Consumer]:
    """The layers whose inputs were pruned, checked against the plan."""
    state_dict = original_model.state_dict()
    found = {}
    for name, module in named_modules(pruned_model):
        kept, layout = plan.get(name), layout_of(module)
        if kept is None or kept.in_channels is None or layout is None:
            continue
        if parametrize.is_parametrized(module):
            raise ValueError(f"{name} is parametrised; compensate the naive model, or merge first")
        weight = original_tensor(state_dict, f"{name}.weight")
        if is_depthwise(module, weight):
            continue
        plan.verify_tensor(state_dict, name, module, "weight", module.weight.detach())  # type: ignore[union-attr, operator]
        in_channels = layout.sizes(weight)[1] // kept.in_repeat
        positions = split_by_group(kept.in_channels, in_channels, layout.groups)
        if positions is None:
            raise PlanError(f"{name}: its {layout.groups} groups keep unequal numbers of channels")
        rows = sliced(module, "weight", weight, Kept(kept.out_channels), f"{name}.weight")
        found[name] = _Consumer(module, layout, rows, positions, in_channels // layout.groups, kept.in_repeat)
    return found


def _ordered(consumers: Mapping[str, _Consumer], called: Sequence[str], processes: Processes) -> dict[str, _Consumer]:
    """In the order of execution; last those on branches that the first batch did not take."""
    places = {name: place for place, name in enumerate(called)}
    earliest = processes.least([places.get(name, len(consumers)) for name in consumers])
    return {
        name: consumers[name] for _, name in sorted(zip(earliest, consumers, strict=True), key=lambda entry: entry[0])
    }


@dataclass(frozen=True)
class _Options:
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


class _Run:
    """One call of :func:`compensate`: every consumer's naive and compensated state, and the report that grows."""

    def __init__(
        self,
        pruned: nn.Module,
        original: nn.Module,
        consumers: Mapping[str, _Consumer],
        batches: tuple[UsableBatches, UsableBatches],
        norms: Sequence[_BatchNorm],
        options: _Options,
    ) -> None:
        self.pruned, self.original, self.consumers, self.options = pruned, original, consumers, options
        self.calibration, self.held_out = batches
        self.norms, self.norm_states = norms, [copy.deepcopy(norm.state_dict()) for norm in norms]
        self.expected = finite_outputs(original, self.held_out, options.forward)
        self.held_out.refuse_many(options.processes.total)
        self.naive = {name: _copies(consumer.parameters()) for name, consumer in consumers.items()}
        self.compensated: dict[str, _Compensated] = {}
        self.second: dict[str, _Compensated] = {}
        self.report = CompensationReport(naive_error=self._error())

    @property
    def steps(self) -> int:
        passes = 2 + len(_KURTOSIS_LIMITS) * self.options.sequential
        return passes * len(self.consumers)

    def compensate(self, bar: Any) -> None:
        """Compensate every consumer, in the way that the held-out batches like best; keep the second best beside it."""
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
        """Mode "ls" per kurtosis limit: the unpruned model's inputs, collected from all consumers together."""
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
        """Leave naive what does harm, or take its second best solution: best change first, while the error falls."""
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
        """Everything as it was, but for new norm statistics where those alone help."""
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
            recalibrate(self.pruned, self.calibration, self.options.forward, process_group=group)

    def _error_recalibrated(self) -> float:
        self._recalibrate()
        return self._error()

    def _error(self) -> float:
        got = outputs(self.pruned, self.held_out, self.options.forward)
        return output_error(got, self.expected, self.options.processes)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _chunks(consumers: Mapping[str, _Consumer], max_bytes: int) -> Iterator[list[str]]:
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
