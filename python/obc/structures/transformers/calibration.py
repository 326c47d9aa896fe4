"""Calibrates predicted costs by the MACs that a model executes, which show how often it applies each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from obc.model.names import common, is_within
from obc.structures.transformers.block import Block

# If all modules' MACs are the same multiple of those for one token up to this share, calibrating changes nothing.
_SAME = 0.01


@dataclass(frozen=True)
class Calibration:
    """The factors that scale predicted costs to the MACs that the unpruned model executes.

    Attributes:
        factors: module -> how often each of its weights is applied in the whole batch.
        per_unit: group -> MACs per unit that belong to no weight: products of queries, keys and values.
        constant: module -> MACs that belong to no weight and that no group changes.
    """

    factors: Mapping[str, float]
    per_unit: Mapping[str, float]
    constant: Mapping[str, float]


def calibrate(
    counted: Mapping[str, float], predicted: Mapping[str, float], blocks: Sequence[Block]
) -> Calibration | None:
    """The calibration; None if the MACs of all modules are the same multiple of those predicted for one token.

    A weight's MACs are those counted in its module. What is counted in a module without a weight, such as attention's
    products, belongs to the block around it, in equal parts per unit, or otherwise to no group.

    Args:
        counted: module -> MACs in its own forward, for the unpruned model (:func:`obc.structures.counted_macs`).
        predicted: module -> MACs of its weights for one token.
        blocks: blocks of the unpruned model.
    """
    outside = {module: macs for module, macs in counted.items() if macs and not predicted.get(module)}
    if _agrees(counted, predicted, sum(outside.values())):
        return None
    factors = {module: counted.get(module, 0.0) / macs for module, macs in predicted.items() if macs}
    per_unit: dict[str, float] = {}
    constant: dict[str, float] = {}
    for module, macs in outside.items():
        owners = _owners(module, predicted, blocks)
        size = sum(block.group.size for block in owners)
        if not size:
            constant[module] = macs
        for block in owners:
            per_unit[block.group.name] = per_unit.get(block.group.name, 0.0) + macs / size
    return Calibration(factors, per_unit, constant)


def _owners(module: str, predicted: Mapping[str, float], blocks: Sequence[Block]) -> list[Block]:
    """The blocks whose units share the work of ``module`` that uses no weight of its own.

    Attention's products belong to the heads around them. Other work of a module belongs to a block if all weights
    inside the module are the block's, as in a Mamba mixer.
    """
    attending = [block for block in blocks if block.attended and _lies_in(module, _place(block))]
    if attending:
        nearest = max(len(_place(block)) for block in attending)
        return [block for block in attending if len(_place(block)) == nearest]
    weights = {name for name in predicted if _lies_in(name, module)}
    own = [block for block in blocks if weights and weights <= {part.module for part in block.group.slices}]
    return own[:1]


def _agrees(counted: Mapping[str, float], predicted: Mapping[str, float], outside: float) -> bool:
    total, per_token = sum(counted.values()), sum(predicted.values())
    if not total or not per_token:
        return True
    if outside > _SAME * total:
        return False
    expected = {module: macs * total / per_token for module, macs in predicted.items()}
    return all(abs(counted.get(module, 0.0) - macs) <= _SAME * macs for module, macs in expected.items())


def _place(block: Block) -> str:
    """The innermost module that contains all of a block's slices."""
    names = [part.module for part in block.group.slices]
    whole = common(names)
    # The slices of a single layer lie in that layer; the block is the module that calls it.
    return whole if any(name != whole for name in names) else whole.rpartition(".")[0]


def _lies_in(module: str, place: str) -> bool:
    return bool(place) and is_within(module, place)
