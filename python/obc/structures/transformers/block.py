"""A block of a transformers model: a group of coupled channels, and what else changes when units of it go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from obc.model.groups import ChannelGroup, Side
from obc.structures.transformers.axes import Axis
from obc.structures.transformers.layers import Counter


@dataclass(frozen=True)
class Kind:
    """A kind of group.

    Attributes:
        name: as callers ask for it.
        whole: its units are no single channels, so that rounding of widths spares them.
        counted: the config's count of its units may have to divide other sizes, so that every width is tried there.
        by_default: found where the caller names no kinds.
    """

    name: str
    whole: bool = False
    counted: bool = False
    by_default: bool = True


@dataclass(frozen=True, eq=False)
class Block:
    """A group, and everything besides its weights that changes when units go.

    Attributes:
        group: as the model is now.
        axes: for slices of tensors outside any ordinary layer, where they lie.
        counters: attributes of modules that count units.
        config: config key -> how much a unit counts there; a fraction where it says a multiple of another width.
        config_fixed: config key -> a value that must be written down once units are gone (it was derived before).
        config_part: dotted name of the config inside the model's that says ``config`` and ``config_fixed``; "" is the
            model's own. Models of several parts (vision and language) have one for each.
        reads_config: a module whose forward reads these counts from its config, as layers with one projection for
            queries, keys and values do.
        min_units: so many must stay for the model to run.
        attended: channels per unit in the products of queries with keys and of weights with values, the mean of both.
        warning: what the caller should know of the model once units are gone.
    """

    group: ChannelGroup
    axes: Mapping[tuple[str, Side], tuple[Axis, ...]] = field(default_factory=dict)
    counters: tuple[Counter, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    config_fixed: Mapping[str, int] = field(default_factory=dict)
    config_part: str = ""
    reads_config: str | None = None
    min_units: int = 1
    attended: float = 0.0
    warning: str = ""

    @property
    def counted_by(self) -> tuple[str, ...]:
        """What the config counts the units by: groups that it counts as one keep equal widths where it says them."""
        return (self.config_part, *(self.config or (self.group.kind,)))
