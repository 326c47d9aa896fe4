"""A Python entry point ``module:function`` that returns what to prune."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from obc.commands.common import UsageError
from obc.model.batches import inputs_of

DESCRIPTION = """\
module:function is called without arguments, with the current folder on the import path, and returns

  (model, batches, loss_fn)                   loss_fn(model, batch) -> scalar loss
  (model, batches, loss_fn, example_inputs)   what the model is called with: a tensor, a tuple or list of arguments,
                                              or a dict of keywords

or a dict with these names, which may also hold further arguments of obc.prune: ignored_layers, num_heads, forward_fn.
Without example_inputs they are the first sample of the first batch: the batch itself if it is a tensor, its first entry
if it is a tuple or list."""

_REQUIRED = ("model", "batches", "loss_fn")
_ORDER = (*_REQUIRED, "example_inputs")
_FURTHER = ("ignored_layers", "num_heads", "forward_fn")


@dataclass(frozen=True)
class PruneCall:
    """The result of the entry point: the arguments of ``obc.prune``, and further keyword arguments."""

    model: nn.Module
    batches: list[Any]
    loss_fn: Callable[..., Any]
    example_inputs: Any
    further: Mapping[str, Any]


def load(name: str) -> PruneCall:
    """Import ``module:function``, call it, and check what it returned. Exceptions in its own code propagate."""
    function = _function(name)
    with contextlib.suppress(ValueError):  # functions in C may have no signature
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise UsageError(f"{name} is called without arguments: {error}") from error
    returned = function()
    if isinstance(returned, Mapping):
        parts = dict(returned)
    elif isinstance(returned, (tuple, list)) and len(returned) in (3, 4):
        parts = dict(zip(_ORDER, returned, strict=False))
    else:
        raise UsageError(f"{name} must return (model, batches, loss_fn), got {_kind(returned)}")
    if lacking := [part for part in _REQUIRED if part not in parts]:
        raise UsageError(f"{name} returned no {lacking[0]!r}; it must return (model, batches, loss_fn)")
    if unknown := sorted(map(str, parts.keys() - {*_ORDER, *_FURTHER})):
        raise UsageError(f"{name} returned {unknown[0]!r}; known are {', '.join((*_ORDER, *_FURTHER))}")
    model, loss_fn = parts["model"], parts["loss_fn"]
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}: the model must be a torch.nn.Module, got {_kind(model)}")
    if not callable(loss_fn):
        raise UsageError(f"{name}: loss_fn must be callable as loss_fn(model, batch), got {_kind(loss_fn)}")
    try:
        batches = list(parts["batches"])
    except TypeError as error:
        raise UsageError(f"{name}: batches must be iterable, got {_kind(parts['batches'])}") from error
    if not batches:
        raise UsageError(f"{name}: batches is empty; there is nothing to score")
    example = parts.get("example_inputs")
    example = _first_sample(name, batches[0]) if example is None else example
    return PruneCall(model, batches, loss_fn, example, {part: parts[part] for part in _FURTHER if part in parts})


def _function(name: str) -> Callable[[], Any]:
    """The function ``module:function``; modules in the working directory are found."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"{name!r} is neither a directory nor module:function, such as mymodel:subject")
    if module_name.endswith(".py"):
        raise UsageError(f"{name!r} names a file; write the module's name, {Path(module_name).stem}:{function_name}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.util.find_spec(module_name)
    except (ModuleNotFoundError, ValueError) as error:
        raise UsageError(f"no module {module_name!r}: {error}; run obc from the folder that holds it") from error
    if found is None:
        raise UsageError(f"no module {module_name!r}; run obc from the folder that holds it, or install it")
    module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if function is None:
        raise UsageError(f"module {module_name!r} has no {function_name!r}")
    if not callable(function):
        raise UsageError(f"{name} is not callable: {_kind(function)}")
    return function  # type: ignore[no-any-return]


def _first_sample(name: str, batch: Any) -> Any:
    """Example inputs for tracing: the first sample of a batch, or of its first entry."""
    inputs = inputs_of(batch)
    if isinstance(inputs, Tensor) and inputs.dim() > 0:
        return inputs[:1]
    raise UsageError(f"{name}: no example_inputs can be taken from batches of {_kind(batch)}; return them as well")


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
