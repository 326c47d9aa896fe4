"""Groups of coupled channels, which structural pruning removes together, and their rows and scores.

A group has units, the smallest parts that can be removed from it. A unit is one channel with everything coupled to it,
a head, an expert, or one channel of every conv group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from obc.model.arguments import instance, several

Side = Literal["out", "in"]
# Kinds whose single unit is a whole residual block or branch.
DEPTH_KINDS = ("layers", "sublayers")
Slices = Literal["gate", "all"]


class Sided(Protocol):
    """Values per channel of one module: scores (C,) or rows (N, C)."""

    @property
    def out_channels(self) -> Tensor | None:
        """Values of the out channels; None if they were not read."""

    @property
    def in_channels(self) -> Tensor | None:
        """Values of the in channels; None if there are none, or they were not read."""


@dataclass(frozen=True, eq=False)
class Slice:
    """The part that one layer loses with each unit of a group.

    Attributes:
        module: the layer's name.
        side: "out": rows of its weight and entries of its bias. "in": columns.
        channels: (units, k) int64: the k channels on that side that go with each unit.
        dim: of a tensor outside layers the dimension of these channels.
    """

    module: str
    side: Side
    channels: Tensor
    dim: int | None = None


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Coupled channels of several layers.

    Attributes:
        name: name of the layer that names the group; unique among a model's groups.
        slices: everything that is removed with a unit, in the order of execution.
        kind: "channels", "heads", "experts" or another word for the units.
        multiplied: layers and parameters whose channels a product outside layers reads, those of queries with those of
            keys; without a unit it reads zeros.
        read_at: of a group whose channels products of activations read, the slices where activation times gradient
            shows all that reads them, of queries and keys those of one of both; empty if layers read all of them.
    """

    name: str
    slices: tuple[Slice, ...]
    kind: str = "channels"
    multiplied: tuple[str, ...] = ()
    read_at: tuple[Slice, ...] = ()

    @property
    def size(self) -> int:
        """The number of units."""
        return len(self.slices[0].channels)

    @property
    def is_depth(self) -> bool:
        """Whether its unit is a whole block or branch; the one slice names that module and stands for what it adds."""
        return self.kind in DEPTH_KINDS

    @property
    def consumers(self) -> tuple[Slice, ...]:
        """The slices of layers that read the group's channels.

        If there are none because the units' outputs are summed (experts), the last slice stands for them.
        """
        return tuple(part for part in self.slices if part.side == "in") or self.slices[-1:]

    @property
    def gates(self) -> tuple[Slice, ...]:
        """The slices where one gate per unit reads: its consumers, or :attr:`read_at`."""
        return self.read_at or self.consumers

    def parts(self, rows: Mapping[str, Sided]) -> dict[tuple[str, Side], Tensor]:
        """(N, units) rows of every slice that has rows: w_m . dL_n/dw_m, summed over the slice's own channels."""
        return _summed(self.slices, rows)

    def gate_rows(self, rows: Mapping[str, Sided]) -> Tensor | None:
        """(N, units) rows of one gate per unit: the sum of its consumers' rows; None if no consumer has rows.

        r_g[n] = sum over consumers of w_in . dL_n/dw_in, before squaring. It equals the sum over the producers' rows
        wherever the operations between are positively homogeneous. Of channels that products of activations read,
        those of queries with those of keys, it is y . dL_n/dy of the channels y of one of both.
        """
        parts = list(_summed(self.gates, rows).values())
        return torch.stack(parts).sum(0) if parts else None

    def scores(self, rows: Mapping[str, Sided], slices: Slices = "all") -> Tensor | None:
        """(units,) S_g: sum of squared rows over all ``slices`` ("all", as in the paper) or of the gate ("gate")."""
        if slices == "gate":
            gate = self.gate_rows(rows)
            return None if gate is None else gate.square().sum(0)
        parts = [values.square().sum(0) for values in self.parts(rows).values()]
        return torch.stack(parts).sum(0) if parts else None


def _summed(slices: Sequence[Slice], rows: Mapping[str, Sided]) -> dict[tuple[str, Side], Tensor]:
    found = {}
    for part in slices:
        values = _values(rows, part)
        if values is not None:
            found[part.module, part.side] = values[..., part.channels.to(values.device)].sum(-1)
    return found


def _values(rows: Mapping[str, Any], part: Slice) -> Tensor | None:
    if part.module not in rows:
        return None
    sided = rows[part.module]
    values: Tensor | None = sided.out_channels if part.side == "out" else sided.in_channels
    return values


def producers(groups: Iterable[ChannelGroup]) -> set[str]:
    """The layers, and tensors outside layers, whose out channels are in one of the ``groups``."""
    return {part.module for group in groups for part in group.slices if part.side == "out"}


def by_name(groups: Sequence[ChannelGroup]) -> dict[str, ChannelGroup]:
    """The groups by name.

    Raises:
        ValueError: two groups have the same name, or ``groups`` is no list.
        TypeError: one of them is no group.
    """
    several("groups", groups)
    named: dict[str, ChannelGroup] = {}
    for group in groups:
        instance("each of groups", group, ChannelGroup, "a group of obc.transformer_groups(model) or structure.groups")
        if group.name in named:
            raise ValueError(f"two groups are named {group.name!r}; rename one of them")
        named[group.name] = group
    return named
