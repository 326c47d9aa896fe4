"""Runs that reach layers which the example inputs do not: in train mode, or on other batches.

An auxiliary head runs in train mode alone, and a branch on some data alone. Tracing one call does not see what such
layers read, so pruning would leave them too wide for it. The same is true of tensors that only training reads.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from obc.model.evaluation import Run, tensors_in
from obc.model.layouts import is_expanded, layout_of
from obc.model.names import joined, named_modules
from obc.model.shared_copy import parameter_uses, shared_copy
from obc.model.usable_batches import all_finite
from obc.structures.comparison import cuda_devices, run_alike
from obc.structures.measure import Usage

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
# Functions with dropout inside -> the position of their argument ``dropout_p``.
_WITH_DROPOUT = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}


def runs_reaching(
    model: nn.Module, run: Run, usage: Usage, others: Iterable[Run] = ()
) -> tuple[list[Run], frozenset[str]]:
    """Those of ``run`` in train mode and ``others`` that use layers which ``run`` does not, and the layers still left.

    ``others`` is read only as long as such layers are left. A run that fails, or whose outputs are not finite, is
    skipped. A layer is used if it is called, or if a function of torch gets a weight that only this layer has. In train
    mode a run also counts if it reads tensors outside layers that may have channels, and ``run`` does not.
    """
    missing = {name for name, module in named_modules(model) if layout_of(module) is not None} - set(usage.positions)
    found: list[Run] = []
    tensors = _perhaps_of_channels(model, {*usage.order})
    if missing or tensors:
        used = _used(model, run, missing | tensors)
        missing, tensors = missing - used, tensors - used
    candidates = itertools.chain([in_train_mode(run)], others)
    while missing or tensors:
        candidate = next(candidates, None)
        if candidate is None:
            break
        if used := _used(model, candidate, missing | tensors):
            found.append(candidate)
            missing -= used
        tensors = set()
    return found, frozenset(missing)


def _perhaps_of_channels(model: nn.Module, called: Set[str]) -> set[str]:
    """The tensors outside layers, parameters and buffers, with a dimension as long as some layer has out channels.

    Torch's own modules, such as norms, read theirs when they are ``called``.
    """
    layers = [(layout_of(module), getattr(module, "weight", None)) for module in model.modules()]
    widths = {layout.sizes(weight)[0] for layout, weight in layers if layout and isinstance(weight, Tensor)} - {1}
    return {
        joined(name, key)
        for name, module in named_modules(model)
        if layout_of(module) is None and not (name in called and type(module).__module__.startswith("torch.nn."))
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if widths & {*tensor.shape}
    }


def _used(model: nn.Module, run: Run, names: set[str]) -> set[str]:
    """The layers and tensors of these names that a run on a copy uses; none if it fails, or its outputs are not finite.

    A tensor that several modules hold counts under one name.
    """
    copied, used = shared_copy(model), set[str]()
    layers = {name: module for name, module in named_modules(copied) if name in names}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=name: used.add(name))
    uses = parameter_uses(copied.modules())
    own = {id(layer.weight): name for name, layer in layers.items() if len(uses.get(id(layer.weight), ())) == 1}
    own |= {id(one): name for name, one in (*copied.named_parameters(), *copied.named_buffers()) if name in names}
    try:
        with _Watching(own, used):
            outputs = run_alike(copied, run)
    except Exception:  # the model's own code: it may not run like this, for example without targets
        return set()
    return used if all_finite(outputs) else set()


def in_train_mode(run: Run) -> Run:
    """``run`` with the model's own modules in train mode, and torch's layers in eval mode without dropout.

    Norms and dropout that are derived from torch's count as torch's. So the train mode decides which layers run, and
    outputs still depend on each channel alone.
    """

    def run_in_train_mode(model: nn.Module) -> Any:
        flags = {module: module.training for module in model.modules()}
        try:
            for module in flags:
                torchs_own = type(module).__module__.startswith("torch.nn.")
                module.training = not (torchs_own or isinstance(module, (_NormBase, _DropoutNd)))
            with _WithoutDropout():
                return run(model)
        finally:
            for module, flag in flags.items():
                module.training = flag

    return run_in_train_mode


class _WithoutDropout(TorchFunctionMode):
    """Dropout returns its input, and attention drops nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if (place := _WITH_DROPOUT.get(func)) is not None:
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs = kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)


class _Watching(TorchFunctionMode):
    """Adds to ``used`` the names of the weights (id -> name) that functions of torch compute something from."""

    def __init__(self, weights: Mapping[int, str], used: set[str]) -> None:
        super().__init__()
        self._weights, self._used = weights, used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if tensors_in(result):  # not a shape, a dtype or a device
            given = (self._weights.get(id(tensor)) for tensor in tensors_in((args, kwargs)))
            self._used.update(name for name in given if name is not None)
        return result


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what runs in train mode write into the model's buffers, and the random numbers that they draw."""
    before = [(module, key, buffer) for module in model.modules() for key, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.clone() for _, _, buffer in before]
    with torch.random.fork_rng(devices=cuda_devices(model)):
        try:
            yield
        finally:
            for (module, key, buffer), value in zip(before, values, strict=True):
                module._buffers[key] = buffer if buffer is None or value is None else _restored(buffer, value)


def _restored(buffer: Tensor, value: Tensor) -> Tensor:
    """The buffer with ``value`` again, and without the graph of outputs that changed it in place."""
    if buffer.grad_fn is not None:
        buffer = buffer.detach() if buffer._is_view() else buffer.detach_()
    return buffer if is_expanded(buffer) else buffer.copy_(value)
