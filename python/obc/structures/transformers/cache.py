"""The key/value cache of a transformers model, read from a cache that it filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.autocast import callers_autocast
from obc.model.errors import PruningError, explained
from obc.model.evaluation import device_of, evaluating
from obc.model.names import named_modules
from obc.structures.memory import MemoryUse
from obc.structures.transformers.block import Block


@dataclass(frozen=True)
class CachedLayer:
    """The contents of one layer of the cache.

    Attributes:
        module: the attention or mixer that fills it.
        group: group of the key/value heads; None if they can't be removed.
        per_unit: entries per token of one unit of the group, keys and values together; without a group, of all heads.
        most: the most tokens that are kept; None: all.
        itemsize: bytes of an entry, the mean of keys and values.
        fixed: bytes per sequence that do not grow with its length.
    """

    module: str
    group: str | None
    per_unit: float
    most: int | None
    itemsize: float
    fixed: float = 0.0

    def bytes_of_unit(self, use: MemoryUse) -> float:
        """Bytes of one unit of the group; without a group, of the layer."""
        tokens = use.length if self.most is None else min(use.length, self.most)
        itemsize = self.itemsize if use.dtype is None else float(use.dtype.itemsize)
        return float(self.per_unit * tokens * use.batch * itemsize)


def cached_layers(model: Any, blocks: Sequence[Block]) -> list[CachedLayer]:
    """The layers of the cache after one token.

    Args:
        model: a model with ``past_key_values`` among its outputs.
        blocks: blocks of the present model.

    Raises:
        PruningError: the model does not run on one token, or returns no cache of this kind.
    """
    remedy = "pass MemoryUse(length=0), which counts weights alone"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PruningError(
            f"{type(model).__name__} also caches its encoder's outputs, whose length a MemoryUse does not give; "
            f"{remedy}"
        )
    token = torch.zeros(1, 1, dtype=torch.int64, device=device_of(model))
    filling = explained(model, "filling its cache with one token", remedy)
    with filling, evaluating(model), torch.no_grad(), callers_autocast():
        outputs = model(input_ids=token, use_cache=True)
    cache = getattr(outputs, "cache", None)  # its name since transformers 5
    layers = getattr(getattr(outputs, "past_key_values", None) if cache is None else cache, "layers", None)
    if layers is None:
        raise PruningError(f"{type(model).__name__} returns no cache of keys and values; {remedy}")
    return [_layer(model, blocks, place, layer) for place, layer in enumerate(layers)]


def _layer(model: nn.Module, blocks: Sequence[Block], place: int, layer: Any) -> CachedLayer:
    filling = [name for name, module in named_modules(model) if vars(module).get("layer_idx") == place]
    tensors = {key: value for key, value in vars(layer).items() if isinstance(value, Tensor) and value.dim() > 1}
    keys, values = tensors.pop("keys", None), tensors.pop("values", None)
    fixed = float(sum(tensor.nbytes for tensor in tensors.values()))
    module = filling[-1] if filling else ""
    if keys is None or values is None or not keys.numel():
        return CachedLayer(module, None, 0.0, None, 1, fixed)
    heads, entries = keys.shape[1], (keys.numel() + values.numel()) / keys.shape[-2]
    itemsize = (keys.nbytes + values.nbytes) / (keys.numel() + values.numel())  # under autocast they may differ
    window = getattr(layer, "sliding_window", None)
    most = window - 1 if isinstance(window, int) else None
    for block in blocks:
        inside = any(block.group.slices[0].module.startswith(f"{name}.") for name in filling)
        if block.group.kind == "heads" and inside and heads % block.group.size == 0:
            unit = entries / block.group.size
            return CachedLayer(module, block.group.name, unit, most, itemsize, fixed)
    return CachedLayer(module, None, entries, most, itemsize, fixed)
