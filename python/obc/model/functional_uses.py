"""Functional uses of layers: a function of torch gets a layer's weight, and the layer itself is not called.

torchvision's Swin computes ``F.linear(x, self.qkv.weight, bias)``, timm's BEiT too, and a head may be
``x @ self.proj.weight.t()``. Hooks see calls only: gates, statistics, counts of MACs and Torch-Pruning would take such
a layer for unused, or miss some of its uses. Here a functional use that computes what a call would compute becomes one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from obc.model.evaluation import Function, with_state_of
from obc.model.linear_like import acts_as_linear, is_linear
from obc.model.watched_weights import Lasting, Use, WeightWatch, computes_its_weight, follow, how_made

_CONVOLUTIONS = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
_KINDS: dict[Any, type[nn.Module]] = {F.linear: nn.Linear, F.embedding: nn.Embedding, **_CONVOLUTIONS}
_MATRIX_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


class LayerCalls(WeightWatch):
    """While it is entered, functional uses of the layers of these models call them.

    A use of a linear layer, a convolution or an embedding whose class has torch's own forward becomes a call, unless a
    call is what uses the weight; ``layer.forward(x)``, which runs no hooks, is none. A bias other than the layer's own
    is added to the call without one. A product with the transposed weight is a use of a linear layer. A weight that the
    layer computes, such as a weight norm's, is a weight like others. Other uses, such as a product with a part of a
    weight or with an embedding's, stay what they are; so do those in activation checkpoints, which autograd repeats
    outside the block. A tensor in the models that shares a weight's memory is the weight.

    Args:
        models: the models.
        lasting: of :class:`obc.model.watched_weights.WeightWatch`.

    Attributes:
        seen: whether there was a functional use.
        others: linear layer or convolution -> the function that used its weight otherwise, outside its forward.
    """

    def __init__(self, models: Iterable[nn.Module], lasting: Lasting | None = None) -> None:
        self.seen, self.others = False, dict[str, str]()
        self._models, self._noted = list(models), set[nn.Module]()
        computing: list[nn.Module] = []
        with torch._C.DisableTorchFunctionSubclass():  # another watch may see the weights
            super().__init__(self._weights(computing), computing, lasting)

    def _modules(self) -> Iterator[nn.Module]:
        left, known = list(self._models), set[nn.Module]()
        while left:
            module = left.pop()
            if module not in known and not isinstance(module, torch.jit.ScriptModule):  # whose inside torch runs
                known.add(module)
                left += [one for one in module._modules.values() if one is not None]
                yield module

    def _weights(self, computing: list[nn.Module]) -> Iterator[tuple[nn.Module, Tensor]]:
        for module in self._modules():
            weight = module._parameters.get("weight")
            if weight is not None and not is_lazy(weight) and weight.dim() >= 2:
                yield module, weight
            elif computes_its_weight(module):
                computing.append(module)

    def __enter__(self) -> LayerCalls:
        self._hooks = _saved_tensors_hooks()
        with torch._C.DisableTorchFunctionSubclass():
            self._follow_aliases()
        super().__enter__()
        return self

    def _follow_aliases(self) -> None:
        """Follow buffers and attributes that share a weight's memory."""
        held: dict[int, list[tuple[nn.Module, Tensor]]] = {}
        for module, weight in self._pairs:
            if (storage := _storage(weight)) != 0:
                held.setdefault(storage, []).append((module, weight))
        for owner in self._modules():
            for name, one in (*owner._buffers.items(), *vars(owner).items()):
                if type(one) is not Tensor or one.dim() < 2:
                    continue
                for module, weight in held.get(_storage(one), ()):
                    if _overlap(weight, one):
                        follow(one, Use(weight, [module], name, how_made(weight, one), one.grad_fn is not None))

    def called(self, func: Any, args: Any, kwargs: Mapping[str, Any], uses: Mapping[int, Use]) -> Any:
        use = self._use_of(func, args, kwargs, uses)
        if use is None or _saved_tensors_hooks() != self._hooks:
            return None
        self.seen = True
        return functools.partial(_called, *use)

    def _use_of(
        self, func: Any, args: Any, kwargs: Any, uses: Mapping[int, Use]
    ) -> tuple[nn.Module, Tensor, Tensor | None] | None:
        """(layer, its input, the bias) if the function computes what a call of the layer computes."""
        if func in _MATRIX_PRODUCTS:
            x, weight = args if len(args) == 2 else (None, None)
            bias, how, func = None, "transposed", F.linear
        elif func in _KINDS:
            names = ("input", "weight", "bias") if func is not F.embedding else ("input", "weight")
            given = dict(zip(names, args, strict=False)) | kwargs
            x, weight, bias, how = given.get("input"), given.get("weight"), given.get("bias"), "itself"
        else:
            return None
        use, kind = uses.get(id(weight)), _KINDS[func]
        if use is None or use.how != how or not isinstance(x, Tensor) or id(x) in uses:
            return None
        if torch.is_grad_enabled() and not use.gradient:  # gates would count it
            return None
        layers = [one for one in use.layers if _is_of(one, kind) and _runs_as_torch_does(one)]
        if len(layers) != 1 or (use.weight is not None and layers[0]._parameters.get("weight") is not use.weight):
            return None
        if func is F.embedding and (args[2] if len(args) > 2 else kwargs.get("padding_idx")) != layers[0].padding_idx:
            return None
        if func in _CONVOLUTIONS and _geometry(layers[0], *args[3:], **kwargs) != _geometry_of(layers[0]):
            return None
        return layers[0], x, bias

    def note(self, use: Use, product: bool, differentiable: bool) -> None:
        if not product or self._noted.issuperset(use.layers):
            return
        self._noted.update(use.layers)
        layers = [one for one in use.layers if isinstance(one, _ConvNd) or is_linear(one)]
        names = [name for model in self._models for name, module in model.named_modules() if module in layers]
        self.others |= dict.fromkeys(names, use.function)


def _runs_as_torch_does(module: nn.Module) -> bool:
    """Whether a call of the module is its function of input, weight and bias alone."""
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward and module.max_norm is None
    if isinstance(module, tuple(_CONVOLUTIONS.values())):
        own = type(module).forward in [kind.forward for kind in _CONVOLUTIONS.values()]
        return own and module.padding_mode == "zeros"
    return acts_as_linear(module) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def _storage(one: Tensor) -> int:
    """The address of the tensor's memory; 0 if it has none of its own."""
    own = one.layout is torch.strided and not is_traceable_wrapper_subclass(one)
    return one.untyped_storage().data_ptr() if own else 0


def _overlap(first: Tensor, second: Tensor) -> bool:
    ends = []
    for one in (first, second):
        last = sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))
        ends.append(one.data_ptr() + last * one.element_size())
    return first.data_ptr() <= ends[1] and second.data_ptr() <= ends[0]


def _is_of(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return is_linear(layer) if kind is nn.Linear else isinstance(layer, kind)


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
    own, computed = layer._parameters.get("bias"), vars(layer).get("weight")
    if bias is not own and own is not None:
        layer._parameters["bias"] = None
    try:
        result: Tensor = layer(x)
    finally:
        if own is not None:
            layer._parameters["bias"] = own
        if computed is not None:  # a hook has set another
            layer.weight = computed
    if bias is own or bias is None:
        return result
    shape = (-1,) if is_linear(layer) else (-1, *[1] * len(layer.kernel_size))  # type: ignore[arg-type]
    return result + bias.view(shape).to(result.dtype)  # under autocast the result has another dtype


def _saved_tensors_hooks() -> Any:
    """The hooks for what autograd saves, which activation checkpoints set."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def other_use(function: str) -> str:
    """What to say of a layer whose weight is used by a function in another way than the layer would."""
    return f"{function} also uses its weight, which is not read: call the layer instead"


def calling_layers(function: Function, first: int | None = None) -> Function:
    """``function(model, ...)`` in which functional uses of the model's layers are calls; None stays None.

    The result's attribute ``other_uses`` collects those of :class:`LayerCalls`.

    Args:
        first: if these first calls have none, later ones are left to a caller who watches the weights anyway.
    """
    if getattr(function, "calls_layers", False):
        if first is None:
            return function
        function = function.__wrapped__  # type: ignore[union-attr]
    if function is None:
        return function

    lasting: Lasting = []
    calls, seen = 0, False

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls, seen
        if calls == first and not seen:
            return function(model, *args, **kwargs)
        with LayerCalls([model], lasting) as watch:
            result = function(model, *args, **kwargs)
        calls, seen = calls + 1, seen or watch.seen
        call.other_uses.update(watch.others)  # type: ignore[attr-defined]
        return result

    call.calls_layers, call.other_uses = True, dict[str, str]()  # type: ignore[attr-defined]
    return with_state_of(function, call)  # type: ignore[return-value]
