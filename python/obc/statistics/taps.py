"""Reads the gradient of an activation during the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Tap(torch.autograd.Function):
    """Identity whose backward passes the gradient to ``read``. A leaf lets backward reach it despite frozen weights."""

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, leaf: Tensor, read: Callable[..., None], copy: bool, *saved: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*saved)
        ctx.read = read
        return activation.clone() if copy else activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            ctx.read(*ctx.saved_tensors, grads[0])
        return grads[0], *[None] * (3 + len(ctx.saved_tensors))


def tapped(activation: Tensor, read: Callable[..., None], copy: bool, saved: Sequence[Tensor] = ()) -> Tensor:
    """The activation, whose gradient goes to ``read`` while the loss goes backward.

    Args:
        activation: any tensor of the forward pass.
        read: ``read(*saved, gradient)`` is called without a graph.
        copy: needed where later code may change the activation in place, which autograd refuses for a view.
        saved: tensors to keep until then; backward raises if one of them was changed in place.
    """
    result: Tensor = _Tap.apply(activation, torch.zeros((), requires_grad=True, device="cpu"), read, copy, *saved)
    return result
