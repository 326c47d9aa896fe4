"""One error for the failures of other code that obc calls: the model's own, Torch-Pruning's, another library's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class PruningError(ValueError):
    """Something that obc uses failed on this model.

    The message names the model, what was being done, the layer where it is known, and what to do about it; the original
    error is the cause (``error.__cause__``).
    """


@contextlib.contextmanager
def explained(model: nn.Module, doing: str, remedy: str) -> Iterator[None]:
    """Turn every error of other code inside the block into a :class:`PruningError`; obc's own errors stay.

    Args:
        model: named in the message; its layers are looked for in the traceback.
        doing: what the block does: "running it on the example inputs".
        remedy: what the caller can do.
    """
    try:
        yield
    except (PruningError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        layer = layer_in(error, model)
        place = "" if layer is None else f" in {layer!r}"
        said = str(error).replace(repr(model), type(model).__name__)  # Python quotes what it can't call
        raise PruningError(
            f"{type(model).__name__}: {doing} failed{place}: {type(error).__name__}: {said}; {remedy}"
        ) from error


def layer_in(error: BaseException, model: nn.Module) -> str | None:
    """The innermost layer of ``model`` that was at work when ``error`` was raised.

    Its own method was running, or a function had it, or a node of Torch-Pruning's graph behind it, in a local variable.
    """
    names = {module: name for name, module in model.named_modules() if name}
    found, traceback = None, error.__traceback__
    while traceback is not None:
        for key, value in traceback.tb_frame.f_locals.items():
            if key in ("self", "module", "layer") or key.endswith("node"):
                found = _named(value, names) or found
        traceback = traceback.tb_next
    return found


def _named(value: Any, names: Mapping[nn.Module, str]) -> str | None:
    """The name of a layer, or of the nearest one before a node of Torch-Pruning's graph."""
    if isinstance(value, nn.Module) and value in names:
        return names[value]
    seen: set[int] = set()
    nodes = [value]
    while nodes:
        node = nodes.pop(0)
        if id(node) in seen or not isinstance(getattr(node, "inputs", None), list):
            continue
        seen.add(id(node))
        module = getattr(node, "module", None)
        if isinstance(module, nn.Module) and module in names:
            return names[module]
        nodes += node.inputs
    return None
