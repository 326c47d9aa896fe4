"""One error for failures of other code that obc calls: the model, Torch-Pruning, another library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.arguments import listed


class PruningError(ValueError):
    """Other code failed on this model.

    The message names the model, the operation, the layer if it is known, and the remedy; ``error.__cause__`` is the
    original error.
    """


@contextlib.contextmanager
def explained(model: nn.Module, doing: str, remedy: str) -> Iterator[None]:
    """Turn every error of other code inside the block into a :class:`PruningError`; obc's own errors pass.

    Args:
        model: the model to name; its layers are searched for in the traceback.
        doing: what the block does, such as "running it on the example inputs".
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


@contextlib.contextmanager
def on_batch(model: nn.Module, batch: Any, index: int | None = None, called: str = "loss_fn") -> Iterator[None]:
    """Add a note on the batch and the layer to errors of the caller's function inside the block. Their type stays."""
    try:
        yield
    except Exception as error:
        layer = layer_in(error, model)
        place = "" if layer is None else f" in layer {layer!r}"
        number = "" if index is None else f" on batch {index}"
        add_note(error, f"{called}(model, batch) failed{number}{place}; this batch is {described(batch)}")
        raise


def described(value: Any) -> str:
    """What a batch is: its type, and the dtype, shape and device of its tensors."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    if isinstance(value, Mapping):
        return f"a mapping of {listed([f'{key!r}: {described(inner)}' for key, inner in value.items()], 4)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {listed([described(inner) for inner in value], 4)}"
    return type(value).__name__


def add_note(error: BaseException, note: str) -> None:
    """``error.add_note(note)``, which Python 3.10 lacks."""
    vars(error).setdefault("__notes__", []).append(note)


def layer_in(error: BaseException, model: nn.Module) -> str | None:
    """The innermost layer of ``model`` that was active when ``error`` was raised.

    Found if a method of the layer was running, or if a local variable of Torch-Pruning held it or a node that follows
    it. Local variables of other functions don't count: a loop over all layers leaves the last in one.
    """
    names = {module: name for name, module in model.named_modules() if name}
    found, traceback = None, error.__traceback__
    while traceback is not None:
        inside = traceback.tb_frame.f_globals.get("__name__", "").startswith("torch_pruning.")
        for key, value in traceback.tb_frame.f_locals.items():
            if key == "self" or (inside and (key in ("module", "layer") or key.endswith("node"))):
                found = _named(value, names) or found
        traceback = traceback.tb_next
    return found


def _named(value: Any, names: Mapping[nn.Module, str]) -> str | None:
    """The name of a layer, or of the nearest layer before a node of Torch-Pruning's graph."""
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
