"""Whole blocks ("layers") and residual branches ("sublayers") of a transformers model as units.

A block without its unit returns its input, a branch adds nothing. The first block of every list stays: caches, masks
and tables of relative positions may depend on it, and one block is needed.

The children of a block show where a branch lies:

========================================= ==================================== =====================================
children                                  the branch is                        in its place
========================================= ==================================== =====================================
``c`` with ``c.self``, ``c.output.dense`` ``c.output.dense`` (BERT's attention) zeros; ``c.self`` passes its input on
``intermediate``, ``output.dense``        ``output.dense`` (BERT's)            zeros; ``intermediate`` passes it on
``fc1``, ``fc2`` and their like           the second (OPT, BART)               zeros; the first passes its input on
any other module with linear layers       that module                          zeros
========================================= ==================================== =====================================

A module that receives the residual stream in order to add to it (as in BLOOM) is not a separate branch; it is left out
and named.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from obc.model.depth import BlockList, Depth, Skipped, StandIn, config_parts
from obc.model.groups import ChannelGroup, Slice
from obc.model.layouts import layout_of
from obc.model.names import is_within, joined, outwards
from obc.model.shared_copy import shared_parameters
from obc.structures.units import NotPrunableError

# Config keys for the number of blocks.
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "depth")
_SIDED_COUNTS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_encoder_blocks"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_PAIRS = (("fc1", "fc2"), ("lin1", "lin2"), ("linear1", "linear2"), ("c_fc", "c_proj"))
_ADDS_ITSELF = ("residual", "input_tensor", "residual_states")
_CROSS = ("cross", "encoder_attn", "enc_attn", "encdec")


@dataclass(frozen=True, eq=False)
class DepthUnit:
    """A whole block or branch.

    Attributes:
        group: a group with one unit, named after the module whose output changes.
        block: the list of blocks and the position in it; None for a branch.
        stand_ins: module -> its stand-in.
    """

    group: ChannelGroup
    block: tuple[str, int] | None
    stand_ins: Mapping[str, StandIn]

    def holds(self, name: str) -> bool:
        """Whether the module or tensor with this name is removed with the unit."""
        return any(is_within(name, own) for own in self.stand_ins)


class Holders:
    """Looks up by name with which of these units a module or tensor is removed."""

    def __init__(self, units: Sequence[DepthUnit]) -> None:
        self.units = units
        self._places: dict[str, list[int]] = {}
        for place, unit in enumerate(units):
            for name in unit.stand_ins:
                self._places.setdefault(name, []).append(place)

    def of(self, name: str) -> set[int]:
        """The indices of the units that it is removed with (:meth:`DepthUnit.holds`)."""
        return {place for one in outwards(name) for place in self._places.get(one, ())}

    def innermost(self, name: str) -> int | None:
        """The branch, or else the whole block, that it is removed with; None if there is none."""
        found = self.of(name)
        return min(found, key=lambda place: (self.units[place].group.kind == "layers", place), default=None)


@dataclass(frozen=True)
class FoundDepth:
    """The units, why others were left out, and the config's counts of the lists.

    Attributes:
        units: by name.
        left_out: module -> reason.
        depth: all lists with nothing removed.
    """

    units: dict[str, DepthUnit] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    depth: Depth = field(default_factory=Depth)


def find_depth(model: nn.Module, modules: Mapping[str, nn.Module], kinds: Collection[str]) -> FoundDepth:
    """Find the blocks and branches of a model that can be removed.

    Args:
        model: a model of the transformers library, or built like one.
        kinds: "layers", "sublayers" or both.
    """
    units: dict[str, DepthUnit] = {}
    left_out: dict[str, str] = {}
    lists: dict[str, BlockList] = {}
    config: dict[str, tuple[str, Any]] = {}
    shared = _shared_owners(model)
    for list_name in block_lists(modules):
        blocks: Any = modules[list_name]
        outputs = next(_outputs(block) for block in blocks if not isinstance(block, Skipped))
        lists[list_name] = BlockList(len(blocks), outputs=outputs)
        config |= {key: (list_name, value) for key, value in _config_values(model, modules, list_name).items()}
        for place in range(len(blocks)):
            name = f"{list_name}.{place}"
            if isinstance(blocks[place], Skipped):
                continue
            if tied := next((owner for owner in shared if owner.startswith(f"{name}.")), None):
                left_out[name] = f"{tied} shares a parameter with {shared[tied]}"
                continue
            found = []
            if "layers" in kinds and place == 0:
                left_out[name] = (
                    "the first block of a list stays, because caches, masks and tables of positions may depend on it"
                )
            if "layers" in kinds and place > 0:
                stand_in = StandIn("input", _outputs(blocks[place]))
                found.append(DepthUnit(_group(name, "layers"), (list_name, place), {name: stand_in}))
            if "sublayers" in kinds:
                branches = _branches(modules, name, left_out)
                found += [unit for unit in branches if not isinstance(modules[unit.group.name], Skipped)]
            units |= {unit.group.name: unit for unit in found}
    return FoundDepth(units, left_out, Depth(lists, {}, config))


def _group(name: str, kind: str) -> ChannelGroup:
    return ChannelGroup(name, (Slice(name, "out", torch.zeros(1, 1, dtype=torch.int64, device="cpu")),), kind)


def block_lists(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the lists of blocks: the outermost ones whose members contain linear layers."""
    found: list[str] = []
    for name, module in modules.items():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        members = [member for member in module if not isinstance(member, Skipped)]
        if not members or any(isinstance(member, (nn.ModuleList, nn.Sequential)) for member in members):
            continue
        inside = [list(member.modules())[1:] for member in members]
        if all(any(layout_of(one) is not None for one in inner) for inner in inside):
            found.append(name)
    return found


def _shared_owners(model: nn.Module) -> dict[str, str]:
    """Module with a parameter that another holds too -> the other."""
    shared: dict[str, str] = {}
    for names in shared_parameters(model):
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        shared |= dict(zip(owners, [*owners[1:], owners[0]], strict=True)) if len(owners) > 1 else {}
    return shared


def merged(found: Depth, before: Depth) -> Depth:
    """The blocks already removed from the model's lists."""
    lists = {name: one if one.removed else found.lists.get(name, one) for name, one in before.lists.items()}
    return Depth({**found.lists, **lists}, before.stand_ins, {**found.config, **before.config})


def without_unit(depth: Depth, unit: DepthUnit) -> Depth:
    """``depth`` with this unit removed as well."""
    lists, stand_ins = dict(depth.lists), {n: s for n, s in depth.stand_ins.items() if not unit.holds(n)}
    if unit.block is None:
        return Depth(lists, stand_ins | dict(unit.stand_ins), depth.config)
    name, place = unit.block
    lists[name] = replace(lists[name], removed=tuple(sorted({*lists[name].removed, place})))
    return Depth(lists, stand_ins, depth.config)


# --- branches -------------------------------------------------------------------------------------------------


def _branches(modules: Mapping[str, nn.Module], block: str, left_out: dict[str, str]) -> Iterator[DepthUnit]:
    children = dict(modules[block].named_children())
    done: set[str] = set()
    for first, second in _PAIRS:
        if first in children and second in children and layout_of(children[second]) is not None:
            done |= {first, second}
            yield _branch(modules, joined(block, second), [joined(block, first)])
    if "intermediate" in children and "output" in children and hasattr(children["output"], "dense"):
        done |= {"intermediate", "output"}
        yield _branch(modules, joined(block, "output.dense"), [joined(block, "intermediate")])
    for child, module in children.items():
        name = joined(block, child)
        if child in done or not any(layout_of(inner) is not None for inner in module.modules()):
            continue
        try:
            if layout_of(module) is not None:
                raise NotPrunableError("a layer of the block itself; which branch it belongs to is not known")
            if isinstance(module, nn.ModuleList):
                raise NotPrunableError("a list; which of its members are branches is not known")
            if hasattr(module, "self") and hasattr(getattr(module, "output", None), "dense"):
                yield _branch(modules, joined(name, "output.dense"), [joined(name, "self")])
                continue
            for inner, inside in module.named_modules():
                if adds := [key for key in inspect.signature(inside.forward).parameters if key in _ADDS_ITSELF]:
                    raise NotPrunableError(f"{joined(name, inner)} is handed {adds[0]}, and adds to it itself")
            yield _branch(modules, name, [])
        except NotPrunableError as reason:
            left_out[name] = str(reason)


def _branch(modules: Mapping[str, nn.Module], end: str, skipped: Sequence[str]) -> DepthUnit:
    stand_ins = {}
    for name in skipped:
        stand_ins[name] = StandIn("input", _outputs(modules[name]), counts_positions=_counts(name, modules[name]))
    module = modules[end]
    layout, weight = layout_of(module), getattr(module, "weight", None)
    features = None if layout is None else layout.sizes(weight)[0]  # type: ignore[arg-type]
    outputs = 0 if layout is not None else _outputs(module)
    stand_ins[end] = StandIn("zeros", outputs, features, counts_positions=_counts(end, module))
    return DepthUnit(_group(end, "sublayers"), None, stand_ins)


def _counts(name: str, module: nn.Module) -> bool:
    """Whether it is an attention that fills a layer of the cache."""
    last = name.rpartition(".")[2]
    attends = "attention" in type(module).__name__.lower() or "attn" in last
    cross = any(word in last.lower() for word in _CROSS)
    return attends and not cross and type(getattr(module, "layer_idx", None)) is int


def _outputs(module: nn.Module) -> int:
    """The length of the tuple that ``forward`` returns; 0 for a tensor. By its source, else by its annotation."""
    forward = inspect.unwrap(type(module).forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):
        tree = ast.Module([], [])
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    sizes = {len(value.elts) for value in returned if isinstance(value, ast.Tuple)}
    if len(sizes) == 1 and all(isinstance(value, ast.Tuple) for value in returned):
        return sizes.pop()
    if returned and all(_is_sum(tree, value) for value in returned):
        return 0  # whatever the annotation says: some were copied from layers that returned tuples
    annotation = inspect.signature(forward).return_annotation
    if annotation is inspect.Signature.empty:
        return 0
    return _of_annotation(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def _is_sum(tree: ast.Module, value: ast.expr) -> bool:
    """Whether an expression is a sum or product of tensors, or a variable whose last value is one.

    It is not if a tuple occurs in it, or, for ``x += ...``, in any value of the variable.
    """
    if not isinstance(value, ast.Name):
        return isinstance(value, ast.BinOp) and not _has_tuple(value)
    values = sorted(_values_of(tree, value.id), key=lambda entry: entry[0])
    if not values:
        return False
    _, last, augments = values[-1]
    if augments:
        return not any(_has_tuple(one) for _, one, _ in values)
    return isinstance(last, ast.BinOp) and not _has_tuple(last)


def _values_of(tree: ast.Module, name: str) -> Iterator[tuple[int, ast.expr, bool]]:
    """(line, value, whether it is added to the one before) for everything assigned to a variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets: Sequence[ast.expr] = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
            targets = [node.target]
        else:
            continue
        if node.value is not None and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            yield node.lineno, node.value, isinstance(node, ast.AugAssign)


def _has_tuple(value: ast.expr) -> bool:
    """Whether a tuple occurs in an expression, except as an index or an argument."""
    if isinstance(value, ast.Tuple):
        return True
    if isinstance(value, (ast.BinOp, ast.IfExp)):
        return any(_has_tuple(one) for one in ast.iter_child_nodes(value) if isinstance(one, ast.expr))
    return False


def _of_annotation(annotation: str) -> int:
    """The length of the tuple that an annotation says; 0 for anything else."""
    try:
        node = ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return 0
    if not isinstance(node, ast.Subscript) or ast.unparse(node.value).rpartition(".")[2].lower() != "tuple":
        return 0
    sizes = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
    return 0 if any(isinstance(one, ast.Constant) and one.value is ... for one in sizes) else len(sizes)


# --- the config -------------------------------------------------------------------------------------------------


def _config_values(model: Any, modules: Mapping[str, nn.Module], list_name: str) -> dict[str, Any]:
    """Dotted names and values of the config's counts of a list's blocks."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    size = len(modules[list_name])  # type: ignore[arg-type]
    owner = _owner_config(modules, list_name)
    parts = dict(config_parts(config))
    path = next((path for path, part in parts.items() if part is owner), "")
    part = parts[path]
    prefix = f"{path}." if path else ""
    found: dict[str, Any] = {}
    for key in _count_keys(part, list_name):
        if type(value := getattr(part, key, None)) is int and value == size:
            found[f"{prefix}{key}"] = value
            break
    for key, value in vars(part).items():
        listed = isinstance(value, (list, tuple)) and len(value) == size
        if listed and not key.startswith("_") and key != "architectures":
            found[f"{prefix}{key}"] = list(value)
    return found


def _count_keys(config: Any, list_name: str) -> tuple[str, ...]:
    side = next((side for side in _SIDED_COUNTS if side in list_name), None)
    if side is None or not getattr(config, "is_encoder_decoder", False):
        return (*_COUNTS, *_SIDED_COUNTS["encoder"], *_SIDED_COUNTS["decoder"])
    return (*_SIDED_COUNTS[side], *(_COUNTS if side == "encoder" else ()))


def _owner_config(modules: Mapping[str, nn.Module], name: str) -> Any:
    """The config of the innermost module around a list that has one."""
    configs = (vars(modules[one]).get("config") for one in outwards(name))
    return next((config for config in configs if config is not None), None)
