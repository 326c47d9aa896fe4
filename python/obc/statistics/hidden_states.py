"""Stores the hidden states between two blocks for all batches, in host memory or in files."""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Key = tuple[int, int, int]  # position among the blocks, batch, part of the batch


class HiddenStates:
    """Stores tensors by key until the ``with`` statement ends.

    Args:
        where: "host", or a folder.

    Attributes:
        bytes: the most that was stored at once.
    """

    def __init__(self, where: str | PathLike[str]) -> None:
        self._held: dict[Key, Tensor] = {}
        self._sizes: dict[Key, int] = {}
        self._folder = None if where == "host" else tempfile.TemporaryDirectory(prefix="obc-states-", dir=where)
        self.bytes = self._now = 0

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, key: Key, states: Tensor) -> None:
        """Store ``states``; they may be changed afterwards."""
        self._now += states.nbytes - self._sizes.get(key, 0)
        self._sizes[key] = states.nbytes
        self.bytes = max(self.bytes, self._now)
        if self._folder is None:
            self._held[key] = states.detach().to("cpu", copy=True)
        else:
            save_file({"states": states.detach().cpu().contiguous()}, self._path(key))

    def get(self, key: Key, device: torch.device) -> Tensor:
        """The stored states, on the device; the caller may change them."""
        if self._folder is None:
            return self._held[key].to(device, copy=True)
        with safe_open(str(self._path(key)), framework="pt") as file:
            return file.get_tensor("states").to(device)

    def drop(self, key: Key) -> None:
        """Forget the stored states, if any."""
        self._now -= self._sizes.pop(key, 0)
        self._held.pop(key, None)
        if self._folder is not None:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{'-'.join(map(str, key))}.safetensors"
