"""How many experts of a mixture a token is sent to, and which parameters are their weights.

Experts that obc can prune are known by the names of their tensors (:mod:`obc.model.experts`). Others are recognised by
their router: a list with as many modules as the router has outputs, or a tensor that stacks as many weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice, pairwise
from typing import Any

from torch import Tensor, nn

from obc.model.layouts import layout_of
from obc.model.names import is_within, joined, outwards
from obc.structures.transformers.layers import value_of

# Attributes and config keys that hold it; a router that always chooses the same number has none.
_NAMES = ("top_k", "moe_topk", "moe_top_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts")
_FIXED = {"SwitchTransformersTop1Router": 1, "NllbMoeTop2Router": 2}
ROUTERS = ("gate", "router")
# How many modules around stacked weights may hold their router: the weights' own, that of all experts, the mixture.
_NEAR = 3


def experts_per_token(modules: Mapping[str, nn.Module], experts: str) -> int | None:
    """How many experts each token is sent to; None if neither modules nor configs say it.

    Looks at the router beside the experts and the modules in it, at the module that contains both, then at their
    configs and those of the modules around, innermost first.
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
    yield from (modules[name].config for name in outwards(experts) if "config" in vars(modules[name]))


def met_share(modules: Mapping[str, nn.Module], name: str, parameter: Tensor) -> float:
    """The share of a parameter that one token meets: less than 1 for experts in lists, and for those of unknown form.

    Raises:
        ValueError: it is not known how many experts a token is sent to, or whether the parameter stacks experts.
    """
    if (listed := _list_around(modules, name)) is not None:
        return _share(modules, *listed)
    if not _is_raw(modules[name], parameter):
        return 1.0
    if (found := _router_rows(modules, name, parameter)) is not None:
        return _share(modules, *found)
    if parameter.dim() > 2 and len(parameter) > 1 and (other := _as_many_rows(modules, name, parameter)) is not None:
        raise ValueError(
            f"a tensor {tuple(parameter.shape)} of {name} ({type(modules[name]).__name__}) may hold {len(parameter)} "
            f"experts that {other} routes to, so how much of it a token meets is not known; pass params or macs, or "
            f"call the module of their router {' or '.join(ROUTERS)}"
        )
    return 1.0


def stacks_experts(modules: Mapping[str, nn.Module], name: str, parameter: Tensor) -> bool:
    """Whether a tensor outside layers stacks weights of experts that no table knows."""
    return _is_raw(modules[name], parameter) and _router_rows(modules, name, parameter) is not None


def _share(modules: Mapping[str, nn.Module], experts: str, count: int) -> float:
    return min(1.0, routed_experts(modules, experts) / max(1, count))


def routed_experts(modules: Mapping[str, nn.Module], experts: str) -> int:
    """How many experts a token is sent to.

    Raises:
        ValueError: that is not known.
    """
    found = experts_per_token(modules, experts)
    if found is None:
        raise ValueError(
            f"how many experts of {experts} a token is sent to is not known, so their cost is not: neither the router "
            "beside them nor a config says top_k or num_experts_per_tok; set top_k on the module around them"
        )
    return found


def _list_around(modules: Mapping[str, nn.Module], name: str) -> tuple[str, int] | None:
    """(name, length) of the innermost list of experts around a module: one called so, or as long as its router."""
    for inner, outer in pairwise(outwards(name)):
        listed = modules[inner]
        if inner != name and isinstance(listed, (nn.ModuleList, nn.ModuleDict)) and len(listed) > 1:
            rows = _outputs(modules, outer)
            if inner.rpartition(".")[2] == "experts" or len(listed) in rows.values():
                return inner, len(listed)
    return None


def _is_raw(module: nn.Module, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and layout_of(module) is None and not isinstance(module, nn.Embedding)


def _router_rows(modules: Mapping[str, nn.Module], name: str, parameter: Tensor) -> tuple[str, int] | None:
    """(name of the experts, their number) if a router near has an output for each of the weights stacked here.

    A tensor of more than two dimensions has one entry per expert. One of two may have several rows of each, as DBRX's.
    """
    for experts, place in _near(name):
        for router, rows in _outputs(modules, place).items():
            if is_within(name, router) or rows < 2:
                continue
            if len(parameter) == rows if parameter.dim() > 2 else not len(parameter) % rows and len(parameter) > rows:
                return experts, rows
    return None


def _outputs(modules: Mapping[str, nn.Module], place: str) -> dict[str, int]:
    """Router inside a module -> number of its outputs."""
    found: dict[str, int] = {}
    for router in (joined(place, child) for child in ROUTERS):
        if router in modules:
            weights = [one for one in modules[router].parameters() if one.dim() == 2]
            found |= {router: len(weights[-1])} if weights else {}
    return found


def _as_many_rows(modules: Mapping[str, nn.Module], name: str, parameter: Tensor) -> str | None:
    """Another matrix near with as many rows as the tensor has entries: perhaps a router under another name."""
    for experts, place in _near(name):
        own = ((place, key, one) for key, one in modules[place].named_parameters(recurse=False))
        children = (joined(place, child) for child, _ in modules[place].named_children())
        inside = ((one, "weight", modules[one]._parameters.get("weight")) for one in children if one != experts)
        for owner, key, one in (*own, *inside):
            if one is not None and one.dim() == 2 and len(one) == len(parameter) and one is not parameter:
                return joined(owner, key)
    return None


def _near(name: str) -> Iterator[tuple[str, str]]:
    """(module, module around it) outwards; at first the module itself, as both."""
    places = list(islice(outwards(name), _NEAR))
    return zip((name, *places), places, strict=False)
