"""The cost of a model: how often each layer runs is measured once, and gives a polynomial in the groups' widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from obc.model.arguments import one_of
from obc.model.channel_dims import dims_of_side
from obc.model.costs import Costs
from obc.model.evaluation import evaluating, tensors_in
from obc.model.groups import ChannelGroup
from obc.model.hooks import hooked
from obc.model.layouts import is_depthwise, is_in_attention, layer_of, layout_of
from obc.model.names import distinct_tensors, joined, named_modules
from obc.structures.memory import MemoryUse
from obc.structures.polynomial import Polynomial
from obc.structures.products import Products


@dataclass
class Usage:
    """Observations of the layers in one forward pass.

    Attributes:
        positions: layer -> the number of positions at which its weight is applied: of the output; for transposed
            convolutions of the input; for linear layers tokens. A layer that is called twice counts twice.
        order: every called module, in the order of first calls.
        depthwise: convolutions with one filter per channel, which lose conv groups where others lose channels.
        returned: modules whose output the model returns unchanged.
        shapes: shapes of the tensors that the model returns.
        several: layers that return other than one floating tensor; which of them holds which channel is not known.
    """

    positions: dict[str, float] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    depthwise: frozenset[str] = frozenset()
    returned: frozenset[str] = frozenset()
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    several: set[str] = field(default_factory=set)


def measure(model: nn.Module, forward: Callable[[], Any]) -> Usage:
    """The usage of ``model`` in one call of ``forward``, in eval mode and without gradients."""
    usage = Usage()
    called: dict[str, None] = {}
    results: list[tuple[str, Tensor]] = []

    def record(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        called[name] = None
        results.extend((name, tensor) for tensor in tensors_in(output))
        floating = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        if layout_of(module) is not None and len(floating) != 1:
            usage.several.add(name)
            return
        for layer, positions in _positions(name, module, tensors_in((args, kwargs)), floating):
            usage.positions[layer] = usage.positions.get(layer, 0) + positions

    handles = [
        module.register_forward_hook(partial(record, name), with_kwargs=True)
        for name, module in named_modules(model)
        if module is not model
    ]
    with hooked(handles), evaluating(model), torch.no_grad():
        returned = tensors_in(forward())
    usage.order = list(called)
    usage.shapes = [tuple(leaf.shape) for leaf in returned]
    usage.returned = frozenset(name for name, tensor in results if any(tensor is leaf for leaf in returned))
    usage.depthwise = frozenset(name for name, module in named_modules(model) if is_depthwise(module))
    return usage


def _positions(
    name: str, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[tuple[str, float]]:
    if isinstance(module, nn.MultiheadAttention):
        # Queries, keys and values each use a third of one weight; the output projection runs inside.
        tokens = [tensor.numel() / tensor.shape[-1] for tensor in inputs[:3]]
        return [(name, sum(tokens) / 3), (joined(name, "out_proj"), tokens[0])]
    layout = layout_of(module)
    if layout is None:
        return []
    if isinstance(module, _ConvNd) and layout.transposed:
        return [(name, inputs[0].numel() / module.in_channels)]
    channels = module.out_channels if isinstance(module, _ConvNd) else outputs[0].shape[-1]
    return [(name, outputs[0].numel() / channels)]


@dataclass(frozen=True)
class TracedCosts:
    """Counts what the present model costs, as a polynomial in the widths of its groups, exact.

    Attributes:
        model: the present model.
        groups: its groups.
        usage: usage measured on the unpruned model.
        dims: for slices of parameters outside any layer, the pruned dimension.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    usage: Usage
    dims: Mapping[str, int]

    def costs(self, unit: Literal["macs", "parameters"], products: Products) -> Costs:
        """MACs or parameters.

        MACs are multiply-accumulates of convolutions and linear layers, and of ``products`` outside :func:`layers_run`
        such as those of attention, without biases, norms and activations. Tied parameters count once.

        Raises:
            ValueError: an unknown unit.
        """
        one_of("unit", unit, ("macs", "parameters"))
        if unit == "parameters":
            return self._of_tensors(unit, lambda parameter: 1.0, buffers=False)
        polynomial = self._polynomial(unit)
        for name, module in layers_run(self.model, self.usage).items():
            polynomial.add_tensor(self.usage.positions[name], joined(name, "weight"), layer_of(module)[1])
        products.add_to(polynomial, self.groups)
        return polynomial.costs()

    def memory(self, use: MemoryUse) -> Costs:
        """Bytes of the weights and buffers that the model saves.

        Raises:
            ValueError: a cache is requested, which only models of the transformers library have.
        """
        if use.length:
            raise ValueError(
                f"the cache of {use.length} tokens is known of transformers models that are pruned without "
                "example_inputs; pass MemoryUse(length=0), which counts weights alone"
            )
        return self._of_tensors("bytes", use.bytes_each, buffers=True)

    def _of_tensors(self, unit: str, factor: Callable[[Tensor], float], buffers: bool) -> Costs:
        polynomial = self._polynomial(unit)
        for name, key, tensor in distinct_tensors(self.model, buffers):
            polynomial.add_tensor(factor(tensor), joined(name, key), tensor)
        return polynomial.costs()

    def _polynomial(self, unit: str) -> Polynomial:
        polynomial = Polynomial(self.groups, unit)
        for index, part in ((index, part) for index, group in enumerate(self.groups) for part in group.slices):
            name, taken = part.module, part.channels.shape[1]
            if (outside := self.dims.get(name) if part.dim is None else part.dim) is not None:
                polynomial.place((name, outside), index, taken)
            elif part.side == "out" or name not in self.usage.depthwise:
                for key, dim, along in dims_of_side(self.model.get_submodule(name), part.side):
                    if (full := joined(name, key)) not in self.dims:
                        polynomial.place((full, dim), index, taken * along.copies / along.groups)
        return polynomial


def layers_run(model: nn.Module, usage: Usage) -> dict[str, nn.Module]:
    """The linear and convolutional layers that ran, by name; the projections of torch's attention are not layers."""
    modules = dict(named_modules(model))
    return {
        name: module
        for name, module in modules.items()
        if name in usage.positions and layout_of(module) is not None and not is_in_attention(modules, name)
    }
