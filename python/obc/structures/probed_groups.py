"""Groups in the order found by running the model, if the order found by tracing is wrong.

:mod:`obc.structures.probing` finds which channels belong together, but not what the operations between layers do when
some are gone. A shuffle between groups, for example, needs groups of equal width. So candidates are tried: first single
channels, then channels joined across the runs of the order, then across ever more parts of equal width, then channels
of one run while the others stay. The first units that pass the proof are used.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from obc.model.evaluation import Run
from obc.model.groups import ChannelGroup
from obc.model.layouts import is_depthwise, layout_of
from obc.structures.influence_groups import Coupled, coupled_channels
from obc.structures.probing import NOTHING, SEVERAL, Probe, probe, reads_channels
from obc.structures.proof import Proof, prove
from obc.structures.protocol import Provable
from obc.structures.traced_groups import Found, GroupFinder
from obc.structures.traced_units import Members
from obc.structures.units import NotPrunableError
from obc.structures.varied import varied_copy

_Result = TypeVar("_Result")

_MOST_TRIES = 12
_Slices = frozenset[tuple[str, str, torch.Size, bytes]]
# More tries than for other groups, because one of many candidates might pass by chance.
_TRIES = 5


class Extensible(Provable, Protocol):
    """A structure that accepts further groups."""

    left_out: dict[str, str]

    def offer(self, group: ChannelGroup) -> None:
        """Add a group to ``groups``."""


@dataclass(eq=False)
class Suspect:
    """A group whose removal, as found, is wrong.

    Attributes:
        found: the group as found.
        producers: layer -> channel of its output -> root channel, as found.
        unseen: further members whose channels no input shows: parameters outside layers, embeddings.
    """

    found: Found
    producers: dict[str, dict[int, int]]
    unseen: Members

    @property
    def width(self) -> int:
        """One more than the largest root channel, and at least the group's size."""
        return max(self.found.size, *(max(roots) + 1 for roots in self.producers.values()))


def recover(structure: Extensible, finder: GroupFinder, wrong: Sequence[Found], run: Run, proof: Proof) -> None:
    """Find the true order of groups that can't be pruned in the traced order; add the groups that are then proved.

    Args:
        structure: the structure that receives groups.
        run: see :func:`obc.structures.proof.prove`.
        proof: proof of the other groups; the costs and results of these are added.
    """
    reasons, tried = dict(structure.left_out), dict[_Slices, str]()
    accepted = _in_another_order(structure, finder, wrong, run, proof, tried)
    inner, pruned = [found for found in wrong if found.inner], set(accepted)
    if any(found.name not in pruned for found in inner):
        more, why, certain = _by_influence(structure, finder, wrong, run, proof, tried)
        accepted += more
        untried = {found.name for found in inner if found.reason}
        reasons |= {name: reason for name, reason in why.items() if name in untried | certain}
        depthwise = untried - why.keys() if why else set()
        reasons |= dict.fromkeys(
            depthwise & finder.depthwise, "it is depthwise, so it keeps the channels that it reads"
        )
    if accepted:
        proof.probed = accepted
        together = prove(structure, run)
        proof.add(together)
        proof.proved, proof.unproved = together.proved, together.unproved
        reasons |= {name: why for name, why in together.left_out.items() if name in accepted}
    producers = {part.module for group in structure.groups for part in group.slices if part.side == "out"}
    for name in list(structure.left_out):
        if name in producers:
            del structure.left_out[name]
        elif name in reasons:
            structure.left_out[name] = reasons[name]
    proof.left_out = {name: why for name, why in structure.left_out.items() if name in proof.left_out}


def _in_another_order(
    structure: Extensible,
    finder: GroupFinder,
    wrong: Sequence[Found],
    run: Run,
    proof: Proof,
    tried: dict[_Slices, str],
) -> list[str]:
    """The names of groups with the traced layers, whose channels running the model finds in another order."""
    suspects = [suspect for found in wrong if (suspect := _suspect(structure.model, found)) is not None]
    if not suspects:
        return []
    found = _searched(lambda run: proposed(varied_copy(structure.model), run, suspects), run)
    if found is None:
        return []
    proposals, passes = found
    proof.passes += passes
    return _accepted(structure, finder, proposals, run, proof, tried)


def _by_influence(
    structure: Extensible,
    finder: GroupFinder,
    wrong: Sequence[Found],
    run: Run,
    proof: Proof,
    tried: dict[_Slices, str],
) -> tuple[list[str], dict[str, str], set[str]]:
    """(names of groups found without tracing, layer -> why it is in none, those that something but a layer reads)."""
    taken = {part.module for group in structure.groups for part in group.slices}
    layers = finder.layers_outside({p.module for g in structure.groups for p in g.slices if p.side == "out"})
    fixed = dict.fromkeys(finder.ignored & set(layers), "it is one of ignored_layers")
    for found in wrong:
        if not found.inner:
            names = {name for name, side in found.members if side == "out"} & set(layers)
            fixed |= dict.fromkeys(names, structure.left_out.get(found.name, found.reason))
    findings = _searched(lambda run: coupled_channels(varied_copy(structure.model), run, layers, fixed, taken), run)
    if findings is None:
        return [], {}, set()
    proof.passes += findings.passes
    before, reasons = dict(structure.left_out), findings.reasons
    coupled = {min(one.layers, key=finder.place): one for one in findings.coupled}
    for name, one in coupled.items():
        structure.left_out[name] = (
            "running the model finds no smaller set of channels that go together than all of them"
        )
        finder.dims.update(one.dims)
    accepted = _accepted(structure, finder, findings.coupled, run, proof, tried)
    for name in coupled.keys() & structure.left_out.keys():
        reasons |= dict.fromkeys(coupled[name].layers, structure.left_out.pop(name))
        structure.left_out |= {name: before[name]} if name in before else {}
    return accepted, reasons, findings.read_elsewhere


class _RunError(Exception):
    """The model's own code raised, which may not run on invented numbers."""


def _searched(search: Callable[[Run], _Result], run: Run) -> _Result | None:
    """``search(run)``, or None if it fails; a fault of the search itself is not taken for one of the model."""

    def guarded(model: nn.Module) -> Any:
        try:
            return run(model)
        except Exception as error:
            raise _RunError from error

    try:
        return search(guarded)
    except _RunError:
        return None
    except Exception as error:
        warnings.warn(
            f"the search for further groups ended in {type(error).__name__}: {error}; groups that tracing finds are "
            "pruned. Please report this with the model",
            stacklevel=2,
        )
        return None


def _accepted(
    structure: Extensible,
    finder: GroupFinder,
    proposals: Sequence[Coupled],
    run: Run,
    proof: Proof,
    tried: dict[_Slices, str],
) -> list[str]:
    """The proposals for which some units pass, by their first producer; these are now groups of the structure.

    Candidates in ``tried`` failed before, for the reason there, and are passed over; those that fail are added.
    """
    names = {group.name for group in structure.groups}
    named = {min(one.layers, key=finder.place): one for one in proposals}
    waiting = {name: _groups(finder, name, one) for name, one in named.items() if name not in names}
    accepted: list[str] = []
    while waiting:
        offered = {}
        for name, groups in list(waiting.items()):
            group = next(groups, None)
            while group is not None and (why := tried.get(_slices(group))) is not None:
                structure.left_out[name], group = why, next(groups, None)
            if group is None:
                del waiting[name]
                continue
            structure.offer(group)
            offered[name] = _slices(group)
        if not offered:
            break
        proved = prove(structure, run, among=offered, tries=_TRIES)
        proof.add(proved)
        for name, slices in offered.items():
            if name in proved.proved:
                accepted.append(name)
                del waiting[name]
                continue
            if name not in proved.left_out:
                structure.leave_out(name, proved.unproved.get(name, "its removal could not be tried"))
            tried[slices] = structure.left_out[name]
    return accepted


def _slices(group: ChannelGroup) -> _Slices:
    """What tells candidates apart: the channels of every slice."""
    return frozenset(
        (part.module, part.side, part.channels.shape, bytes(part.channels.numpy())) for part in group.slices
    )


def _suspect(model: nn.Module, found: Found) -> Suspect | None:
    """The part of a group to probe; None if no order would make it a group."""
    modules = dict(model.named_modules())
    producers: dict[str, dict[int, int]] = {}
    unseen: Members = {}
    for (name, side), roots in found.members.items():
        module = modules.get(name)
        if isinstance(module, nn.MultiheadAttention):
            return None
        if side == "in":
            continue
        if module is not None and layout_of(module) is not None:
            if not is_depthwise(module):
                producers[name] = dict(roots)
        elif module is None or isinstance(module, nn.Embedding):
            unseen[name, side] = dict(roots)
    return Suspect(found, producers, unseen) if found.inner and found.traced and producers else None


# --- what goes together ---------------------------------------------------------------------------------------


def proposed(model: nn.Module, run: Run, suspects: Sequence[Suspect]) -> tuple[list[Coupled], int]:
    """(proposals, number of forward passes).

    All suspects are probed at once. If something depends on several of their channels, for example on a pair of halves
    or on neighbours, channels are taken together.
    """
    bits = max(suspect.width - 1 for suspect in suspects).bit_length()
    numbered = dict(enumerate(suspects))
    together = _probe(model, run, {number: suspect.producers for number, suspect in numbered.items()}, bits)
    unclear = {number for number in numbered if _several(together, number, bits).numel()}
    proposals = [
        _proposal(model, suspect, together, number, bits)
        for number, suspect in numbered.items()
        if number not in unclear
    ]
    passes = together.passes
    for classes in (_neighbours, _strided):
        merged = {}
        for number in unclear:
            size, read = suspects[number].found.size, len(_several(together, number, bits))
            if size % read == 0 and size > read:
                merged[number] = _merged(suspects[number], classes(size, read))
        if merged:
            probed = _probe(model, run, {number: suspect.producers for number, suspect in merged.items()}, bits)
            passes += probed.passes
            for number, suspect in merged.items():
                if not _several(probed, number, bits).numel():
                    unclear.remove(number)
                    proposals.append(_proposal(model, suspect, probed, number, bits))
    return proposals, passes


def _probe(model: nn.Module, run: Run, producers: Mapping[int, dict[str, dict[int, int]]], bits: int) -> Probe:
    """Probe the producers of several suspects at once; a code has the suspect's number above the channel's bits."""
    return probe(
        model,
        run,
        {layer: _codes(roots, number << bits) for number, own in producers.items() for layer, roots in own.items()},
    )


def _proposal(model: nn.Module, suspect: Suspect, probed: Probe, number: int, bits: int) -> Coupled:
    outs: Members = {(layer, "out"): roots for layer, roots in suspect.producers.items()}
    members = outs | suspect.unseen | _reached(model, probed, number, bits)
    return Coupled(list(suspect.producers), members, suspect.found.size)


def _neighbours(size: int, read: int) -> list[int]:
    """The input channel, of ``read`` ones, that each of ``size`` channels enters: neighbours share one."""
    return [channel // (size // read) for channel in range(size)]


def _strided(size: int, read: int) -> list[int]:
    """The same for one channel from each of several equal parts, such as the halves of a gated unit."""
    return [channel % read for channel in range(size)]


def _merged(suspect: Suspect, classes: Sequence[int]) -> Suspect:
    """The suspect with root channels of one class treated as one."""
    producers = {
        layer: {channel: classes[root] for channel, root in roots.items()} for layer, roots in suspect.producers.items()
    }
    unseen: Members = {
        part: {channel: classes[root] for channel, root in roots.items()} for part, roots in suspect.unseen.items()
    }
    return Suspect(replace(suspect.found, size=max(classes) + 1), producers, unseen)


def _codes(roots: dict[int, int], first: int) -> Tensor:
    codes = torch.full((max(roots) + 1,), -1, device="cpu")
    for channel, root in roots.items():
        codes[channel] = first + root
    return codes


def _several(probed: Probe, number: int, bits: int) -> Tensor:
    """The inputs that depend on several channels of one suspect, in the layer that reads most of them."""
    most = torch.empty(0, dtype=torch.int64, device="cpu")
    for name, seen in probed.suspects.items():
        upper = seen[:, bits:]
        values = torch.tensor([(number >> bit) & 1 for bit in range(upper.shape[1])], dtype=torch.int64, device="cpu")
        possible = ((upper >> values) & 1).bool().all(1)
        found = (possible & (probed.origins[name] == SEVERAL)).nonzero()[:, 0]
        most = found if len(found) > len(most) else most
    return most


def _reached(model: nn.Module, probed: Probe, number: int, bits: int) -> Members:
    """Everything that reads channels of one suspect: (module, side) -> channel -> code within the suspect."""
    modules = dict(model.named_modules())
    reached: Members = {}
    for name, origins in probed.origins.items():
        ours = (origins != NOTHING) & (origins != SEVERAL) & (origins >> bits == number)
        if bool(ours.any()):
            module = modules[name]
            mine = ours.nonzero()[:, 0].tolist()
            reached[name, "in" if reads_channels(module) else "out"] = {
                c: int(origins[c]) & ((1 << bits) - 1) for c in mine
            }
    return reached


# --- units ----------------------------------------------------------------------------------------------------


def _groups(finder: GroupFinder, name: str, proposal: Coupled) -> Iterator[ChannelGroup]:
    order = _order(proposal)
    tables: list[list[list[int]]] = []
    kinds = (
        proposal.kinds if proposal.kinds is not None else torch.zeros(proposal.size, dtype=torch.int64, device="cpu")
    )
    for table, hidden in (*_across(kinds), *_divisions(order, proposal.size)):
        roots = set(table.flatten().tolist())
        members = {part: own for part, own in proposal.members.items() if not roots.isdisjoint(own.values())}
        try:
            group = finder.assemble(name, members, table, proposal.size, hidden)
        except NotPrunableError:
            continue
        if not group.consumers or group.consumers[0].side != "in":
            return  # nothing is known to read it
        if group.size == 1 and all(p.channels.numel() == len(members[p.module, p.side]) for p in group.slices):
            continue  # nothing would stay
        found = group.slices[0].channels.tolist()
        if found not in tables:
            tables.append(found)
            yield group
        if len(tables) == _MOST_TRIES:
            return


def _across(kinds: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Like :func:`_divisions`, for root channels of several kinds: as many of each kind, then one kind alone."""
    each = torch.arange(len(kinds), device="cpu")[:, None]
    if bool(kinds.any()):
        yield each, nn.functional.one_hot(kinds)
        for kind in range(int(kinds.max()) + 1):
            yield each[kinds == kind], None


def _order(proposal: Coupled) -> list[int]:
    """The root channels in the order of the first layer that reads them in another order."""
    order = list(range(proposal.size))
    for (_, side), roots in proposal.members.items():
        if side == "in":
            found = list(dict.fromkeys(roots[channel] for channel in sorted(roots)))
            if found != order and len(found) == proposal.size:
                return found
    return order


def _divisions(order: Sequence[int], size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(removable channels, (size, parts) part of each): parts that may have to stay equally wide."""
    each = torch.arange(size, device="cpu")[:, None]
    yield each, None
    places = [0] * size
    for place, channel in enumerate(order):
        places[channel] = place
    by_channel, by_place = _runs(places), _runs(order)
    in_order = torch.empty(size, dtype=torch.int64, device="cpu")
    in_order[torch.tensor(order, device="cpu")] = by_place
    runs = [parts for parts in (by_channel, in_order) if 0 < int(parts.max()) < size - 1]
    for parts in runs:
        yield each, nn.functional.one_hot(parts)
    for parts in runs:
        lengths = parts.bincount()
        for longest in lengths.argsort(descending=True)[:2]:
            if int(lengths[longest]) > 1:
                yield each[parts == longest], None
    for count in range(2, size):
        if size % count == 0:
            yield each, nn.functional.one_hot(torch.arange(size, device="cpu") // (size // count))
            yield each, nn.functional.one_hot(torch.arange(size, device="cpu") % count)


def _runs(numbers: Sequence[int]) -> Tensor:
    """(n,) the run of each number; a run continues while the step stays equal."""
    run, runs, step = 0, [0], None
    for before, now in itertools.pairwise(numbers):
        if step is not None and now - before != step:
            run, step = run + 1, None
        else:
            step = now - before
        runs.append(run)
    return torch.tensor(runs, dtype=torch.int64, device="cpu")
