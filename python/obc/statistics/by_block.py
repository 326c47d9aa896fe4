"""Options of a collection block by block, for models larger than the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obc.model.arguments import several
from obc.statistics.blocks import residual_blocks
from obc.statistics.errors import StatisticsError


@dataclass(frozen=True)
class ByBlock:
    """How :func:`obc.collect` goes through a model block by block.

    One block runs on all batches before the next one does, and its weights are on the device only then; those outside
    the blocks, such as embeddings and the head, stay there. Between two blocks the hidden states of all batches are
    stored: tokens * width numbers in the model's dtype (times ``span`` for ``Blocks(span=...)``). Before that, the
    whole model runs once on the first batch, with one block's weights on the device at a time. This shows the order of
    the blocks, and what each of them returns is compared with its later result alone.

    Args:
        device: where blocks run, and where the batches must be; None: where the model's weights are (the CPU for a
            model on the meta device).
        weights: a safetensors file, or a folder of them, for parameters and buffers on the meta device. Tensors are
            named as in ``model.state_dict()``.
        states: "host" keeps hidden states in host memory; a folder keeps them in files there, which are removed at the
            end.
        blocks: names of the blocks; by default :func:`obc.statistics.residual_blocks`.
    """

    device: torch.device | str | None = None
    weights: str | PathLike[str] | None = None
    states: str | PathLike[str] = "host"
    blocks: Sequence[str] | None = None

    def names(self, model: nn.Module) -> list[str]:
        """The blocks of this model.

        Raises:
            StatisticsError: there are none, a name is unknown, or a block is inside another.
        """
        several("ByBlock(blocks=...)", self.blocks or (), StatisticsError)
        found = residual_blocks(model) if self.blocks is None else list(self.blocks)
        known = {name for name, _ in model.named_modules() if name}
        if unknown := [name for name in found if name not in known]:
            raise StatisticsError(f"ByBlock(blocks=...): the model has no module {unknown[0]!r}")
        if not found:
            raise StatisticsError(
                f"no residual blocks were found in {type(model).__name__}: name them, ByBlock(blocks=[...]), or "
                "collect without by_block"
            )
        for name in found:
            if inner := [other for other in found if other.startswith(f"{name}.")]:
                raise StatisticsError(f"ByBlock(blocks=...): {inner[0]!r} is inside {name!r}; name one of them")
        return found

    def runs_on(self, model: nn.Module) -> torch.device:
        """The device to run on: ``device``, or that of the first weights of ``model`` that are in memory."""
        if self.device is not None:
            return torch.device(self.device)
        devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
        return next(devices, torch.device("cpu"))

    def identity(self) -> dict[str, Any]:
        """The options that must match when a run resumes from a checkpoint."""
        weights = None if self.weights is None else str(self.weights)
        return {"blocks": None if self.blocks is None else list(self.blocks), "weights": weights}


def options_of(by_block: bool | ByBlock) -> ByBlock | None:
    """The options for the argument ``by_block`` of ``obc.collect``.

    Raises:
        StatisticsError: it is neither a bool nor a ByBlock, or its folder does not exist.
    """
    if isinstance(by_block, bool):
        return ByBlock() if by_block else None
    if not isinstance(by_block, ByBlock):
        raise StatisticsError(f"by_block must be a bool or obc.statistics.ByBlock(...), got {by_block!r}")
    if by_block.states != "host" and not Path(by_block.states).is_dir():
        raise StatisticsError(f"ByBlock(states=...) must be 'host' or a folder that exists, got {by_block.states!r}")
    if by_block.weights is not None and not Path(by_block.weights).exists():
        raise StatisticsError(f"ByBlock(weights=...): there is no file or folder {str(by_block.weights)!r}")
    return by_block
