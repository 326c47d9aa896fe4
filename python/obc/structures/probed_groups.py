"""Groups in the order found by running the model, if the order found by tracing is wrong.

:mod:`obc.structures.influence` finds which channels belong together, but not what the operations between layers do when
some are gone. A shuffle between groups, for example, needs groups of equal width. So candidates are tried: first single
channels, then channels joined with some that nothing reads, then across the runs of the order, then across ever more
parts of equal width, then channels of one run while the others stay. The first units that pass the proof are used.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.evaluation import Run
from obc.model.groups import ChannelGroup, Side, producers
from obc.structures.extensible import Extensible
from obc.structures.held_counts import Held, with_counts
from obc.structures.influence_groups import Coupled, coupled_channels
from obc.structures.proof import Proof, prove
from obc.structures.traced_groups import Found, GroupFinder
from obc.structures.transformers.block import Block
from obc.structures.units import Members, NotPrunableError
from obc.structures.varied import varied_copy

_MOST_TRIES = 12
# More tries than for other groups, because one of many candidates might pass by chance.
_TRIES = 5


# (name of a group, its members, the number of their channels, what may be attentions) -> what else may go with them.
More = Callable[[str, Members, int, Sequence[Block]], Iterator[Block]]


def recover(
    structure: Extensible, finder: GroupFinder, wrong: Sequence[Found], held: Held, run: Run, proof: Proof, more: More
) -> None:
    """Find the true order of groups that can't be pruned in the traced order; add the groups that are then proved.

    Args:
        structure: the structure that receives groups.
        held: the counts that modules hold.
        run: see :func:`obc.structures.proof.prove`.
        proof: proof of the other groups; the costs and results of these are added.
        more: proposes groups with further channels, which are tried first.
    """
    reasons, accepted = dict(structure.left_out), list[str]()
    inner = [found for found in wrong if found.inner]
    untried = {found.name for found in inner if found.reason}
    taken = {part.module for group in structure.groups for part in group.slices}
    rank, ranks, contracted = 0, 1 if inner or finder.weights_outside_calls(taken) else 0, False
    while rank < ranks:
        one = _by_influence(structure, finder, wrong, held, run, proof, more, rank, contracted)
        if one is None:
            break
        names, why, certain, found = one
        rank, accepted, ranks = rank + 1, accepted + names, rank if contracted else found
        finder.reasons = why | finder.reasons if contracted else finder.reasons | why
        reasons |= {name: finder.reasons[name] for name in why if name in untried | certain}
        depthwise = untried - why.keys() if why else set()
        reasons |= dict.fromkeys(
            depthwise & finder.depthwise, "it is depthwise, so it keeps the channels that it reads"
        )
        if rank >= ranks and not contracted:
            ranks, contracted = rank + 1, True  # once more, where channels end at products of activations
    if accepted:
        proof.probed = accepted
        reasons |= {name: why for name, why in proof.again(structure, run).items() if name in accepted}
    produced = producers(structure.groups)
    for name in list(structure.left_out):
        if name in produced:
            del structure.left_out[name]
        elif name in reasons:
            structure.left_out[name] = reasons[name]
    proof.left_out = {name: why for name, why in structure.left_out.items() if name in proof.left_out}


def _by_influence(
    structure: Extensible,
    finder: GroupFinder,
    wrong: Sequence[Found],
    held: Held,
    run: Run,
    proof: Proof,
    more: More,
    rank: int,
    contracted: bool,
) -> tuple[list[str], dict[str, str], set[str], int] | None:
    """(names of the groups found, layer -> why it is in none, those that something but a layer reads, ranks).

    None if the model does not run on invented numbers, or no layer is left whose channels products may read.
    """
    taken: set[str | tuple[str, Side]] = {(p.module, p.side) for group in structure.groups for p in group.slices}
    taken |= {part.module for group in structure.groups for part in group.slices if part.module in finder.called}
    layers = finder.layers_outside(producers(structure.groups))
    fixed = dict.fromkeys(finder.ignored & set(layers), "it is one of ignored_layers")
    for found in wrong:
        if not found.inner:
            names = {name for name, side in found.members if side == "out"} & set(layers)
            fixed |= dict.fromkeys(names, structure.left_out.get(found.name, found.reason))

    if contracted and fixed.keys() >= {*layers}:
        return None

    def guarded(model: nn.Module) -> Any:
        try:
            return run(model)
        except Exception as error:
            raise _RunError from error

    try:
        model = varied_copy(structure.model)
        findings = coupled_channels(model, guarded, layers, fixed, taken, rank, contracted, finder.other_vectors)
    except _RunError:
        return None
    except Exception as error:  # a fault of the search itself
        warnings.warn(
            f"the search for further groups ended in {type(error).__name__}: {error}; groups that tracing finds are "
            "pruned. Please report this with the model",
            stacklevel=2,
        )
        return None
    proof.passes += findings.passes
    before, reasons = dict(structure.left_out), findings.reasons
    every = {min(one.layers, key=finder.place): one for one in _compatible(findings.coupled)}
    coupled = {name: one for name, one in every.items() if one.gates or not contracted}
    for name, one in coupled.items():
        structure.left_out[name] = (
            "running the model finds no smaller set of channels that go together than all of them"
        )
        finder.dims.update(one.dims)
        finder.in_dims.update(one.in_dims)
    attentions = [
        Block(group) for name, one in coupled.items() for group in itertools.islice(_groups(finder, name, one), 1)
    ]
    proposals: dict[str, Iterator[Block]] = {
        name: with_counts(
            structure,
            itertools.chain(
                () if contracted or bool(one.kinds.any()) else more(name, one.members, one.size, attentions),
                map(Block, _groups(finder, name, one)),
            ),
            held,
            run,
        )
        for name, one in coupled.items()
    }
    accepted = first_proved(structure, proposals, run, proof)
    if contracted:  # queries, keys and values whose module holds one width for all of them
        merged = {
            min(one.layers, key=finder.place): one
            for one in _merged([one for name, one in every.items() if name not in accepted])
        }
        together = {
            name: with_counts(structure, map(Block, _groups(finder, name, one)), held, run)
            for name, one in merged.items()
        }
        accepted += first_proved(structure, together, run, proof)
    for name in coupled.keys() & structure.left_out.keys():
        reasons |= dict.fromkeys(coupled[name].layers, structure.left_out.pop(name))
        structure.left_out |= {name: before[name]} if name in before else {}
    return accepted, reasons, findings.read_elsewhere, findings.ranks


def _merged(failed: Sequence[Coupled]) -> Iterator[Coupled]:
    """Those of layers of one module that have equally many classes, number by number, if some meet in products."""
    alike: dict[tuple[str, int], list[Coupled]] = {}
    for one in failed:
        if one.size == len(one.kinds):
            alike.setdefault((one.layers[0].rpartition(".")[0], one.size), []).append(one)
    for ones in alike.values():
        if len(ones) > 1 and any(one.gates for one in ones):
            members, gates = Members(), Members()
            for one in ones:
                for all_of_them, own in ((members, one.members), (gates, one.gates or _read(one))):
                    for part, roots in own.items():
                        all_of_them[part] = all_of_them.get(part, {}) | roots
            dims = {name: dim for one in ones for name, dim in one.dims.items()}
            in_dims = {name: dim for one in ones for name, dim in one.in_dims.items()}
            layers = [name for one in ones for name in one.layers]
            yield Coupled(layers, members, ones[0].size, torch.zeros_like(ones[0].kinds), dims, in_dims, gates)


def _read(one: Coupled) -> Members:
    return {part: own for part, own in one.members.items() if part[1] == "in"}


def _compatible(found: Sequence[Coupled]) -> Iterator[Coupled]:
    """Those that cut no side of a parameter along another dimension than one before."""
    known: dict[tuple[str, Side], int] = {}
    for one in found:
        own: dict[tuple[str, Side], int] = {(name, "out"): dim for name, dim in one.dims.items()}
        own |= {(name, "in"): dim for name, dim in one.in_dims.items()}
        if all(known.get(key, dim) == dim for key, dim in own.items()):
            known |= own
            yield one


class _RunError(Exception):
    """The model's own code raised, which may not run on invented numbers."""


def offer_proved(structure: Extensible, proposals: Mapping[str, Iterator[Block]], run: Run, proof: Proof) -> None:
    """Let the structure have the first proposal that passes of each group that failed in tracing.

    Args:
        structure: receives groups, and what counts their units; the others stay left out for the former reason.
        proposals: name of a group -> what it may be.
        run: see :func:`obc.structures.proof.prove`.
        proof: of the groups so far; the results for all groups together replace its own.
    """
    reasons = dict(structure.left_out)
    accepted = first_proved(structure, proposals, run, proof)
    structure.left_out.update({name: reasons[name] for name in proposals if name not in accepted})
    if accepted:
        proof.left_out |= proof.again(structure, run)


def first_proved(structure: Extensible, proposals: Mapping[str, Iterator[Block]], run: Run, proof: Proof) -> list[str]:
    """The names for which one of the proposed groups passes; the first that does is now a group of the structure.

    Args:
        structure: it leaves the others out, with the reason for the last proposal.
        proposals: name of a group -> what it may be.
        run: see :func:`obc.structures.proof.prove`.
        proof: the costs are added to it.
    """
    waiting, accepted = dict(proposals), list[str]()
    while waiting:
        offered = []
        for name, blocks in list(waiting.items()):
            block = next(blocks, None)
            if block is None:
                del waiting[name]
                continue
            if block.counters:
                structure.blocks[name] = block
            structure.offer(block.group)
            offered.append(name)
        if not offered:
            break
        proved = prove(structure, run, among=offered, tries=_TRIES)
        proof.add(proved)
        for name in offered:
            if name in proved.proved:
                accepted.append(name)
                del waiting[name]
            elif name not in proved.left_out:
                structure.leave_out(name, proved.unproved.get(name, "its removal could not be tried"))
    return accepted


# --- units ----------------------------------------------------------------------------------------------------


def _groups(finder: GroupFinder, name: str, proposal: Coupled) -> Iterator[ChannelGroup]:
    tables: list[list[list[int]]] = []
    size, kinds = proposal.size, proposal.kinds
    single, *joined = _divisions(_order(proposal), size)
    with_unread = itertools.islice(_across(kinds), 1 if size < len(kinds) else 0)
    for table, hidden in (*_across(kinds[:size]), single, *with_unread, *joined):
        roots = set(table.flatten().tolist())
        among = range(len(kinds) if max(roots) >= size else size)
        members = {
            part: {channel: root for channel, root in own.items() if root in among}
            for part, own in proposal.members.items()
            if not roots.isdisjoint(own.values())
        }
        gates = {
            part: {channel: root for channel, root in own.items() if root in roots}
            for part, own in proposal.gates.items()
        }
        try:
            group = finder.assemble(name, members, table, len(among), hidden, gates=gates)
        except NotPrunableError:
            continue
        if not group.read_at and group.consumers[0].side != "in":
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
