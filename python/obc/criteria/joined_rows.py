"""Which rows of several layers, and of the parts of a batch, belong together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from obc.criteria.protocol import CriterionError
from obc.criteria.residuals import Residuals
from obc.model.batches import samples_in


def samples_of(batch: Any, positions: int) -> int:
    """The number of samples in a batch, for a layer that gets all positions in one dimension, sample after sample."""
    samples = samples_in(batch)
    if samples == 0 or positions % samples:
        raise CriterionError(
            f"a layer got {positions} positions of a batch of {samples} samples, so which one is whose is not known; "
            "pass batches whose first tensor has a row for each sample, or rows='batch'"
        )
    return samples


def refuse_unlike(rows: dict[Residuals, Tensor]) -> None:
    """Refuse rows of tokens if layers saw different numbers of positions."""
    counts: dict[int, str] = {}
    for tap, values in rows.items():
        counts.setdefault(len(values), tap.consumer.name)
    if len(counts) > 1:
        said = " and ".join(f"{name} has {count}" for count, name in counts.items())
        raise CriterionError(
            f"rows of tokens need layers that see the same positions, but for one batch {said} rows; leave layers out "
            "with ignored_layers=, or score samples instead of tokens: rows='sample', criterion='jacobian'"
        )


def by_group(taps: list[Residuals], several: bool) -> dict[str, Tensor]:
    """The rows of all batches, added over a group's consumers."""
    found: dict[str, Tensor] = {}
    for tap in taps:
        if tap.rows:
            rows = torch.cat(tap.rows) if several else torch.stack(tap.rows)
            found[tap.group] = found[tap.group] + rows if tap.group in found else rows
    return found
