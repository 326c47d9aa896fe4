"""A copy of a model's modules that shares the memory of its weights, for experiments."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from obc.model.names import joined, named_modules


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy all modules of ``model``; parameters share the memory of the original, buffers are copied.

    The parameters are new objects without gradients. Replacing or shortening them in the copy, or changing flags,
    leaves ``model`` as it is; writing into their values would change it.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = _alias(parameter)
        # Tensors in plain attributes may have a graph, which can't be copied.
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
    return copy.deepcopy(model, memo)


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
