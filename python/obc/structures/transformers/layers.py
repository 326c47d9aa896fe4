"""The layers of a model by name: their sizes, the attributes of modules and the keys of the config that count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.depth import config_parts
from obc.model.layouts import layout_of
from obc.model.names import named_modules
from obc.model.quantized import is_quantised, why_not_sliced
from obc.structures.units import NotPrunableError


@dataclass(frozen=True)
class Counter:
    """A module's attribute that counts ``per_unit`` for every unit of a group."""

    module: str
    attribute: str
    per_unit: int


class Layers:
    """What is asked of a model to find its blocks.

    Attributes:
        model: as given.
        config: of the module that was entered last, or None: the model's, or one inside it.
        config_part: its dotted name inside the model's.
        modules: by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, getattr(model, "config", None)
        self.modules = dict(named_modules(model))
        self._quantised = {name for name, module in self.modules.items() if is_quantised(module)}
        self.config_part = ""
        parts = () if self.config is None else config_parts(self.config)
        self._parts = {id(part): (path, part) for path, part in parts}

    def enter(self, name: str) -> None:
        """Let :attr:`config` be that of the module ``name``: of the nearest one around it that has one."""
        if self.config is None:
            return
        while True:
            own = vars(self.modules[name]).get("config") if name in self.modules else None
            if id(own) in self._parts or not name:
                break
            name = name.rpartition(".")[0]
        self.config_part, self.config = self._parts.get(id(own), ("", self.model.config))

    def has(self, name: str, child: str) -> bool:
        """Whether the module ``name`` has a module ``child``."""
        return joined(name, child) in self.modules

    def layer(self, name: str, child: str) -> nn.Module | None:
        """The linear or convolutional layer ``child`` of the module ``name``, or None.

        Raises:
            NotPrunableError: it is a quantised one.
        """
        self.refuse_quantised(joined(name, child))
        module = self.modules.get(joined(name, child))
        return module if module is not None and layout_of(module) is not None else None

    def size(self, name: str, side: str) -> int:
        """How many channels a side of a linear or convolutional layer has.

        Raises:
            NotPrunableError: it is a quantised one.
        """
        module = self.modules[name]
        self.refuse_quantised(name)
        layout, weight = layout_of(module), module.weight
        assert layout is not None
        assert isinstance(weight, Tensor)
        return layout.sizes(weight)[0 if side == "out" else 1]

    def size_or_none(self, name: str, side: str) -> int | None:
        """The same of any module: norms and embeddings have outputs alone, and others no side at all."""
        module = self.modules[name]
        self.refuse_quantised(name)
        if layout_of(module) is not None:
            return self.size(name, side)
        weight = getattr(module, "weight", None)
        if side == "out" and isinstance(weight, Tensor) and (weight.dim() == 1 or isinstance(module, nn.Embedding)):
            return int(weight.shape[-1])
        return None

    def refuse_quantised(self, name: str) -> None:
        """Refuse a layer whose weight is stored packed.

        Raises:
            NotPrunableError: it is; says what to do.
        """
        if name in self._quantised:
            raise NotPrunableError(why_not_sliced(name, self.modules[name]))

    def counters(self, names: Sequence[str], counted: Mapping[tuple[str, ...], tuple[int, int]]) -> tuple[Counter, ...]:
        """Attributes of these modules that have the value that they would count."""
        return tuple(
            Counter(name, key, per_unit)
            for name in names
            for keys, (value, per_unit) in counted.items()
            for key in keys
            if vars(self.modules[name]).get(key) == value
        )

    def config_key(self, keys: Sequence[str], per_unit: int) -> dict[str, int]:
        """The first of these keys that the config has, with what a unit counts there."""
        key = next((key for key in keys if says(self.config, key)), None)
        return {} if key is None else {key: per_unit}


def channels(units: int, width: int, copies: int = 1) -> Tensor:
    """(units, copies * width): of ``copies`` stretches of ``units`` blocks, the u-th block of each."""
    blocks = torch.arange(copies * units * width).reshape(copies, units, width)
    return blocks.transpose(0, 1).reshape(units, copies * width)


def joined(name: str, child: str) -> str:
    """The full name of a child; of the model itself, whose name is empty, the child's own."""
    return f"{name}.{child}" if name else child


def value_of(config: Any, key: str, default: Any = None) -> Any:
    """What a config says of a key; of one that differs from layer to layer, what it says of all others.

    transformers raises where code reads such a key of the whole model.
    """
    read = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return getattr(config, key, default) if read is None else read(key, default)


_NOTHING = object()


def says(config: Any, key: str) -> bool:
    """Whether a config has the key."""
    return value_of(config, key, _NOTHING) is not _NOTHING
