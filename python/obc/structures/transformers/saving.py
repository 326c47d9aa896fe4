"""Saves and loads pruned transformers models of any widths in a folder: config, plan and weights, without pickle."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from obc.files import refuse_unfinished, whole_folder
from obc.model.depth import compact, is_compact, put_stand_in, refuse_other_lists, with_depth
from obc.model.kept import Kept, PlanError, kept_of
from obc.model.layouts import layout_of
from obc.model.names import joined, named_modules, named_tensors
from obc.model.plan import PruningPlan, refuse_non_plans, register_counts
from obc.model.refusals import refuse_dropped_biases, refuse_fresh_weights
from obc.model.shared_copy import shared_copy
from obc.model.slicing import sliced
from obc.structures.removal import size_of
from obc.structures.transformers.block import Block
from obc.structures.transformers.blocks import DEFAULT_KINDS, Finder
from obc.structures.transformers.config import with_widths
from obc.structures.transformers.structure import TransformersStructure

PLAN_FILE, _WEIGHTS = "obc_plan.json", "model.safetensors"
_FORMAT = "obc.pruned_model/1"
# Query heads inside key/value groups come after whole groups: each count depends on what the other leaves.
_ROUNDS = (DEFAULT_KINDS, ("query_heads",), ("embedding",))


def save_pruned(model: nn.Module, plan: PruningPlan, directory: str | os.PathLike[str]) -> None:
    """Save a pruned transformers model into a folder: config.json, obc_plan.json and model.safetensors.

    For models whose layers keep different widths, which no config can express; it also works where ``save_pretrained``
    does. Tied parameters are stored once. Values may have changed since pruning (fine-tuned, compensated).

    Args:
        model: the pruned model.
        plan: the plan of its structure.
        directory: the folder; created if it is missing.

    Raises:
        ValueError: the model has no config, or belongs to no class of the transformers library.
        PlanError: config and plan don't make the model's shapes, so that :func:`load_pruned` would refuse the folder:
            the plan of a model that had been pruned before needs :meth:`obc.PruningPlan.after`.
        OSError: a file can't be written; an existing folder is left unchanged.
    """
    refuse_non_plans(plan)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ValueError(f"{type(model).__name__} has no transformers config; save its state_dict and plan yourself")
    tensors, tied = _distinct(model.state_dict())
    if plan.depth:
        blocks_gone = any(one.removed for one in plan.depth.lists.values())
        if blocks_gone and not is_compact(model, plan.depth):
            raise ValueError("removed blocks still have stand-ins in the model: call structure.compact()")
        config = with_depth(config, plan.depth, compacted=False)
    with torch.device("meta"):
        unpruned = type(model)(type(config).from_dict(config.to_dict()))
    skeleton = _cut(unpruned, plan)
    _create_biases(skeleton, tensors)
    if (different := _first_difference(skeleton, tensors)) is not None:
        name, made, own = different
        raise PlanError(
            f"{name}: config and plan make it {made}, the model has {own}; was the model pruned before? Then pass "
            "plan.after(the earlier plan)"
        )
    content = config.to_dict() | {"architectures": [type(model).__name__]}
    with whole_folder(directory) as folder:
        (folder / "config.json").write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")
        plan.save(folder / PLAN_FILE)
        save_file(tensors, folder / _WEIGHTS, {"format": "pt", "obc_format": _FORMAT, "tied": json.dumps(tied)})
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)


def load_pruned(directory: str | os.PathLike[str], model_class: type[nn.Module] | None = None) -> nn.Module:
    """Load a model that :func:`save_pruned` wrote, in eval mode.

    The model is built from the config, cut to the plan's shapes, and then loaded strictly.

    Args:
        directory: the folder.
        model_class: the model's class; by default the transformers class that the config names.

    Raises:
        PlanError: :func:`save_pruned` did not write the folder, or its files don't belong together.
        ValueError: transformers has no class with the name; pass ``model_class``.
    """
    import transformers

    folder = Path(directory)
    refuse_unfinished(folder, PlanError)
    if lacking := [name for name in ("config.json", PLAN_FILE, _WEIGHTS) if not (folder / name).is_file()]:
        raise PlanError(f"{folder} has no {lacking[0]}; save_pruned did not write this folder")
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = (content.get("architectures") or [""])[0]
    chosen = model_class or getattr(transformers, named, None)
    if chosen is None:
        raise ValueError(f"transformers has no class {named!r}; pass model_class=")
    plan = PruningPlan.load(folder / PLAN_FILE)
    state = _read(folder / _WEIGHTS)
    config_class: Any = chosen.config_class  # type: ignore[union-attr]
    with torch.device("cpu"):  # where the file's weights are read, whatever the default device
        model: Any = _cut(chosen(config_class.from_pretrained(folder)), plan)
    refused = with_widths(model, [], depth=plan.depth)[1] if plan.depth else None
    if refused is not None:
        refuse_fresh_weights(model, refused)
    if created := _create_biases(model, state):
        refuse_dropped_biases(model, created)
    if (different := _first_difference(model, state)) is not None:
        name, made, own = different
        raise PlanError(f"{name}: config and plan make it {made}, the file has {own}")
    model.load_state_dict(state, strict=True, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    if hasattr(model, "can_generate") and model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]


def _cut(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """The model as its config makes it, cut to the plan's widths and depth."""
    _refuse_other_sizes(model, plan)
    cut_to(model, plan)
    for name, stand_in in plan.depth.stand_ins.items():
        put_stand_in(model, name, stand_in)
    compact(model, plan.depth)
    return model


def _refuse_other_sizes(model: nn.Module, plan: PruningPlan) -> None:
    """Raise a PlanError if the config's layers have neither the sizes from before pruning nor those after it."""
    refuse_other_lists(model, plan.depth, "the config's model")
    plan.refuse_unknown(model, "the config's model")
    modules = dict(named_modules(model))
    for name, kept in plan.items():
        module, (owner, _, attribute) = modules.get(name), name.rpartition(".")
        sides = ("out", kept.dim, kept.out_size, kept.out_channels), ("in", kept.in_dim, kept.in_size, kept.in_columns)
        for side, dim, made, left in sides:
            if made is None or left is None:
                continue
            size = size_of(module, side) if module else getattr(modules[owner], attribute).shape[dim]
            if size not in (made, len(left)):
                raise PlanError(
                    f"{name}: the plan keeps {len(left)} of {made} {side} channels, but the config says {size}; was "
                    "the model pruned before? Then pass plan.after(the earlier plan)"
                )


def _first_difference(
    model: nn.Module, state: Mapping[str, Tensor]
) -> tuple[str, tuple[int, ...] | None, tuple[int, ...]] | None:
    """(name, the model's shape, the shape in ``state``) of the first tensor whose shapes differ."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = ((name, shapes.get(name), tuple(tensor.shape)) for name, tensor in state.items())
    return next((one for one in found if one[1] != one[2]), None)


def is_saved_pruned(directory: str | os.PathLike[str]) -> bool:
    """Whether :func:`save_pruned` wrote this folder, so that its config alone does not tell the model's widths."""
    weights = Path(directory) / _WEIGHTS
    if not weights.is_file():
        return False
    try:
        with safe_open(weights, framework="pt") as file:
            return (file.metadata() or {}).get("obc_format") == _FORMAT
    except SafetensorError:
        return False


def _create_biases(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Create the biases that layers got after pruning, which no config mentions; returns the layers' names."""
    modules, created = dict(model.named_modules()), []
    for name, tensor in state.items():
        module = modules.get(name.removesuffix(".bias"))
        if name.endswith(".bias") and module is not None and layout_of(module) is not None and module.bias is None:
            module.bias = nn.Parameter(torch.empty_like(tensor))
            created.append(name.removesuffix(".bias"))
    return created


def cut_to(model: nn.Module, plan: PruningPlan) -> None:
    """Remove units of every group until it has as many as the plan keeps; the config may have these widths already."""
    for kinds in _ROUNDS:
        if kinds == ("embedding",) and not _keeps_fewer_features(model, plan):
            continue
        structure = TransformersStructure(model, kinds)
        surplus = {}
        for name, block in structure.blocks.items():
            kept = _units_kept(structure, block, plan)
            if kept is not None and kept < block.group.size:
                surplus[name] = torch.arange(kept, block.group.size, device="cpu")
        structure.remove(surplus)


def counts_after(model: nn.Module, plan: PruningPlan) -> list[tuple[Any, str, Any]]:
    """(module or config, attribute, value) of what changes besides tensors if an unpruned model is cut to ``plan``.

    It is tried on a copy that shares the weights. If the model is none of the transformers library, or if the plan was
    not made by a :class:`TransformersStructure`, so that its removals give other shapes, only counts of heads.
    """
    if not len(plan):
        return []
    if not hasattr(getattr(model, "config", None), "to_dict"):
        return _counts_of_heads(model, plan)
    narrow, modules = shared_copy(model), dict(model.named_modules())
    try:
        cut_to(narrow, plan)
        for module_name, module, tensor_name, tensor in named_tensors(narrow):
            original, key = getattr(modules[module_name], tensor_name).detach(), joined(module_name, tensor_name)
            weight = getattr(modules[module_name], "weight", None)
            kept = kept_of(plan, module_name, key)
            if sliced(module, tensor_name, original, kept, key, weight).shape != tensor.shape:
                return _counts_of_heads(model, plan)
    except (ValueError, IndexError):  # a plan for other layers; cutting names what does not fit
        return _counts_of_heads(model, plan)
    found: list[tuple[Any, str, Any]] = []
    configs: dict[int, Any] = {}  # id of a config -> its copy
    for name, one in narrow.named_modules():
        found += _differences(modules[name], one)
        if not hasattr(config := getattr(one, "config", None), "to_dict"):
            continue
        before = modules[name].config
        if configs.setdefault(id(before), config) is not config:
            found.append((modules[name], "config", config))  # the layer got a config of its own
        else:
            found += _differences(before, config)
    return found


def _counts_of_heads(model: nn.Module, plan: PruningPlan) -> list[tuple[Any, str, Any]]:
    """(module, attribute, value) of the counts of attentions that lose whole heads.

    A plan that has counts of a module itself has all that changed.
    """
    found: list[tuple[Any, str, Any]] = []
    modules = dict(model.named_modules())
    for block in Finder(model, ("heads",), proved=True).blocks.values():
        part = block.group.slices[0]
        entry = plan.get(part.module)
        if block.reads_config is not None or entry is None or entry.out_channels is None:
            continue
        stays = int(torch.isin(part.channels, entry.out_channels).all(1).sum())
        if stays * part.channels.shape[1] != len(entry.out_channels):
            continue  # not whole heads
        for counter in (one for one in block.counters if one.module not in plan.counts):
            owner = modules[counter.module]
            after = counter.without(owner, block.group.size - stays)
            found += [(owner, attribute, value) for attribute, value in after.items()]
    return found


def _differences(owner: Any, changed: Any) -> list[tuple[Any, str, Any]]:
    """The plain attributes in which a pruned module or config differs from the unpruned one."""
    before, missing = vars(owner), object()
    return [
        (owner, key, value)
        for key, value in vars(changed).items()
        if isinstance(value, (int, float, tuple, list, dict))
        and not (isinstance(owner, nn.Module) and key.startswith("_"))
        and before.get(key, missing) != value
    ]


register_counts(counts_after)


def _units_kept(structure: TransformersStructure, block: Block, plan: Mapping[str, Kept]) -> int | None:
    """The number of units that the plan keeps; if query heads were removed from groups too, what its slices need."""
    needed = []
    for part in block.group.slices:
        axis = structure.weights.axes(block, part)[0]
        kept = plan.get(axis.key)
        channels = None if kept is None else kept.out_channels if axis.side == "out" else kept.in_channels
        if channels is None:
            return None  # it lost no units; another kind of group narrowed what they share
        # Channels in no unit all stay: keys and values that all query heads share, in a fused projection.
        others = structure.weights.tensor(axis).shape[axis.dim] - part.channels.numel()
        needed.append(math.ceil((len(channels) - others) / part.channels.shape[1]))
    return max(needed)


def _keeps_fewer_features(model: nn.Module, plan: Mapping[str, Kept]) -> bool:
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return any(name in plan for name in embeddings) or any(
        kept.dim is not None and kept.out_channels is not None and name.endswith(("cls_token", "position_embeddings"))
        for name, kept in plan.items()
    )


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors without those that share memory with an earlier one, name of such a tensor -> the earlier name)."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, tied


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("obc_format") != _FORMAT:
            raise PlanError(f"{path} was not written by save_pruned; from_pretrained may read it")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return state | {name: state[source] for name, source in json.loads(metadata["tied"]).items()}
