"""The pruning plan, what every layer kept: composed over steps, verified exactly, saved as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.files import atomic_write, built, read_fields
from obc.model.arguments import instance
from obc.model.counts import count_of, set_count
from obc.model.cutting import cut
from obc.model.depth import (
    Depth,
    compact,
    original_names,
    outer_lists,
    put_stand_in,
    refuse_longer_lists,
    refuse_other_lists,
    with_lists,
)
from obc.model.held_tensors import held_tensors
from obc.model.kept import Kept, PlanError, kept_of
from obc.model.matching import match
from obc.model.names import joined, named_modules, named_tensors
from obc.model.slicing import original_tensor, refuse_non_state_dict, same_values, sliced
from obc.model.usable import refuse_non_modules, refuse_without_values
from obc.page.document import fragment
from obc.page.markup import table

_FORMAT, _VERSION = "obc.PruningPlan", 1

# Channels, columns and blocks must lie below this; a damaged file may say otherwise.
_LARGEST = 2**31
# What else than tensors and torch's own layers a plan changes: (module, attribute, new value), for an unpruned model.
_COUNTS: list[Callable[[nn.Module, PruningPlan], list[tuple[Any, str, Any]]]] = []
# Fields that may be 0 or missing.
_DIMENSIONS = ("dim", "in_dim")
# Absent from files if they are not known, as in files from before they were recorded.
_SIZES = ("out_size", "in_size")


class PruningPlan(Mapping[str, Kept]):
    """The channels that every pruned layer kept, by module name (raw parameters: by parameter name).

    Names are those of the unpruned model, even if whole blocks were removed and later ones moved up in their list.

    Args:
        kept: name -> what was kept.
        depth: the removed blocks and branches.
        counts: module -> attribute -> its value in the pruned model: an integer that counts channels or heads, or
            several, of which some do. ``"config.n_head"`` is one in the module's config.
    """

    def __init__(
        self,
        kept: Mapping[str, Kept] | None = None,
        depth: Depth | None = None,
        counts: Mapping[str, Mapping[str, int | list[int]]] | None = None,
    ) -> None:
        instance("kept", kept, (Mapping, type(None)), "a mapping of layers' names to obc.Kept")
        self._kept = dict(kept or {})
        for name, one in self._kept.items():
            instance(f"kept[{name!r}]", one, Kept, "an obc.Kept")
        self.depth = Depth() if depth is None else depth
        self.counts = {module: dict(values) for module, values in (counts or {}).items()}

    def __getitem__(self, name: str) -> Kept:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        gone = self.depth.removed
        return f"PruningPlan({len(self)} layers{f', without {len(gone)} modules' if gone else ''})"

    def _repr_html_(self) -> str:
        """A table for a notebook: how many channels every layer kept."""
        rows = [[name, _kept_count(kept.out_channels), _kept_count(kept.in_channels)] for name, kept in self.items()]
        head = ["layer", "out channels kept", "in channels kept"]
        return fragment(table(head, rows, label="what every layer kept"))

    def out_index(self, name: str, device: torch.device) -> Tensor | slice:
        """An index, on ``device``, of the unpruned layer's or norm's ``name`` by its kept out channels, or of all."""
        channels = self._kept[name].out_channels if name in self else None
        return slice(None) if channels is None else channels.to(device)

    def verify(self, original_state_dict: Mapping[str, Tensor], pruned_model: nn.Module) -> None:
        """Check that slicing the original by this plan gives every tensor of the pruned model, value by value.

        Layers without an entry must be unchanged.

        Args:
            original_state_dict: ``state_dict()`` of the unpruned model, or a copy of it from before pruning.
            pruned_model: the model as pruning left it, before anything compensates or trains it.

        Raises:
            PlanError: a tensor differs; the message names the first one and both shapes.
            TypeError: ``original_state_dict`` is no mapping.
        """
        self.refuse_unknown(pruned_model, "the pruned model")
        refuse_non_state_dict(original_state_dict)
        refuse_longer_lists(original_state_dict, self.depth)
        names = original_names(pruned_model, self.depth)
        for module_name, module, tensor_name, pruned in named_tensors(pruned_model):
            self.verify_tensor(original_state_dict, names[module_name], module, tensor_name, pruned)

    def refuse_unknown(self, model: nn.Module, role: str) -> None:
        """Raise a PlanError if an entry names nothing in the model; ``role`` says in the message which one it is."""
        refuse_non_modules(model, role)
        modules = {name for name, _ in model.named_modules()}
        self._refuse_unknown(self.depth.lists, modules, role)
        names = original_names(model, self.depth)
        known = set(names.values()) | {
            joined(names[name], key)
            for name, module in named_modules(model)
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        known |= {name for _, _, name in held_tensors(model)}
        self._refuse_unknown(self, known, role)

    @staticmethod
    def _refuse_unknown(names: Iterable[str], known: Set[str], role: str) -> None:
        if unknown := next((name for name in names if name not in known), None):
            parts = (name.removesuffix(f".{unknown}") for name in known if name.endswith(f".{unknown}"))
            part = next((part for part in parts if all(joined(part, name) in known for name in names)), None)
            remedy = "pass the plan made for it" if part is None else f"pass its part {part!r}, which has all of them"
            raise PlanError(f"the plan has an entry for {unknown!r}, which {role} lacks; {remedy}")

    def verify_tensor(
        self,
        original_state_dict: Mapping[str, Tensor],
        module_name: str,
        module: nn.Module,
        tensor_name: str,
        pruned: Tensor,
    ) -> None:
        """Like :meth:`verify` for one tensor: ``pruned``, the tensor ``tensor_name`` of the pruned ``module``.

        Args:
            original_state_dict: ``state_dict()`` of the unpruned model.
            module_name: the module's name in the unpruned model.
            module: the pruned module.
            tensor_name: name of its tensor, such as "weight".
            pruned: that tensor.

        Raises:
            PlanError: the original lacks it, or has another shape, dtype or other values where the plan keeps them.
        """
        key = joined(module_name, tensor_name)
        original = original_tensor(original_state_dict, key)
        expected = self._slice(original_state_dict, module_name, module, tensor_name)
        if expected.shape != pruned.shape:
            raise PlanError(
                f"{key}: the plan makes {tuple(expected.shape)} of the original's {tuple(original.shape)}, "
                f"the pruned model has {tuple(pruned.shape)}; record the plan with prune_step while pruning"
            )
        if expected.dtype != pruned.dtype:
            raise PlanError(
                f"{key}: the original is {expected.dtype}, the pruned model {pruned.dtype}; convert one of them"
            )
        if not same_values(expected.to(pruned.device), pruned):
            raise PlanError(
                f"{key}: the original's {tuple(original.shape)} sliced by the plan has the pruned model's shape "
                f"{tuple(pruned.shape)} but other values: it was compensated or trained, or is of another original; "
                "use the pruned model as pruning left it"
            )

    def after(self, earlier: PruningPlan) -> PruningPlan:
        """This plan, of a model that ``earlier`` had pruned before, in terms of the unpruned model.

        What ``earlier`` left must be what this plan was made for, as far as both have the sizes from before pruning.
        For a model that is pruned again, as :func:`load_pruned` returned it, with its blocks renumbered:

        >>> result = obc.prune(load_pruned("pruned"), batches=batches, loss_fn=loss_fn, params=0.8)
        >>> save_pruned(result.model, result.plan.after(obc.PruningPlan.load("pruned/obc_plan.json")), "pruned-again")

        Raises:
            PlanError: ``earlier`` left other numbers of channels or blocks than this plan was made for.
        """
        refuse_non_plans(earlier, "earlier")
        depth = self.depth.after(earlier.depth)
        kept = {name: one for name, one in earlier.items() if not depth.without(name)}
        for name, one in self.items():
            original = earlier.depth.original_name(name)
            try:
                kept[original] = one.after(earlier.get(original))
            except PlanError as error:
                raise PlanError(f"{original}: {error}") from error
        counts = {**earlier.counts, **{earlier.depth.original_name(name): one for name, one in self.counts.items()}}
        return PruningPlan(kept, depth, counts)

    def put_slices(self, original_state_dict: Mapping[str, Tensor], pruned_model: nn.Module) -> None:
        """Reset a pruned model's weights, in place, to the slices of the original.

        Running statistics of norms are kept. Removed blocks must have their stand-ins.

        Args:
            original_state_dict: ``state_dict()`` of the unpruned model.
            pruned_model: the model to reset.

        Raises:
            PlanError: the plan does not describe the model.
        """
        refuse_non_modules(pruned_model, "the pruned model")
        refuse_non_state_dict(original_state_dict)
        refuse_longer_lists(original_state_dict, self.depth)
        with torch.no_grad():
            for module_name, module, tensor_name, tensor in named_tensors(pruned_model):
                if not (isinstance(module, _BatchNorm) and tensor_name in module._buffers):
                    tensor.copy_(self._slice(original_state_dict, module_name, module, tensor_name))

    def _slice(
        self, original_state_dict: Mapping[str, Tensor], module_name: str, module: nn.Module, tensor_name: str
    ) -> Tensor:
        key = joined(module_name, tensor_name)
        original = original_tensor(original_state_dict, key)
        weight = original_state_dict.get(joined(module_name, "weight"))
        return sliced(module, tensor_name, original, kept_of(self, module_name, key), key, weight)

    def apply(self, model: nn.Module) -> nn.Module:
        """Cut an unpruned model to what this plan kept, in place, so that a pruned state dict can be loaded.

        >>> model = build()  # the unpruned model's class and arguments
        >>> obc.PruningPlan.load("plan.json").apply(model).load_state_dict(pruned_state_dict)

        Sizes of torch's own layers are updated, the counts of heads and experts in models of the transformers library,
        the counts of heads in other attentions that obc recognises, and the integers in your own modules, and in their
        configs, that the plan has in ``counts``. Set others yourself. Layers that share a parameter must keep the same
        of it. Which layers read each other a plan does not say, and the model is not run: run one that
        was edited by hand on a batch afterwards.

        Returns:
            The model.

        Raises:
            PlanError: the plan names a module that the model lacks, does not fit a tensor, was made for other sizes or
                a longer or shorter list of blocks, or keeps different channels of a shared one; the model is unchanged.
        """
        refuse_non_modules(model, "the model")
        refuse_other_lists(model, self.depth, "the model")
        self.refuse_unknown(model, "the model")
        counts = [count for find in (*_COUNTS, _own_counts) for count in find(model, self)]
        cut(model, self)
        for owner, attribute, value in counts:
            set_count(owner, attribute, value)
        for name, stand_in in self.depth.stand_ins.items():
            put_stand_in(model, name, stand_in)
        compact(model, self.depth)
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON.

        Raises:
            OSError: the file can't be written; an existing file is left unchanged.
        """
        layers = {
            name: {
                field: _plain(value) for field, value in vars(kept).items() if value is not None or field not in _SIZES
            }
            for name, kept in self.items()
        }
        depth = {"depth": dataclasses.asdict(self.depth)} if self.depth.lists or self.depth.stand_ins else {}
        counts = {"counts": self.counts} if self.counts else {}
        content = json.dumps({"format": _FORMAT, "version": _VERSION, "layers": layers, **depth, **counts}).encode()
        with atomic_write(path) as file:
            file.write(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan written by :meth:`save`.

        Raises:
            PlanError: the file is not a plan, has another version, or is damaged.
            OSError: the file can't be read.
        """
        try:
            content = read_fields(path, _FORMAT)
        except ValueError as error:
            raise PlanError(f"{os.fspath(path)} is not a pruning plan: {error}") from error
        name = os.fspath(path)
        if content.get("version") != _VERSION:
            raise PlanError(f"{name} is not a pruning plan of version {_VERSION}")
        layers = content.get("layers")
        if not isinstance(layers, dict):
            raise PlanError(f"{name} is a damaged pruning plan: it has no layers")
        try:
            depth = built(content["depth"], Depth) if "depth" in content else None
            counts = _counts(content.get("counts", {}))
            return cls({layer: _kept(fields) for layer, fields in layers.items()}, depth, counts)
        except ValueError as error:
            raise PlanError(f"{name} is a damaged pruning plan: {error}") from error

    @classmethod
    def from_models(cls, original_state_dict: Mapping[str, Tensor], pruned_model: nn.Module) -> PruningPlan:
        """Find and verify the plan of a model that was pruned elsewhere, by matching values.

        Channels with equal values are interchangeable and matched in ascending order. A Linear is taken to follow a
        flatten if its columns were kept in blocks and an earlier layer kept those channels.

        Args:
            original_state_dict: ``state_dict()`` of the unpruned model.
            pruned_model: a model of the same modules, whose tensors are slices of the original's.

        Raises:
            PlanError: a tensor of the pruned model is not a slice of the original, or several slices explain it.
        """
        refuse_without_values(pruned_model, "the pruned model")
        kept = match(original_state_dict, pruned_model)
        plan = cls(kept, with_lists(Depth(), outer_lists(pruned_model), kept))
        plan.verify(original_state_dict, pruned_model)
        return plan


def refuse_non_plans(plan: Any, name: str = "plan") -> None:
    """Raise a TypeError if ``plan`` is no :class:`PruningPlan`, but a path or the result that has one."""
    if not isinstance(plan, PruningPlan):
        path = isinstance(plan, (str, os.PathLike))
        inner = isinstance(getattr(plan, "plan", None), PruningPlan)
        remedy = "; pass obc.PruningPlan.load(path)" if path else "; pass its plan, result.plan" if inner else ""
        raise TypeError(f"{name} must be an obc.PruningPlan, got {type(plan).__name__}{remedy}")


def register_counts(find: Callable[[nn.Module, PruningPlan], list[tuple[Any, str, Any]]]) -> None:
    """Let :meth:`PruningPlan.apply` set what ``find(unpruned model, plan)`` returns: (owner, attribute, new value)."""
    if find not in _COUNTS:
        _COUNTS.append(find)


def _own_counts(model: nn.Module, plan: PruningPlan) -> list[tuple[Any, str, Any]]:
    """What the plan itself has of counts, if the model has these attributes; tuples stay tuples."""
    modules, counts = dict(model.named_modules()), list[tuple[Any, str, Any]]()
    for name, values in plan.counts.items():
        for attribute, value in values.items():
            before = count_of(modules.get(name), attribute)
            if isinstance(value, list) and type(before) in (list, tuple) and len(before) == len(value):
                counts.append((modules[name], attribute, type(before)(value)))
            elif isinstance(value, list) or type(before) is not int:
                numbers = f"{len(value)} numbers" if isinstance(value, list) else "number"
                raise PlanError(
                    f"the plan sets the {numbers} {joined(name, attribute)!r}, which the model lacks; pass the plan "
                    "made for it"
                )
            else:
                counts.append((modules[name], attribute, value))
    return counts


def _kept_count(channels: Tensor | None) -> str:
    return "all" if channels is None else str(len(channels))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _kept(fields: Any) -> Kept:
    """Parse one layer's entry of a file; raises ValueError if it is damaged."""
    known = {field.name for field in dataclasses.fields(Kept)}
    if not isinstance(fields, dict) or not fields.keys() <= known:
        raise ValueError(f"a layer has the fields {', '.join(sorted(known))}, got {reprlib.repr(fields)}")
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name.endswith("_channels"):
            values[name] = None if value is None else _indices(name, value)
        elif type(value) is int and 0 <= value < _LARGEST and (value > 0 or name in _DIMENSIONS):
            values[name] = value
        elif name not in (*_DIMENSIONS, *_SIZES) or value is not None:
            raise ValueError(f"{name} must be a positive number, got {reprlib.repr(value)}")
    return Kept(**values)


def _counts(content: Any) -> dict[str, dict[str, int | list[int]]]:
    """Parse the counts of a file; raises ValueError if they are damaged."""
    values = [one for each in content.values() for one in each.values()] if _is_of_dicts(content) else [None]
    numbers = [one for value in values for one in (value if isinstance(value, list) else [value])]
    if not all(type(one) is int and 0 <= one < _LARGEST for one in numbers):
        raise ValueError(f"counts must be modules with attributes and numbers, got {reprlib.repr(content)}")
    return dict(content)


def _is_of_dicts(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(one, dict) for one in content.values())


def _indices(name: str, value: Any) -> Tensor:
    if not isinstance(value, list) or not all(type(index) is int and 0 <= index < _LARGEST for index in value):
        raise ValueError(f"{name} must be a list of indices, got {reprlib.repr(value)}")
    return torch.tensor(value, dtype=torch.int64, device="cpu")
