"""Functional uses of layers: a function of torch gets a layer's weight, and the layer itself is not called.

torchvision's Swin computes ``F.linear(x, self.qkv.weight, bias)``, timm's BEiT too, and a head may be
``x @ self.proj.weight.t()``. Hooks see calls only: gates, statistics, counts of MACs and Torch-Pruning would take such
a layer for unused, or miss some of its uses. Here a functional use that computes what a call would compute becomes one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from obc.model.linear_like import acts_as_linear, is_linear

Function = TypeVar("Function", bound=Callable[..., Any] | None)

_CONVOLUTIONS = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
_KINDS: dict[Any, type[nn.Module]] = {F.linear: nn.Linear, F.embedding: nn.Embedding, **_CONVOLUTIONS}
_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_TRANSPOSES = {
    *(torch.t, Tensor.t, torch.transpose, Tensor.transpose, torch.permute, Tensor.permute),
    *(Tensor.T.__get__, Tensor.mT.__get__),  # type: ignore[attr-defined]
}
# What else computes something that a layer of its own might: products, and weights made of weights.
_OTHERS = {
    *(torch.einsum, torch.tensordot, torch.addmm, torch.baddbmm, torch.bmm, Tensor.bmm, Tensor.__rmatmul__),
    *(torch.cat, torch.add, Tensor.add, Tensor.__add__, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__getitem__),
    *(torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.narrow, Tensor.narrow, F.conv_transpose2d),
}
_LOOKED_AT = {*_KINDS, *_PRODUCTS, *_TRANSPOSES, *_OTHERS}
# Calls of a function that are looked at before it counts as one without functional uses: the first may be of one
# sample.
_CALLS = 3

_entered: list[LayerCalls] = []


class LayerCalls(TorchFunctionMode):
    """While it is entered, functional uses of the layers of these models call them.

    A use of a linear layer, a convolution or an embedding whose class has torch's own forward becomes a call, unless a
    call is what uses the weight; ``layer.forward(x)``, which runs no hooks, is none. A bias other than the layer's own
    is added to the call without one. A product with the transposed weight is a use of a linear layer. Others, such as a
    product with a part of a weight or with an embedding's, stay what they are; so do those in activation checkpoints,
    which autograd repeats outside the block.

    Attributes:
        seen: whether there was a functional use.
        others: linear layer or convolution -> the function that used its weight otherwise, outside its forward.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.seen, self.others = False, dict[str, str]()
        self._layers: dict[int, list[nn.Module]] = {}
        self._watched: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in (pair for model in models for pair in model.named_modules()):
            weight = module._parameters.get("weight")
            if weight is None or is_lazy(weight) or weight.dim() < 2:
                continue
            if _runs_as_torch_does(module):
                self._layers.setdefault(id(weight), []).append(module)
            if isinstance(module, _ConvNd) or is_linear(module):
                self._watched.setdefault(id(weight), []).append((name, module))
        self._transposed: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def __enter__(self) -> LayerCalls:
        self._hooks = _saved_tensors_hooks()
        super().__enter__()
        _entered.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _entered.remove(self)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _LOOKED_AT or is_compiling():
            return func(*args, **kwargs)
        if func in _TRANSPOSES:
            result = func(*args, **kwargs)
            if id(args[0]) in self._layers and _is_transpose(args[0], result):
                self._transposed[id(result)] = result, args[0]
            return result
        use = self._use_of(func, args, kwargs)
        if use is None:
            self._note(func, [*args, *kwargs.values()])
        if use is None or _runs_in(use[0]) or _saved_tensors_hooks() != self._hooks:
            return func(*args, **kwargs)
        for one in _entered:  # the innermost alone makes the call
            one.seen = True
        return _called(*use)

    def _use_of(self, func: Any, args: Any, kwargs: Any) -> tuple[nn.Module, Tensor, Tensor | None] | None:
        """(layer, its input, the bias) if the function computes what a call of the layer computes."""
        if func in _OTHERS:
            return None
        if func in _PRODUCTS:
            x, other = args if len(args) == 2 else (None, None)
            if (found := self._transposed.get(id(other))) is None:
                return None
            weight, bias, func = found[1], None, F.linear
        else:
            names = ("input", "weight", "bias") if func is not F.embedding else ("input", "weight")
            given = dict(zip(names, args, strict=False)) | kwargs
            x, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
        kind = _KINDS[func]
        layers = [one for one in self._layers.get(id(weight), ()) if _is_of(one, kind)]
        if len(layers) != 1 or layers[0].weight is not weight or not isinstance(x, Tensor):
            return None
        if func is F.embedding and (args[2] if len(args) > 2 else kwargs.get("padding_idx")) != layers[0].padding_idx:
            return None
        if func in _CONVOLUTIONS and _geometry(layers[0], *args[3:], **kwargs) != _geometry_of(layers[0]):
            return None
        return layers[0], x, bias

    def _note(self, func: Any, given: list[Any]) -> None:
        """Note the layers whose weights a function gets outside of these layers' own forwards."""
        entries = (entry for one in given for entry in (one if isinstance(one, (list, tuple)) else [one]))
        for layers in [self._watched[id(entry)] for entry in entries if id(entry) in self._watched]:
            if not any(_runs_in(layer) for _, layer in layers):
                self.others |= dict.fromkeys((name for name, _ in layers), func.__name__)


def _runs_as_torch_does(module: nn.Module) -> bool:
    """Whether a call of the module is its function of input, weight and bias alone."""
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward and module.max_norm is None
    if isinstance(module, tuple(_CONVOLUTIONS.values())):
        own = type(module).forward in [kind.forward for kind in _CONVOLUTIONS.values()]
        return own and module.padding_mode == "zeros"
    return acts_as_linear(module) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def _is_of(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return is_linear(layer) if kind is nn.Linear else isinstance(layer, kind)


def _is_transpose(weight: Tensor, result: Tensor) -> bool:
    return weight.dim() == 2 and result.shape == weight.shape[::-1] and result.stride() == weight.stride()[::-1]


def _geometry_of(layer: Any) -> tuple[Any, ...]:
    return layer.stride, layer.padding, layer.dilation, layer.groups


def _geometry(
    layer: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, **others: Any
) -> tuple[Any, ...]:
    """Arguments of a convolution, as the layer holds them."""
    dims = len(layer.kernel_size)
    each = [(one,) * dims if isinstance(one, int) else one for one in (stride, padding, dilation)]
    return (*(one if isinstance(one, str) else tuple(one) for one in each), groups)


def _called(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer returns, with this bias in place of its own."""
    own = layer._parameters.get("bias")
    if bias is own:
        result: Tensor = layer(x)
        return result
    if own is not None:
        layer._parameters["bias"] = None
    try:
        result = layer(x)
    finally:
        if own is not None:
            layer._parameters["bias"] = own
    if bias is None:
        return result
    shape = (-1,) if is_linear(layer) else (-1, *[1] * len(layer.kernel_size))  # type: ignore[arg-type]
    return result + bias.view(shape).to(result.dtype)  # under autocast the result has another dtype


def _runs_in(layer: nn.Module) -> bool:
    """Whether the function runs inside a call of the layer, or straight from another of torch's own modules."""
    between = (__name__, "torch.overrides", "torch.nn.functional")
    frame, first = sys._getframe(1), True
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name not in between and (first or name == nn.Module.__module__):
            own = frame.f_locals.get("self") is layer
            if (own and name == nn.Module.__module__) or (first and not own and name.startswith("torch.nn.modules.")):
                return True
            first = False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _saved_tensors_hooks() -> Any:
    """The hooks for what autograd saves, which activation checkpoints set."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def other_use(function: str) -> str:
    """What to say of a layer whose weight is used by a function in another way than the layer would."""
    return f"{function} also uses its weight, which is not read: call the layer instead"


@contextmanager
def layers_called(models: Sequence[nn.Module], run: Callable[[], Any]) -> Iterator[Mapping[str, str]]:
    """Inside the block functional uses of the models' layers are calls, if ``run()`` shows that there are any.

    Yields:
        ``others`` of the run (:class:`LayerCalls`).
    """
    with LayerCalls(models) as mode:
        run()
    with LayerCalls(models) if mode.seen else nullcontext():
        yield mode.others


def calling_layers(function: Function) -> Function:
    """``function(model, ...)`` in which functional uses of the model's layers are calls; None stays None.

    If there are none in its first three calls, later ones are not looked at, which would take time. The result's
    attribute ``other_uses`` collects those of :class:`LayerCalls`.
    """
    if function is None or getattr(function, "calls_layers", False):
        return function
    calls, seen = 0, False

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls, seen
        if calls == _CALLS and not seen:
            return function(model, *args, **kwargs)
        with LayerCalls([model]) as mode:
            result = function(model, *args, **kwargs)
        calls, seen = min(calls + 1, _CALLS), seen or mode.seen
        call.other_uses.update(mode.others)  # type: ignore[attr-defined]
        return result

    call.calls_layers, call.other_uses = True, dict[str, str]()  # type: ignore[attr-defined]
    # Losses with a state, such as label-free ones, are told by these names which row comes, and name themselves.
    for name in ("seek", "identity"):
        if hasattr(function, name):
            setattr(call, name, getattr(function, name))
    return call  # type: ignore[return-value]
