"""Registration of ``torch.ops.obc.<op>``: arguments are checked, then passed to a backend of :mod:`obc.backends`."""

from __future__ import annotations

import functools
import numbers
import reprlib
from collections.abc import Callable, Iterable
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
# A schema's type -> Python's, and what messages call a value of it.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "TensorType": ((Tensor,), "a tensor"),
    "BoolType": ((bool, torch.SymBool), "True or False"),
    "IntType": ((int, torch.SymInt, numbers.Integral), "an integer"),
    "FloatType": ((float, torch.SymFloat, numbers.Real), "a number"),
}


@functools.cache
def _types(op: str) -> list[tuple[str, tuple[type, ...], str, bool, bool]]:
    """Every argument of a schema: name, types, what messages call one, whether it is a list, whether it may be None."""
    found = []
    for argument in getattr(torch.ops.obc, op).default._schema.arguments:
        kind, optional, listed = argument.type, False, False
        if kind.kind() == "OptionalType":
            kind, optional = kind.getElementType(), True
        if kind.kind() == "ListType":
            kind, listed = kind.getElementType(), True
        gaps = kind.kind() == "OptionalType"
        types, said = _KINDS[(kind.getElementType() if gaps else kind).kind()]
        found.append((argument.name, (*types, type(None)) if gaps else types, said, listed, optional))
    return found


def check_arguments(op: str, *arguments: Any) -> tuple[Any, ...]:
    """The operator's own check, for a caller without tensors: it takes whatever has the attributes that it reads."""
    return _CHECKS[op](*arguments)


def run(op: str, like: Tensor, *arguments: Any) -> Any:
    """The backend's result for checked arguments; ``like`` is the tensor by which the backend is chosen."""
    return backends.resolve(op, like.device.type, like.dtype, like.numel())(*arguments)


def call(op: str, *arguments: Any) -> Any:
    """``torch.ops.obc.<op>(*arguments)``, but not through torch's dispatcher where it would only pass tensors on.

    The dispatcher and its formulas in Python take twice as long as the checks and the kernel of a small call.

    Raises:
        TypeError: an argument is of another type than the schema says.
        RuntimeError: a tensor has a tangent of forward-mode differentiation, which torch's dispatcher would drop.
    """
    if torch.compiler.is_compiling():
        return getattr(_dispatched, op)(*arguments)
    given = typed(op, *arguments)
    tensors = _tensors(given)
    _refuse_tangents(op, tensors)
    if _intercepted() or not _all_plain(tensors):
        return getattr(_dispatched, op)(*given)
    return _IMPLEMENTATIONS[op](*given)


def typed(op: str, *arguments: Any) -> list[Any]:
    """The arguments, of the types in the operator's schema; NumPy's numbers become Python's.

    Not every backend looks at types: to some any text is true, and torch passes on None for a tensor.

    Raises:
        TypeError: an argument is of another type; the message names it.
    """
    found: list[Any] = []
    for (name, types, kind, listed, optional), value in zip(_types(op), arguments, strict=False):
        if value is None and optional:
            found.append(None)
        elif not listed:
            found.append(_entry(op, name, types, kind, value))
        elif not isinstance(value, (list, tuple)):
            raise TypeError(f"obc::{op}: {name} must be a list with one entry per layer, got {_received(value)}")
        else:
            found.append([_entry(op, f"{name}[{i}]", types, kind, entry) for i, entry in enumerate(value)])
    return found


def _entry(op: str, name: str, types: tuple[type, ...], kind: str, value: Any) -> Any:
    if type(value) in types:
        return value
    if not isinstance(value, types):
        raise TypeError(f"obc::{op}: {name} must be {kind}, got {_received(value)}")
    return types[0](value) if isinstance(value, numbers.Number) else value


def _received(value: Any) -> str:
    return "None" if value is None else f"{reprlib.repr(value)}, a {type(value).__name__}"


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in arguments:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list):
            found += [entry for entry in value if isinstance(entry, Tensor)]
    return found


def _refuse_tangents(op: str, tensors: Iterable[Tensor]) -> None:
    if forward_ad._current_level < 0:  # outside of dual_level and torch.func.jvp
        return
    for place, tensor in enumerate(tensors):
        if forward_ad.unpack_dual(tensor).tangent is not None:
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


def _all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether none is of a subclass, recorded by autograd, or a view that is negated when read."""
    recorded = torch.is_grad_enabled()
    for tensor in tensors:
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
        typed(op, *arguments)
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
