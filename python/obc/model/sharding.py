"""Whether a model lies on several processes: ``fully_shard``, DTensors, ``DistributedDataParallel``."""

from __future__ import annotations

import sys
from typing import Any

from torch import distributed as dist
from torch import nn


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a part of the model."""
    # Importing it takes half a second; a model that it was applied to has already imported it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def is_in_flat_shards(model: nn.Module) -> bool:
    """Whether a part of the model is wrapped in ``FullyShardedDataParallel``, the older way (FSDP1)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules())


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters lie on several processes."""
    return (
        is_fully_sharded(model)
        or is_in_flat_shards(model)
        or any(is_dtensor(parameter) for parameter in model.parameters())
    )


def data_parallel_modules(model: nn.Module) -> list[Any]:
    """The ``DistributedDataParallel`` wrappers in the model."""
    if not dist.is_available():
        return []
    return [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
