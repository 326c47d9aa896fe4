"""Rows of parameters for which no layer is called, read from their gradients.

r_u[n] = sum over the other dimensions of w . dL_n/dw: along the dimension of which products read channels it is what a
gate on these channels would read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obc.criteria.loss_rows import LossRows, Part
from obc.model.evaluation import LossFn
from obc.model.groups import ChannelGroup, Side, Slices
from obc.scoring.results.kept_rows import ChannelRows

Key = tuple[str, Side]


def weights_outside_calls(model: nn.Module, groups: Sequence[ChannelGroup], slices: Slices) -> dict[Key, int]:
    """(parameter by which products read channels, side) -> its dimension; side "out" only for ``slices="all"``.

    Other parameters outside layers, such as tables of positions, are not read.
    """
    known = {name for name, one in model.named_parameters(remove_duplicate=False) if one.is_floating_point()}
    parts = [part for group in groups for part in group.slices if part.dim is not None and part.module in known]
    reading = {part.module for part in parts if part.side == "in"}
    return {
        (part.module, part.side): part.dim  # type: ignore[misc]
        for part in parts
        if part.module in reading and (slices == "all" or part.side == "in")
    }


class ParameterRows(LossRows):
    """A loss function that reads rows of parameters; gradients have no form per sample, so these come one by one.

    On leaving the ``with`` block the parameters are as frozen as they were.

    Args:
        dims: as :func:`parameters_read` finds them.
        per_sample: rows belong to samples.
    """

    def __init__(self, model: nn.Module, dims: Mapping[Key, int], loss_fn: LossFn, per_sample: bool) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        super().__init__(loss_fn, {key: named[key[0]].shape[dim] for key, dim in dims.items()}, per_sample)
        self._dims, self._parameters = dict(dims), {id(one): one for one in (named[name] for name, _ in dims)}
        self._keys = {one: [key for key in dims if id(named[key[0]]) == one] for one in self._parameters}
        self._before = [(one, one.requires_grad) for one in self._parameters.values()]
        self._handles: list[Any] = []
        self._reading: Part = (0, 0)

    def __enter__(self) -> ParameterRows:
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, requires_grad in self._before:
            parameter.requires_grad_(requires_grad)

    def _hooks(self, model: nn.Module, part: Part) -> list[Any]:
        self._reading = part
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)  # the scorer has frozen it
        if not self._handles:
            handles = [one.register_post_accumulate_grad_hook(self._read) for one in self._parameters.values()]
            self._handles += handles
        return []

    def _read(self, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        dtype = torch.promote_types(grad.dtype, torch.float32)
        products = parameter.detach().to(dtype) * grad.detach().to(dtype)
        for key in self._keys[id(parameter)]:
            self._add(key, products.movedim(self._dims[key], 0).flatten(1).sum(1)[None], self._reading)

    def rows(self) -> dict[str, ChannelRows]:
        """(N, channels) finite rows of every parameter, on the sides that are read."""
        found = self.found()
        return {name: ChannelRows(found.get((name, "out")), found.get((name, "in"))) for name, _ in self._dims}
