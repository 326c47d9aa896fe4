"""What the groups of a Torch-Pruning pruner remove: modules, sides and root channels."""

from __future__ import annotations

from typing import Any

from torch import nn

from obc.model.groups import Side
from obc.structures.traced_items import items_of


def removed_groups(pruner: Any) -> Any:
    """The groups of a pruner's model, but for what it ignores."""
    return pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types)


def removable_sides(pruner: Any, model: nn.Module) -> dict[str, set[Side]]:
    """The sides of ``model``'s modules that have a slice in a group of ``pruner``, for :func:`obc.score` to read.

    Anything pruned as a parameter or as a whole attention is read on both sides of its module.

    Args:
        pruner: a pruner of ``model``; its ``ignored_layers`` and ``root_module_types`` are respected.

    Raises:
        ValueError: none of the pruner's groups has a module of ``model``.
    """
    names = {id(module): name for name, module in model.named_modules()}
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    sides: dict[str, set[Side]] = {}
    for item in (item for group in removed_groups(pruner) for item in items_of(group)):
        target = item.target
        if isinstance(target, nn.Parameter):
            modules: list[nn.Module | None] = [owners.get(id(target))]
            read: set[Side] = {"out", "in"}
        elif isinstance(target, nn.MultiheadAttention):
            modules, read = [target, target.out_proj], {"out", "in"}
        else:
            modules, read = [target], {item.side}
        for module in modules:
            if id(module) in names:
                sides.setdefault(names[id(module)], set()).update(read)
    if not sides:
        raise ValueError(
            f"pruner: none of its groups has a module of this {type(model).__name__}; pass the pruner of the model "
            "that is scored"
        )
    return sides
