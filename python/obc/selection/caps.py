"""Limits on how much one group may lose; names of groups and of the blocks that contain them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from obc.model.arguments import listed, number
from obc.model.names import outwards


@dataclass(frozen=True)
class Caps:
    """Limits how much any one group may lose, over all steps.

    Attributes:
        ratio: the largest share of its units that a group may lose, in [0, 1]: one number, or by name of a group or
            block (a part of names that ends at a dot), 1 if not named.
        protected: the number of blocks at the start and at the end that lose nothing.
    """

    ratio: float | Mapping[str, float] = 1.0
    protected: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, ratio: float | Mapping[str, float], protected: int | tuple[int, int]) -> Caps:
        """Check and convert the arguments of ``obc.prune`` or ``obc.select``.

        Raises:
            ValueError: a ratio is outside [0, 1], or a number of blocks is not an integer of at least 0.
        """
        named = ratio.items() if isinstance(ratio, Mapping) else [("", ratio)]
        for name, value in named:
            number("max_pruning_ratio", value)
            if not 0 <= value <= 1:
                raise ValueError(f"max_pruning_ratio must be in [0, 1], got {value}{f' for {name!r}' if name else ''}")
        ends = tuple(protected) if isinstance(protected, Sequence) else (protected, protected)
        if len(ends) != 2 or not all(isinstance(count, int) and count >= 0 for count in ends):
            raise ValueError(f"protected_blocks is a number of blocks, or (first, last), got {protected!r}")
        return cls(ratio, (ends[0], ends[1]))

    def least(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Group -> the number of units that must stay, from unpruned widths in the order of execution.

        Raises:
            ValueError: no group has one of the names.
        """
        ratios = self.ratio if isinstance(self.ratio, Mapping) else {}
        refuse_unknown("max_pruning_ratio", ratios, widths)
        every = 1.0 if isinstance(self.ratio, Mapping) else self.ratio
        blocks = list(dict.fromkeys(block_of(name) for name in widths))
        spared = {*blocks[: self.protected[0]], *blocks[max(0, len(blocks) - self.protected[1]) :]}
        return {
            name: width - (0 if block_of(name) in spared else math.floor(width * found_for(name, ratios, every) + 1e-9))
            for name, width in widths.items()
        }


def refuse_unknown(argument: str, names: Iterable[str], groups: Iterable[str]) -> None:
    """Raise ValueError if one of the argument's names is neither a group's nor that of a block with groups."""
    known = list(groups)
    for name in names:
        if not any(group == name or group.startswith(f"{name}.") for group in known):
            raise ValueError(f"{argument}: no group is named {name!r}; there are {listed(known)}")


def found_for(name: str, values: Mapping[str, float], default: float) -> float:
    """The value for a name, or for its longest prefix that ends before a dot."""
    return next((values[one] for one in outwards(name) if one in values), default)


def block_of(name: str) -> str:
    """A layer's name up to its first number: the block that contains it."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return name
