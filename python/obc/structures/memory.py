"""The memory that a budget counts: bytes of weights, and a key/value cache of a stated size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a model that serves requests: its weights and buffers, and the cache of all sequences.

    bytes = sum of numel x itemsize over the state dict's tensors, tied ones once
          + batch x sum over attentions of (tokens kept) x (channels of keys + channels of values) x itemsize

    The tokens kept are ``length``, or with a sliding window of w at most w - 1, as in the transformers library's cache.
    Removed key/value heads and blocks free their cache; states of recurrent mixers count in full. Activations are not
    counted.

    Attributes:
        length: tokens of every sequence in the cache; 0 counts only the weights.
        batch: number of sequences in the cache.
        dtype: dtype of all floating tensors; None uses their own.

    Raises:
        ValueError: a length below 0, a batch below 1, or a dtype that is not floating-point.
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
        """Bytes of one entry of a tensor."""
        if self.dtype is not None and tensor.is_floating_point():
            return float(self.dtype.itemsize)
        return float(tensor.element_size())

    def __str__(self) -> str:
        dtype = "" if self.dtype is None else f", {str(self.dtype).removeprefix('torch.')}"
        if self.length == 0:
            return f"weights{dtype}"
        return f"weights and a cache of {self.batch} x {self.length} tokens{dtype}"
