"""What an item of a group of Torch-Pruning says: which module loses which channels, on which side, with which roots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from obc.model.groups import Side


@dataclass(frozen=True, eq=False)
class GroupItem:
    """One item of a group.

    Attributes:
        target: the module, parameter or operation that loses channels.
        handler: the function of Torch-Pruning that removes them.
        channels: the channels that it loses.
        roots: the root channel of each; None if Torch-Pruning does not say which channels go together (grouped
            queries). Those of the first item are its channels.
        dim: of a parameter the dimension of its channels.
        writes: whether they are its out channels.
        reads: whether they are its in channels. Layers with one handler for both sides, such as norms, have both.
    """

    target: Any
    handler: Callable[..., Any]
    channels: list[int]
    roots: list[int] | None
    dim: int
    writes: bool
    reads: bool

    @property
    def side(self) -> Side:
        """The side that it loses; "out" if it has both."""
        return "out" if self.writes else "in"


def items_of(group: Any) -> Iterator[GroupItem]:
    """The items of a group, the root first."""
    for place, item in enumerate(group):
        dep, channels = item[0], [int(index) for index in item[1]]
        roots: Any = getattr(item, "root_idxs", None) if place else channels
        known = roots is not None and not any(root is None for root in roots)
        target, pruner = dep.target.module, dep.handler.__self__
        yield GroupItem(
            target,
            dep.handler,
            channels,
            list(roots) if known else None,
            dep.target.pruning_dim % target.dim() if isinstance(target, nn.Parameter) else 0,
            writes=dep.handler == pruner.prune_out_channels,
            reads=dep.handler == pruner.prune_in_channels,
        )
