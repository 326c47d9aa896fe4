"""What an item of a group of Torch-Pruning says: which module loses which channels, on which side, with which roots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from obc.model.groups import Side


@dataclass(frozen=True, eq=False)
class GroupItem:
    """One item of a group; its channels are listed only where they are asked for.

    Attributes:
        dependency: what Torch-Pruning follows to get there.
        pruned: Torch-Pruning's indices of the channels that it loses.
        root_indices: its indices of their root channels, if it says them.
    """

    dependency: Any
    pruned: Sequence[Any]
    root_indices: Sequence[Any] | None

    @property
    def target(self) -> Any:
        """The module, parameter or operation that loses channels."""
        return self.dependency.target.module

    @property
    def handler(self) -> Callable[..., Any]:
        """The function of Torch-Pruning that removes them."""
        handler: Callable[..., Any] = self.dependency.handler
        return handler

    @cached_property
    def channels(self) -> list[int]:
        """The channels that it loses."""
        return [int(index) for index in self.pruned]

    @cached_property
    def roots(self) -> list[int] | None:
        """The root channel of each; None if Torch-Pruning does not say which channels go together (grouped queries)."""
        if self.root_indices is None or any(root is None for root in self.root_indices):
            return None
        return [int(root) for root in self.root_indices]

    @property
    def dim(self) -> int:
        """Of a parameter the dimension of its channels."""
        dim: int = self.dependency.target.pruning_dim % self.target.dim()
        return dim

    @property
    def writes(self) -> bool:
        """Whether they are its out channels."""
        return bool(self.handler == self.dependency.handler.__self__.prune_out_channels)

    @property
    def reads(self) -> bool:
        """Whether they are its in channels. Layers with one handler for both sides, such as norms, have both."""
        return bool(self.handler == self.dependency.handler.__self__.prune_in_channels)

    @property
    def side(self) -> Side:
        """The side that it loses; "out" if it has both."""
        return "out" if self.writes else "in"


def items_of(group: Any) -> Iterator[GroupItem]:
    """The items of a group, the root first, whose channels are their own roots."""
    for place, item in enumerate(group):
        yield GroupItem(item[0], item[1], getattr(item, "root_idxs", None) if place else item[1])
