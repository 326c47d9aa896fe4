"""Compensation without training: consumers of pruned channels take over by least squares what these carried.

Mode "correct" is :mod:`obc.recovery.correct`, modes "ls" and "seq" are :mod:`obc.recovery.least_squares`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from obc.model.arguments import listed, number, one_of, refuse_uncallable
from obc.model.autocast import in_present_autocast, without_autocast
from obc.model.depth import expanded
from obc.model.evaluation import ForwardFn, call_on_batch, device_of, evaluating, without_cache
from obc.model.functional_uses import LayerCalls, calling_layers, other_use
from obc.model.layouts import is_compiled
from obc.model.plan import PruningPlan, refuse_non_plans
from obc.model.processes import Processes, failing_together
from obc.model.progress import LayerProgress
from obc.model.recurrent import is_recurrent
from obc.model.sharding import is_sharded
from obc.model.usable import refuse_one_model, refuse_unusable
from obc.model.usable_batches import UsableBatches
from obc.recovery.calibration import batch_norms
from obc.recovery.compensation_options import CompensationOptions
from obc.recovery.compensation_report import CompensationReport
from obc.recovery.consumers import PrunedConsumer, find_consumers
from obc.recovery.correct import CorrectRun
from obc.recovery.least_squares import LeastSquaresRun
from obc.recovery.unfused import unfused

Mode = Literal["correct", "ls", "seq"]

# Relative ridges that held-out batches choose from.
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# Modes "ls" and "seq" also try a larger one: they don't see errors of other layers, which make large changes harmful.
_MORE_RIDGES = (3e-1,)
# Mode "correct" too: late layers of convolutional networks have few positions per image.
_LARGE_RIDGES = (10.0, 1.0)


def compensate(
    pruned_model: nn.Module,
    original_model: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    mode: Mode | None = None,
    ridge: float | None = None,
    held_out: float = 0.2,
    recalibrate_norms: bool = True,
    offload: bool = False,
    max_bytes: int = 2**31,
    keep_decompressors: bool = False,
    process_group: Any = None,
    progress: bool | None = None,
) -> CompensationReport:
    """Compensate ``pruned_model`` in place from unlabelled batches; shapes and parameter names stay the same.

    mode="correct" works layer by layer in the order of execution, and includes the present error of the residual stream
    in the regression: W' = W + E[(S_full - S_pruned) zT] (E[z zT] + lambda I)^-1, where S is the stream after the layer
    and z the layer's input; for a layer off the stream S is its own output (:mod:`obc.recovery.correct`). On a stream
    of tokens every position is weighted by one over the mean square of S_full there. The bias, if there is one, takes
    the rest of the mean. Both models run side by side, module by module: about two forward passes of the unpruned and
    four of the pruned one if its modules form a chain, such as decoder layers, plus the sums of products. Memory: twice
    the tensor between two modules for all batches, the stream after each layer of one module, and 16 (columns +
    outputs) columns bytes for one layer, where columns counts its inputs (for a convolution times its taps). No logits
    are kept. A model whose modules form no chain runs from its start up to every layer. The input of a transposed
    convolution, whose outputs overlap, is reconstructed as in "seq".

    mode="ls" gives every consumer the weight W D with D = S + (E[x zT] - S E[z zT]) (E[z zT] + lambda I)^-1
    (:mod:`obc.recovery.moments`), and its bias the rest of the mean. z is the kept part of the unpruned model's x; one
    pass over the batches serves all layers. For a layer that writes to a stream of tokens every position is weighted by
    one over the mean square of the stream there. A convolution that pads with zeros is regressed through zero, because
    its padding does not have the mean.

    mode="seq" does the same layer by layer, where z is what the pruned model, compensated so far, produces, with the
    ridge that was best in "ls". If the modules form a chain and there are no BatchNorms, a module runs once in both
    models for each of its layers, and once more; otherwise the models run from their start for every layer, which a
    warning says before it begins. The result of "ls" is kept if it is better on the held-out batches.

    The down projections of fused experts, whose weights are one tensor, are layers too, each regressed on the tokens
    routed to it (:mod:`obc.recovery.unfused`). Layers that no batch reached, such as an expert without tokens, stay
    naive, and so do fused experts that compute something other than a gated product; a warning names them. Padding
    positions, according to a batch's ``attention_mask``, count neither in the regressions nor in the model's output.
    After an exception the pruned model is as it was.

    A share of the batches is held out. In mode "correct" they decide for every layer which ridge to use, or to leave it
    unchanged, and at the end whether the result is better than naive. In modes "ls" and "seq" they decide by the
    model's output: one ridge for all layers, or for each layer the ridge (or no compensation) that reconstructs its
    input best, or naive. This takes a pass over the held-out batches for every ridge; with BatchNorms, a pass over all
    batches. The running sums take 16 in (kept + 2) bytes per layer ("seq": + 16 kept^2, one layer at a time), plus a
    copy of the consumers for every ridge and the unpruned model's outputs on the held-out batches, which are recomputed
    each time if they exceed ``max_bytes``.

    Args:
        pruned_model: the model as pruning left it; device and dtype are those of ``original_model``.
        original_model: the unpruned model; unchanged.
        plan: what pruning kept.
        batches: calibration batches, at least two; a list is made of them, because they are used several times. Batches
            on which something is not finite are left out and named.
        forward_fn: ``forward_fn(model, batch)`` returns the outputs to preserve, tensors in any nesting; by default
            :func:`obc.model.evaluation.call_on_batch`, which accepts batches such as (inputs, labels).
        mode: "correct", "ls" or "seq". None means "correct", as in ``obc.prune(compensate=True)``, but "ls" with
            ``keep_decompressors``, because "correct" has no decompressors.
        ridge: relative to the mean diagonal of E[z zT]. None lets held-out batches choose from 1e-1 to 1e-5, and also
            3e-1 in modes "ls" and "seq", 10 and 1 in mode "correct".
        held_out: the share of the batches to hold out, in (0, 0.5]; at least one batch.
        recalibrate_norms: whenever weights change, give BatchNorms the statistics with which they return the same means
            and variances as in the unpruned model.
        offload: mode "correct": keep the tensors between modules in host memory.
        max_bytes: limit for the running sums of mode "ls", and of layers that mode "correct" solves together; further
            layers take further passes over the batches.
        keep_decompressors: keep every D, in * kept numbers per layer, in the report; not for mode "correct".
        process_group: every process in this group has the same models and its own batches, possibly of different
            number. Sums, errors and BatchNorm statistics combine all of them, and all get the same model.
        progress: show a progress bar; None shows it in a terminal only, and logs lines elsewhere.

    Raises:
        PlanError: the plan doesn't describe the consumers' weights.
        ValueError: an unknown mode, a negative ridge, ``held_out`` out of range, fewer than two batches, more than a
            tenth of them not finite, no consumer reached by a batch, a Gram matrix that is singular despite the ridge,
            or a compiled or parametrised model.
    """
    with failing_together(process_group, pruned_model, original_model):
        start = time.perf_counter()
        if mode is None:
            mode = "ls" if keep_decompressors else "correct"
        _check(pruned_model, original_model, mode, ridge, held_out, keep_decompressors)
        refuse_non_plans(plan)
        refuse_uncallable(forward_fn=forward_fn)
        plan.refuse_unknown(pruned_model, "the pruned model")
        processes = Processes(process_group, device_of(original_model))
        split = _split(UsableBatches.of(batches), held_out, processes)
        forward = calling_layers(in_present_autocast(forward_fn or call_on_batch))
        with (
            without_autocast(),
            expanded(pruned_model, plan.depth),
            evaluating(pruned_model, original_model),
            without_cache(pruned_model, original_model),
            torch.no_grad(),
            LayerCalls((pruned_model, original_model)) as watch,
            unfused(pruned_model, original_model, plan, next(iter(split[0])), forward, processes) as (layers, fused),
            LayerProgress("obc.compensate", progress) as bar,
        ):
            for part in split:
                part.on_batch = bar.on_batch
            consumers = find_consumers(pruned_model, original_model, layers)
            norms = batch_norms(pruned_model) if recalibrate_norms else []
            more = _LARGE_RIDGES if mode == "correct" else _MORE_RIDGES
            ridges: Sequence[float] = [*more, *RIDGES] if ridge is None else [ridge]
            options = CompensationOptions(
                mode, forward, ridges, offload, max_bytes, keep_decompressors, processes, layers
            )
            kind = CorrectRun if mode == "correct" else LeastSquaresRun
            report = kind(pruned_model, original_model, consumers, split, norms, options, bar).run()
        report.sliced_experts = fused
        report.notes += [
            f"{name}: what this recurrent layer lost is not compensated in its own weights"
            for name, module in pruned_model.named_modules()
            if is_recurrent(module) and name in plan
        ]
        # Equivalent Pruning leaves fused experts sliced.
        report.decompressors = {name: found for name, found in report.decompressors.items() if name in plan}
        partly = {name: function for name, function in watch.others.items() if name in report.layers}
        report.notes += [f"{name}: {other_use(function)}" for name, function in partly.items()]
        _warn_of_unreached(report)
        if partly:
            warnings.warn(
                f"compensation saw a part of these layers' inputs: {listed(report.notes[-len(partly) :])}", stacklevel=2
            )
        _warn_of_few_rows(report, consumers)
        report.seconds = time.perf_counter() - start
        return report


def _check(
    pruned_model: nn.Module,
    original_model: nn.Module,
    mode: str,
    ridge: float | None,
    held_out: float,
    keep_decompressors: bool,
) -> None:
    one_of("mode", mode, get_args(Mode))
    number("held_out", held_out)
    number("ridge", 0 if ridge is None else ridge, finite=True)
    if ridge is not None and ridge < 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out is the share of the batches that decides, in (0, 0.5], got {held_out}")
    if keep_decompressors and mode == "correct":
        raise ValueError("mode='correct' has no decompressors: it changes weights directly; pass mode='ls' or 'seq'")
    for role, model in (("pruned", pruned_model), ("original", original_model)):
        refuse_unusable(model, f"the {role} model")
        if compiled := [f": {name}" if name else "" for name, module in model.named_modules() if is_compiled(module)]:
            raise ValueError(
                f"the {role} model{compiled[0]} is compiled; pass what torch.compile was given, and compile after "
                "compensation"
            )
        if is_sharded(model):
            raise ValueError(
                f"the {role} model's parameters are split over several processes; compensate first, then shard it"
            )
    refuse_one_model(pruned_model, original_model, "the pruned model", "the original")


def _warn_of_unreached(report: CompensationReport) -> None:
    if report.sliced_experts:
        warnings.warn(
            f"fused experts are not compensated: {listed(report.sliced_experts)} stay as pruning left them",
            stacklevel=3,
        )
    if report.unreached:
        warnings.warn(
            f"no calibration batch reached {listed(report.unreached)}, which stay as pruning left them; pass "
            f"batches and a forward_fn that call them as modules",
            stacklevel=3,
        )


def _warn_of_few_rows(report: CompensationReport, consumers: Mapping[str, PrunedConsumer]) -> None:
    kept = {name: consumer.positions.shape[1] for name, consumer in consumers.items()}
    rows = {name: layer.rows for name, layer in report.layers.items()}
    if few := [
        f"{name} ({rows[name]} positions for {kept[name]} channels)" for name in rows if rows[name] < kept[name]
    ]:
        warnings.warn(
            f"fewer calibration positions than kept channels, so the result depends on the ridge: {listed(few)}; "
            f"pass more batches",
            stacklevel=3,
        )


def _split(usable: UsableBatches, share: float, processes: Processes) -> tuple[UsableBatches, UsableBatches]:
    """(calibration, held out): with a share of a fifth every fifth batch is held out; of fewer batches the last one."""
    batches = usable.numbered()
    (fewest,) = processes.least([len(batches)])  # all processes raise if one must, so that none is left waiting
    if fewest < 2:
        used_up = "" if fewest else "; a generator can be read only once"
        raise ValueError(f"compensate got {fewest} batches; pass at least two, one of which is held out{used_up}")
    every = round(1 / share)
    if len(batches) < every:
        return usable.part(batches[:-1]), usable.part(batches[-1:])
    calibration = [batch for index, batch in enumerate(batches) if (index + 1) % every]
    return usable.part(calibration), usable.part(batches[every - 1 :: every])
