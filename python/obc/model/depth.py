"""Removed blocks and residual branches: their stand-ins, and the model without them.

While a model is being pruned, a :class:`Skipped` module stands in for every removed block or branch, so that all other
modules keep their names. :func:`compact` then deletes the blocks from their lists and renumbers whatever counts blocks:
positions in a cache, and values in the config. Branches keep their stand-ins, because a model can't be expressed
without them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from obc.model.errors import PruningError
from obc.model.evaluation import first_floating
from obc.model.kept import PlanError
from obc.model.names import is_within, joined, named_modules

# Attributes in which modules keep their position among the blocks.
PLACE_ATTRIBUTES = ("layer_idx", "layer_index", "layer_id", "layer_number", "block_idx")
# Argument names under which modules receive a cache of keys and values.
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class StandIn:
    """The outputs of a removed module's stand-in.

    Attributes:
        returns: "input": its first floating tensor, unchanged. "zeros": zeros of the same shape.
        outputs: 0: it returns a tensor. n: it returns a tuple of n, all None but the first.
        features: size of the last dimension of zeros; None takes the input's.
        counts_positions: for an attention, whose layer of the cache must still count the earlier tokens.
    """

    returns: Literal["input", "zeros"]
    outputs: int = 0
    features: int | None = None
    counts_positions: bool = False


class Skipped(nn.Module):
    """Returns what its :class:`StandIn` says. Has no parameters, and keeps the plain attributes of ``replaced``."""

    def __init__(self, stand_in: StandIn, replaced: nn.Module) -> None:
        super().__init__()
        self.stand_in = stand_in
        for key, value in plain_attributes(replaced).items():
            setattr(self, key, value)
        self.train(replaced.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stand-in's output in place of the removed module's: its input, or zeros.

        Raises:
            PruningError: there is no floating tensor among the arguments.
        """
        x = first_floating(args, kwargs)
        if x is None:
            raise PruningError("a removed module was called without a floating tensor: what it returned is not known")
        if self.stand_in.counts_positions:
            self._count_positions(x, kwargs)
        if self.stand_in.returns == "zeros":
            x = x.new_zeros((*x.shape[:-1], self.stand_in.features or x.shape[-1]))
        return x if self.stand_in.outputs == 0 else (x, *[None] * (self.stand_in.outputs - 1))

    def _count_positions(self, x: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Add keys and values with no heads to the cache, one per position, so that it counts the positions."""
        cache = next((kwargs[key] for key in _CACHES if kwargs.get(key) is not None), None)
        cache = getattr(cache, "self_attention_cache", cache)
        place = next((vars(self)[key] for key in PLACE_ATTRIBUTES if key in vars(self)), None)
        if cache is not None and place is not None:
            nothing = x.new_zeros((x.shape[0], 0, x.shape[1], 1))
            cache.update(nothing, nothing, place)

    def extra_repr(self) -> str:
        """The stand-in's result, as its repr shows it."""
        return f"returns={self.stand_in.returns!r}"


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's public attributes that are numbers or strings, except its training flag."""
    return {
        key: value
        for key, value in vars(module).items()
        if type(value) in _PLAIN and key != "training" and not key.startswith("_")
    }


@dataclass(frozen=True)
class BlockList:
    """A list of blocks, some of which may have been removed.

    Attributes:
        size: number of blocks in the unpruned model.
        removed: positions of the removed blocks, ascending.
        outputs: a block's outputs, as in :class:`StandIn`.
    """

    size: int
    removed: tuple[int, ...] = ()
    outputs: int = 0

    @property
    def kept(self) -> list[int]:
        """Positions in the unpruned list of the blocks that remain."""
        gone = set(self.removed)
        return [place for place in range(self.size) if place not in gone]


@dataclass(frozen=True)
class Depth:
    """The removed blocks and branches, in terms of the unpruned model.

    Attributes:
        lists: name of a list of blocks -> which of them were removed.
        stand_ins: name of a removed branch -> its stand-in.
        config: dotted name of a config value -> (the list that it counts, the unpruned value): a number of blocks, or
            a list with one entry per block.

    Raises:
        ValueError: a list has no block with the number of a removed one.
    """

    lists: Mapping[str, BlockList] = field(default_factory=dict)
    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)
    config: Mapping[str, tuple[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, one in self.lists.items():
            if not all(0 <= place < one.size for place in one.removed):
                raise ValueError(f"{name!r} has {one.size} blocks, of which {list(one.removed)} were removed")

    def __bool__(self) -> bool:
        return bool(self.stand_ins or self.shortened)

    @property
    def shortened(self) -> dict[str, BlockList]:
        """The lists of which blocks were removed."""
        return {name: one for name, one in self.lists.items() if one.removed}

    @property
    def removed(self) -> list[str]:
        """Names of the removed blocks and branches."""
        blocks = [f"{name}.{place}" for name, one in self.lists.items() for place in one.removed]
        return [*blocks, *self.stand_ins]

    def without(self, name: str) -> bool:
        """Whether the module with this name in the unpruned model was removed, alone or with what contains it."""
        return any(is_within(name, gone) for gone in self.removed)

    def original_name(self, name: str) -> str:
        """The name in the unpruned model of what has this name in the model without the removed blocks."""
        for list_name, one in self.shortened.items():
            if name.startswith(f"{list_name}."):
                place, dot, rest = name[len(list_name) + 1 :].partition(".")
                if int(place) >= len(one.kept):
                    raise PlanError(f"{name!r} is none of the {len(one.kept)} blocks that the earlier plan left")
                return f"{list_name}.{one.kept[int(place)]}{dot}{rest}"
        return name

    def after(self, earlier: Depth) -> Depth:
        """Both removals in terms of the unpruned model; this one is of the model that ``earlier`` left.

        Raises:
            PlanError: ``earlier`` left another number of blocks in a list.
        """
        lists = dict(earlier.lists)
        for name, one in self.lists.items():
            if (before := earlier.lists.get(name)) is not None:
                if one.size != len(before.kept):
                    raise PlanError(
                        f"{name}: this plan was made for {one.size} blocks, but the earlier plan leaves "
                        f"{len(before.kept)}; pass the plan of the step before it"
                    )
                gone = {*before.removed, *(before.kept[place] for place in one.removed)}
                one = BlockList(before.size, tuple(sorted(gone)), (before if before.removed else one).outputs)
            lists[name] = one
        named = {earlier.original_name(name): stand_in for name, stand_in in self.stand_ins.items()}
        both = Depth(lists, {}, {**self.config, **earlier.config})
        stand_ins = {**earlier.stand_ins, **named}
        return Depth(lists, {name: one for name, one in stand_ins.items() if not both.without(name)}, both.config)


# --- the model ------------------------------------------------------------------------------------------------


def outer_lists(model: nn.Module) -> dict[str, BlockList]:
    """The numbered lists of a model that lie in no other: a plan records their lengths, as it does channels."""
    found: dict[str, BlockList] = {}
    for name, module in named_modules(model):
        numbered = list(module._modules) == [str(place) for place in range(len(module._modules))]
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and numbered
        if name and is_list and not any(is_within(name, outer) for outer in found):
            found[name] = BlockList(len(module._modules))
    return found


def with_lists(depth: Depth, lists: Mapping[str, BlockList], names: Iterable[str]) -> Depth:
    """``depth`` with those of ``lists`` that hold one of these modules or parameters."""
    holders = {name: one for name, one in lists.items() if any(other.startswith(f"{name}.") for other in names)}
    return replace(depth, lists=holders | dict(depth.lists))


def refuse_other_lists(model: nn.Module, depth: Depth, role: str) -> None:
    """Raise a PlanError if a list of the unpruned ``model`` has another length than ``depth`` is of."""
    modules = dict(model.named_modules())
    _refuse_lengths({name: len(modules[name]._modules) for name in depth.lists if name in modules}, depth, role)


def refuse_longer_lists(state_dict: Iterable[str], depth: Depth) -> None:
    """The same for the names in a state dict, in which the last blocks don't show if they have no tensors."""
    sizes: dict[str, int] = {}
    for key in state_dict:
        for name, one in depth.lists.items():
            place = key[len(name) + 1 :].partition(".")[0]
            if key.startswith(f"{name}.") and place.isdecimal():
                sizes[name] = max(sizes.get(name, one.size), int(place) + 1)
    _refuse_lengths(sizes, depth, "the original state dict")


def _refuse_lengths(sizes: Mapping[str, int], depth: Depth, role: str) -> None:
    for name, size in sizes.items():
        if size != (made := depth.lists[name].size):
            raise PlanError(
                f"{name}: the plan was made for {made} blocks where {role} has {size}; pass the model that "
                "was pruned, as it was before, or the plan made for this one"
            )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the module with this name."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def put_stand_in(model: nn.Module, name: str, stand_in: StandIn) -> None:
    """Put a :class:`Skipped` in the place of the module with this name."""
    replace_module(model, name, Skipped(stand_in, model.get_submodule(name)))


def is_compact(model: nn.Module, depth: Depth) -> bool:
    """Whether the removed blocks were deleted from their lists.

    Raises:
        PruningError: a list has neither its old number of blocks nor the number that remains.
    """
    found = set()
    for name, one in depth.shortened.items():
        count = len(_list(model, name))
        if count not in (one.size, one.size - len(one.removed)):
            raise PruningError(
                f"{name!r} has {count} blocks; of the unpruned model's {one.size}, {len(one.removed)} were removed"
            )
        found.add(count != one.size)
    if len(found) > 1:
        raise PruningError("the removed blocks were deleted from some lists but not from others")
    return found == {True}


def original_names(model: nn.Module, depth: Depth) -> dict[str, str]:
    """Name of every module -> its name in the unpruned model."""
    names = {name: name for name, _ in model.named_modules()}
    if not depth or not is_compact(model, depth):
        return names
    return {name: depth.original_name(name) for name in names}


def compact(model: nn.Module, depth: Depth) -> None:
    """Delete the removed blocks from their lists, and renumber caches and config.

    Stand-ins for branches stay. Does nothing if the blocks were deleted already.
    """
    if is_compact(model, depth):
        return
    for name, one in depth.shortened.items():
        blocks = list(_list(model, name))
        for place, old in enumerate(one.kept):
            _renumber(blocks[old], old, place)
        _refill(_list(model, name), [blocks[old] for old in one.kept])
    _write_config(model, depth, compacted=True)


def expand(model: nn.Module, depth: Depth) -> None:
    """Undo :func:`compact`: put a :class:`Skipped` in the place of every removed block."""
    if not is_compact(model, depth):
        return
    for name, one in depth.shortened.items():
        kept = list(_list(model, name))
        blocks: list[nn.Module] = [Skipped(StandIn("input", one.outputs), kept[0]) for _ in range(one.size)]
        for place, old in enumerate(one.kept):
            _renumber(kept[place], place, old)
            blocks[old] = kept[place]
        _refill(_list(model, name), blocks)
    _write_config(model, depth, compacted=False)


@contextlib.contextmanager
def expanded(model: nn.Module, depth: Depth) -> Iterator[None]:
    """Inside the block all modules have the names of the unpruned model, as after :func:`expand`."""
    was_compact = bool(depth) and is_compact(model, depth)
    if was_compact:
        expand(model, depth)
    try:
        yield
    finally:
        if was_compact:
            compact(model, depth)


def _list(model: nn.Module, name: str) -> nn.ModuleList | nn.Sequential:
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, (nn.ModuleList, nn.Sequential)):
        raise PruningError(f"{type(model).__name__} has no list of blocks {name!r}; pass the model of these blocks")
    return found


def _refill(blocks: nn.Module, modules: list[nn.Module]) -> None:
    blocks._modules.clear()
    for place, module in enumerate(modules):
        blocks._modules[str(place)] = module


def _renumber(block: nn.Module, old: int, new: int) -> None:
    for module in block.modules():
        for key in PLACE_ATTRIBUTES:
            if vars(module).get(key) == old and type(vars(module)[key]) is int:
                setattr(module, key, new)


# --- the config -----------------------------------------------------------------------------------------------


def config_values(depth: Depth, compacted: bool) -> dict[str, Any]:
    """Dotted name -> the config value for all blocks, or without the removed ones."""
    values: dict[str, Any] = {}
    for key, (name, full) in depth.config.items():
        one = depth.lists[name]
        if not compacted:
            values[key] = full
        elif isinstance(full, int):
            values[key] = full - len(one.removed)
        else:
            values[key] = [full[place] for place in one.kept]
    return values


def with_depth(config: Any, depth: Depth, compacted: bool) -> Any:
    """A copy of the config with the values of :func:`config_values`."""
    new = copy.deepcopy(config)
    overrides = {
        path: overrides_in(part) for path, part in config_parts(new) if getattr(part, "is_heterogeneous", False)
    }
    for path in overrides:
        part_of(new, path).per_layer_config = None
    for key, value in config_values(depth, compacted).items():
        path, _, attribute = key.rpartition(".")
        setattr(part_of(new, path), attribute, copy.copy(value))
    for path, found in overrides.items():
        lists = (name for key, (name, _) in depth.config.items() if key.rpartition(".")[0] == path)
        one = depth.lists.get(next(lists, ""))
        moved = {} if one is None else dict(enumerate(one.kept))
        if one is not None and compacted:
            found = {place: found[old] for place, old in moved.items() if old in found}
        elif one is not None:
            found = {old: found[place] for place, old in moved.items() if place in found}
        part_of(new, path).per_layer_config = found
    return new


def overrides_in(config: Any) -> dict[int, dict[str, Any]]:
    """A config's settings for single layers (transformers' ``per_layer_config``)."""
    return {int(place): dict(values) for place, values in (config.to_dict().get("per_layer_config") or {}).items()}


def part_of(config: Any, path: str) -> Any:
    """The nested config at a dotted path."""
    for part in path.split(".") if path else ():
        config = getattr(config, part)
    return config


def _write_config(model: Any, depth: Depth, compacted: bool) -> None:
    config = getattr(model, "config", None)
    if config is None or not depth.config:
        return
    put_config(model.modules(), config, with_depth(config, depth, compacted))


def put_config(modules: Iterable[nn.Module], old: Any, new: Any) -> None:
    """Give every module that holds the old config, or a part of it, the same of the new one."""
    parts = dict(_matching_parts(old, new))
    for module in modules:
        if (own := id(vars(module).get("config"))) in parts:
            module.config = parts[own]


def _matching_parts(old: Any, new: Any) -> Iterable[tuple[int, Any]]:
    """(identity of a config or of a nested one, the same part of the new config)."""
    yield id(old), new
    for key, value in _attributes(old).items():
        inner = _attributes(new).get(key)
        if hasattr(value, "to_dict") and hasattr(inner, "to_dict"):
            yield from _matching_parts(value, inner)


def config_parts(config: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted name, config) of a config and all nested ones; "" is the config itself."""
    yield path, config
    for key, value in _attributes(config).items():
        if hasattr(value, "to_dict"):
            yield from config_parts(value, joined(path, key))


def _attributes(config: Any) -> Mapping[str, Any]:
    """The attributes of a config; a dict has none, nor has a tuple or a class with slots."""
    attributes: Mapping[str, Any] = getattr(config, "__dict__", {})
    return attributes
