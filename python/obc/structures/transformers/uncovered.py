"""Names the modules of repeated blocks that no kind of group covers, so that nothing is left out silently."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from obc.model.arguments import listed
from obc.structures.transformers.block import Block
from obc.structures.transformers.family import attributes
from obc.structures.transformers.layers import Layers

_SHOWN = 6  # number of weights that a reason names


def uncovered(layers: Layers, blocks: Mapping[str, Block], left_out: Collection[str]) -> dict[str, str]:
    """Module of a repeated block with no weight in any group -> a reason that names its weights.

    A module is covered if a group has any layer or parameter inside it, or if it, or a module around or inside it, was
    left out with a reason already. So a projection that no group uses is not named if others of its module are used.
    """
    covered = _with_those_around(part.module for block in blocks.values() for part in block.group.slices)
    covered |= _with_those_around(left_out)
    weights: dict[str, list[str]] = {}
    for name, module in layers.modules.items():
        matrices = [
            key for key, parameter in module._parameters.items() if parameter is not None and parameter.dim() > 1
        ]
        if not matrices or isinstance(module, nn.Embedding):
            continue
        is_layer = matrices == ["weight"]
        holder = name.rpartition(".")[0] if is_layer else name
        repeated = any(part.isdigit() for part in holder.split("."))
        if repeated and holder not in covered and not _with_those_around([holder]) & {*left_out}:
            weights.setdefault(holder, []).extend([name.rpartition(".")[2]] if is_layer else matrices)
    parents = {name.rpartition(".")[0] for name in left_out}  # the output projection of an attention that is left out
    return {
        holder: _reason(layers.modules[holder], names)
        for holder, names in weights.items()
        if len(names) > 1 or holder.rpartition(".")[0] not in parents
    }


def _with_those_around(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def _reason(module: nn.Module, names: list[str]) -> str:
    if any(getattr(module, key, None) == 1 for key in attributes("heads")):
        return f"{type(module).__name__} has a single head"
    return f"{type(module).__name__} has no units of a kind that is known (its weights: {listed(names, _SHOWN)})"
