"""Bounds Torch-Pruning's searches, some of which never end: on some views it follows channels in a circle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# A search visits a node once for every path to it.
_MOST_CALLS = 10_000
# Between layers a tensor may have more channels than any layer: concatenated, or including positions.
_ROOM = 16


class UnboundedSearchError(RuntimeError):
    """Torch-Pruning follows more channels than there are."""


class _Mappings(list[Any]):
    """The channel mappings along one edge of the graph, which Torch-Pruning refills before every search."""

    def __init__(self, mappings: list[Any], most: int) -> None:
        self._most = most
        super().__init__(self._bounded(mapping) for mapping in mappings)

    def __setitem__(self, index: Any, mapping: Any) -> None:
        super().__setitem__(index, self._bounded(mapping))

    def _bounded(self, mapping: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        if mapping is None:
            return None
        calls = 0

        def bounded(channels: Any) -> Any:
            nonlocal calls
            calls += 1
            found = mapping(channels)
            if len(found) > self._most or calls > _MOST_CALLS:
                raise UnboundedSearchError(f"it follows {len(found)} channels in a circle; no layer has so many")
            return found

        return bounded


def bound_searches(graph: Any, model: nn.Module) -> None:
    """Make searches in a dependency graph raise :class:`UnboundedSearchError` instead of growing without end."""
    most = _ROOM * max((max(parameter.shape) for parameter in model.parameters() if parameter.dim()), default=1)
    for node in graph.module2node.values():
        for dependency in node.dependencies:
            dependency.index_mapping = _Mappings(list(dependency.index_mapping), most)
