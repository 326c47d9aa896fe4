"""The layers of a model by name: their sizes, the attributes of modules and the keys of the config that count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obc.model.layouts import layout_of
from obc.model.names import named_modules


@dataclass(frozen=True)
class Counter:
    """A module's attribute that counts ``per_unit`` for every unit of a group."""

    module: str
    attribute: str
    per_unit: int


class NotPrunableError(ValueError):
    """Why a block that was found can't be pruned."""


class Layers:
    """What :class:`obc.structures.transformers.blocks.Finder` asks a model.

    Attributes:
        model: as given.
        config: its config, or None.
        modules: by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, getattr(model, "config", None)
        self.modules = dict(named_modules(model))

    def _has(self, name: str, child: str) -> bool:
        return joined(name, child) in self.modules

    def _layer(self, name: str, child: str) -> nn.Module | None:
        module = self.modules.get(joined(name, child))
        return module if module is not None and layout_of(module) is not None else None

    def _size(self, name: str, side: str) -> int:
        module = self.modules[name]
        layout, weight = layout_of(module), module.weight
        assert layout is not None
        assert isinstance(weight, Tensor)
        stored = isinstance(module, nn.Linear) and weight.shape != (module.out_features, module.in_features)
        if stored or not weight.is_floating_point():
            raise NotPrunableError(f"{name} stores its weight packed, as {tuple(weight.shape)} of {weight.dtype}")
        return layout.sizes(weight)[0 if side == "out" else 1]

    def _size_or_none(self, name: str, side: str) -> int | None:
        module = self.modules[name]
        if layout_of(module) is not None:
            return self._size(name, side)
        weight = getattr(module, "weight", None)
        if side == "out" and isinstance(weight, Tensor) and (weight.dim() == 1 or isinstance(module, nn.Embedding)):
            return int(weight.shape[-1])
        return None

    def _counters(
        self, names: Sequence[str], counted: Mapping[tuple[str, ...], tuple[int, int]]
    ) -> tuple[Counter, ...]:
        """Attributes of these modules that have the value that they would count."""
        return tuple(
            Counter(name, key, per_unit)
            for name in names
            for keys, (value, per_unit) in counted.items()
            for key in keys
            if vars(self.modules[name]).get(key) == value
        )

    def _config_key(self, keys: Sequence[str], per_unit: int) -> dict[str, int]:
        key = next((key for key in keys if hasattr(self.config, key)), None)
        return {} if key is None else {key: per_unit}


def channels(units: int, width: int, copies: int = 1) -> Tensor:
    """(units, copies * width): of ``copies`` stretches of ``units`` blocks, the u-th block of each."""
    blocks = torch.arange(copies * units * width).reshape(copies, units, width)
    return blocks.transpose(0, 1).reshape(units, copies * width)


def joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
