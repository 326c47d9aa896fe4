"""The interface between a structure and what finds further groups for it."""

from __future__ import annotations

from typing import Protocol

from obc.model.groups import ChannelGroup
from obc.structures.protocol import Provable
from obc.structures.transformers.block import Block


class Extensible(Provable, Protocol):
    """A structure that accepts further groups; some are blocks, with counts that change with their units.

    Leaving a group out takes its block away.
    """

    left_out: dict[str, str]
    blocks: dict[str, Block]

    def offer(self, group: ChannelGroup) -> None:
        """Add a group to ``groups``."""
