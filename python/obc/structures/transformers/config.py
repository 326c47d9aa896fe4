"""Writes a pruned model's widths into its config, if the architecture has a key for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from obc.model.depth import Depth, overrides_in, part_of, plain_attributes, put_config
from obc.structures.transformers.block import Block
from obc.structures.transformers.layers import says, value_of
from obc.structures.transformers.weights import BlockWeights

_SHOWN = 3  # number of widths of an uneven model shown in a message


def with_widths(
    model: nn.Module,
    blocks: Sequence[Block],
    sizes: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    depth: Depth | None = None,
) -> tuple[Any | None, str | None]:
    """(a copy of the model's config with the blocks' widths, None), or (None, why no config can express them).

    Accepted only if the model's class, built from it without memory, has exactly the model's shapes.

    Args:
        sizes: group -> number of units, if it differs from the present number.
        shapes: tensor -> its shape with these sizes, if it differs from the present shape.
        depth: removed blocks and branches.
    """
    model_: Any = model
    config = copy.deepcopy(model_.config)
    values = _counted(blocks, sizes or {})
    different = {key: found for key, found in values.items() if len(found) > 1}
    uneven = ""
    for (_, key), found in different.items():
        widths = [f"{value} ({name})" for value, name in found.items()]
        more = f", … ({len(widths)} different ones)" if len(widths) > _SHOWN else ""
        uneven = uneven or f"layers keep different {key}: {', '.join(widths[:_SHOWN])}{more}"
    try:
        for path in dict.fromkeys(block.config_part for block in blocks):
            keys = {key for part, key in different if part == path}
            inside = [block for block in blocks if block.config_part == path]
            if (refusal := _say_per_layer(part_of(config, path), inside, sizes or {}, keys, depth)) is not None:
                return None, f"{uneven}; {refusal}"
        for (path, key), found in values.items():
            if (path, key) not in different:
                setattr(part_of(config, path), key, next(iter(found)))
        fixed = {(b.config_part, key): value for b in blocks for key, value in b.config_fixed.items()}
        for (path, key), value in fixed.items():
            part = part_of(config, path)
            if key not in (getattr(part, "per_layer_attributes", None) or ()) and _derived_head_size(part) != value:
                setattr(part, key, value)
        skeleton = _skeleton(type(model), config)
    except Exception as refusal:  # transformers' own validation may raise anything; its message is the reported reason
        if uneven:
            return None, f"{uneven}, and {type(model).__name__} does not read them layer by layer ({_begin(refusal)})"
        return None, f"{type(config).__name__} refuses the widths: {refusal}"
    built = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    for name, tensor in model.state_dict().items():
        shape = tuple((shapes or {}).get(name, tensor.shape))
        if built.get(name) != shape:
            more = f"{uneven}, and " if uneven else ""
            return None, (
                f"{more}{type(config).__name__} can't express the widths: {name} is {shape}, a model built from it has "
                f"{built.get(name, ())}"
            )
    reason = _more_than(model, skeleton, depth)
    return (None, reason) if reason is not None else (config, None)


def _counted(blocks: Sequence[Block], sizes: Mapping[str, int]) -> dict[tuple[str, str], dict[Any, str]]:
    """(part of the config, key) -> the values of the blocks for it -> the first block with the value."""
    values: dict[tuple[str, str], dict[Any, str]] = {}
    for block in blocks:
        for key, value in _values_of(block, sizes).items():
            values.setdefault((block.config_part, key), {}).setdefault(value, block.group.name)
    return values


def _values_of(block: Block, sizes: Mapping[str, int]) -> dict[str, Any]:
    size = sizes.get(block.group.name, block.group.size)
    exact = {key: size * per_unit for key, per_unit in block.config.items()}
    # Widths that are multiples of the hidden size are fractions; whole numbers become integers, as configs want them.
    return {key: int(value) if value == int(value) else value for key, value in exact.items()}


def _say_per_layer(
    config: Any, blocks: Sequence[Block], sizes: Mapping[str, int], keys: set[str], depth: Depth | None
) -> str | None:
    """Write the values of these keys per layer (transformers' ``per_layer_config``), or return why that fails.

    Earlier values for single layers are replaced if a block has another value. Building a model from the config shows
    whether the model's code reads them.
    """
    known = hasattr(type(config), "per_layer_config")
    if not known:
        return "this version of transformers has no per_layer_config" if keys else None
    overrides = overrides_in(config)
    before = bool(overrides)
    said: dict[tuple[int, str], Any] = {}
    for block in blocks:
        place = _place_of(block.group.name, depth)
        for key, value in _values_of(block, sizes).items():
            if place is None:
                if key in keys:
                    return f"{block.group.name} is in no layer"
                continue
            overrides.get(place, {}).pop(key, None)
            if key in keys and said.setdefault((place, key), value) != value:
                return f"layer {place} has several"
    for (place, key), value in said.items():
        overrides.setdefault(place, {})[key] = value
    overrides = {place: values for place, values in overrides.items() if values}
    if overrides or before:
        config.per_layer_config = overrides or None
    return None


def _place_of(name: str, depth: Depth | None) -> int | None:
    """The index among the present model's layers: the first number in a name."""
    for list_name, one in (depth.lists if depth else {}).items():
        if name.startswith(f"{list_name}."):
            return one.kept.index(int(name[len(list_name) + 1 :].partition(".")[0]))
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _more_than(model: nn.Module, skeleton: nn.Module, depth: Depth | None) -> str | None:
    """The modules that only a model built from the config has; if blocks were removed, also other differences."""
    state = model.state_dict()
    if lacking := next((name for name in skeleton.state_dict() if name not in state), None):
        return f"no config can express that {lacking} is gone: a model built from it has it"
    if not depth:
        return None
    modules = dict(model.named_modules())
    for name, built in skeleton.named_modules():
        own = modules.get(name)
        if own is None or type(own) is not type(built):
            return f"a model built from the config has a {type(built).__name__} as {name}"
        for key, value in plain_attributes(built).items():
            if vars(own).get(key) != value:
                return f"in a model built from the config {name}.{key} is {value}, here it is {vars(own).get(key)}"
    return None


def said_values(config: Any, blocks: Sequence[Block]) -> dict[tuple[str, str], Any]:
    """The config's values for every key that the blocks' widths may change: (part, key) -> value, if present."""
    keys = [(block.config_part, key) for block in blocks for key in (*block.config, *block.config_fixed)]
    found = {(path, key): part_of(config, path) for path, key in dict.fromkeys(keys)}
    return {(path, key): value_of(part, key) for (path, key), part in found.items() if says(part, key)}


def with_values(config: Any, blocks: Sequence[Block], values: Mapping[tuple[str, str], Any]) -> Any:
    """A copy of the config with ``values`` and no other keys of the blocks; undoes :func:`with_widths`."""
    former = copy.deepcopy(config)
    for path in dict.fromkeys(block.config_part for block in blocks):
        if getattr(part_of(former, path), "is_heterogeneous", False):
            part_of(former, path).per_layer_config = None
    for path, key in said_values(config, blocks):
        if (path, key) in values:
            setattr(part_of(former, path), key, values[path, key])
        else:
            delattr(part_of(former, path), key)
    return former


class ModelConfig:
    """The config of a model that is being pruned.

    Attributes:
        refused: why the config could not be adapted to the widths, or None.
    """

    def __init__(self, config: Any, blocks: Sequence[Block]) -> None:
        self.refused: str | None = None
        self._unpruned = said_values(config, blocks)
        self._adapted: Any = None

    def of_copy(self) -> ModelConfig:
        """The same for a copy of the model."""
        copied = copy.copy(self)
        copied._adapted = None
        return copied

    def adapt(self, model: Any, weights: BlockWeights, depth: Depth) -> None:
        """Write the widths into the config if it can express them; every module gets the new config.

        Otherwise the config gets the unpruned model's values back, not those of an earlier step; modules that read
        their counts from it get a config of their own.
        """
        config = getattr(model, "config", None)
        if config is None:
            return
        blocks = list(weights.blocks.values())
        adapted, self.refused = with_widths(model, blocks, depth=depth)
        new = config
        if adapted is not None:
            new = self._adapted = adapted
        elif config is self._adapted:
            new = with_values(config, blocks, self._unpruned)
        put_config(weights.modules.values(), config, new)
        for block in blocks:
            if block.reads_config is not None and block.reads_config in weights.modules:
                own = part_of(new, block.config_part) if adapted is not None else own_config(new, block)
                weights.modules[block.reads_config].config = own


def own_config(config: Any, block: Block) -> Any:
    """A copy of the config, or of its part, with one block's widths, for one module."""
    own = copy.copy(part_of(config, block.config_part))
    for key, per_unit in block.config.items():
        setattr(own, key, block.group.size * per_unit)
    return own


def _derived_head_size(config: Any) -> int | None:
    """The size of a head according to the config, or as the library derives it."""
    if (said := value_of(config, "head_dim")) is not None:
        return int(said)
    hidden, heads = value_of(config, "hidden_size"), value_of(config, "num_attention_heads")
    return hidden // heads if hidden and heads and hidden % heads == 0 else None


def _begin(refusal: Exception) -> str:
    """The first sentence of a library's message; what follows is advice on its own attributes."""
    return str(refusal).split(". ")[0]


def _skeleton(model_class: type[nn.Module], config: Any) -> nn.Module:
    """The model that ``from_pretrained`` would build, from the config as it is read back from its file."""
    read_back = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        return model_class(read_back)
