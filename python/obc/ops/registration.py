"""Registration of ``torch.ops.obc.<op>``: arguments are checked, then passed to a backend of :mod:`obc.backends`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from obc import backends
from obc.backends.operators import TABLE

_LIBRARY = torch.library.Library("obc", "DEF")
_CHECKS: dict[str, Callable[..., tuple[Any, ...]]] = {}
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
_dispatched = torch.ops.obc
for _operator in TABLE:
    _LIBRARY.define(_operator.name + _operator.schema)


def check_arguments(op: str, *arguments: Any) -> tuple[Any, ...]:
    """The operator's own check, for a caller without tensors: it takes whatever has the attributes that it reads."""
    return _CHECKS[op](*arguments)


def run(op: str, like: Tensor, *arguments: Any) -> Any:
    """The backend's result for checked arguments; ``like`` is the tensor by which the backend is chosen."""
    return backends.resolve(op, like.device.type, like.dtype, like.numel())(*arguments)


def call(op: str, tensors: Sequence[Tensor | None], *arguments: Any) -> Any:
    """``torch.ops.obc.<op>(*arguments)``, but not through torch's dispatcher where it would only pass ``tensors`` on.

    The dispatcher and its formulas in Python take twice as long as the checks and the kernel of a small call.

    Raises:
        RuntimeError: a tensor has a tangent of forward-mode differentiation, which torch's dispatcher would drop.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _refuse_tangents(op, tensors)
    dispatched = compiling or _intercepted() or not _all_plain(tensors)
    if not dispatched:
        try:
            return _IMPLEMENTATIONS[op](*arguments)
        except (AttributeError, TypeError):
            # The schema names what is of a wrong type, except None in a tensor's place; a check raises its error again.
            _refuse_none(op, arguments)
    return getattr(_dispatched, op)(*arguments)


def _refuse_none(op: str, arguments: Sequence[Any]) -> None:
    for argument, value in zip(getattr(_dispatched, op).default._schema.arguments, arguments, strict=False):
        if value is None and str(argument.type) == "Tensor":
            raise TypeError(f"obc::{op}: {argument.name} must be a tensor, got None")


def _refuse_tangents(op: str, tensors: Iterable[Tensor | None]) -> None:
    if forward_ad._current_level < 0:  # outside of dual_level and torch.func.jvp
        return
    for place, tensor in enumerate(tensors):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"obc::{op} has no forward-mode derivative, but tensor {place} of its inputs has a tangent; use "
                f"reverse mode, or obc.reference.{op}, which torch differentiates"
            )


def _intercepted() -> bool:
    """Whether a mode, a transform or a trace sees every operator that is called now."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _all_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether none is of a subclass, recorded by autograd, or a view that is negated when read."""
    recorded = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or (recorded and tensor.requires_grad) or tensor.is_neg():
            return False
    return True


def register(
    op: str,
    check: Callable[..., tuple[Any, ...]],
    empty: Callable[..., Any],
    autograd: tuple[Callable[..., Any], Callable[..., None]] | None,
    implementation: Callable[..., Any] | None = None,
) -> None:
    """Give an operator of the table its implementation, its fake and its autograd formula.

    Args:
        op: its name in the table.
        check: raises if an argument does not fit; returns all arguments, with defaults filled in and dimensions counted
            from 0. The implementation and the fake both call it.
        empty: makes the result, without values, from checked arguments.
        autograd: backward and setup_context, for example those of :func:`not_differentiable`; None if ``check`` refuses
            inputs that require grad.
        implementation: takes unchecked arguments. By default they are checked and passed to the backend that the first
            one chooses.
    """

    _CHECKS[op] = check

    def checked(*arguments: Any) -> Any:
        arguments = check(*arguments)
        return run(op, arguments[0], *arguments)

    _IMPLEMENTATIONS[op] = implementation or checked

    def dispatched(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:  # a raw call; torch.func.jvp has unwrapped its tensors before it comes here
            _refuse_tangents(op, [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)])
        return _IMPLEMENTATIONS[op](*arguments)

    _LIBRARY.impl(op, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"obc::{op}", lambda *arguments, **named: empty(*check(*arguments, **named)), lib=_LIBRARY
    )
    if autograd is not None:
        backward, setup_context = autograd
        torch.library.register_autograd(f"obc::{op}", backward, setup_context=setup_context, lib=_LIBRARY)


def not_differentiable(op: str, remedy: str) -> tuple[Callable[..., Any], Callable[..., None]]:
    """The autograd formula that raises."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"obc::{op} is not differentiable; {remedy}")

    return backward, lambda ctx, inputs, output: None
