"""Functions that get a scored weight outside of its layer's forward, in whichever row: gates don't see them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from obc.model.watched_weights import Use, WatchedWeight, WeightWatch, computes_its_weight
from obc.scoring.reading.module_readers import ModuleReader


class WeightUses(WeightWatch):
    """Notes them while a row is read.

    Args:
        readers: the scorer's.

    Attributes:
        functions: reader -> the first such function.
    """

    gradients = True

    def __init__(self, readers: Iterable[ModuleReader]) -> None:
        gated = [reader for reader in readers if reader.how == "gate" and reader.scored and not reader.rule.packed]
        self._readers = {reader.module: reader for reader in gated}
        names = [(reader.module, name) for reader in gated for name in (reader.rule.weight, reader.rule.bias)]
        found = [(module, module._parameters.get(name)) for module, name in names if name is not None]
        pairs = [(module, parameter) for module, parameter in found if parameter is not None]
        super().__init__(pairs, [reader.module for reader in gated if computes_its_weight(reader.module)])
        self.functions: dict[ModuleReader, str] = {}

    def __enter__(self) -> WeightUses:
        super().__enter__()
        for module, reader in self._readers.items():
            reader.watched = [weight for weight in module._parameters.values() if type(weight) is WatchedWeight]
        return self

    def __exit__(self, *error: Any) -> None:
        for reader in self._readers.values():
            reader.watched = ()
        super().__exit__(*error)

    def note(self, use: Use, product: bool, differentiable: bool) -> None:
        if differentiable:
            for reader in [self._readers[module] for module in use.layers if module in self._readers]:
                self.functions.setdefault(reader, use.function)


def beside_gates(function: str) -> str:
    """Why gates don't read a layer whose weight or bias a function uses."""
    return f"{function} also uses its weight or bias, without calling it"
