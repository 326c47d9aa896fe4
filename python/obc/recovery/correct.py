"""Mode "correct" of compensation: corrects errors as they arise, layer by layer in the order of execution.

The output of a layer on a residual branch enters a sum, its point (:mod:`obc.recovery.stream_points`). Let S_full be
the sum in the unpruned model and S_pruned in the pruned one, compensated up to here. The layer's weight becomes

    W' = W + E[(S_full - S_pruned) zT] (E[z zT] + lambda I)^-1

where z is the layer's input (:mod:`obc.recovery.normal_equations`): the regression of W x_full plus the error of the
stream, minus what W already makes of z. The bias takes the mean of what is missing; for a layer without one, the
running mean of the BatchNorm that alone reads its output does. Each layer thus repairs what all layers before it broke,
as far as its input allows. The point of a layer that enters no sum is its own output. Layers that write to one sum in
parallel are corrected one after another: each sees the error that the previous ones left. Layers that read the same
tensor and have points of their own don't see each other's changes and are solved together.

On a stream of tokens every position is weighted by one over the mean square of S_full there: norms that read the stream
divide by its size, so the relative error counts. Otherwise a few special tokens, whose stream is many times larger,
would determine the regression of a transformer.

The unpruned and the pruned model run side by side through a chain of modules (:mod:`obc.recovery.segments`): the
unpruned one runs every module once, the pruned one up to each layer and once more, and only the tensors between modules
are kept. If the module has BatchNorms, the pruned one runs once more for their statistics. Layers behind the chain run
from its end on (:mod:`obc.recovery.after_chain`), others outside it from the models' start.

Held-out batches run along. For every layer they choose the ridge, or to leave the layer unchanged, by the mean over
channels of the remaining share of each channel's error; at the end they decide whether the output came closer to the
unpruned model's at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.model.absorbing import norms_behind
from obc.model.evaluation import ForwardFn, stream_of
from obc.model.names import is_within
from obc.model.progress import LayerProgress
from obc.model.usable_batches import UsableBatches, all_finite
from obc.recovery.after_chain import called_after, from_end
from obc.recovery.calibration import named_norms, norm_reference, output_error, recalibrate_from, restorer, side_by_side
from obc.recovery.chain_parts import agreed_chain, say_many_passes
from obc.recovery.compensation_options import CompensationOptions
from obc.recovery.compensation_report import CompensationReport
from obc.recovery.consumers import PrunedConsumer
from obc.recovery.layer_correction import CorrectionSums, Layer, LayerCorrections, waves
from obc.recovery.module_norms import ModuleNorms, reads_the_same
from obc.recovery.norm_reference import take_statistics
from obc.recovery.segments import ChainBatch, capture, captured
from obc.recovery.stream_points import Call, Seen, observe

# Of the unpruned and the pruned model.
Runs = tuple[Callable[[int], Any], Callable[[int], Any]]


@dataclass
class _Place:
    """The part in which layers are corrected: the whole models, or one module of the chain.

    Attributes:
        full: runs the unpruned model's part on a batch, given by its index.
        pruned: the same for the pruned model's part.
        layers: the layers in it.
        points: per batch, the unpruned model's points in a module of the chain, kept while it is worked on.
    """

    full: Callable[[int], Any]
    pruned: Callable[[int], Any]
    layers: list[Layer]
    points: list[dict[str, list[Call]]] = field(default_factory=list)


class CorrectRun:
    """One call of :func:`obc.compensate` in mode "correct"."""

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
        self._models = (original, pruned)
        self.consumers, self.norms = consumers, norms
        self.usable, self.held_out = batches
        numbered = [each.numbered() for each in batches]
        self.calibration = len(numbered[0])
        self.numbers, self.batches = zip(*numbered[0], *numbered[1], strict=True)
        self.report = CompensationReport(naive_error=self._error(options.forward))
        on_all = int(options.processes.total(self.calibration)[0])
        self.corrections = LayerCorrections(options, consumers, self.report, self.batches, self.calibration, on_all)
        self._put_back = restorer(self._changed())
        self.layers = [Layer(name, consumer, options.plan[name].out_channels) for name, consumer in consumers.items()]

    def _changed(self) -> list[nn.Module]:
        return [*(consumer.module for consumer in self.consumers.values()), *self.norms]

    def _error(self, forward: ForwardFn) -> float:
        processes = self.options.processes
        error = output_error(side_by_side(self.pruned, self.original, self.held_out, forward), processes)
        self.held_out.refuse_many(processes.total)
        return error

    def _live(self) -> list[int]:
        return [index for index, number in enumerate(self.numbers) if number not in self.usable.left_out]

    def _leave_out(self, index: int) -> None:
        number, why = self.numbers[index], "what a layer makes of it is not finite"
        self.usable.left_out[number] = why
        self.usable.on_left_out(f"batch {number} is left out: {why}")

    # --- the order of work ------------------------------------------------------------------------------------

    def run(self) -> CompensationReport:
        """Correct every layer, and keep the result if the held-out output error falls; on an error keep nothing."""
        try:
            return self._run()
        except BaseException:
            self._put_back()
            raise

    def _run(self) -> CompensationReport:
        self.bar.begin("correcting", len(self.layers))
        if self.norms:
            # The regressions absorb what new statistics would repair, and start from those that the weights were made
            # for.
            take_statistics(self.pruned, self.original, self.options.plan)
        self._look()
        chain = self._chain()
        inside = {layer.name for layer in self.layers if any(is_within(layer.scope, name) for name in chain)}
        first = min((layer.order for layer in self.layers if layer.name in inside), default=0)
        others = [layer for layer in self.layers if layer.name not in inside]
        whole: Runs = self._whole(self.original), self._whole(self.pruned)
        before = [layer for layer in others if layer.order < first]
        self._correct(_Place(*whole, before))
        ends, after = whole, set[str]()
        if chain:
            ends = self._run_chain(chain, [layer for layer in self.layers if layer.name in inside])
            after = self._called_after(chain)
        between = [layer for layer in others if layer.order >= first and layer.name not in after]
        self._correct(_Place(*whole, between))
        self._correct(_Place(*ends, [layer for layer in others if layer.name in after]))
        names = named_norms(self.pruned)
        outside = [name for name in names if not any(is_within(name, module) for module in chain)]
        early = [name for name in outside if name not in after]
        if after and not (before or between) and self._unchanged(early, chain):
            self._decide([names[name] for name in outside if name in after], *ends)
        else:
            self._decide([names[name] for name in outside], *whole)
        self.options.processes.share(tensor for module in self._changed() for tensor in module.state_dict().values())
        return self.report

    def _look(self) -> None:
        """Find out where every layer's output goes, from one run of the unpruned model."""
        modules = {layer.name: self.original.get_submodule(layer.name) for layer in self.layers}
        seen = observe(partial(self._whole(self.original), 0), modules, set(), whole=self.original)
        by_name = {layer.name: layer for layer in self.layers}
        tied = Counter(id(layer.weight()) for layer in self.layers)
        # A layer off the stream comes before one whose sum it enters, which would make up for what it has lost.
        for order, name in enumerate(sorted(seen.calls, key=lambda name: seen.calls[name][0].closed)):
            layer, calls = by_name[name], seen.calls[name]
            # If an output goes different ways in different calls, its only common point is itself; in one sum every
            # call, or layer with the same weight, would make up for all of them.
            apart = len({id(call.point) for call in calls}) == len(calls) and tied[id(layer.weight())] == 1
            layer.summed = apart and all(call.summed for call in calls) and not layer.consumer.overlaps
            layer.calls, layer.order, layer.source = len(calls), order, calls[0].source
            layer.scope = calls[0].scope if layer.summed else name
        absorbed = norms_behind(self.original, modules, partial(self._whole(self.original), 0)) if self.norms else {}
        fed = Counter(norm for norms in absorbed.values() for norm in norms)
        for name, norms in absorbed.items():
            layer, found = by_name[name], self.pruned.get_submodule(norms[0])
            if fed[norms[0]] == len(norms) == 1 and not (layer.consumer.has_bias or layer.consumer.overlaps):
                layer.norm = next((own for own in self.norms if own is found), None)
        self.layers.sort(key=lambda layer: layer.order)

    def _chain(self) -> list[str]:
        scopes = {layer.name: layer.scope for layer in self.layers if layer.calls}
        chain, why = agreed_chain(self.original, partial(self._whole(self.original), 0), scopes, self.options.processes)
        if not chain and scopes:
            self.report.notes.append(f"every layer was reached from the model's start: {why}")
            say_many_passes("correct", 2 * len(scopes), why)
        return chain

    def _called_after(self, chain: list[str]) -> set[str]:
        """The modules called only after the chain, if the models can be run from its end."""
        found = called_after(self.original, chain, partial(self._whole(self.original), 0))
        return set(self.options.processes.in_all(dict(self.original.named_modules()), found))

    def _unchanged(self, norms: Sequence[str], chain: list[str]) -> bool:
        """Whether these norms before the chain read the same in both models, so that they need no new statistics."""
        first, second = (partial(capture, model, chain, partial(self._whole(model), 0), True) for model in self._models)
        same = not norms or reads_the_same(norms, self._models, (first, second), self.options.plan)
        return bool(self.options.processes.least([same])[0])

    def _whole(self, model: nn.Module) -> Callable[[int], Any]:
        return lambda index: self.options.forward(model, self.batches[index])

    # --- the chain --------------------------------------------------------------------------------------------

    def _run_chain(self, chain: list[str], layers: list[Layer]) -> Runs:
        """Correct the chain's layers; returns runs of both models from its end on."""
        full, pruned = self._captured(self.original, chain), self._captured(self.pruned, chain)
        for place, name in enumerate(chain):
            module, kept = self.original.get_submodule(name), self.pruned.get_submodule(name)
            here = _Place(
                partial(_call, full, module, place),
                partial(_call, pruned, kept, place),
                [layer for layer in layers if is_within(layer.scope, name)],
            )
            norms = ModuleNorms(name, module, kept, self.norms)
            after = self._run_full(here, norms)
            self._correct(here)
            done: dict[int, Tensor] = {}
            if norms.norms:
                live = self._live()
                fit = [index for index in live if index < self.calibration]
                wanted = {index: after[index] for index in live if index >= self.calibration}
                changed, done = norms.renew(here.pruned, fit, wanted, self.options.plan, self.options.processes)
                self.report.norms_recalibrated = self.report.norms_recalibrated or changed
            for index, stream in enumerate(after):
                full[index].stream = stream
                pruned[index].stream = self._stored(done[index] if index in done else stream_of(here.pruned(index)))
        first, second = (
            from_end(model, chain, batches, self._whole(model))
            for model, batches in zip(self._models, (full, pruned), strict=True)
        )
        return first, second

    def _captured(self, model: nn.Module, chain: list[str]) -> list[ChainBatch]:
        runs = [partial(self._whole(model), index) for index in range(len(self.batches))]
        return [replace(one, stream=self._stored(one.stream)) for one in captured(model, chain, runs)]

    def _stored(self, stream: Tensor | None) -> Tensor:
        assert stream is not None
        stored = stream.detach().cpu() if self.options.offload else stream.detach()
        self.report.stream_bytes = max(self.report.stream_bytes, 2 * len(self.batches) * stored.nbytes)
        return stored

    def _run_full(self, here: _Place, norms: ModuleNorms) -> list[Tensor]:
        """Run the unpruned module on every batch; keep its layers' points and return its outputs."""
        after = []
        modules = {layer.name: self.original.get_submodule(layer.name) for layer in here.layers}
        own = {layer.name for layer in here.layers if not layer.summed}
        for index in range(len(self.batches)):
            with norms.reading(index) if index < self.calibration else nullcontext():
                seen = observe(partial(here.full, index), modules, own)
            here.points.append(_targets(here.layers, seen, self.options.offload))
            after.append(self._stored(stream_of(seen.output)))
        return after

    # --- layers -----------------------------------------------------------------------------------------------

    def _correct(self, here: _Place) -> None:
        for wave in waves(here.layers, self.options.max_bytes):
            sums = {layer.name: CorrectionSums.of(layer.consumer) for layer in wave}
            for index in self._live():
                self.bar.on_batch(index, len(self.batches))
                self._accumulate(here, wave, sums, index)
            self.usable.refuse_many(self.options.processes.total)
            self.report.moment_bytes = max(
                self.report.moment_bytes, sum(each.fit.bytes + each.check.bytes for each in sums.values())
            )
            for layer in wave:
                self.corrections.solve(layer, sums[layer.name])
                self.bar.update()

    def _accumulate(self, here: _Place, wave: list[Layer], sums: dict[str, CorrectionSums], index: int) -> None:
        own = {layer.name for layer in wave if not layer.summed}
        stop = sum(layer.calls for layer in wave) or None
        modules = {layer.name: layer.consumer.module for layer in wave}
        if here.points:
            points = here.points[index]
        else:
            originals = {name: self.original.get_submodule(name) for name in modules}
            seen = observe(partial(here.full, index), originals, own, stop)
            points = _targets(wave, seen, self.options.offload)
        arrived = observe(partial(here.pruned, index), modules, own, stop).calls
        if not all_finite(
            [[(call.x, call.point) for call in calls] for calls in (*points.values(), *arrived.values())]
        ):
            self._leave_out(index)
            return
        for layer in wave:
            targets, calls = points.get(layer.name, []), arrived.get(layer.name, [])
            if len(targets) != len(calls):
                continue
            for target, call in zip(targets, calls, strict=True):
                self.corrections.add(layer, sums[layer.name], target, call, index)

    def _decide(self, norms: list[_BatchNorm], *runs: Callable[[int], Any]) -> None:
        """Whether these norms get new statistics, and whether the result is better than naive."""
        report, options = self.report, self.options
        run_of = dict(zip(self._models, runs, strict=True))
        places = {number: index for index, number in enumerate(self.numbers)}

        def on(batches: UsableBatches) -> ForwardFn:
            return lambda model, batch: run_of[model](places[batches.current])

        report.compensated_error = report.final_error = self._error(on(self.held_out))
        norms = [norm for norm in norms if any(norm is other for other in self.norms)]
        if norms:
            put_norms_back = restorer(norms)
            reference = norm_reference(self.original, self.usable, on(self.usable))
            targets = reference.targets(self.pruned, options.plan, processes=options.processes)
            recalibrate_from(self.pruned, norms, self.usable, on(self.usable), options.processes, targets)
            if (error := self._error(on(self.held_out))) < report.final_error:
                report.final_error, report.norms_recalibrated = error, True
            else:
                put_norms_back()
        if not report.final_error < report.naive_error:
            self._put_back()
            report.leave_naive()


def _targets(layers: Sequence[Layer], seen: Seen, offload: bool) -> dict[str, list[Call]]:
    """The unpruned model's calls with their points alone; for a layer whose outputs overlap, with its inputs."""
    found = {}
    for layer in layers:
        calls = seen.calls.get(layer.name, [])
        tensors = [call.x if layer.consumer.overlaps else call.point for call in calls]
        tensors = [tensor.cpu() for tensor in tensors] if offload else tensors
        found[layer.name] = [replace(call, x=kept, point=kept) for call, kept in zip(calls, tensors, strict=True)]
    return found


def _call(streams: Sequence[ChainBatch], module: nn.Module, place: int, index: int) -> Any:
    return streams[index].call(module, place)
