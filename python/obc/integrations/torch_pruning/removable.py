"""The channels that a Torch-Pruning pruner may remove, as the modules and sides that :func:`obc.score` reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from obc.model.groups import Side


def removable_sides(pruner: Any, model: nn.Module) -> dict[str, set[Side]]:
    """The sides of ``model``'s modules that have a slice in a group of ``pruner``; "in", "out" or both.

    Anything pruned as a parameter or as a whole attention is read on both sides of its module.

    Args:
        pruner: a pruner of ``model``; its ``ignored_layers`` and ``root_module_types`` are respected.

    Raises:
        ValueError: none of the pruner's groups has a module of ``model``.
    """
    names = {id(module): name for name, module in model.named_modules()}
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    sides: dict[str, set[Side]] = {}
    groups = pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types)
    for dependency in (item[0] for group in groups for item in group):
        target = dependency.target.module
        if isinstance(target, nn.Parameter):
            modules: list[nn.Module | None] = [owners.get(id(target))]
            read: set[Side] = {"out", "in"}
        elif isinstance(target, nn.MultiheadAttention):
            modules, read = [target, target.out_proj], {"out", "in"}
        else:
            out = dependency.handler == dependency.handler.__self__.prune_out_channels
            modules, read = [target], {"out" if out else "in"}
        for module in modules:
            if id(module) in names:
                sides.setdefault(names[id(module)], set()).update(read)
    if not sides:
        raise ValueError(
            f"pruner: none of its groups has a module of this {type(model).__name__}; pass the pruner of the model "
            "that is scored"
        )
    return sides
