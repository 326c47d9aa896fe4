"""The cost of a transformers model per token: a polynomial in its groups' widths, from the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from torch import Tensor, nn

from obc.model.arguments import one_of
from obc.model.costs import Costs
from obc.model.depth import Skipped
from obc.model.experts import expert_weights, fused_experts, is_parallel
from obc.model.groups import ChannelGroup, Slice
from obc.model.layouts import layout_of
from obc.model.names import distinct_tensors, joined, named_modules
from obc.structures.memory import MemoryUse
from obc.structures.polynomial import Polynomial
from obc.structures.protocol import Unit
from obc.structures.transformers.block import Block
from obc.structures.transformers.cache import CachedLayer
from obc.structures.transformers.calibration import Calibration
from obc.structures.transformers.depth import DepthUnit, Holders
from obc.structures.transformers.routing import met_share, routed_experts, stacks_experts


@dataclass(frozen=True)
class TransformerCosts:
    """Counts what the present model costs, exact in the widths of its groups: blocks first, then depth units.

    Attributes:
        model: the present model.
        blocks: its blocks.
        depth: removable blocks and branches: groups of one unit, which take the costs of everything inside along.
        axes: (parameter name, dimension) -> (index of a block, its slice) for everything that lies there.
        names: name of every module -> its name in blocks and calibration.
    """

    model: nn.Module
    blocks: Sequence[Block]
    depth: Sequence[DepthUnit]
    axes: Mapping[tuple[str, int], Sequence[tuple[int, Slice]]]
    names: Mapping[str, str]

    def costs(self, unit: Unit, sequence_length: int = 0, calibration: Calibration | None = None) -> Costs:
        """Parameters, active parameters or multiply-accumulates per token.

        A weight of shape (d_1, d_2, ...) has as many parameters as the product of its sizes, and takes as many MACs,
        once per token; fused experts take those of the experts that a token is routed to. Embeddings, norms, biases and
        the scan of state spaces take none. The products of queries with keys and of weights with values take
        2 * ``sequence_length`` MACs per attended channel. Tied parameters count once, but each of their uses takes
        MACs.

        Args:
            unit: "macs", "parameters" or "active_parameters".
            sequence_length: number of positions that each token attends to.
            calibration: makes MACs those of a whole batch, as counted on the unpruned model.

        Raises:
            ValueError: an unknown unit.
        """
        one_of("unit", unit, get_args(Unit))
        polynomial = self._polynomial(unit)
        for own, key, tensor, skipped, factor in _terms(self.model, unit):
            module = self.names[own]
            if unit == "macs" and calibration is not None:
                factor *= calibration.factors.get(module, 0.0)
            polynomial.add_tensor(factor, joined(module, key), tensor, skipped, self._container(module))
        if unit == "macs" and calibration is not None:
            present = {self.names[name] for name, one in named_modules(self.model) if not isinstance(one, Skipped)}
            for module, macs in calibration.constant.items():
                if module in present:
                    polynomial.add(macs, goes_with=self._container(module))
            self._add_per_unit(polynomial, [calibration.per_unit.get(one.group.name, 0.0) for one in self.blocks])
        elif unit == "macs" and sequence_length:
            self._add_per_unit(polynomial, [2.0 * sequence_length * block.attended for block in self.blocks])
        return polynomial.costs(self._inside())

    def memory(self, use: MemoryUse, cached: Sequence[CachedLayer] = ()) -> Costs:
        """Bytes of the saved weights and buffers, tied ones once, and of the key/value cache."""
        polynomial = self._polynomial("bytes")
        for own, key, tensor in distinct_tensors(self.model, buffers=True):
            name, goes_with = joined(self.names[own], key), self._container(self.names[own])
            polynomial.add_tensor(use.bytes_each(tensor), name, tensor, goes_with=goes_with)
        per_unit = dict.fromkeys((block.group.name for block in self.blocks), 0.0)
        for layer in cached:
            goes_with, taken = self._container(layer.module), layer.bytes_of_unit(use)
            polynomial.add(layer.fixed * use.batch, goes_with=goes_with)
            if layer.group in per_unit:
                per_unit[layer.group] += taken
            elif layer.group is None:
                polynomial.add(taken, goes_with=goes_with)
        self._add_per_unit(polynomial, list(per_unit.values()))
        return polynomial.costs(self._inside())

    @cached_property
    def _holders(self) -> Holders:
        return Holders(self.depth)

    @property
    def _groups(self) -> list[ChannelGroup]:
        return [*(block.group for block in self.blocks), *(one.group for one in self.depth)]

    def _polynomial(self, unit: str) -> Polynomial:
        polynomial = Polynomial(self._groups, unit)
        for axis, parts in self.axes.items():
            for index, part in parts:
                polynomial.place(axis, index, part.channels.shape[1])
        return polynomial

    def _add_per_unit(self, polynomial: Polynomial, per_block: list[float]) -> None:
        polynomial.add_per_unit(per_block + [0.0] * len(self.depth))

    def _container(self, module: str) -> int | None:
        """The innermost block or branch that contains a module, among the groups."""
        inner = self._holders.innermost(module)
        return None if inner is None else len(self.blocks) + inner

    def _inside(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {one.group.name: [] for one in self.depth}
        for group in self._groups:
            container = [self._holders.of(part.module) for part in group.slices]
            for place in sorted(set.intersection(*container)) if container else range(len(self.depth)):
                if self.depth[place].group is not group:
                    found[self.depth[place].group.name].append(group.name)
        return found


def macs_for_one_token(model: nn.Module) -> dict[str, float]:
    """Module -> MACs of its weights for one token."""
    found: dict[str, float] = {}
    for module, _, tensor, skipped, factor in _terms(model, "macs"):
        sizes = [size for dim, size in enumerate(tensor.shape) if dim not in skipped]
        found[module] = found.get(module, 0.0) + factor * math.prod(sizes)
    return found


def _terms(model: nn.Module, unit: str) -> Iterator[tuple[str, str, Tensor, tuple[int, ...], float]]:
    """(module, parameter's name in it, parameter, dimensions that don't count, how often it counts)."""
    modules = dict(named_modules(model))
    if unit != "macs":
        for module_name, key, parameter in distinct_tensors(model, buffers=False):
            yield module_name, key, parameter, *_counted(modules, module_name, parameter, unit)
        return
    for module_name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            if layout_of(module) is not None and key == "weight":
                yield module_name, key, parameter, (), 1.0
            elif key in expert_weights(module) or is_parallel(module):
                yield module_name, key, parameter, (0,), float(routed_experts(modules, module_name))
            elif stacks_experts(modules, module_name, parameter):
                yield module_name, key, parameter, (), met_share(modules, module_name, parameter)
            elif _is_router(module, key, parameter):
                yield module_name, key, parameter, (), 1.0


def _counted(
    modules: Mapping[str, nn.Module], module_name: str, parameter: Tensor, unit: str
) -> tuple[tuple[int, ...], float]:
    """(dimensions that don't count, how often the rest counts) for a parameter, by its name.

    In active counts, experts' parameters count as often as a token is routed to one of them.
    """
    if unit == "parameters":
        return (), 1.0
    module = modules[module_name]
    if (fused_experts(module) is not None and parameter.dim() > 1) or is_parallel(module):
        return (0,), float(routed_experts(modules, module_name))
    return (), met_share(modules, module_name, parameter)


def _is_router(module: nn.Module, key: str, parameter: Tensor) -> bool:
    return key == "weight" and parameter.dim() == 2 and isinstance(getattr(module, "top_k", None), int)
