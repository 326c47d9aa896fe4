"""The positions that count, of a layer's input and of what a model returns: those that the attention mask keeps."""

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


def without_padding(batch: Any, output: Tensor) -> Tensor:
    """(positions, C) of what a model returned, (B, T, C), that the mask of the batch keeps; else all of it."""
    part = Part()
    part.begin(batch)
    if part.valid is None or output.dim() != 3 or output.shape[:2] != part.valid.shape:
        return output
    return output[part.valid.to(output.device)]
