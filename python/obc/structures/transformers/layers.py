"""A model's layers by name: their sizes, and the module attributes and config keys that count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.counts import count_of
from obc.model.depth import config_parts
from obc.model.layouts import layer_of, layout_of
from obc.model.names import joined, named_modules, outwards
from obc.model.quantized import is_quantised, why_not_sliced
from obc.structures.units import NotPrunableError


@dataclass(frozen=True)
class Counter:
    """A module's attribute that counts ``per_unit`` for every unit of a group.

    Attributes:
        attribute: its name, or a path (:mod:`obc.model.counts`).
        axis: if the attribute is einops' mapping of axes to lengths, the axis that counts.
        place: if the attribute is a list or tuple of counts, the place of this one.
    """

    module: str
    attribute: str
    per_unit: int
    axis: str = ""
    place: int | None = None

    def without(self, module: nn.Module, units: int) -> dict[str, Any]:
        """The attributes of the module, and their values once so many units are gone."""
        before, gone = count_of(module, self.attribute), self.per_unit * units
        if self.place is not None:
            return {self.attribute: type(before)(n - gone * (place == self.place) for place, n in enumerate(before))}
        if not self.axis:
            return {self.attribute: before - gone}
        lengths = {**before, self.axis: before[self.axis] - gone}
        return {self.attribute: lengths, f"_{self.attribute}": tuple(lengths.items())}  # the layer reads the second


class Layers:
    """Answers questions about a model, for finding its blocks.

    Attributes:
        model: the model.
        config: config of the module entered last: the model's, one inside it, or None.
        config_part: its dotted name inside the model's config.
        modules: modules by name.
        proved: whether what is found will be proved, so that lengths may tell what has heads where no name does.
    """

    def __init__(self, model: nn.Module, proved: bool = False) -> None:
        self.proved = proved
        self.model, self.config = model, getattr(model, "config", None)
        self.modules = dict(named_modules(model))
        self._quantised = {name for name, module in self.modules.items() if is_quantised(module)}
        self.config_part = ""
        parts = () if self.config is None else config_parts(self.config)
        self._parts = {id(part): (path, part) for path, part in parts}

    def enter(self, name: str) -> None:
        """Set :attr:`config` to that of the module ``name``, or of the nearest module around it that has one."""
        if self.config is None:
            return
        own = (id(vars(self.modules[one]).get("config")) for one in outwards(name) if one in self.modules)
        known = (self._parts[one] for one in own if one in self._parts)
        self.config_part, self.config = next(known, ("", self.model.config))

    def has(self, name: str, child: str) -> bool:
        """Whether the module ``name`` has a module ``child``."""
        return joined(name, child) in self.modules

    def layer(self, name: str, child: str) -> nn.Module | None:
        """The linear or convolutional layer ``child`` of the module ``name``, or None.

        Raises:
            NotPrunableError: it is quantised.
        """
        path = joined(name, child)
        module = self.modules.get(path)
        if module is None:
            return None
        self.refuse_quantised(path)
        return module if layout_of(module) is not None else None

    def size(self, name: str, side: str) -> int:
        """The number of channels on one side of a linear or convolutional layer.

        Raises:
            NotPrunableError: it is quantised.
        """
        module = self.modules[name]
        self.refuse_quantised(name)
        layout, weight = layer_of(module)
        return layout.sizes(weight)[0 if side == "out" else 1]

    def size_or_none(self, name: str, side: str) -> int | None:
        """The same for any module: norms and embeddings only have outputs, others and missing ones no side at all."""
        module = self.modules.get(name)
        self.refuse_quantised(name)
        if module is not None and layout_of(module) is not None:
            return self.size(name, side)
        weight = getattr(module, "weight", None)
        if side == "out" and isinstance(weight, Tensor) and (is_row(weight) or isinstance(module, nn.Embedding)):
            return int(weight.shape[-1])
        return None

    def counts(self, name: str, *keys: str) -> list[int]:
        """The integers that the module ``name`` has under these names: numbers of heads, their sizes and the like.

        Raises:
            NotPrunableError: it has no integer under one of them.
        """
        module = self.modules[name]
        found = [value for key in keys if isinstance(value := getattr(module, key, None), int)]
        if len(found) < len(keys):
            raise NotPrunableError(f"{type(module).__name__} does not say {', '.join(keys)}")
        return found

    def refuse_quantised(self, name: str) -> None:
        """Refuse a layer whose weight is stored packed.

        Raises:
            NotPrunableError: it is packed; the message says what to do.
        """
        if name in self._quantised:
            raise NotPrunableError(why_not_sliced(name, self.modules[name]))

    def counters(self, names: Sequence[str], counted: Mapping[tuple[str, ...], tuple[int, int]]) -> tuple[Counter, ...]:
        """The attributes of these modules whose values match the counts."""
        found = {
            (name, key): Counter(name, key, per_unit)
            for name in names
            for keys, (value, per_unit) in counted.items()
            for key in keys
            if vars(self.modules[name]).get(key) == value
        }
        return tuple(found.values())

    def rearrangements(self, name: str, counts: Mapping[int, int]) -> tuple[Counter, ...]:
        """The einops layers inside a module that are given the length of an axis by these counts -> ``per_unit``."""
        found = []
        for child, module in self.modules[name].named_modules():
            lengths = vars(module).get("axes_lengths")
            if isinstance(lengths, dict) and isinstance(vars(module).get("_axes_lengths"), tuple):
                said = [(axis, counts[length]) for axis, length in lengths.items() if length in counts]
                found += [Counter(joined(name, child), "axes_lengths", per_unit, axis) for axis, per_unit in said[:1]]
        return tuple(found)

    def config_key(self, keys: Sequence[str], per_unit: int, value: int | None = None) -> dict[str, int]:
        """The first of these keys that the config has, if possible with ``value``, with what a unit counts there."""
        said = [key for key in keys if says(self.config, key)]
        fitting = [key for key in said if value is not None and value_of(self.config, key) == value]
        return dict.fromkeys((fitting or said)[:1], per_unit)


def is_row(weight: Tensor) -> bool:
    """Whether a norm's weight has one value per channel, along its last dimension."""
    return weight.dim() in (1, 4) and weight.numel() == weight.shape[-1]


def channels(units: int, width: int, copies: int = 1) -> Tensor:
    """(units, copies * width): the u-th of ``units`` blocks in each of ``copies`` stretches."""
    blocks = torch.arange(copies * units * width, device="cpu").reshape(copies, units, width)
    return blocks.transpose(0, 1).reshape(units, copies * width)


def value_of(config: Any, key: str, default: Any = None) -> Any:
    """The config's value for a key; for a key that differs per layer, the value for all other layers.

    transformers raises if code reads such a key for the whole model.
    """
    read = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return getattr(config, key, default) if read is None else read(key, default)


_NOTHING = object()


def says(config: Any, key: str) -> bool:
    """Whether the config has a value for ``key``."""
    return value_of(config, key, _NOTHING) is not _NOTHING
