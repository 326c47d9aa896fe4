"""A copy of a model's modules that shares the memory of its weights, for experiments."""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from obc.model.names import joined, named_modules

_CONTAINERS = (list, tuple, dict)
_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy all modules of ``model``; parameters share the memory of the original, buffers are copied.

    The parameters are new objects without gradients. Replacing or shortening them in the copy, or changing flags,
    leaves ``model`` as it is; writing into their values would change it. Hooks, and functions that replace a method
    such as ``model.forward = lambda x: old(x)``, call the copy's modules. Activations that the model keeps lose their
    graph in the copy.
    """
    with _Activations():
        return _shared_copy(model)


class _Activations(TorchFunctionMode):
    """Copies what ``deepcopy`` refuses: compressed sparse tensors, and tensors with a graph, without it.

    Models keep such tensors, in lists for example.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or (args[0].is_leaf and args[0].layout not in _COMPRESSED):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())


def deep_copy(model: nn.Module) -> nn.Module:
    """``copy.deepcopy`` of a model that may keep activations."""
    with _Activations():
        return copy.deepcopy(model)


def _shared_copy(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {id(None): None}
    modules = list(model.modules())
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = _alias(parameter)
        for value in vars(module).values():
            if isinstance(value, Tensor):
                memo[id(value)] = value
            elif type(value) in _CONTAINERS and value:
                memo |= {id(one): one for one in _with_graphs(value)}
    # What deepcopy does, without its bookkeeping for every module: new objects first, then copies of what they hold.
    shells = [(module, type(module).__new__(type(module))) for module in modules if _is_its_state(module)]
    memo |= {id(module): shell for module, shell in shells}
    for module, shell in reversed(shells):
        vars(shell).update({key: _copied(value, memo) for key, value in module.__getstate__().items()})
    copied: nn.Module = copy.deepcopy(model, memo)
    for module in copied.modules():
        for key, value in vars(module).items():
            if isinstance(value, types.FunctionType):
                vars(module)[key] = _rebound(value, memo)
            elif key.endswith("_hooks") and isinstance(value, dict) and value:
                value.update({handle: _rebound(hook, memo) for handle, hook in value.items()})
    return copied


def _with_graphs(value: Any) -> Iterator[Tensor]:
    """The tensors with a graph in lists, tuples and dicts: what a module remembers of an earlier call."""
    if isinstance(value, Tensor) and not value.is_leaf:
        yield value
    elif type(value) in _CONTAINERS:
        for one in value.values() if type(value) is dict else value:
            yield from _with_graphs(one)


def _is_its_state(module: nn.Module) -> bool:
    """Whether ``deepcopy`` would make a new object and copy the entries of the module's state, and no more."""
    kind: Any = type(module)
    return (
        not hasattr(kind, "__deepcopy__")
        and "__deepcopy__" not in vars(module)
        and kind.__new__ is object.__new__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is nn.Module.__getstate__
        and kind.__setstate__ is nn.Module.__setstate__
        and kind not in copyreg.dispatch_table
        and not any("__slots__" in vars(base) for base in kind.__mro__)
    )


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """``deepcopy``, but quick for what most entries of a module's ``__dict__`` are."""
    if type(value) in (bool, int, float, str, type(None)):
        return value
    if type(value) in (dict, list, set, OrderedDict) and not value:
        return memo.setdefault(id(value), type(value)())
    if type(value) is dict and all(id(one) in memo for one in value.values()):  # a module's parameters and children
        return memo.setdefault(id(value), {key: memo[id(one)] for key, one in value.items()})
    return copy.deepcopy(value, memo)


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """A function or method with the copies of the modules that it holds, which ``deepcopy`` leaves in functions.

    It may also hold them in lists, tuples and dicts. Its copy goes into ``memo`` before what it holds is copied: a
    function may hold itself.
    """
    if isinstance(value, (nn.Module, types.FunctionType)) and id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        owner = _rebound(value.__self__, memo)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        inner = _rebound(value.func, memo)
        args = [_rebound(arg, memo) for arg in value.args]
        return functools.partial(inner, *args, **{key: _rebound(arg, memo) for key, arg in value.keywords.items()})
    if _holds(value) and type(value) in (list, tuple):
        return type(value)(_rebound(one, memo) for one in value)
    if _holds(value) and type(value) is dict:
        return {key: _rebound(one, memo) for key, one in value.items()}
    if not isinstance(value, types.FunctionType):
        return value
    held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    given = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if not any(_holds(one) for one in (*held, *given)):
        return value
    cells = tuple(types.CellType() if _is_filled(cell) else cell for cell in value.__closure__ or ())
    new = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
    memo[id(value)] = new
    for cell, old in zip(cells, value.__closure__ or (), strict=True):
        if cell is not old:
            cell.cell_contents = _rebound(old.cell_contents, memo)
    if value.__defaults__ is not None:
        new.__defaults__ = tuple(_rebound(one, memo) for one in value.__defaults__)
    if value.__kwdefaults__ is not None:
        new.__kwdefaults__ = {key: _rebound(one, memo) for key, one in value.__kwdefaults__.items()}
    return functools.update_wrapper(new, value)


def _holds(value: Any) -> bool:
    if type(value) in (list, tuple, dict):
        return any(_holds(one) for one in (value.values() if type(value) is dict else value))
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


Uses = dict[int, list[tuple[Any, Any]]]


def parameter_uses(modules: Iterable[nn.Module]) -> Uses:
    """id of a parameter -> (the module's dict that holds it, its name there); several entries if it is shared.

    A recurrent layer also holds its parameters in a list, which its kernels read.
    """
    uses: Uses = {}
    for module in modules:
        held: list[tuple[Any, Any, Any]] = [
            (module._parameters, key, parameter) for key, parameter in module._parameters.items()
        ]
        if isinstance(module, nn.RNNBase):
            held += [(module._flat_weights, place, one) for place, one in enumerate(module._flat_weights)]
        for holder, key, parameter in held:
            if parameter is not None:
                uses.setdefault(id(parameter), []).append((holder, key))
    return uses


def replace_parameter(uses: Uses, old: nn.Parameter, new: Tensor) -> nn.Parameter:
    """Give every module that holds ``old`` one new parameter with the values of ``new``, and return it."""
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    holders = uses.pop(id(old))
    uses[id(parameter)] = holders
    for parameters, key in holders:
        parameters[key] = parameter
    return parameter


def replace_tensor(uses: Uses, module: nn.Module, key: str, new: Tensor) -> None:
    """Give ``module`` another buffer, or every module that holds this parameter of it another parameter."""
    if key in module._buffers:
        module._buffers[key] = new
    else:
        replace_parameter(uses, getattr(module, key), new)


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that several modules hold."""
    names: dict[int, list[str]] = {}
    for module_name, module in named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(joined(module_name, key))
    return [found for found in names.values() if len(found) > 1]
