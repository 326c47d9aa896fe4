"""What memory a budget counts: weights in bytes, and a cache of keys and values of a stated size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MemoryUse:
    """Memory while a model serves: its weights and buffers, and the keys and values of every sequence in flight.

    bytes = sum of numel x itemsize over the state dict's tensors, tied ones once
          + batch x sum over attentions of (tokens kept) x (channels of keys + channels of values) x itemsize

    Tokens kept are ``length``, with a sliding window of w at most w - 1, as in the cache of the transformers library.
    Heads of keys and values that go free their cache, and so do whole blocks; states of recurrent mixers count in full.
    Activations are not counted.

    Attributes:
        length: tokens of every sequence in the cache; 0: weights alone.
        batch: sequences in the cache.
        dtype: of the floating tensors of both; None: those that they have.

    Raises:
        ValueError: a length below 0, a batch below 1, or a dtype that is no floating one.
    """

    length: int = 0
    batch: int = 1
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("length", self.length, 0), ("batch", self.batch, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"the {name} of MemoryUse must be an integer of at least {least}, got {value!r}")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(f"the dtype of MemoryUse must be a floating one, as torch.bfloat16, got {self.dtype!r}")

    def bytes_each(self, tensor: Tensor) -> float:
        """Of one entry of a tensor."""
        if self.dtype is not None and tensor.is_floating_point():
            return float(self.dtype.itemsize)
        return float(tensor.element_size())

    def __str__(self) -> str:
        dtype = "" if self.dtype is None else f", {str(self.dtype).removeprefix('torch.')}"
        if self.length == 0:
            return f"weights{dtype}"
        return f"weights and a cache of {self.batch} x {self.length} tokens{dtype}"


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own buffers that lie in its state dict."""
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield key, buffer
