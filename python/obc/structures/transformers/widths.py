"""The equal widths that a transformers model's config can express, tried on its class before anything is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from obc.model.groups import Slice
from obc.structures.transformers.block import Axis, Block
from obc.structures.transformers.config import with_widths
from obc.structures.transformers.family import kinds


@dataclass(frozen=True)
class Expressible:
    """The widths that a config can express.

    Attributes:
        widths: group -> the widths that it may have, if not all can be expressed.
        refused: first group of a family -> why its width must stay.
        multiples: group -> a number of which its width must be a multiple.
    """

    widths: Mapping[str, Sequence[int]]
    refused: Mapping[str, str]
    multiples: Mapping[str, int]


def equal_widths(blocks: Mapping[str, Block]) -> list[list[str]]:
    """Names of the groups that keep equal widths: those that the config counts together and that are equal now."""
    families: dict[tuple[Any, ...], list[str]] = {}
    for name, block in blocks.items():
        families.setdefault((*block.counted_by, block.group.size), []).append(name)
    return list(families.values())


def expressible_widths(
    model: nn.Module,
    blocks: Mapping[str, Block],
    axes_of: Callable[[Block, Slice], Sequence[Axis]],
    multiple_of: Callable[[Block], int],
) -> Expressible:
    """The widths of every family that the config can express, whatever the widths of the other families are.

    If it can't even express the present widths, nothing is known, and nothing is ruled out.

    Args:
        blocks: blocks of the model, by group name.
        axes_of: returns where a slice of a block lies.
        multiple_of: returns the number of which a block's width must be a multiple.
    """
    nothing = Expressible({}, {}, {})
    if getattr(model, "config", None) is None or with_widths(model, list(blocks.values()))[1] is not None:
        return nothing
    trial = _Trial(model, blocks, axes_of)
    widths: dict[str, Sequence[int]] = {}
    refused: dict[str, str] = {}
    multiples: dict[str, int] = {}
    heads = {getattr(model.config, "num_attention_heads", None) or 1}
    # The residual stream comes last, when it is known what its width is divided into.
    for family in sorted(equal_widths(blocks), key=lambda names: blocks[names[0]].group.kind == "embedding"):
        block = blocks[family[0]]
        size, kind = block.group.size, kinds()[block.group.kind]
        multiple = math.lcm(*(multiple_of(blocks[name]) for name in family))
        least = max(blocks[name].min_units for name in family)
        if kind.name == "embedding":
            multiple = math.lcm(multiple, *heads)
        multiples |= dict.fromkeys(family, multiple)
        candidates = range(-(-least // multiple) * multiple, size, multiple)
        if not candidates:
            continue
        # If nothing else counts these widths, all widths between two good ones are taken to be good.
        tried = candidates if kind.counted else sorted({candidates[0], candidates[-1]})
        reasons = {width: trial.refusal(family, width) for width in tried}
        said = [width for width, reason in reasons.items() if reason is None]
        if kind.counted:
            heads |= {width * block.config.get("num_attention_heads", 1) for width in said}
        if len(said) == len(reasons):
            continue
        if not kind.counted:
            said = []
        for name in family:
            widths[name] = (*said, size)
        if not said:
            reason = next(filter(None, reasons.values()))
            refused[family[0]] = (
                f"uniform=True keeps to widths that the config can express, so all {len(family)} such groups keep "
                f"their {size} units; to prune them, use uniform=False and save_pruned ({reason})"
            )
    return Expressible(widths, refused, multiples)


class _Trial:
    """Asks the config about widths that the model does not have."""

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, Block], axes_of: Callable[[Block, Slice], Sequence[Axis]]
    ) -> None:
        self.model, self.blocks, self.axes_of = model, blocks, axes_of
        self.parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.parameters |= dict(model.named_buffers(remove_duplicate=False))  # correction biases, running statistics
        self.names: dict[int, list[str]] = {}  # several names for one tied parameter
        for name, parameter in self.parameters.items():
            self.names.setdefault(id(parameter), []).append(name)

    def refusal(self, family: Sequence[str], width: int) -> str | None:
        """Why the config can't express ``width`` units for the groups of a family; None if it can."""
        sizes = dict.fromkeys(family, width)
        return with_widths(self.model, list(self.blocks.values()), sizes, self._shapes(sizes))[1]

    def _shapes(self, sizes: Mapping[str, int]) -> dict[str, list[int]]:
        lost: dict[tuple[str, int], int] = {}
        for name, width in sizes.items():
            block = self.blocks[name]
            for part in block.group.slices:
                channels = (block.group.size - width) * part.channels.shape[1]
                for axis in self.axes_of(block, part):
                    for tensor in self.names[id(self.parameters[axis.name])]:
                        lost[tensor, axis.dim] = channels
        shapes: dict[str, list[int]] = {}
        for (tensor, dim), channels in lost.items():
            shapes.setdefault(tensor, list(self.parameters[tensor].shape))[dim] -= channels
        return shapes
