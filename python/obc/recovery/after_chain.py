"""What a model does after a chain of modules (:mod:`obc.recovery.segments`), run from what the last of them returned.

Layers and norms after the chain, such as the head of a convolutional network, need no new run through the chain: its
modules all return the stored tensor at once. This is used only if on a first batch the model then returns the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.evaluation import tensors_in
from obc.model.hooks import hooked, replaced
from obc.recovery.segments import ChainBatch, close


def skipped(model: nn.Module, chain: Sequence[str], result: Tensor) -> AbstractContextManager[None]:
    """Inside the block every module of the chain returns ``result`` without running."""
    return replaced(*map(model.get_submodule, chain), forward=lambda *args, **kwargs: result)


def from_end(
    model: nn.Module, chain: Sequence[str], batches: Sequence[ChainBatch], run: Callable[[int], Any]
) -> Callable[[int], Any]:
    """``run`` of a model on a batch, given by its index, without the chain: each batch's stream is what it returned."""

    def resumed(index: int) -> Any:
        with skipped(model, chain, batches[index].on_device()):
            return run(index)

    return resumed


def called_after(model: nn.Module, chain: Sequence[str], run: Callable[[], Any]) -> set[str]:
    """The names of the modules that are called only after the chain; none if the model can't be run from its end."""
    before: set[str] = set()
    after: set[str] = set()
    ends: list[Tensor | None] = []

    def called(name: str, module: nn.Module, args: Any) -> None:
        (after if ends else before).add(name)

    def copied(output: Any) -> Tensor | None:
        return output.clone() if isinstance(output, Tensor) else None

    last = model.get_submodule(chain[-1])
    handles = [module.register_forward_pre_hook(partial(called, name)) for name, module in model.named_modules()]
    # A copy, because what follows may change it in place.
    handles.append(last.register_forward_hook(lambda module, args, output: ends.append(copied(output))))
    with torch.no_grad():
        with hooked(handles):
            wanted = tensors_in(run())
        if len(ends) != 1 or ends[0] is None:
            return set()
        try:
            with skipped(model, chain, ends[0]):
                got = tensors_in(run())
        except Exception:  # what it needs of the modules in between can't be known; all runs begin at its start then
            return set()
    same = len(got) == len(wanted) and all(a.shape == b.shape and close(a, b) for a, b in zip(got, wanted, strict=True))
    return after - before if same else set()
