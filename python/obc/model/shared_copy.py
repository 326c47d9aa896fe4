"""A copy of a model's modules that shares the memory of its weights, for experiments."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from obc.model.names import joined, named_modules


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy all modules of ``model``; parameters share the memory of the original, buffers are copied.

    The parameters are new objects without gradients. Replacing or shortening them in the copy, or changing flags,
    leaves ``model`` as it is; writing into their values would change it. A function that replaces a method, such as
    ``model.forward = lambda x: old(x)``, calls the copy's modules.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = _alias(parameter)
        # Tensors in plain attributes may have a graph, which can't be copied.
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for key, value in vars(module).items():
            if isinstance(value, types.FunctionType):
                vars(module)[key] = _rebound(value, memo)
    return copied


def _rebound(value: Any, memo: Mapping[int, Any]) -> Any:
    """A function or method with the copies of the modules that it holds, which ``deepcopy`` leaves in functions."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, types.MethodType):
        owner = _rebound(value.__self__, memo)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        inner = _rebound(value.func, memo)
        args = [_rebound(arg, memo) for arg in value.args]
        return functools.partial(inner, *args, **{key: _rebound(arg, memo) for key, arg in value.keywords.items()})
    if not isinstance(value, types.FunctionType):
        return value
    held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    given = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if not any(_holds(one) for one in (*held, *given)):
        return value
    cells = (
        types.CellType(_rebound(cell.cell_contents, memo)) if _is_filled(cell) else cell
        for cell in value.__closure__ or ()
    )
    defaults = None if value.__defaults__ is None else tuple(_rebound(one, memo) for one in value.__defaults__)
    new = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, tuple(cells) or None)
    if value.__kwdefaults__ is not None:
        new.__kwdefaults__ = {key: _rebound(one, memo) for key, one in value.__kwdefaults__.items()}
    return functools.update_wrapper(new, value)


def _holds(value: Any) -> bool:
    return isinstance(value, (nn.Module, types.MethodType, types.FunctionType, functools.partial))


def _is_filled(cell: types.CellType) -> bool:
    """Whether a variable of a closure has a value yet."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    if type(parameter) is not nn.Parameter:
        return parameter  # a class with its own state
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


Uses = dict[int, list[tuple[dict[str, Any], str]]]


def parameter_uses(model: nn.Module) -> Uses:
    """id of a parameter -> (the module's dict that holds it, its name there); several entries if it is shared."""
    uses: Uses = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append((module._parameters, key))
    return uses


def replace_parameter(uses: Uses, old: nn.Parameter, new: Tensor) -> None:
    """Give every module that holds ``old`` one new parameter with the values of ``new``."""
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    holders = uses.pop(id(old))
    uses[id(parameter)] = holders
    for parameters, key in holders:
        parameters[key] = parameter


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that several modules hold."""
    names: dict[int, list[str]] = {}
    for module_name, module in named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(joined(module_name, key))
    return [found for found in names.values() if len(found) > 1]
