"""The plan of a scorer: readers, slots of the flat rows, and the gradients that check or replace gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from obc import ops
from obc.model.arguments import instance, meant, several
from obc.model.groups import Side
from obc.model.rules import Rule, channel_count, scored_rule
from obc.model.sharding import is_sharded
from obc.scoring.coverage import Coverage
from obc.scoring.reading.chain_candidates import Candidates, Pending
from obc.scoring.reading.chains import Chains
from obc.scoring.reading.flat_row import FlatRow, Slot
from obc.scoring.reading.gradients import ComputedWeight, NormGradients, WeightGradient
from obc.scoring.reading.module_readers import ModuleReader
from obc.scoring.sharding import tied

ModuleFilter = Iterable[str] | Mapping[str, Iterable[Side]] | Callable[[str, nn.Module], bool]
_SIDES: frozenset[Side] = frozenset(("in", "out"))
# Known to scale and shift their outputs.
_SCALES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass
class GradientSource:
    """A weight's gradient and the readers that it checks or replaces; a tied weight has several.

    ``partial``: it checks one side only and replaces nothing, because others share the bias.
    """

    gradient: WeightGradient
    readers: list[ModuleReader]
    partial: bool = False


@dataclass
class Plan:
    """Everything that a scorer reads.

    Attributes:
        readers: by module name, in the order of the model.
        unscored: module name -> why it has no rule.
        flats: one flat row per device and accumulation dtype.
        sources: the weights whose gradient can check or replace gates.
        norms: (parameter, slot) of norms read from their own gradients; weights and biases are separate entries.
        unchecked: weights of modules that only gates can read.
        chains: which rows follow from which, once a row was checked.
    """

    readers: dict[str, ModuleReader] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)
    flats: dict[tuple[torch.device, torch.dtype], FlatRow] = field(default_factory=dict)
    sources: list[GradientSource] = field(default_factory=list)
    norms: list[list[tuple[nn.Parameter, Slot]]] = field(default_factory=list)
    unchecked: list[Tensor] = field(default_factory=list)
    chains: Chains = field(default_factory=Chains)

    def candidates(self) -> Candidates:
        """Candidates for chains: norms whose rows come from their own gradients, with the names that torch's have."""
        norms = [reader for reader in self.readers.values() if reader.how == "norm gradient"]
        readers = [reader for reader in norms if reader.rule.weight == "weight"]
        return Candidates({id(reader.weight): (reader.module, reader.out) for reader in readers})

    def confirm_chains(self, candidates: Candidates | Pending, norms: Iterable[NormGradients]) -> None:
        """Keep the chains that hold in this row and belong to modules that gates read."""
        gated = [reader for reader in self.readers.values() if reader.how == "gate" and reader.in_ is not None]
        inputs = {reader.in_ for reader in gated}
        # In the checking row, in-place changes happened to a copy, which gives a different graph.
        outputs = {reader.out for reader in gated if not reader.copy_output}
        found = [one for one in candidates.found() if one.seen_by in inputs]
        self.chains.confirm((one for one in found if one.slot in inputs or one.slot in outputs), norms)

    def give_up_chains(self) -> None:
        """Put gates everywhere again."""
        self.chains.give_up()
        for reader in self.readers.values():
            reader.forget_native()

    def parameters_read(self) -> set[int]:
        """The identities of the parameters that the plan reads."""
        weights = [one for source in self.sources for one in source.gradient.parameters]
        norms = [norm for part in self.norms for norm, _ in part]
        return {id(parameter) for parameter in (*weights, *norms, *self.unchecked)}

    def coverage(self, model: nn.Module, checked: bool) -> dict[str, Coverage]:
        """Module name -> how it is read, or why not, in the order of the model."""
        coverage, relations = {}, _Relations(self)
        for name, _ in model.named_modules():
            if name in self.unscored:
                coverage[name] = Coverage.unscored(self.unscored[name])
            elif name in self.readers:
                coverage[name] = self._how(self.readers[name], checked, relations)
        return coverage

    def _how(self, reader: ModuleReader, checked: bool, relations: _Relations) -> Coverage:
        if not reader.scored:
            return Coverage.unscored(str(reader.reason))
        if not self._was_used(reader):
            return Coverage.unscored("no gradient reached it in any row")
        if reader.how == "weight gradient":
            return Coverage(reader.how, reader.reason)
        tied = relations.tied(reader)
        if reader.how != "gate":
            return Coverage(reader.how, tied=tied)
        checked = checked and reader in relations.checkable
        sides = {"out": reader.out} | ({} if reader.in_ is None else {"in": reader.in_})
        chained = [(side, self.chains.slots[slot]) for side, slot in sides.items() if slot in self.chains.slots]
        return Coverage("gate", reader.reason, copied=reader.copy_output, checked=checked, tied=tied, chained=chained)

    def _was_used(self, reader: ModuleReader) -> bool:
        if reader.how == "weight gradient":
            return any(source.gradient.fired for source in self.sources if reader in source.readers)
        return reader.used or (reader.called and reader.how == "gate")

    def without_source(self) -> list[ModuleReader]:
        """Readers whose gates no weight's gradient can check or replace."""
        checked = {reader for source in self.sources if source.gradient.seen for reader in source.readers}
        return [reader for reader in self.readers.values() if reader.how == "gate" and reader not in checked]

    def sides(self, name: str) -> dict[str, Slot]:
        """The slots of a module's rows: "out_channels" and "in_channels", as far as they are read."""
        reader = self.readers[name]
        slots = {"out_channels": reader.out, "in_channels": reader.in_}
        return {side: slot for side, slot in slots.items() if slot is not None and slot.read}

    def layout(self) -> list[tuple[str, int, int]]:
        """(module, out channels, in channels), -1 for a side that is not read; a saved state must have the same."""
        return [(name, _size_of(reader.out), _size_of(reader.in_)) for name, reader in self.readers.items()]

    def state_dict(self) -> dict[str, Any]:
        """Scores and everything learnt in the first row, to resume from."""
        return {
            "layout": self.layout(),
            "scores": [flat.scores.clone() for flat in self.flats.values()],
            "readers": {name: {key: getattr(reader, key) for key in _STATE} for name, reader in self.readers.items()},
            "fired": [source.gradient.fired for source in self.sources],
            "chains": self.chains.state(self._slots(), self._modules()),
        }

    def _slots(self) -> list[Slot]:
        return [slot for flat in self.flats.values() for slot in flat.slots]

    def _modules(self) -> dict[str, nn.Module]:
        return {name: reader.module for name, reader in self.readers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state; ValueError, and nothing is loaded, if it is of another model or of other options."""
        here, there = self.layout(), [tuple(entry) for entry in state["layout"]]
        for mine, theirs in zip(here, there, strict=False):
            if mine != theirs:
                raise ValueError(f"this state is of another model or other options: it has {theirs}, this model {mine}")
        if len(here) != len(there):
            raise ValueError(
                f"this state has {len(there)} modules, this model {len(here)}; use the same model and options"
            )
        sums = [flat.scores for flat in self.flats.values()]
        if [tuple(saved.shape) for saved in state["scores"]] != [tuple(flat.shape) for flat in sums]:
            raise ValueError("the sums in this state have other lengths than its modules have channels; it is damaged")
        for flat, saved in zip(sums, state["scores"], strict=True):
            flat.copy_(saved)
        for name, values in state["readers"].items():
            for key in _STATE:
                setattr(self.readers[name], key, values[key])
        for source, fired in zip(self.sources, state["fired"], strict=True):
            source.gradient.fired = fired
        self.chains.load(state["chains"], self._slots(), self._modules())


class _Relations:
    """The readers that share a weight, and those that a weight's gradient can check, for a whole plan."""

    def __init__(self, plan: Plan) -> None:
        whole = [source for source in plan.sources if source.gradient.seen and not source.partial]
        self.checkable = {reader for source in whole for reader in source.readers}
        # Computed weights are new tensors at every access: held, so that no two have the same identity.
        self._weights = {reader: reader.weight for reader in plan.readers.values()}
        self._sharing: dict[int, list[ModuleReader]] = {}
        for reader, weight in self._weights.items():
            self._sharing.setdefault(id(weight), []).append(reader)

    def tied(self, reader: ModuleReader) -> list[str]:
        """The names of the other readers of the same weight."""
        return [other.name for other in self._sharing[id(self._weights[reader])] if other is not reader]


# What a reader's state consists of.
_STATE = ("how", "reason", "scored", "called", "used", "copy_input", "copy_output")


def _size_of(slot: Slot | None) -> int:
    return slot.size if slot is not None and slot.read else -1


def _wanted(model: nn.Module, modules: ModuleFilter | None) -> Callable[[str, nn.Module], frozenset[Side]]:
    if modules is None:
        return lambda name, module: _SIDES
    if callable(modules):
        predicate = modules
        return lambda name, module: _SIDES if predicate(name, module) else frozenset()
    several("modules", modules)
    for name in modules:
        instance("each of modules", name, str, "a name")
    sides: dict[str, frozenset[Side]] = dict.fromkeys(modules, _SIDES)
    if isinstance(modules, Mapping):
        for name, wanted_sides in modules.items():
            several(f"modules[{name!r}]", wanted_sides)
        sides = {name: frozenset(wanted_sides) for name, wanted_sides in modules.items()}
        for name, wanted_sides in sides.items():
            if not wanted_sides or wanted_sides - _SIDES:
                raise ValueError(f"modules: {name!r} must have 'in', 'out' or both, got {sorted(wanted_sides)}")
    known = [name for name, _ in model.named_modules()]
    if unknown := sorted(sides.keys() - set(known)):
        raise ValueError(
            f"modules: the model has no module {unknown[0]!r}; names are those of model.named_modules()"
            f"{meant(unknown[0], known)}"
        )
    return lambda name, module: sides.get(name, frozenset())


def make_plan(model: nn.Module, modules: ModuleFilter | None, per_sample: bool, fold_groups: bool) -> Plan:
    """Decide how each module of the model is read.

    Raises:
        ValueError: no module can be scored, or ``modules`` names one that the model does not have.
    """
    plan, slots = Plan(), _Slots()
    rules: dict[str, tuple[nn.Module, Rule]] = {}
    wanted = _wanted(model, modules)
    for name, module in model.named_modules():
        if not (sides := wanted(name, module)):
            continue
        rule = scored_rule(module)
        if isinstance(rule, str):
            plan.unscored[name] = rule
        elif rule is not None and slots.ask(module, rule, sides):
            rules[name] = module, rule
    for name, (module, rule) in rules.items():
        plan.readers[name] = _reader(name, module, rule, slots, fold_groups)
    if not plan.readers:
        found = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
        among = "" if modules is None else " among those that modules= chooses"
        raise ValueError(f"{type(model).__name__} has no module that can be scored{among} (its modules: {found})")
    plan.flats = slots.flats
    for reader in plan.readers.values():
        if type(reader.module) is nn.Embedding:
            tokens = slots.known.get((id(reader.weight), 0))
            reader.tokens = tokens if tokens is not None and tokens.read else None
    if is_sharded(model):
        _plan_sharded(plan)
    else:
        _plan_gradients(plan, per_sample)
    for reader in plan.without_source():
        reader.doubted = reader.rule.kind == "norm" and not isinstance(reader.module, _SCALES)
    for flat in plan.flats.values():
        flat.allocate()
    return plan


class _Slots:
    """The slots of all weights; one per weight and dimension, so that tied weights share theirs."""

    def __init__(self) -> None:
        self.flats: dict[tuple[torch.device, torch.dtype], FlatRow] = {}
        self.known: dict[tuple[int, int], Slot] = {}
        self._asked: set[tuple[int, int]] = set()

    def ask(self, module: nn.Module, rule: Rule, sides: Iterable[Side]) -> bool:
        """Note that these sides of a module are read; False if it has none of them.

        If one use of a tied weight needs a slot, all uses read it.
        """
        axes: dict[Side, int | None] = {"out": None if rule.inputs_alone else rule.out_axis, "in": rule.in_axis}
        asked = {_key(module, rule, axis) for side in sides if (axis := axes[side]) is not None}
        self._asked |= asked
        return bool(asked)

    def of(self, name: str, module: nn.Module, rule: Rule, axis: int, fold: int) -> Slot:
        key = _key(module, rule, axis)
        if key not in self.known:
            weight: Tensor = getattr(module, rule.weight)
            kind = (weight.device, ops.accumulation_dtype(weight.dtype))
            size = channel_count(module, rule, axis) // fold
            if key in self._asked:
                self.known[key] = self.flats.setdefault(kind, FlatRow(*kind)).add(name, size)
            else:
                self.known[key] = Slot(name, FlatRow(*kind), 0, size, read=False)
        return self.known[key]


def _key(module: nn.Module, rule: Rule, axis: int) -> tuple[int, int]:
    # A parametrisation computes a new tensor at every access, so the module identifies the weight.
    weight = getattr(module, rule.weight)
    return id(weight if isinstance(weight, nn.Parameter) else module), axis


def _reader(name: str, module: nn.Module, rule: Rule, slots: _Slots, fold_groups: bool) -> ModuleReader:
    fold = rule.groups if fold_groups and rule.in_axis == 1 else 1
    out = slots.of(name, module, rule, rule.out_axis, 1)
    in_ = None if rule.in_axis is None else slots.of(name, module, rule, rule.in_axis, fold)
    reader = ModuleReader(name, module, rule, out, in_, fold)
    padding = getattr(module, "padding_idx", None) if rule.looks_up else None
    if padding is not None and bool(reader.weight[padding].any()):
        reader.reason = "its padding row is not zero but has no gradient"
    return reader


def _plan_gradients(plan: Plan, per_sample: bool) -> None:
    by_weight: dict[int, list[ModuleReader]] = {}
    weights: list[tuple[nn.Parameter, Slot]] = []
    biases: list[tuple[nn.Parameter, Slot]] = []
    inseparable = _sharing_a_bias_alone(plan.readers.values())
    for reader in plan.readers.values():
        weight = reader.weight
        has_gradient = _with_gradient(reader) is not None
        if reader.rule.inputs_alone:
            plan.unchecked.append(weight)
        elif reader in inseparable:
            plan.unchecked.append(weight)
            if reader.rule.out_dim is None:
                reader.scored, reader.reason = False, "it shares its bias with other modules and no gate serves it"
            elif has_gradient and reader.in_ is not None and reader.in_.read:
                by_weight.setdefault(_weight_key(reader), []).append(reader)
        elif reader.rule.kind == "norm" and not per_sample and isinstance(weight, nn.Parameter):
            reader.how = "norm gradient"
            weights.append((weight, reader.out))
            if reader.rule.bias is not None:
                biases.append((getattr(reader.module, reader.rule.bias), reader.out))
        elif has_gradient:
            by_weight.setdefault(_weight_key(reader), []).append(reader)
            if reader.rule.out_dim is None:
                reader.reason = "no activation shows how its parameters are used"
        elif reader.rule.out_dim is None:
            reader.scored, reader.reason = False, "its weight is computed and no gate serves it"
    plan.norms = [part for entries in (weights, biases) for part in _by_kind(_once(entries))]
    for readers in by_weight.values():
        partial = not inseparable.isdisjoint(readers)
        plan.sources.append(GradientSource(_weight_gradient(readers, partial), readers, partial))


def _with_gradient(reader: ModuleReader) -> nn.Parameter | ComputedWeight | None:
    """The reader's weight, if it has a gradient that can be read."""
    weight = reader.weight
    if reader.rule.packed or not weight.is_floating_point():
        return None
    return weight if isinstance(weight, nn.Parameter) else ComputedWeight.of(reader.module, reader.rule.weight)


def _weight_key(reader: ModuleReader) -> int:
    """What identifies a weight: the parameter, or the module that computes it anew at every access."""
    weight = reader.weight
    return id(weight if isinstance(weight, nn.Parameter) else reader.module)


def _once(entries: Iterable[tuple[nn.Parameter, Slot]]) -> list[tuple[nn.Parameter, Slot]]:
    """Each parameter once: modules that share one have one slot, and its gradient is already the sum of their uses."""
    return list({id(parameter): (parameter, slot) for parameter, slot in entries}.values())


def _sharing_a_bias_alone(readers: Iterable[ModuleReader]) -> set[ModuleReader]:
    """Readers whose bias others have too, with another weight: its gradient does not say whose share is whose.

    Gates read them, in batch rows those of norms too, and no gradient checks these gates.
    """
    users: dict[int, list[ModuleReader]] = {}
    for reader in readers:
        bias = None if reader.rule.bias is None else getattr(reader.module, reader.rule.bias)
        if isinstance(bias, nn.Parameter):
            users.setdefault(id(bias), []).append(reader)
    return {one for several in users.values() if len({id(each.out) for each in several}) > 1 for one in several}


def _plan_sharded(plan: Plan) -> None:
    """No process has a whole weight's gradient: gates read everything, norms too, and what they can't is named."""
    for reader in plan.readers.values():
        if reader.rule.out_dim is None:
            reader.scored, reader.reason = False, "no gate serves it, and its weight is spread over processes"
    for reader in tied(plan.readers.values()):
        reader.scored, reader.reason = False, "its weight is tied, and spread over processes"


def _by_kind(entries: list[tuple[nn.Parameter, Slot]]) -> list[list[tuple[nn.Parameter, Slot]]]:
    """Split by parameter dtype and flat row, so that each slot appears at most once in every part."""
    parts: dict[tuple[torch.dtype, FlatRow, int], list[tuple[nn.Parameter, Slot]]] = {}
    seen: dict[Slot, int] = {}
    for parameter, slot in entries:
        turn = seen[slot] = seen.get(slot, -1) + 1
        parts.setdefault((parameter.dtype, slot.flat, turn), []).append((parameter, slot))
    return list(parts.values())


def _weight_gradient(readers: list[ModuleReader], partial: bool) -> WeightGradient:
    """The transient gradient of the weight that these readers share; if it is ``partial``, of their in channels."""
    by_axis: dict[int, Slot] = {}
    biases = []
    for reader in readers:
        rule = reader.rule
        if reader.out.read and not partial:
            by_axis[0 if rule.elementwise else rule.out_axis] = reader.out
        if rule.in_axis is not None and reader.in_ is not None and reader.in_.read:
            by_axis[rule.in_axis] = reader.in_
        bias = None if rule.bias is None else getattr(reader.module, rule.bias)
        if isinstance(bias, nn.Parameter) and reader.out.read and not partial:
            biases.append((bias, reader.out))
    column_dim = 2 if any(2 in (reader.rule.in_axis, reader.rule.out_axis) for reader in readers) else 1
    first = readers[0]
    weight = _with_gradient(first)
    assert weight is not None
    return WeightGradient(
        weight,
        by_axis.get(0),
        by_axis.get(column_dim),
        max(reader.rule.groups for reader in readers),
        max(reader.fold for reader in readers),
        _once(biases),
        elementwise=first.rule.elementwise,
        column_dim=column_dim,
    )
