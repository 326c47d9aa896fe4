"""How much any one group may lose; names of groups and of the blocks that they lie in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Caps:
    """How much any one group may lose, over all steps.

    Attributes:
        ratio: the largest share of its units that a group may lose, in [0, 1]: of every group, or by group's name or a
            part of names that ends at a dot (a block); 1 where not named.
        protected: so many blocks at the start and at the end lose nothing.
    """

    ratio: float | Mapping[str, float] = 1.0
    protected: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, ratio: float | Mapping[str, float], protected: int | tuple[int, int]) -> Caps:
        """What ``obc.prune`` or ``obc.select`` was given, checked.

        Raises:
            ValueError: a ratio outside [0, 1], or a number of blocks that is no integer from 0 on.
        """
        named = ratio.items() if isinstance(ratio, Mapping) else [("", ratio)]
        for name, value in named:
            if not 0 <= value <= 1:
                raise ValueError(f"max_pruning_ratio must lie in [0, 1], got {value}{f' for {name!r}' if name else ''}")
        ends = (protected, protected) if isinstance(protected, int) else tuple(protected)
        if len(ends) != 2 or not all(isinstance(count, int) and count >= 0 for count in ends):
            raise ValueError(f"protected_blocks is a number of blocks, or (first, last), got {protected!r}")
        return cls(ratio, (ends[0], ends[1]))

    def least(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Group -> how many units stay at least, of unpruned widths in the order of execution.

        Raises:
            ValueError: a name that no group has.
        """
        ratios = self.ratio if isinstance(self.ratio, Mapping) else {}
        for name in ratios:
            if not any(group == name or group.startswith(f"{name}.") for group in widths):
                raise ValueError(f"max_pruning_ratio: no group is named {name!r}; there are {', '.join(widths)}")
        every = 1.0 if isinstance(self.ratio, Mapping) else self.ratio
        blocks = list(dict.fromkeys(block_of(name) for name in widths))
        spared = {*blocks[: self.protected[0]], *blocks[max(0, len(blocks) - self.protected[1]) :]}
        return {
            name: width - (0 if block_of(name) in spared else math.floor(width * found_for(name, ratios, every) + 1e-9))
            for name, width in widths.items()
        }


def found_for(name: str, values: Mapping[str, float], default: float) -> float:
    """The value of a name, or of the longest part of it that ends before a dot."""
    while name:
        if name in values:
            return values[name]
        name = name.rpartition(".")[0]
    return default


def block_of(name: str) -> str:
    """The part of a layer's name up to its first number: the block that it lies in."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return name
