"""Runs a model whose layers return invented numbers, and tells what every module reads.

Tracing tells what operations do to shapes; running tells what they do to channels: whether they are flipped, rolled,
shuffled, flattened with the channels last, or stacked. Every layer returns invented numbers whatever it reads, so a
channel reaches what lies between its layer and the next ones, and nothing beyond. Norms over channels let their input
through. In a pass some channels get other numbers, with the opposite sign so that no ReLU hides them; whatever a layer
reads differently depends on one of them (:mod:`obc.structures.influence`). No layer multiplies by its weight.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from obc.model.evaluation import Run, first_floating, tensors_in
from obc.model.layouts import (
    has_several_weights,
    is_depthwise,
    is_in_attention,
    is_joint_attention,
    layout_of,
    loose_buffers,
)
from obc.model.names import joined, named_modules
from obc.model.recurrent import is_recurrent
from obc.model.rules import Rule, rule_for
from obc.model.shared_copy import shared_copy
from obc.structures.comparison import run_alike
from obc.structures.contractions import Contractions
from obc.structures.norm_axis import norm_axis, norm_channels
from obc.structures.reaching import unchanged_buffers
from obc.structures.weight_products import WeightProducts


def changed(before: Mapping[str, list[Tensor]], now: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Module -> which channels it read differently, in any of its calls."""
    found: dict[str, Tensor] = {}
    for name, readings in before.items():
        others = now.get(name, [])
        if len(others) != len(readings) or len({len(reading) for reading in (*readings, *others)}) != 1:
            continue
        found[name] = torch.stack([one != other for one, other in zip(readings, others, strict=True)]).any(0)
    return found


class Prober:
    """A copy of a model whose layers return invented numbers; ``other_vectors`` name modules that are no norms.

    Attributes:
        model: the copy.
        scale: size of the numbers.
        sign: their sign.
        passes: number of forward passes so far.
        returned: what the model returned in the last pass.
        products: products with weights that no layer is called for.
        contractions: where channels end in products of activations; None where they pass these.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        products: WeightProducts | None = None,
        contractions: Contractions | None = None,
        other_vectors: Collection[str] = (),
    ) -> None:
        self.model, self._run, self.products = shared_copy(model), run, products or WeightProducts()
        self.contractions = contractions
        self._outputs: dict[str, list[Tensor]] = {}  # for every call: meta tensors, which have a shape but no numbers
        self._devices: dict[str, torch.device] = {}
        self._calls: dict[str, int] = {}
        self._readings: dict[str, list[Tensor]] = {}
        self.scale, self.sign = 1.0, 1
        self._selected: Mapping[str, Tensor] = {}
        self.passes = 0
        self.returned: list[Tensor] = []
        by_name = dict(named_modules(self.model))
        modules = list(by_name.items())
        for name, module in modules:
            if name not in other_vectors:
                self._listen(name, module)
        called = dict.fromkeys(name for name, module in modules if is_depthwise(module))
        hooks = [
            module.register_forward_hook(lambda *_, name=name: called.pop(name, None))
            for name, module in modules
            if name in called
        ]
        # Depthwise convolutions don't move channels, so they run.
        layers = [(name, m) for name, m in modules if reads_channels(m)]
        handles = [layer.register_forward_hook(partial(self._remember, name)) for name, layer in layers]
        self._observe(None, ())
        for handle in hooks:
            handle.remove()
        for handle, (name, layer) in zip(handles, layers, strict=True):
            handle.remove()
            self._pretend(name, layer)
        self._holders = [
            (name, module)
            for name, module in modules
            if not has_several_weights(module)
            and (not is_depthwise(module) or name in called)
            and not is_in_attention(by_name, name)
        ]

    def read(self, selected: Mapping[str, Tensor], changed: Iterable[str] = ()) -> dict[str, list[Tensor]]:
        """The inputs of all modules and products when these channels of layers (name -> (C,) bool) are changed.

        Args:
            changed: the dimensions along which the copy's parameters have other channels now.
        """
        self._selected, parameters = selected, frozenset(changed)
        with contextlib.ExitStack() as stack:
            if self.contractions is not None:
                everything = parameters.union(selected) or None
                self.contractions.begin(everything, self._note)
                stack.enter_context(self.contractions)
            self._observe(parameters if selected or parameters else None, self._holders)
        return self._readings

    def meeting(self, key: str) -> set[str]:
        """The products and reductions where a source is read, so that no other may change in the same passes."""
        return self.products.meeting(key) | (set() if self.contractions is None else self.contractions.meeting(key))

    @property
    def calls(self) -> int:
        """The number of calls of layers so far in this pass."""
        return sum(self._calls.values())

    def _observe(self, changed: frozenset[str] | None, holders: Sequence[tuple[str, nn.Module]]) -> None:
        self.passes += 1
        self._calls, self._readings = {}, {}
        products = self.products.learning or bool(self.products.found)
        ending = self.products if products else contextlib.nullcontext()
        with ending, unchanged_buffers(self.model):  # else a pass would read what the pass before wrote
            tensors = [
                (joined(name, key), one, key in module._buffers)
                for name, module in (holders if products else ())
                for key, one in (*module.named_parameters(recurse=False), *loose_buffers(module))
            ]
            self.products.begin(tensors, changed, self.scale * self.sign, lambda: self.calls, self._note)
            self.returned = run_alike(self.model, self._run)

    def _note(self, name: str, tensor: Tensor, dim: int) -> None:
        self._readings.setdefault(name, []).append(sums(tensor.detach(), dim))

    # --- inputs ------------------------------------------------------------------------------------------------

    def _listen(self, name: str, module: nn.Module) -> None:
        found = _channels_read(module)
        if found is None:
            return
        dim, size = found
        forward = module.forward

        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_joint_attention(module):
                for one in tensors_in(split_arguments(module, args, kwargs)[0]):
                    self._note(name, one, dim)
                return
            x = first_floating(unpacked(args), kwargs)
            if x is not None:
                axis = dim if size is None else norm_axis(forward, unpacked(args), kwargs, size, dim)
                self._note(name, x, 1 if axis is None else axis)

        module.register_forward_pre_hook(listen, with_kwargs=True)
        multiplies = layout_of(module) is not None or has_several_weights(module)
        if not multiplies and not isinstance(module, (_NormBase, nn.PReLU)):
            module.forward = _let_through

    def _remember(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._outputs.setdefault(name, []).append(each_tensor(output, lambda tensor: tensor.to("meta")))
        self._devices[name] = tensors_in(output)[0].device

    # --- outputs ----------------------------------------------------------------------------------------------

    def _pretend(self, name: str, module: nn.Module) -> None:
        layout = layout_of(module)
        dim = -1 if layout is None or layout.out_dim is None else layout.out_dim

        def pretend(*args: Any, **kwargs: Any) -> Any:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            selected, whole = self._selected.get(name), self._outputs[name][call]
            if is_joint_attention(module):  # its weights, of every pair of positions, have no channels
                output, weights = whole
                return self._numbers(name, output, dim, call, selected), each_tensor(
                    weights, lambda like: self._numbers(name, like, dim, call, None)
                )
            return each_tensor(whole, lambda like: self._numbers(name, like, dim, call, selected))

        module.forward = pretend

    def _numbers(self, name: str, like: Tensor, dim: int, call: int, selected: Tensor | None) -> Tensor:
        dim %= like.dim()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {call}".encode()))
        usual, other = (_factors(like.shape, generator) for _ in range(2))
        if selected is None:
            selected = torch.zeros(like.shape[dim], dtype=torch.bool, device="cpu")
        selected = selected.repeat(like.shape[dim] // len(selected))  # a hidden unit in each direction
        size = self.scale * self.sign
        usual[dim], other[dim] = usual[dim] * size, (other[dim] * size * -1.5)[selected]
        numbers = _product(usual)
        if bool(selected.any()):
            numbers.index_copy_(dim, selected.nonzero()[:, 0], _product(other))
        return numbers.to(self._devices[name], like.dtype)


def pattern(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Positive numbers that differ along every dimension: a product of one random vector per dimension."""
    return _product(_factors(shape, generator))


def _factors(shape: torch.Size, generator: torch.Generator) -> list[Tensor]:
    return [torch.rand(size, generator=generator, device="cpu") + 0.5 for size in shape]


def _product(factors: Sequence[Tensor]) -> Tensor:
    """The outer product of vectors, one per dimension."""
    numbers = torch.ones((), device="cpu")
    for axis, vector in enumerate(factors):
        numbers = numbers * vector.view([-1 if axis == other else 1 for other in range(len(factors))])
    return numbers


def reads_channels(module: nn.Module) -> bool:
    """Whether a module's inputs are channels that it reads, and not those that it returns."""
    if is_recurrent(module) or is_joint_attention(module):
        return True
    return layout_of(module) is not None and not is_depthwise(module)


def split_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The arguments that a recurrent layer or an attention reads channel by channel, and all others."""
    names: tuple[str, ...] = ()
    if is_recurrent(module):
        names = ("input",)
    elif is_joint_attention(module):
        names = ("query", "key", "value")
    read = [*args[: len(names)], *(one for key, one in kwargs.items() if key in names)]
    return read, [*args[len(names) :], *(one for key, one in kwargs.items() if key not in names)]


def unpacked(args: Sequence[Any]) -> list[Any]:
    """The arguments, a packed sequence as its data."""
    return [arg.data if isinstance(arg, PackedSequence) else arg for arg in args]


def each_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a layer returns, in any nesting, with every floating tensor changed; lengths and places are kept."""
    if isinstance(output, PackedSequence):
        return output._replace(data=change(output.data))
    return pytree.tree_map(
        lambda leaf: change(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, output
    )


def _let_through(*args: Any, **kwargs: Any) -> Tensor:
    x = first_floating(args, kwargs)
    assert x is not None
    return x.clone()


def _channels_read(module: nn.Module) -> tuple[int, int | None] | None:
    """(dimension, number if known) of the channels that a module reads; None if it has none of its own."""
    rule = rule_for(module)
    if is_recurrent(module) or is_joint_attention(module):
        return -1, None
    if layout_of(module) is not None:
        assert isinstance(rule, Rule)
        assert rule.in_dim is not None
        return rule.in_dim, None
    found = norm_channels(module)
    over_several = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) > 1
    return None if found is None or over_several else (found[1], found[0])


def sums(x: Tensor, dim: int) -> Tensor:
    """(C,) random sums over all positions, in float64; different numbers give different sums."""
    dim %= x.dim()
    before, size, after = (math.prod(part) for part in (x.shape[:dim], x.shape[dim : dim + 1], x.shape[dim + 1 :]))
    with torch._C.DisableTorchFunction():  # these are no products of the model
        weights, numbers = _weights(before * after).to(x.device), x.double()
        if after == 1:
            return (weights @ numbers.reshape(before, size)).cpu()
        return (numbers.reshape(before, size, after) @ weights.view(before, after, 1)).sum((0, 2)).cpu()


@lru_cache(maxsize=16)
def _weights(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
