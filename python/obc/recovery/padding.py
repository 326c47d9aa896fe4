"""The positions of a layer's input that count: those that a batch's attention mask keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from obc.statistics.part import Part


def valid_rows(batch: Any, x: Tensor) -> Tensor | slice:
    """Indices into the positions of ``x``, (B, T, C) or (B * T, C), that the mask of the batch keeps; else all."""
    part = Part()
    part.begin(batch)
    valid = part.valid_positions(x, -1)
    return slice(None) if valid is None else valid.flatten().nonzero()[:, 0]
