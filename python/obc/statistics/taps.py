"""Reads the gradient of an activation during the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Tap(torch.autograd.Function):
    """Identity whose backward passes the gradient to ``read``. A leaf lets backward reach it despite frozen weights."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, leaf: Tensor, read: Callable[[Tensor], None], copy: bool) -> Tensor:
        ctx.read = read
        return activation.clone() if copy else activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            ctx.read(grads[0])
        return grads[0], None, None, None


def tapped(activation: Tensor, read: Callable[[Tensor], None], copy: bool) -> Tensor:
    """The activation, whose gradient goes to ``read`` while the loss goes backward.

    Args:
        activation: any tensor of the forward pass.
        read: gets the gradient, without a graph.
        copy: needed where later code may change the activation in place, which autograd refuses for a view.
    """
    result: Tensor = _Tap.apply(activation, torch.zeros((), requires_grad=True), read, copy)
    return result
