"""Selects the positions that the attention mask keeps, in a layer's input and in a model's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from obc.recovery.stream_points import Routing
from obc.statistics.part import Part


def valid_rows(batch: Any, x: Tensor, routing: Routing | None = None) -> Tensor | slice:
    """Indices of the positions of ``x``, (B, T, C) or (B * T, C), that the batch's mask keeps; without one, all.

    With ``routing`` the positions of ``x``, (n, C), are the tokens that an expert got.
    """
    part = Part()
    part.begin(batch)
    if routing is not None:
        if part.valid is None or part.valid.numel() != routing.total:
            return slice(None)
        return part.valid.flatten().to(routing.tokens.device)[routing.tokens].nonzero()[:, 0]
    valid = part.valid_positions(x, -1)
    return slice(None) if valid is None else valid.flatten().nonzero()[:, 0]


def without_padding(batch: Any, output: Tensor) -> Tensor:
    """(positions, C) of a model's output (B, T, C) that the batch's mask keeps; without one, all of it."""
    part = Part()
    part.begin(batch)
    if part.valid is None or output.dim() != 3 or output.shape[:2] != part.valid.shape:
        return output
    return output[part.valid.to(output.device)]
