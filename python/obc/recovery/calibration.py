"""Running models over calibration batches: capturing a layer's inputs, comparing outputs, BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from obc.model.evaluation import ForwardFn, call_on_batch, evaluating
from obc.model.layouts import Layout
from obc.recovery.processes import ALONE, Processes


def inputs(model: nn.Module, names: Sequence[str], batch: Any, forward_fn: ForwardFn) -> dict[str, list[Tensor]]:
    """The inputs of the modules ``names`` in one forward pass, call by call, by name in the order of first calls."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, []).append((args[0] if args else next(iter(kwargs.values()))).detach().clone())

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        forward_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def channel_rows(x: Tensor, layout: Layout, repeat: int) -> Tensor:
    """(positions, channels) of a layer's input; behind a flatten every column of a channel is a position."""
    if layout.convolution:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    return rows if repeat == 1 else rows.unflatten(1, (-1, repeat)).transpose(1, 2).flatten(0, 1)


def outputs(model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn) -> list[list[Tensor]]:
    """The floating tensors that ``forward_fn`` returns, batch by batch."""
    results = (pytree.tree_leaves(forward_fn(model, batch)) for batch in batches)
    return [[leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()] for leaves in results]


def output_error(
    got: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], processes: Processes = ALONE
) -> float:
    """Sum of squared differences over the sum of squares of ``expected``; infinite where something is not finite."""
    difference = energy = 0.0
    for got_leaves, expected_leaves in zip(got, expected, strict=True):
        for tensor, target in zip(got_leaves, expected_leaves, strict=True):
            difference += float((tensor.double() - target.double()).square().sum())
            energy += float(target.double().square().sum())
    difference, energy = processes.total(difference, energy)
    error = difference / energy if energy else difference
    return error if error == error else float("inf")


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The norms of ``model`` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def recalibrate_norms(
    model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn | None = None, *, process_group: Any = None
) -> None:
    """Estimate the running statistics of every BatchNorm anew: the mean over ``batches`` of each batch's statistics.

    All other modules run in eval mode; training flags, momenta and the count of batches seen are restored. A model
    without such norms is not run.

    Args:
        model: changed in place.
        batches: any iterable, passed over once.
        forward_fn: ``forward_fn(model, batch)``; by default :func:`obc.model.evaluation.call_on_batch`, which takes
            batches such as (inputs, labels).
        process_group: the mean is over the batches of all processes of this group.

    Raises:
        ValueError: there are no batches, in no process.
    """
    if norms := batch_norms(model):
        device = next(iter(norms[0].buffers())).device
        _recalibrate(model, norms, batches, forward_fn or call_on_batch, Processes(process_group, device))


def _recalibrate(
    model: nn.Module,
    norms: Sequence[_BatchNorm],
    batches: Iterable[Any],
    forward_fn: ForwardFn,
    processes: Processes,
) -> None:
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    count = 0
    with evaluating(model), torch.no_grad():
        try:
            for norm in norms:
                norm.train()
                tracked = norm.num_batches_tracked
                norm.num_batches_tracked = None if tracked is None else torch.zeros_like(tracked)
                norm.momentum = None  # a cumulative mean
            for count, batch in enumerate(batches, 1):  # noqa: B007 - how many there were
                forward_fn(model, batch)
        finally:
            for norm, momentum, tracked in before:
                norm.momentum, norm.num_batches_tracked = momentum, tracked
    (total,) = processes.total(count)
    if total == 0:
        raise ValueError("recalibrate_norms got no batches; pass an iterable that is not used up")
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
    for statistic in statistics if processes.group is not None else []:
        statistic.mul_(count / total)
    processes.add(statistics)
