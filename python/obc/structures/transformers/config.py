"""Writing a pruned model's widths into its config, where the architecture has a key for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from obc.model.depth import Depth
from obc.model.kept import PlanError
from obc.structures.transformers.block import Block
from obc.structures.transformers.layers import says


def with_widths(
    model: nn.Module,
    blocks: Sequence[Block],
    sizes: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    depth: Depth | None = None,
) -> tuple[Any | None, str | None]:
    """(a copy of the model's config with the blocks' widths, None), or (None, why no config says them).

    Believed only where the model's class, built from it, has exactly the model's shapes; it is built without memory.

    Args:
        model: has the config.
        blocks: of the model.
        sizes: group -> units, where it is not as many as the group has now.
        shapes: tensor -> the shape that it would have with these sizes, where that is not its shape now.
        depth: blocks and branches that are gone.
    """
    model_: Any = model
    config = copy.deepcopy(model_.config)
    values: dict[str, dict[int, str]] = {}
    for block in blocks:
        size = (sizes or {}).get(block.group.name, block.group.size)
        for key, per_unit in block.config.items():
            values.setdefault(key, {}).setdefault(size * per_unit, block.group.name)
    for key, found in values.items():
        if len(found) > 1:
            widths = ", ".join(f"{value} ({name})" for value, name in found.items())
            return None, f"layers keep different {key}: {widths}"
    try:
        for key, found in values.items():
            setattr(config, key, next(iter(found)))
        for key, value in {key: value for block in blocks for key, value in block.config_fixed.items()}.items():
            if _derived_head_size(config) != value:
                setattr(config, key, value)
        skeleton = _skeleton(type(model), config)
    except Exception as refusal:  # transformers' own validation, of whatever type, is the reason that is reported
        return None, f"{type(config).__name__} refuses the widths: {refusal}"
    built = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    for name, tensor in model.state_dict().items():
        shape = tuple((shapes or {}).get(name, tensor.shape))
        if built.get(name) != shape:
            return None, (
                f"{type(config).__name__} can't say the widths: {name} is {shape}, a model built from it has "
                f"{built.get(name, ())}"
            )
    reason = _more_than(model, skeleton, depth)
    return (None, reason) if reason is not None else (config, None)


def _more_than(model: nn.Module, skeleton: nn.Module, depth: Depth | None) -> str | None:
    """What a model built from the config has that the pruned one has not; with blocks gone also what it does else."""
    state = model.state_dict()
    if lacking := next((name for name in skeleton.state_dict() if name not in state), None):
        return f"no config can say that {lacking} is gone; a model built from it has it"
    if not depth:
        return None
    modules = dict(model.named_modules())
    for name, built in skeleton.named_modules():
        own = modules.get(name)
        if own is None or type(own) is not type(built):
            return f"a model built from the config has a {type(built).__name__} as {name}"
        for key, value in vars(built).items():
            simple = type(value) in (bool, int, float, str) and not key.startswith("_") and key != "training"
            if simple and vars(own).get(key) != value:
                return f"in a model built from the config {name}.{key} is {value}, here it is {vars(own).get(key)}"
    return None


def refuse_save_pretrained(model: Any, reason: str | None) -> None:
    """Let ``model.save_pretrained`` raise where its folder would load with fresh weights; None takes that back."""
    vars(model).pop("save_pretrained", None)
    if reason is None:
        return

    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        raise PlanError(
            f"from_pretrained would give this model fresh weights, or other constants, where modules were removed "
            f"({reason}); "
            "obc.structures.transformers.save_pruned and load_pruned serve"
        )

    vars(model)["save_pretrained"] = save_pretrained


def said_values(config: Any, blocks: Sequence[Block]) -> dict[str, Any]:
    """The config's values of every key that the blocks' widths may change; keys that it lacks are left out."""
    keys = [key for block in blocks for key in (*block.config, *block.config_fixed)]
    return {key: getattr(config, key) for key in dict.fromkeys(keys) if says(config, key)}


def with_values(config: Any, blocks: Sequence[Block], values: Mapping[str, Any]) -> Any:
    """A copy of the config that says ``values``, and nothing of the blocks' other keys: undoes :func:`with_widths`."""
    former = copy.deepcopy(config)
    for key in said_values(config, blocks):
        if key in values:
            setattr(former, key, values[key])
        else:
            delattr(former, key)
    return former


def own_config(config: Any, block: Block) -> Any:
    """A copy of the config with one block's widths, for one module."""
    own = copy.copy(config)
    for key, per_unit in block.config.items():
        setattr(own, key, block.group.size * per_unit)
    return own


def _derived_head_size(config: Any) -> int | None:
    """The size of a head that the config says, or that the library derives from it."""
    if (said := getattr(config, "head_dim", None)) is not None:
        return int(said)
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return hidden // heads if hidden and heads and hidden % heads == 0 else None


def _skeleton(model_class: type[nn.Module], config: Any) -> nn.Module:
    """The model that ``from_pretrained`` would build: from the config as it is read back from its file."""
    read_back = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        return model_class(read_back)
