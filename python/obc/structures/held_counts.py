"""Counts of a group's units and channels that modules hold as attributes, under any name, and read when they run.

A module may split what it reads by widths that it keeps in a list, or reshape it by a number of heads, a width of a
head, or a hidden size. It does not run on fewer channels until these follow. Which do is tried on copies: as few
attributes as possible change, and the proof decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.evaluation import Run
from obc.model.groups import ChannelGroup, Slice
from obc.model.layouts import layout_of
from obc.model.names import is_within, named_modules
from obc.model.shared_copy import shared_copy
from obc.structures.comparison import run_alike
from obc.structures.extensible import Extensible
from obc.structures.removal import size_of
from obc.structures.transformers.block import Block
from obc.structures.transformers.layers import Counter

# Of the attributes that may count, and of the choices among them with which a model runs.
_MOST_COUNTS, _MOST_CHOICES = 5, 3

_MODULE = frozenset(vars(nn.Module()))  # hooks, parameters, children

# Module -> attribute -> the counts that it holds: one, or several in a list or tuple.
Held = dict[str, dict[str, Any]]


def counts_read(model: nn.Module, run: Run) -> Held:
    """The counts that modules other than torch's layers read while ``run(model)`` runs; empty if it fails.

    A count is an integer above 1, a list or tuple one of integers.
    """
    watched, found = shared_copy(model), Held()
    try:
        for name, module in named_modules(watched):
            kind = type(module)
            if not kind.__module__.startswith("torch.nn.") or kind is nn.Transformer:  # it checks its d_model
                module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": _noting(name, found)})
        run_alike(watched, run)
    except Exception:  # the model's own code, which may not run as another class
        return {}
    return found


def _noting(name: str, found: Held) -> Any:
    configs = dict[str, Any]()

    def noted(path: str, value: Any, own: bool) -> Any:
        """The value, of a config a copy that notes what is read of it; ``own``: whether it lies in the holder."""
        if own and _counts(value):
            found.setdefault(name, {})[path] = value
        elif own and _holds_more(value) and path not in configs:
            configs[path] = watched(value, path)
        return configs.get(path, value) if own else value

    def watched(config: Any, path: str) -> Any:
        kind: Any = type(config)
        read = partial(_inside, noted, path)
        lookups = {"__getitem__": read(kind.__getitem__), "get": read(kind.get)} if isinstance(config, dict) else {}
        copied = kind.__new__(
            type(kind.__name__, (kind,), {"__getattribute__": read(kind.__getattribute__), **lookups})
        )
        if isinstance(config, dict):
            dict.update(copied, config)
        if hasattr(config, "__dict__"):
            vars(copied).update(vars(config))
        return copied

    def noting(module: nn.Module, key: str) -> Any:
        value = object.__getattribute__(module, key)
        own = key[:2] != "__" and key not in _MODULE and key in object.__getattribute__(module, "__dict__")
        return noted(key, value, own)

    return noting


def _inside(noted: Any, path: str, lookup: Any) -> Any:
    """A lookup in a config or dict that notes the counts that it finds."""

    def inside(config: Any, key: Any, *default: Any) -> Any:
        value = lookup(config, key, *default)
        if not isinstance(key, str) or key[:2] == "__" or "." in key:  # isinstance looks __class__ up
            return value
        own = key in (dict.keys(config) if isinstance(config, dict) else vars(config))
        return noted(f"{path}.{key}", value, own)

    return inside


def _holds_more(value: Any) -> bool:
    """Whether a value is a dict, or an object with attributes that no other library than the model's own made."""
    if isinstance(value, dict):
        return True
    outside = isinstance(value, Tensor) or callable(value) or type(value).__module__.startswith("torch")
    return hasattr(value, "__dict__") and not outside


def _counts(value: Any) -> bool:
    return (type(value) is int and value > 1) or (
        type(value) in (list, tuple) and len(value) > 0 and all(type(one) is int for one in value)
    )


def with_counts(structure: Extensible, blocks: Iterator[Block], held: Held, run: Run) -> Iterator[Block]:
    """Each block as it is, and then with the counts that follow its units."""
    for block in blocks:
        yield block
        yield from counted(structure, block, held, run)


def counted(structure: Extensible, block: Block, held: Held, run: Run) -> Iterator[Block]:
    """The block with further counts that follow its units.

    Without half of the units the model runs with these counts, and does not return what it returns with fewer of them.

    Args:
        structure: has the model; it does not have the block's group.
        block: a block that failed its proof, or was not tried yet.
        held: see :func:`counts_read`.
        run: see :func:`obc.structures.proof.prove`.
    """
    group, known = block.group, {(one.module, one.attribute) for one in block.counters}
    unknown = {
        name: {key: value for key, value in counts.items() if (name, key) not in known} for name, counts in held.items()
    }
    widths, numbers = _following(dict(named_modules(structure.model)), group, unknown)
    found, seen = [*numbers, *widths][:_MOST_COUNTS], list[tuple[set[int], list[Tensor]]]()
    without = _outputs(structure, block, run) if found else None
    for places in itertools.chain(*(itertools.combinations(range(len(found)), n) for n in range(1, len(found) + 1))):
        if len(seen) == _MOST_CHOICES:
            return
        chosen = [found[place] for place in places]
        heads = any(one in numbers for one in chosen) and group.slices[0].channels.shape[1] > 1
        counters = (*block.counters, *itertools.chain(*chosen))
        tried = replace(block, group=replace(group, kind="heads") if heads else group, counters=counters)
        outputs = _outputs(structure, tried, run)
        fewer = [[] if without is None else without, *(other for part, other in seen if part.issubset(places))]
        if outputs is not None and not any(_equal(outputs, other) for other in fewer):
            seen.append((set(places), outputs))
            yield tried


def _equal(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(outputs) == len(others) and all(map(torch.equal, outputs, others))


def _following(
    modules: Mapping[str, nn.Module], group: ChannelGroup, held: Held
) -> tuple[list[list[Counter]], list[list[Counter]]]:
    """What may count the group's channels, and what its units, in the modules that hold its layers.

    Attributes of one name in modules of one class change together.
    """
    widths, numbers = dict[Hashable, list[Counter]](), dict[Hashable, list[Counter]]()
    for name, counts in held.items():
        parts = [part for part in group.slices if is_within(part.module, name)]
        sizes = {_size(modules, part): part.channels for part in parts}
        for key, value in counts.items() if parts else ():
            kind = type(modules[name]), key
            if type(value) is not int and (channels := sizes.get(sum(value))) is not None:
                widths.setdefault(kind, []).extend(_split(Counter(name, key, 0), value, channels))
                continue
            for place, one in enumerate([value] if type(value) is int else value):
                counter = Counter(name, key, 0, place=None if type(value) is int else place)
                if (channels := sizes.get(one)) is not None:
                    widths.setdefault((*kind, place), []).append(replace(counter, per_unit=channels.shape[1]))
                elif one > 1 and one % group.size == 0 and any(size % one == 0 for size in sizes):
                    numbers.setdefault((*kind, place), []).append(replace(counter, per_unit=one // group.size))
    return [one for one in widths.values() if one], [*numbers.values()]


def _size(modules: Mapping[str, nn.Module], part: Slice) -> int:
    """The width of the layer on the slice's side."""
    module = modules.get(part.module)
    return part.channels.numel() if module is None or layout_of(module) is None else size_of(module, part.side)


def _split(counter: Counter, widths: Sequence[int], channels: Tensor) -> list[Counter]:
    """Counts of the pieces of a split from which every unit takes as many channels; none if units differ."""
    ends = torch.tensor(widths, device="cpu").cumsum(0)
    pieces = torch.searchsorted(ends, channels.contiguous(), right=True)
    taken = nn.functional.one_hot(pieces, len(widths)).sum(1)
    if not bool((taken == taken[0]).all()):
        return []
    return [replace(counter, per_unit=n, place=place) for place, n in enumerate(taken[0].tolist()) if n]


def _outputs(structure: Extensible, block: Block, run: Run) -> list[Tensor] | None:
    """What the model returns without half of the block's units, and with counts without them; None if it fails."""
    trial: Any = structure.twin(shared_copy(structure.model))
    name, gone = block.group.name, max(1, block.group.size // 2)
    trial.blocks[name] = block
    trial.offer(block.group)
    try:
        trial.remove({name: torch.arange(gone, device="cpu")})
        return run_alike(trial.model, run)
    except Exception:  # the model's own code
        return None
