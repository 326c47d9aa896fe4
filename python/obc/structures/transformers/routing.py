"""How many experts of a mixture a token is sent to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from obc.model.names import joined
from obc.structures.transformers.layers import value_of

# Attributes and config keys that hold it; a router that always chooses the same number has none.
_NAMES = ("top_k", "moe_topk", "moe_top_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts")
_FIXED = {"SwitchTransformersTop1Router": 1, "NllbMoeTop2Router": 2}
ROUTERS = ("gate", "router")


def experts_per_token(modules: Mapping[str, nn.Module], experts: str) -> int | None:
    """How many experts each token is sent to; None if neither modules nor configs say it.

    Looks at the router beside the experts and the modules in it, at the module that contains both, then at their
    configs and those of the modules around, innermost first.

    Args:
        modules: the model's modules by name.
        experts: name of the module with the experts.
    """
    for holder in _holders(modules, experts):
        if (fixed := _FIXED.get(type(holder).__name__)) is not None:
            return fixed
        for name in _NAMES:
            if type(said := vars(holder).get(name)) is int:
                return said
    for config in _configs(modules, experts):
        for name in _NAMES:
            if type(said := value_of(config, name)) is int:
                return said
    return None


def _holders(modules: Mapping[str, nn.Module], experts: str) -> Iterator[nn.Module]:
    parent = experts.rpartition(".")[0]
    for block in (parent, experts):
        for child in ROUTERS:
            if (router := modules.get(joined(block, child))) is not None:
                yield from router.modules()
    for name in (parent, experts):
        yield modules[name]


def _configs(modules: Mapping[str, nn.Module], experts: str) -> Iterator[Any]:
    parent = experts.rpartition(".")[0]
    for child in ROUTERS:
        if (router := modules.get(joined(parent, child))) is not None and "config" in vars(router):
            yield router.config
    name = experts
    while True:
        if "config" in vars(modules[name]):
            yield modules[name].config
        if not name:
            return
        name = name.rpartition(".")[0]
