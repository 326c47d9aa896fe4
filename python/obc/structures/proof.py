"""The proof that removing units is right: the sliced model equals the unpruned one with these units masked.

About half of every group's units, chosen at random, are removed on copies of the model that share its weights: one is
sliced by the structure, one masked (:mod:`obc.structures.masking`), and both run on the same inputs
(:mod:`obc.structures.comparison`). All groups are tried at once; on failure halves of them are tried, down to single
groups. A second try removes other units, so that a misplaced unit shows in one of the two; there the masked channels
are large, so that operations over channels show that barely act on small ones (:mod:`obc.structures.amplified`).
Parameters with a single value (freshly initialised norms, layers that start at zero) get random values in both copies,
because they could hide what comes before them.

A try costs two forward passes.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from obc.model.errors import layer_in
from obc.model.evaluation import Run
from obc.model.groups import ChannelGroup
from obc.model.kept import PlanError, staying
from obc.model.layouts import has_own_tensors, is_depthwise
from obc.model.names import named_modules
from obc.model.shared_copy import shared_copy, shared_parameters
from obc.structures.amplified import SIZES, amplify
from obc.structures.comparison import Observation, compare, observe
from obc.structures.masking import lost_channels, masked_copy, unmaskable
from obc.structures.norm_axis import NormAxisError
from obc.structures.protocol import Limits, Provable
from obc.structures.varied import varied_copy

_TRIES = 2
_SEED = 0  # of the choice of units
# Consumers must distinguish at least this share of the units: half of them are silent behind a ReLU, and half are
# removed in each try.
_SEEN = 0.25
# So many of the groups last tried alone tell whether halves are worth a try.
_RECENT = 4


class ProofError(PlanError):
    """The pruned model does not compute what the unpruned one computes with the same units masked."""


@dataclass
class Proof:
    """The results of proving a structure's groups.

    Attributes:
        proved: groups for which removing equals masking.
        left_out: group -> why removing its units is wrong.
        unproved: group -> why nothing can be said about it.
        error: the largest relative difference between a sliced and a masked model, over the proved groups.
        tolerance: the difference that rounding explains (:attr:`obc.structures.comparison.Observation.tolerance`).
        passes: number of forward passes.
        tries: number of sliced copies.
        seconds: time taken.
        probed: the proved groups whose order was found by running the model (:mod:`obc.structures.influence`).
    """

    proved: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unproved: dict[str, str] = field(default_factory=dict)
    error: float = 0.0
    tolerance: float = 0.0
    passes: int = 0
    tries: int = 0
    seconds: float = 0.0
    probed: list[str] = field(default_factory=list)

    def add(self, other: Proof) -> None:
        """Add the costs and the largest error of another proof for the same structure."""
        self.error, self.tolerance = max(self.error, other.error), max(self.tolerance, other.tolerance)
        self.passes, self.tries = self.passes + other.passes, self.tries + other.tries
        self.seconds += other.seconds

    def again(self, structure: Provable, run: Run) -> dict[str, str]:
        """Prove the present groups of the structure together: what is proved is replaced, costs are added.

        Returns:
            group that was now left out -> reason.
        """
        together = prove(structure, run)
        self.add(together)
        self.proved, self.unproved = together.proved, together.unproved
        return together.left_out


def prove(structure: Provable, run: Run, *, among: Collection[str] | None = None, tries: int = _TRIES) -> Proof:
    """Try every group of ``structure``, and make it leave out those whose removal is wrong.

    Args:
        structure: its model, and what it has removed so far, are not changed.
        run: ``run(model)`` returns the model's outputs on inputs that are always the same, in any nesting.
        among: names of the groups to try; by default all.
        tries: number of tries, with other units and another width in each; the third with one unit less, the fourth
            without the first half, the fifth without the last.
    """
    start = time.perf_counter()
    proof = _Prover(structure, run, tries, among).prove()
    proof.seconds = time.perf_counter() - start
    for name, reason in proof.left_out.items():
        structure.leave_out(name, reason)
    return proof


class _Prover:
    def __init__(self, structure: Provable, run: Run, tries: int, among: Collection[str] | None) -> None:
        self.structure, self.run, self.tries = structure, run, tries
        self.groups = {group.name: group for group in structure.groups if among is None or group.name in among}
        self.proof = Proof()
        self.seen: dict[str, set[int]] = {name: set() for name in self.groups}
        self._alone: list[bool] = []  # whether each group that was tried alone passed
        self._turns: dict[str, int] = {}  # how many groups of the same size come before
        counts: Counter[int] = Counter()
        for name, group in self.groups.items():
            self._turns[name] = counts[group.size]
            counts[group.size] += 1

    def prove(self) -> Proof:
        proof, limits = self.proof, getattr(self.structure, "limits", Limits())
        self.removals = [
            {
                name: units
                for name, group in self.groups.items()
                if not group.is_depth and (len(units := self._units(group, limits, number)) or number)
            }
            for number in range(self.tries)
        ]
        depth = _depth_removals(self.groups)
        names = [name for name in self.groups if name in self.removals[0]]
        if not names and not depth:
            return proof
        try:
            self.base = self._base()
        except Exception as error:  # the model's own code, copied or run
            names = [*names, *(name for one in depth for name in one)]
            proof.unproved |= dict.fromkeys(names, f"a copy of the model does not run: {type(error).__name__}: {error}")
            return proof
        proof.unproved |= unmaskable(self.base, (self.groups[name] for name in names))
        if not self.unmasked.finite():
            proof.unproved |= dict.fromkeys(names, "the model's outputs are not finite on this batch")
        maskable = [name for name in names if name not in proof.unproved]
        others = [name for name in names if name in proof.unproved]
        for number in range(self.tries):
            maskable, others = self._passing(maskable, number), self._passing(others, number)
        proved_depth = self._prove_depth(depth)
        unseen = [name for name in maskable if len(self.seen[name]) < _SEEN * self.groups[name].size]
        proof.unproved |= {name: self._unseen(name) for name in unseen if name not in proof.unproved}
        proof.unproved = {name: why for name, why in proof.unproved.items() if name not in proof.left_out}
        proof.proved = [name for name in [*maskable, *proved_depth] if name not in proof.unproved]
        return proof

    def _prove_depth(self, depth: Sequence[Sequence[str]]) -> list[str]:
        """Those for which removing equals masking; the others are left out."""
        passing: list[str] = []
        for half in depth:
            if not self.unmasked.finite():
                self.proof.unproved |= dict.fromkeys(half, "the model's outputs are not finite on this batch")
                continue
            self.removals.append({name: torch.zeros(1, dtype=torch.int64, device="cpu") for name in half})
            passing += self._passing(half, len(self.removals) - 1)
        return passing

    def _base(self) -> nn.Module:
        """The model to slice and mask: with some values varied if it runs that way, otherwise unchanged."""
        varied = varied_copy(self.structure.model)
        self.unmasked = self._observe(varied)
        if self.unmasked.finite():
            return varied
        plain = shared_copy(self.structure.model)
        self.unmasked = self._observe(plain)
        return plain

    def _units(self, group: ChannelGroup, limits: Limits, number: int) -> Tensor:
        """About half of the units, different ones in every try; none if no smaller width is permitted.

        Groups of one size have different widths: a view by the width of another tensor is right while both are equally
        wide. Where only one smaller width is permitted, none are removed in every other try after the first.
        """
        size, least = group.size, limits.min_units.get(group.name, 1)
        multiple = limits.round_to.get(group.name, 1)
        permitted = [width for width in range(least, size) if width % multiple == 0]
        if not permitted:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        # Every try leaves another width: an operation may be right for even widths only.
        permitted.sort(key=lambda width: abs(width - size / 2))
        if number == _TRIES:
            left = max(permitted)
        elif len(permitted) == 1:
            left = size if number and (number + self._turns[group.name]) % 2 == 0 else permitted[0]
        else:
            left = permitted[min(number + self._turns[group.name] % (number + 3), len(permitted) - 1)]
        gone = size - left
        if number > _TRIES:  # the first half, then the last, where a dependence on which units are removed shows best
            half = size - permitted[0]
            return (
                torch.arange(half, device="cpu")
                if number == _TRIES + 1
                else torch.arange(size - half, size, device="cpu")
            )
        generator = torch.Generator().manual_seed(zlib.crc32(f"{_SEED} {group.name}".encode()))
        order = torch.randperm(size, generator=generator, device="cpu")
        # Half of what one try removes is also removed in the next, so the quarters have different combinations of
        # tries.
        return order.roll(-number * max(1, gone // 2))[:gone].sort().values

    # --- which of them pass ---------------------------------------------------------------------------------

    def _passing(self, names: Sequence[str], number: int) -> list[str]:
        """Those of the groups that pass together; the others are left out."""
        if not names or self._fault(names, number) is None:
            return self._untied(names, number)
        if not self._repeats(names, number):
            self.proof.unproved |= dict.fromkeys(names, "the model returns something else at every call")
            return list(names)
        # Groups of the same kind pass or fail alike. They are adjacent, so that halves mostly contain one kind.
        alike = sorted(names, key=lambda name: ("".join(c for c in name if not c.isdigit()), names.index(name)))
        self._alone.clear()
        passing = self._halved(alike, number)
        if len(passing) > 1 and self._fault(passing, number) is not None:
            passing = self._one_by_one(passing, number)
        return self._untied([name for name in names if name in passing], number)

    def _untied(self, names: Sequence[str], number: int) -> list[str]:
        """Among groups that pass together, perhaps by chance: those that share no tensor, or also pass alone.

        A tensor of a subclass counts as shared by the layer's two sides: which one it belongs to is only inferred.
        """
        shared = {name.rpartition(".")[0] for tied in shared_parameters(self.base) for name in tied}
        shared |= {name for name, module in named_modules(self.base) if has_own_tensors(module)}
        tied = {name for name in names if any(part.module in shared for part in self.groups[name].slices)}
        return [name for name in names if len(names) == 1 or name not in tied or self._passes(name, number)]

    def _halved(self, names: Sequence[str], number: int) -> list[str]:
        if len(names) == 1:
            self._alone.append(self._passes(names[0], number))
            return [*names] if self._alone[-1] else []
        middle = len(names) // 2
        passing: list[str] = []
        for half in (names[:middle], names[middle:]):
            last = self._alone[-_RECENT:]
            hopeless = len(last) > 1 and 2 * sum(last) <= len(last)  # where so many fail alone, most halves do
            passes = len(half) > 1 and not hopeless and self._fault(half, number) is None
            passing += half if passes else self._halved(half, number)
        return passing

    def _one_by_one(self, names: Sequence[str], number: int) -> list[str]:
        """As many as pass together; each passes alone, but not with all others."""
        together: list[str] = []
        for name in names:
            if self._passes(name, number, together):
                together.append(name)
        return together

    def _passes(self, name: str, number: int, together: Sequence[str] = ()) -> bool:
        """Whether a group passes, ``together`` with others; if it does not, it is left out."""
        fault = self._fault([*together, name], number)
        if fault is not None:
            others = f"it can't be pruned together with {', '.join(together)}: " if together else ""
            self.proof.left_out[name] = others + fault
        return fault is None

    # --- one try --------------------------------------------------------------------------------------------

    def _fault(self, names: Sequence[str], number: int) -> str | None:
        """The fault in removing units of these groups, or None."""
        removed = {name: self.removals[number][name] for name in names}
        self.proof.tries += 1
        trial = self.structure.twin(shared_copy(self.base))
        try:
            for part in _parts(removed, min(number + 1, _TRIES)):
                trial.remove(part)
            trial.plan.verify(self.base.state_dict(), trial.model)
            sliced = self._observe(trial.model)
        except Exception as fault:  # whatever a model's own code raises is the reported reason
            layer = layer_in(fault, trial.model)
            place = "" if layer is None else f" in {layer!r}"
            return self._said(
                names, f"the model does not run without {self._shares(removed)}{place}: {type(fault).__name__}: {fault}"
            )
        del trial  # its memory
        try:
            masked = self._masked(names, removed, number)
        except _MaskedError as error:
            return str(error)
        if masked is None:
            return None
        if (shared := self._overlap(names, masked, removed)) is not None:
            return shared
        found = compare(masked, sliced)
        if found.where is None:
            self.proof.error = max(self.proof.error, found.error)
            self.proof.tolerance = max(self.proof.tolerance, masked.tolerance)
            self._note_seen(names, masked, removed)
            self._note_multiplied(names, masked, removed, number)
            return None
        if "output changes" in found.where:
            return self._said(names, f"the model returns something else without {self._shares(removed)}: {found.where}")
        if number % 2:  # the first try, of small channels, did not show it
            return self._said(names, f"its removed channels, made large, change what others do: {found.where}")
        return self._said(
            names,
            "its consumers do not see its channels in this order, or what they see or compute of the others depends "
            f"on those removed: {found.where}",
        )

    def _masked(self, names: Sequence[str], removed: Mapping[str, Tensor], number: int) -> Observation | None:
        """The unpruned model with these units masked, and large in every second try; None if that is impossible."""
        if any(name in self.proof.unproved for name in names):
            return None
        groups = [self.groups[name] for name in names]
        lost = lost_inputs(self.base, groups, removed)
        sizes = SIZES if number % 2 and not any(group.is_depth for group in groups) else ()
        reason = ""
        for size in (*sizes, None):
            try:
                masked = masked_copy(self.base, groups, removed)
                if size is not None:
                    amplify(masked, groups, removed, size)
                found = self._observe(masked, lost)
            except NormAxisError as error:  # removing its units may be wrong, and nothing would show it
                raise _MaskedError(str(error)) from error
            except Exception as error:
                reason = f"the masked model does not run: {type(error).__name__}: {error}"
            else:
                if found.finite():
                    return found
                reason = "the masked model's outputs are not finite"
        if len(names) > 1:
            raise _MaskedError(reason)
        self.proof.unproved[names[0]] = reason
        return None

    def _repeats(self, names: Sequence[str], number: int) -> bool:
        """Whether the masked model returns the same twice."""
        removed = {name: self.removals[number][name] for name in names}
        try:
            one, other = (self._masked(names, removed, number) for _ in range(2))
        except _MaskedError:
            return True
        return one is None or other is None or compare(one, other).where is None

    def _observe(self, model: nn.Module, lost: Mapping[str, Tensor] | None = None) -> Observation:
        self.proof.passes += 1
        return observe(model, self.run, lost)

    # --- messages -------------------------------------------------------------------------------------------

    def _shares(self, removed: Mapping[str, Tensor]) -> str:
        return " and ".join(f"{len(units)} of the {self.groups[name].size} units" for name, units in removed.items())

    def _said(self, names: Sequence[str], what: str) -> str:
        """The fault, and what may explain it: shared parameters, a consumer's own forward, random numbers."""
        modules = {part.module for name in names for part in self.groups[name].slices}
        shared = [
            " and ".join(tied)
            for tied in shared_parameters(self.base)
            if any(name.rpartition(".")[0] in modules for name in tied)
        ]
        drawn = "; the model draws random numbers, other ones for fewer channels: let it draw none while it is pruned"
        what += f"; {', '.join(shared)} are one parameter" if shared else ""
        return what + self._own_forward(names) + drawn * self.unmasked.draws

    def _own_forward(self, names: Sequence[str]) -> str:
        """Says which consumer, a layer of a class with a forward of its own, may compute with another weight."""
        consumers = (part.module for name in names for part in self.groups[name].consumers)
        layers = dict(named_modules(self.base))
        for name in consumers:
            kind = type(layers.get(name))
            if issubclass(kind, (nn.Linear, _ConvNd)) and not kind.forward.__module__.startswith("torch."):
                return (
                    f"; {name!r} is a {kind.__name__}, which has a forward of its own: if it computes its weight from "
                    "all in channels (weight standardisation), obc.plain_layers(model, example_inputs) puts a plain "
                    "layer with that weight in its place"
                )
        return ""

    def _overlap(self, names: Sequence[str], masked: Observation, removed: Mapping[str, Tensor]) -> str | None:
        """A channel that a unit of one of these groups reads and another group removes, or None.

        Of parameters outside layers, such as fused experts, groups count channels along different dimensions.
        """
        lost = lost_inputs(self.base, [self.groups[name] for name in names], removed)
        for name in (one for one in names if not self.groups[one].is_depth):
            stays = staying(self.groups[name].size, removed[name])
            readers = (part for part in self.groups[name].consumers if part.side == "in")
            for part in (one for one in readers if masked.readings.get(one.module)):
                channels = part.channels[stays].flatten()
                both = channels[torch.isin(channels, lost.get(part.module, channels[:0]))]
                if len(both):
                    return f"input channel {int(both[0])} of {part.module} is in several groups, in {name} for example"
        return None

    def _note_seen(self, names: Sequence[str], masked: Observation, removed: Mapping[str, Tensor]) -> None:
        """Record which units' channels are read and can be distinguished."""
        lost = lost_inputs(self.base, [self.groups[name] for name in names], removed)
        for name in (one for one in names if not self.groups[one].is_depth):
            stays = staying(self.groups[name].size, removed[name])
            multiplied = bool(self.groups[name].read_at)
            for part in (one for one in self.groups[name].consumers if one.side == "in" or not multiplied):
                readings = masked.readings.get(part.module, [])
                channels = part.channels[stays]
                if part.module in lost:
                    channels = channels - torch.searchsorted(lost[part.module], channels)
                for reading in readings:
                    if not len(stays) and len(_told_apart(reading.sums[:, None])) >= _SEEN * len(reading.sums):
                        self.seen[name] |= set(range(self.groups[name].size))  # some of its channels always stay
                    self.seen[name] |= set(stays[_told_apart(reading.sums[channels])].tolist())
                if not readings and self._ran(part.module, masked):  # weights may be used without calling the layer
                    self.seen[name] |= set(stays.tolist())

    def _note_multiplied(
        self, names: Sequence[str], masked: Observation, removed: Mapping[str, Tensor], number: int
    ) -> None:
        """Record the units that only products of activations read, if anything changes without them."""
        for name in names:
            group = self.groups[name]
            if group.read_at and group.consumers[0].side == "out":
                alone = masked if len(names) == 1 else self._masked([name], removed, number)
                if alone is not None and compare(self.unmasked, alone).where is not None:
                    self.seen[name] |= set(staying(group.size, removed[name]).tolist())

    def _ran(self, name: str, observed: Observation) -> bool:
        """Whether a layer was called, or the module that holds it; lists of modules are passed over."""
        holder = name
        while holder and holder not in observed.called:
            if holder != name and type(self.base.get_submodule(holder)).forward is not nn.Module.forward:
                return False
            holder = holder.rpartition(".")[0]
        return True

    def _unseen(self, name: str) -> str:
        consumers = [part.module for part in self.groups[name].consumers]
        if self.groups[name].read_at:
            return "what the products of activations that read its channels return makes no difference"
        if not any(module in self.unmasked.called for module in consumers):
            return f"{', '.join(consumers)} did not run"
        return f"what {', '.join(consumers)} read is zero, or the same, for most of its units"


class _MaskedError(Exception):
    """The masked model does not run."""


def _depth_removals(groups: Mapping[str, ChannelGroup]) -> list[list[str]]:
    """Names of whole blocks, or branches, that are tried together: every second one, then the others."""
    kinds: dict[str, list[str]] = {}
    for name, group in groups.items():
        if group.is_depth:
            kinds.setdefault(group.kind, []).append(name)
    return [half for names in kinds.values() for half in (names[::2], names[1::2]) if half]


def lost_inputs(model: nn.Module, groups: Sequence[ChannelGroup], removed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> its input channels that are removed with these units; depthwise convolutions read what they write."""
    lost: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for (name, side), channels in lost_channels(groups, removed).items():
        if side == "in" or (name in modules and is_depthwise(modules[name])):
            lost[name] = channels
    return lost


def _parts(removed: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The same ascending units in ``count`` consecutive removals; each uses the indices that the previous left."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, units in removed.items():
        gone = 0
        for part, chosen in zip(parts, units.tensor_split(count), strict=True):
            if len(chosen):
                part[name] = chosen - gone
                gone += len(chosen)
    return parts


def _told_apart(sums: Tensor) -> Tensor:
    """Indices of the non-zero rows, without repetitions of equal rows."""
    _, places = sums.unique(dim=0, return_inverse=True)
    first = torch.full((len(sums),), len(sums), device="cpu").scatter_reduce(
        0, places, torch.arange(len(sums), device="cpu"), "amin"
    )
    rows = first[first < len(sums)]
    return rows[(sums[rows] != 0).any(1)]
