"""Runs models over calibration batches: captures inputs, compares outputs, estimates BatchNorm statistics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.model.arguments import iterable_batches, refuse_uncallable
from obc.model.autocast import in_present_autocast, without_autocast
from obc.model.evaluation import ForwardFn, call_on_batch, evaluating, tensors_in
from obc.model.plan import PruningPlan, refuse_non_plans
from obc.model.processes import ALONE, Processes, failing_together
from obc.model.usable import refuse_inference_tensors, refuse_non_modules, refuse_one_model
from obc.model.usable_batches import UsableBatches, all_finite
from obc.recovery.norm_reference import MomentSums, NormReference, Target, matching
from obc.statistics.part import Part

# Outputs are converted to float64 in pieces of this many numbers.
_PIECE = 2**22
_NOT_FINITE = "what it gives a BatchNorm is not finite"


def outputs(model: nn.Module, batch: Any, forward_fn: ForwardFn) -> list[Tensor]:
    """The floating tensors that ``forward_fn`` returns for a batch, without padding positions."""
    return [_without_padding(batch, out) for out in tensors_in(forward_fn(model, batch)) if out.is_floating_point()]


def _without_padding(batch: Any, output: Tensor) -> Tensor:
    """(positions, C) of a model's output (B, T, C) that the batch's mask keeps; without one, all of it."""
    part = Part()
    part.begin(batch)
    if part.valid is None or output.dim() != 3 or output.shape[:2] != part.valid.shape:
        return output
    return output[part.valid.to(output.device)]


def output_error(pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]], processes: Processes = ALONE) -> float:
    """Sum of squared differences over the sum of squares of what is wanted, of (tensors, wanted ones) of each batch.

    Infinite if anything is not finite.
    """
    sums = [_squares(got, wanted) for got, wanted in pairs]
    difference, energy = processes.total(sum(one for one, _ in sums), sum(one for _, one in sums))
    error = difference / energy if energy else difference
    return error if error == error else float("inf")


def side_by_side(
    model: nn.Module, expected: nn.Module, batches: UsableBatches, forward_fn: ForwardFn
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Both models' outputs on each batch; one is left out if the output of ``expected`` is not finite."""
    for batch in batches:
        wanted = outputs(expected, batch, forward_fn)
        if all_finite(wanted):
            yield outputs(model, batch, forward_fn), wanted
        else:
            batches.leave_out("the model's outputs on it are not finite")


def _squares(tensors: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[float, float]:
    """Sums of squared differences, and of squares of ``targets``; computed in pieces, so that no copy is large."""
    difference = energy = 0.0
    for tensor, target in zip(tensors, targets, strict=True):
        pieces = (values.reshape(-1).split(_PIECE) for values in (tensor, target))
        for got, wanted in zip(*pieces, strict=True):
            difference += float((got.double() - wanted.double()).square().sum())
            energy += float(wanted.double().square().sum())
    return difference, energy


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The norms of ``model`` with running statistics."""
    return list(named_norms(model).values())


def named_norms(module: nn.Module, place: str = "") -> dict[str, _BatchNorm]:
    """The norms of ``module`` with running statistics, by their names in the model that contains it at ``place``."""
    return {
        ".".join(part for part in (place, name) if part): norm
        for name, norm in module.named_modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
    }


def restorer(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that gives the modules the state again that they have now."""
    states = [(module, copy.deepcopy(module.state_dict())) for module in modules]

    def restore() -> None:
        for module, state in states:
            module.load_state_dict(state)

    return restore


def recalibrate_norms(
    model: nn.Module,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    original_model: nn.Module | None = None,
    plan: PruningPlan | None = None,
    process_group: Any = None,
) -> None:
    """Re-estimate the running statistics of every BatchNorm from ``batches``.

    With ``original_model``, the unpruned one, and the plan, every norm gets the statistics with which it returns the
    same mean and variance as in the unpruned model on the same batches, whatever data these are
    (:mod:`obc.recovery.norm_reference`). Without it, statistics are the mean over the batches of each batch's
    statistics, which is right if there are many batches and they resemble the training data.

    All other modules run in eval mode. Training flags, momenta and the count of batches seen are restored. A model
    without such norms is not run, and a warning says so.

    Args:
        model: the model, changed in place.
        batches: any iterable, used once; with ``original_model`` a list is made of it, which is used twice.
        forward_fn: ``forward_fn(model, batch)``; by default :func:`obc.model.evaluation.call_on_batch`, which accepts
            batches such as (inputs, labels).
        original_model: the unpruned model; unchanged.
        plan: the plan of ``model``; by default nothing was pruned.
        process_group: use the batches of all processes in this group.

    A batch that makes a statistic infinite or NaN is left out and named. If this raises, the model keeps its
    statistics.

    Raises:
        ValueError: no process has batches, or more than a tenth of them can't be used.
    """
    with failing_together(process_group, model):
        refuse_non_modules(model)
        if not (norms := batch_norms(model)):
            what = f"{type(model).__name__} has no BatchNorm with running statistics"
            warnings.warn(f"{what}, so recalibrate_norms changed nothing", stacklevel=2)
            return
        refuse_inference_tensors(model)
        refuse_uncallable(forward_fn=forward_fn)
        iterable_batches(batches)
        if original_model is not None:
            refuse_non_modules(original_model, "original_model")
            refuse_one_model(model, original_model, "the model", "original_model")
        if plan is not None:
            refuse_non_plans(plan)
            plan.refuse_unknown(model, "the model")
        processes = Processes(process_group, next(iter(norms[0].buffers())).device)
        usable = UsableBatches.of(batches if original_model is None else list(batches))
        forward, targets = in_present_autocast(forward_fn or call_on_batch), {}
        with without_autocast():
            if original_model is not None:
                reference = norm_reference(original_model, usable, forward)
                targets = reference.targets(model, plan or PruningPlan(), processes=processes)
            recalibrate_from(model, norms, usable, forward, processes, targets)


def norm_reference(model: nn.Module, batches: UsableBatches, forward_fn: ForwardFn) -> NormReference:
    """The inputs' statistics at the BatchNorms of the unpruned ``model``, from one pass over the batches in eval mode.

    This is a separate pass, because reading a norm's input would end the trace of
    :func:`obc.recovery.stream_points.observe`.
    """
    norms = named_norms(model)
    reference = NormReference(norms)
    if norms:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                with reference.reading() as calls:
                    forward_fn(model, batch)
                if all_finite(calls):  # otherwise the passes over the pruned model leave the batch out and say why
                    reference.add(calls, batches.current)
    return reference


def recalibrate_from(
    model: nn.Module,
    norms: Sequence[_BatchNorm],
    batches: UsableBatches,
    forward_fn: ForwardFn,
    processes: Processes,
    targets: Mapping[_BatchNorm, Target],
) -> None:
    """:func:`recalibrate_norms` for some norms; ``forward_fn`` may run part of a model.

    Norms with a target get the statistics that follow from it; the others get those of the batches.
    """
    targets = {norm: targets[norm] for norm in norms if norm in targets}
    plain = [norm for norm in norms if norm not in targets]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in plain]
    unchanged = {norm: _statistics(norm, copy=True) for norm in norms}
    try:
        with evaluating(model), torch.no_grad():
            for norm in plain:
                norm.train()
                for statistic in _statistics(norm):
                    statistic.zero_()  # restarts the mean, even if a statistic is not finite
                tracked = norm.num_batches_tracked
                norm.num_batches_tracked = None if tracked is None else torch.zeros_like(tracked)
                norm.momentum = None  # a cumulative mean
            sums = {norm: MomentSums(_statistics(norm)[0]) for norm in targets}
            count = _pass_over(model, plain, targets, sums, batches, forward_fn)
            (total,) = processes.total(count)
            batches.refuse_many(processes.total)
            if total == 0:
                raise ValueError("recalibrate_norms got no batches; pass an iterable that is not used up")
            ran = [norm for norm in plain if norm.num_batches_tracked is None or int(norm.num_batches_tracked)]
            _put_back({norm: unchanged[norm] for norm in plain if norm not in ran})
            statistics = [statistic for norm in plain for statistic in _statistics(norm)]
            for statistic in statistics if processes.group is not None else []:
                statistic.mul_(count / total)
            processes.add(statistics)
            for norm, moments in sums.items():
                moments.gather(processes)
                if (average := moments.average()) is None:
                    _put_back({norm: unchanged[norm]})
                else:
                    targets[norm].put(norm, *average)
    except BaseException:
        _put_back(unchanged)
        raise
    finally:
        for norm, momentum, tracked in before:
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def _statistics(norm: _BatchNorm, copy: bool = False) -> list[Tensor]:
    found = [statistic for statistic in (norm.running_mean, norm.running_var) if statistic is not None]
    return [statistic.clone() for statistic in found] if copy else found


def _put_back(statistics: Mapping[_BatchNorm, Sequence[Tensor]]) -> None:
    with torch.no_grad():
        for norm, values in statistics.items():
            for statistic, value in zip(_statistics(norm), values, strict=True):
                statistic.copy_(value)


def _pass_over(
    model: nn.Module,
    plain: Sequence[_BatchNorm],
    targets: Mapping[_BatchNorm, Target],
    sums: Mapping[_BatchNorm, MomentSums],
    batches: UsableBatches,
    forward_fn: ForwardFn,
) -> int:
    """Run the model on the batches and count them; a batch that is not finite leaves the statistics unchanged."""
    count = 0
    for batch in batches:
        buffers = [buffer for norm in plain for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        with matching(targets, batches.current) as calls:
            forward_fn(model, batch)
        if all_finite((buffers, calls)):
            count += 1
            for norm, mean, variance in calls:
                sums[norm].add(mean, variance)
            continue
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        batches.leave_out(_NOT_FINITE)
    return count
