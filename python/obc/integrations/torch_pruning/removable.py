"""What the groups of a Torch-Pruning pruner remove: modules, sides and root channels."""

from __future__ import annotations

from typing import Any

from torch import nn

from obc.model.groups import Side


def removed_groups(pruner: Any) -> Any:
    """The groups of a pruner's model, but for what it ignores."""
    return pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types)


def removed_side(dependency: Any) -> Side:
    """The side that a dependency prunes. Layers with one handler for both sides, such as norms, have it named "out"."""
    return "out" if dependency.handler == dependency.handler.__self__.prune_out_channels else "in"


def roots_of(item: Any, group: Any) -> list[int] | None:
    """The root channel of each channel of a group's item; None if Torch-Pruning left it without."""
    roots = item[1] if item is group[0] else getattr(item, "root_idxs", None)
    return None if roots is None or any(root is None for root in roots) else list(roots)


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
    for dependency in (item[0] for group in removed_groups(pruner) for item in group):
        target = dependency.target.module
        if isinstance(target, nn.Parameter):
            modules: list[nn.Module | None] = [owners.get(id(target))]
            read: set[Side] = {"out", "in"}
        elif isinstance(target, nn.MultiheadAttention):
            modules, read = [target, target.out_proj], {"out", "in"}
        else:
            modules, read = [target], {removed_side(dependency)}
        for module in modules:
            if id(module) in names:
                sides.setdefault(names[id(module)], set()).update(read)
    if not sides:
        raise ValueError(
            f"pruner: none of its groups has a module of this {type(model).__name__}; pass the pruner of the model "
            "that is scored"
        )
    return sides
