"""Moves a model's weights to a device block by block, from host memory or from safetensors files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from obc.statistics.errors import StatisticsError

_OUTSIDE = ""  # owner of what lies in no block, or in several


@dataclass(frozen=True)
class _Place:
    """The place of a parameter or buffer in a module.

    Attributes:
        name: name in ``model.state_dict()``.
        holder: the module's dictionary that contains it.
        key: key in that dictionary.
    """

    name: str
    holder: MutableMapping[str, Any]
    key: str


class WeightsOnDevice:
    """Puts the weights of one block, or those outside the blocks, on the device temporarily.

    Args:
        device: where weights are needed.
        files: a safetensors file, or a folder of them, for tensors on the meta device.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], device: torch.device, files: str | PathLike[str] | None
    ) -> None:
        self.device = device
        self._files = _index(files) if files is not None else {}
        self._places: dict[int, list[_Place]] = {}
        self._tensors: dict[int, Tensor] = {}
        for module_name, module in model.named_modules():
            prefix = f"{module_name}." if module_name else ""
            for holder in (module._parameters, module._buffers):
                for key, tensor in holder.items():
                    if tensor is not None:
                        self._tensors[id(tensor)] = tensor
                        self._places.setdefault(id(tensor), []).append(_Place(f"{prefix}{key}", holder, key))
        self._owned: dict[str, list[int]] = {_OUTSIDE: [], **{block: [] for block in blocks}}
        for identity, places in self._places.items():
            owners = {next((b for b in blocks if place.name.startswith(f"{b}.")), _OUTSIDE) for place in places}
            self._owned[owners.pop() if len(owners) == 1 else _OUTSIDE].append(identity)
        self._check()

    def bytes(self, block: str = _OUTSIDE) -> int:
        """Bytes of a block's weights, or of those outside the blocks."""
        return sum(self._tensors[identity].nbytes for identity in self._owned[block])

    @contextlib.contextmanager
    def on_device(self, block: str = _OUTSIDE) -> Iterator[None]:
        """Inside the ``with`` statement, the weights of a block, or those outside the blocks, are on the device."""
        moved = []
        try:
            for identity in self._owned[block]:
                tensor = self._tensors[identity]
                if tensor.device != self.device:
                    moved.append(identity)
                    self._put(identity, self._moved(identity))
            yield
        finally:
            for identity in moved:
                self._put(identity, self._tensors[identity])

    def _put(self, identity: int, tensor: Tensor) -> None:
        for place in self._places[identity]:
            place.holder[place.key] = tensor

    def _moved(self, identity: int) -> Tensor:
        tensor = self._tensors[identity]
        values = self._read(identity) if tensor.is_meta else tensor.detach()
        values = values.to(self.device, tensor.dtype)
        return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values

    def _read(self, identity: int) -> Tensor:
        name = self._name_in_files(identity)
        assert name is not None
        with safe_open(str(self._files[name]), framework="pt") as file:
            values: Tensor = file.get_tensor(name)
        shape = self._tensors[identity].shape
        if values.shape != shape:
            raise StatisticsError(
                f"{self._files[name]} has {name!r} of shape {tuple(values.shape)}, the model {tuple(shape)}"
            )
        return values

    def _name_in_files(self, identity: int) -> str | None:
        return next((place.name for place in self._places[identity] if place.name in self._files), None)

    def _check(self) -> None:
        """Raise before anything runs if a tensor on the meta device is not in the files."""
        for identity, tensor in self._tensors.items():
            if tensor.is_meta and self._name_in_files(identity) is None:
                name = self._places[identity][0].name
                where = "pass ByBlock(weights=...), a safetensors file or a folder of them"
                if self._files:
                    where = "the files have no tensor of that name; write buffers and fused weights to a file as well"
                raise StatisticsError(f"{name!r} is on the meta device: {where}")


def _index(files: str | PathLike[str]) -> dict[str, Path]:
    path = Path(files)
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not paths:
        raise StatisticsError(f"ByBlock(weights=...): there is no *.safetensors in {str(path)!r}")
    found: dict[str, Path] = {}
    for one in paths:
        with safe_open(str(one), framework="pt") as file:
            found |= dict.fromkeys(file.keys(), one)
    return found
