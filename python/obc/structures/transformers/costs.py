"""What a transformers model costs per token, as a polynomial in its groups' widths, from the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from obc.model.costs import Costs
from obc.model.groups import Slice
from obc.model.layouts import layout_of
from obc.model.names import named_modules
from obc.structures.transformers.axes import Axis
from obc.structures.transformers.blocks import Block
from obc.structures.transformers.calibration import Calibration

# (fixed size, size per unit of every group)
_Size = tuple[float, Tensor]


def transformer_costs(
    model: nn.Module,
    blocks: Sequence[Block],
    axes: Mapping[tuple[str, int], Sequence[tuple[int, Slice]]],
    unit: Literal["macs", "parameters"],
    sequence_length: int = 0,
    calibration: Calibration | None = None,
) -> Costs:
    """Parameters, or multiply-accumulates for one token, exact in the widths of the blocks' groups.

    A weight of shape (d_1, d_2, ...) has the product of its sizes in parameters, and takes as many MACs, once for every
    token; fused experts take those of the experts that a token is routed to. Embeddings, norms, biases and the scan of
    state spaces take none. The products of queries with keys and of weights with values take 2 * ``sequence_length``
    MACs per attended channel. Tied parameters count once; their uses take MACs each.

    Args:
        model: as it is now.
        blocks: of the model as it is now.
        axes: (parameter name, dimension) -> the indices of the blocks, and their slices, that lie there.
        unit: "macs" or "parameters".
        sequence_length: positions that each token attends to.
        calibration: MACs are those of a whole batch, as they were counted on the unpruned model.

    Raises:
        ValueError: an unknown unit.
    """
    if unit not in ("macs", "parameters"):
        raise ValueError(f"unit must be 'macs' or 'parameters', got {unit!r}")
    widths = torch.tensor([float(block.group.size) for block in blocks], dtype=torch.float64)
    constant, linear = 0.0, torch.zeros_like(widths)
    quadratic = torch.zeros(len(widths), len(widths), dtype=torch.float64)
    for module, name, tensor, skipped, factor in _terms(model, unit):
        if unit == "macs" and calibration is not None:
            factor *= calibration.factors.get(module, 0.0)
        sizes = [_size(tensor, name, dim, axes, widths) for dim in range(tensor.dim()) if dim not in skipped]
        c, a, b = _product(sizes, widths)
        constant, linear, quadratic = constant + factor * c, linear + factor * a, quadratic + factor * b
    if unit == "macs" and calibration is not None:
        constant += calibration.constant
        linear = linear + torch.tensor([calibration.per_unit.get(b.group.name, 0.0) for b in blocks]).double()
    elif unit == "macs" and sequence_length:
        linear = linear + torch.tensor([2.0 * sequence_length * block.attended for block in blocks]).double()
    return Costs(
        [b.group.name for b in blocks], widths, constant=constant, linear=linear, quadratic=quadratic, unit=unit
    )


def macs_for_one_token(model: nn.Module) -> dict[str, float]:
    """Module -> MACs of its weights for one token."""
    found: dict[str, float] = {}
    for module, _, tensor, skipped, factor in _terms(model, "macs"):
        sizes = [size for dim, size in enumerate(tensor.shape) if dim not in skipped]
        found[module] = found.get(module, 0.0) + factor * math.prod(sizes)
    return found


def _terms(model: nn.Module, unit: str) -> Iterator[tuple[str, str, Tensor, tuple[int, ...], float]]:
    """(module, parameter name, parameter, dimensions that don't count, how often it counts)."""
    seen: set[int] = set()
    for module_name, module in named_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}" if module_name else key
            if unit == "parameters":
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield module_name, name, parameter, (), 1.0
            elif layout_of(module) is not None and key == "weight":
                yield module_name, name, parameter, (), 1.0
            elif parameter.dim() == 3 and key in ("gate_up_proj", "down_proj"):
                yield module_name, name, parameter, (0,), float(_routed(model, module_name))
            elif _is_router(module, key, parameter):
                yield module_name, name, parameter, (), 1.0


def _is_router(module: nn.Module, key: str, parameter: Tensor) -> bool:
    return key == "weight" and parameter.dim() == 2 and isinstance(getattr(module, "top_k", None), int)


def _routed(model: nn.Module, experts: str) -> int:
    """To how many experts each token goes."""
    parent = model.get_submodule(experts.rpartition(".")[0])
    for module in (parent, *parent.children()):
        if isinstance(top := getattr(module, "top_k", None), int):
            return top
    return int(getattr(getattr(model, "config", None), "num_experts_per_tok", 1))


def _size(
    tensor: Tensor,
    name: str,
    dim: int,
    axes: Mapping[tuple[str, int], Sequence[tuple[int, Slice]]],
    widths: Tensor,
) -> _Size:
    per_unit = torch.zeros_like(widths)
    for index, part in axes.get((name, dim), ()):
        per_unit[index] += part.channels.shape[1]
    return tensor.shape[dim] - float(per_unit @ widths), per_unit


def _product(sizes: Sequence[_Size], widths: Tensor) -> tuple[float, Tensor, Tensor]:
    """constant, linear and quadratic part of a product of sizes, of which at most two depend on the widths."""
    constant, linear = 1.0, torch.zeros_like(widths)
    quadratic = torch.zeros(len(widths), len(widths), dtype=torch.float64)
    for fixed, per_unit in sizes:
        if not bool(per_unit.any()):
            constant, linear, quadratic = constant * fixed, linear * fixed, quadratic * fixed
            continue
        assert not bool(quadratic.any()), "three widths in one tensor"
        quadratic = quadratic * fixed + torch.outer(linear, per_unit)
        linear = linear * fixed + constant * per_unit
        constant = constant * fixed
    return constant, linear, quadratic


def axis_key(axis: Axis) -> tuple[str, int]:
    """How :func:`transformer_costs` looks an axis up."""
    return f"{axis.module}.{axis.tensor}" if axis.module else axis.tensor, axis.dim
