"""Gates: identities on activations whose own gradient is a row of scores.

A gate is a zero leaf with one entry per channel (for sample rows per sample and channel) that travels with an
activation through an identity. The identity's backward returns the gradient unchanged and gives the gate
``channel_dot(activation, gradient)``. The gate's ``.grad`` is preset to a slice of one flat vector, so autograd adds
every use, micro-batch and checkpointed segment directly into it. Nothing has side effects, so ``torch.compile`` traces
it. :mod:`obc.backends.native_gates` does the same in C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from obc import ops


def pass_gate(
    native: Any | None, activation: Tensor, gate: Tensor, channel_dim: int, per_sample: bool, fold: int
) -> Tensor:
    """``activation`` through a gate; uses the library ``native`` if there is one and it serves this tensor."""
    if native is not None:
        gated = native.gate(activation, gate, channel_dim, per_sample, fold)
        if gated is not NotImplemented:
            return gated  # type: ignore[no-any-return]
    return Gate.apply(activation, gate, channel_dim, per_sample, fold)  # type: ignore[no-any-return]


def _folded_dot(activation: Tensor, grad: Tensor, channel_dim: int, per_sample: bool, fold: int) -> Tensor:
    """channel_dot; with ``fold`` > 1 the channels of that many conv groups are added up."""
    plain = type(grad) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    channel_dot = ops.channel_dot_undispatched if plain else ops.channel_dot
    dot = channel_dot(activation, grad, channel_dim, per_sample)
    return dot if fold == 1 else dot.unflatten(-1, (fold, -1)).sum(-2)


class Gate(torch.autograd.Function):
    """Identity on ``activation``; the gate's gradient is ``channel_dot(activation, grad)``."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, gate: Tensor, channel_dim: int, per_sample: bool, fold: int) -> Tensor:
        """Returns the activation itself."""
        ctx.save_for_backward(activation)
        ctx.channel_dim, ctx.per_sample, ctx.fold = channel_dim, per_sample, fold
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient unchanged, and the gate's: (C,), or (B, C) per sample."""
        (activation,), (grad,) = ctx.saved_tensors, grads
        dot = _folded_dot(activation, grad, ctx.channel_dim, ctx.per_sample, ctx.fold)
        return grad, dot, None, None, None


class CheckGate(torch.autograd.Function):
    """A gate of the checking row: it returns a clone, so that in-place changes do no harm, and detects them.

    An output's gate keeps the tensor that it received, which no other code sees. An input's gate keeps the clone,
    because other code may change the tensor that it received. Sets ``watch.output_changed`` if the returned tensor was
    changed in place, ``watch.input_changed`` if the received one was, ``watch.reached`` when a gradient arrives, and
    ``watch.differentiated`` if that gradient may be differentiated again (``create_graph=True``).
    The kept tensor is saved as any other, so activation checkpointing drops it, but without its version: changes are
    noted here instead of being refused by autograd.
    """

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, gate: Tensor, channel_dim: int, per_sample: bool, fold: int, watch: Any
    ) -> Tensor:
        """Returns a clone of the activation."""
        handed = activation.clone()
        ctx.received, ctx.handed = _version_alone(activation), _version_alone(handed)
        ctx.versions = ctx.received._version, ctx.handed._version
        ctx.save_for_backward((activation if watch.keeps_received else handed).data)
        ctx.channel_dim, ctx.per_sample, ctx.fold, ctx.watch = channel_dim, per_sample, fold, watch
        return handed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """As :meth:`Gate.backward`; tells ``watch`` what was changed in place."""
        (kept,), (grad,) = ctx.saved_tensors, grads
        ctx.watch.reached = True
        ctx.watch.differentiated |= torch.is_grad_enabled()
        ctx.watch.input_changed |= ctx.received._version != ctx.versions[0]
        ctx.watch.output_changed |= ctx.handed._version != ctx.versions[1]
        dot = _folded_dot(kept, grad, ctx.channel_dim, ctx.per_sample, ctx.fold)
        return grad, dot, None, None, None, None


def _version_alone(tensor: Tensor) -> Tensor:
    """A tensor that shares ``tensor``'s version counter from now on and holds no memory."""
    alias = tensor.detach()
    alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)  # replaces the values; the version stays
    return alias


class TokenGate(torch.autograd.Function):
    """Identity on an embedding's output; the gate's gradient is, for each row of the table, the dot of its look-ups.

    Serves the out channels of a head whose weight is tied to the table: their rows contain both uses.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, gate: Tensor, tokens: Tensor, per_sample: bool) -> Tensor:
        """Returns a clone of the embeddings."""
        ctx.save_for_backward(activation, tokens)
        ctx.shape, ctx.per_sample = gate.shape, per_sample
        return activation.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient unchanged, and the gate's: one number per row of the table."""
        (activation, tokens), (grad,) = ctx.saved_tensors, grads
        dtype = ops.accumulation_dtype(activation.dtype)
        dots = (activation.to(dtype) * grad.to(dtype)).sum(-1)
        rows = tokens.expand(dots.shape).reshape(ctx.shape[0] if ctx.per_sample else 1, -1)
        table = dots.new_zeros(rows.shape[0], ctx.shape[-1])
        table.scatter_add_(1, rows, dots.reshape(rows.shape))
        return grad, table.reshape(ctx.shape), None, None
