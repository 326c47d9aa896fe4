"""Runs that reach layers which the example inputs do not: in train mode, or on other batches.

An auxiliary head runs in train mode alone, and a branch on some data alone. Tracing one call does not see what such
layers read, so pruning would leave them too wide for it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from obc.model.layouts import layout_of
from obc.model.names import named_modules
from obc.model.shared_copy import shared_copy
from obc.structures.comparison import observe
from obc.structures.measure import Usage

Run = Callable[[nn.Module], Any]

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


def runs_reaching(model: nn.Module, run: Run, usage: Usage, others: Iterable[Run] = ()) -> list[Run]:
    """Those of ``run`` in train mode and ``others`` that call layers which ``usage``, measured on ``run``, lacks.

    ``others`` is read only as long as such layers are left. A run that fails, or whose outputs are not finite, is
    skipped.
    """
    missing = {name for name, module in named_modules(model) if layout_of(module) is not None} - set(usage.positions)
    found: list[Run] = []
    candidates = itertools.chain([in_train_mode(run)], others)
    while missing:
        candidate = next(candidates, None)
        if candidate is None:
            break
        try:
            seen = observe(shared_copy(model), candidate)
        except Exception:  # the model's own code: it may not run like this, for example without targets
            continue
        if missing & seen.called and seen.finite():
            found.append(candidate)
            missing -= seen.called
    return found


def in_train_mode(run: Run) -> Run:
    """``run`` with the model's own modules in train mode, and torch's layers in eval mode without dropout.

    So the train mode decides which layers run, and outputs still depend on each channel alone.
    """

    def run_in_train_mode(model: nn.Module) -> Any:
        flags = {module: module.training for module in model.modules()}
        try:
            for module in flags:
                module.training = not type(module).__module__.startswith("torch.nn.")
            with _WithoutDropout():
                return run(model)
        finally:
            for module, flag in flags.items():
                module.training = flag

    return run_in_train_mode


class _WithoutDropout(TorchFunctionMode):
    """Dropout returns its input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what runs in train mode write into the model's buffers, and the random numbers that they draw."""
    before = [(module, key, buffer) for module in model.modules() for key, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.clone() for _, _, buffer in before]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for (module, key, buffer), value in zip(before, values, strict=True):
                module._buffers[key] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)
