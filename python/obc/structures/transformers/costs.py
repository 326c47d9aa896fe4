"""The cost of a transformers model per token: a polynomial in its groups' widths, from the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from obc.model.arguments import one_of
from obc.model.costs import Costs
from obc.model.depth import Skipped
from obc.model.experts import expert_weights, fused_experts, is_parallel
from obc.model.groups import Slice
from obc.model.layouts import layout_of
from obc.model.names import joined, named_modules, saved_buffers
from obc.structures.memory import MemoryUse
from obc.structures.polynomial import Polynomial
from obc.structures.protocol import Unit
from obc.structures.transformers.block import Block
from obc.structures.transformers.cache import CachedLayer
from obc.structures.transformers.calibration import Calibration
from obc.structures.transformers.depth import DepthUnit, Holders
from obc.structures.transformers.routing import met_share, routed_experts, stacks_experts


def transformer_costs(
    model: nn.Module,
    blocks: Sequence[Block],
    axes: Mapping[tuple[str, int], Sequence[tuple[int, Slice]]],
    unit: Unit,
    sequence_length: int = 0,
    calibration: Calibration | None = None,
    depth: Sequence[DepthUnit] = (),
    names_of: Mapping[str, str] | None = None,
) -> Costs:
    """Parameters, active parameters or multiply-accumulates per token, exact in the widths of the blocks' groups.

    A weight of shape (d_1, d_2, ...) has as many parameters as the product of its sizes, and takes as many MACs, once
    per token; fused experts take those of the experts that a token is routed to. Embeddings, norms, biases and the scan
    of state spaces take none. The products of queries with keys and of weights with values take 2 * ``sequence_length``
    MACs per attended channel. Tied parameters count once, but each of their uses takes MACs.

    Args:
        model: the present model.
        blocks: blocks of the present model.
        axes: (parameter name, dimension) -> (index of a block, its slice) for everything that lies there.
        unit: "macs", "parameters" or "active_parameters".
        sequence_length: number of positions that each token attends to.
        calibration: makes MACs those of a whole batch, as counted on the unpruned model.
        depth: removable blocks and branches: groups of one unit after the others, which take the costs of everything
            inside along.
        names_of: name of a module -> its name in blocks and calibration, if that differs.

    Raises:
        ValueError: an unknown unit.
    """
    one_of("unit", unit, get_args(Unit))
    polynomial, container = _polynomial(blocks, axes, unit, depth), _around(blocks, depth)

    for own, key, tensor, skipped, factor in _terms(model, unit):
        module = (names_of or {}).get(own, own)
        name = joined(module, key)
        if unit == "macs" and calibration is not None:
            factor *= calibration.factors.get(module, 0.0)
        counted = [dim for dim in range(tensor.dim()) if dim not in skipped]
        sizes = (polynomial.size((name, dim), tensor.shape[dim]) for dim in counted)
        polynomial.add(factor, *sizes, goes_with=container(module))
    if unit == "macs" and calibration is not None:
        present = {
            (names_of or {}).get(name, name) for name, one in named_modules(model) if not isinstance(one, Skipped)
        }
        for module, macs in calibration.constant.items():
            if module in present:
                polynomial.add(macs, goes_with=container(module))
        per_unit = [calibration.per_unit.get(block.group.name, 0.0) for block in blocks]
        polynomial.add_per_unit(per_unit + [0.0] * len(depth))
    elif unit == "macs" and sequence_length:
        attended = [2.0 * sequence_length * block.attended for block in blocks]
        polynomial.add_per_unit(attended + [0.0] * len(depth))
    return polynomial.costs(_inside(blocks, depth))


def transformer_memory(
    model: nn.Module,
    blocks: Sequence[Block],
    axes: Mapping[tuple[str, int], Sequence[tuple[int, Slice]]],
    use: MemoryUse,
    cached: Sequence[CachedLayer] = (),
    depth: Sequence[DepthUnit] = (),
    names_of: Mapping[str, str] | None = None,
) -> Costs:
    """Bytes of the saved weights and buffers, tied ones once, and of the key/value cache.

    Args:
        use: what is counted.
        cached: the layers of the cache, if ``use`` counts one.
        model, blocks, axes, depth, names_of: as for :func:`transformer_costs`.
    """
    polynomial, container = _polynomial(blocks, axes, "bytes", depth), _around(blocks, depth)
    seen: set[int] = set()
    for own, module in named_modules(model):
        name = (names_of or {}).get(own, own)
        for key, tensor in (*module.named_parameters(recurse=False), *saved_buffers(module)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full = joined(name, key)
            sizes = (polynomial.size((full, dim), size) for dim, size in enumerate(tensor.shape))
            polynomial.add(use.bytes_each(tensor), *sizes, goes_with=container(name))
    per_unit = dict.fromkeys((block.group.name for block in blocks), 0.0)
    for layer in cached:
        goes_with, taken = container(layer.module), layer.bytes_of_unit(use)
        polynomial.add(layer.fixed * use.batch, goes_with=goes_with)
        if layer.group in per_unit:
            per_unit[layer.group] += taken
        elif layer.group is None:
            polynomial.add(taken, goes_with=goes_with)
    polynomial.add_per_unit([*per_unit.values(), *[0.0] * len(depth)])
    return polynomial.costs(_inside(blocks, depth))


def _polynomial(
    blocks: Sequence[Block],
    axes: Mapping[tuple[str, int], Sequence[tuple[int, Slice]]],
    unit: str,
    depth: Sequence[DepthUnit],
) -> Polynomial:
    polynomial = Polynomial([block.group for block in blocks] + [one.group for one in depth], unit)
    for axis, parts in axes.items():
        for index, part in parts:
            polynomial.place(axis, index, part)
    return polynomial


def _around(blocks: Sequence[Block], depth: Sequence[DepthUnit]) -> Callable[[str], int | None]:
    """A function that finds the innermost block or branch that contains a module, among the groups."""
    holders = Holders(depth)

    def container(module: str) -> int | None:
        inner = holders.innermost(module)
        return None if inner is None else len(blocks) + inner

    return container


def _inside(blocks: Sequence[Block], depth: Sequence[DepthUnit]) -> dict[str, list[str]]:
    holders = Holders(depth)
    found: dict[str, list[str]] = {one.group.name: [] for one in depth}
    for group in (*(block.group for block in blocks), *(one.group for one in depth)):
        container = [holders.of(part.module) for part in group.slices]
        for place in sorted(set.intersection(*container)) if container else range(len(depth)):
            if depth[place].group is not group:
                found[depth[place].group.name].append(group.name)
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
    seen: set[int] = set()
    modules = dict(named_modules(model))
    for module_name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            if unit != "macs":
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield module_name, key, parameter, *_counted(modules, module_name, parameter, unit)
            elif layout_of(module) is not None and key == "weight":
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
