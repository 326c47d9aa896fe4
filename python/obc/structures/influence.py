"""Finds, by running the model, which inputs of every layer each channel influences past nothing but operations.

A source of channels is a layer, an embedding, or a dimension of a parameter or buffer outside layers; in each pass some
of its channels change (:mod:`obc.structures.probing`). So an input may depend on channels of several layers that are
added up, and on several channels of one layer, as behind a gated unit. Sources that no layer reads in common are
examined in the same passes.

At first the channels of all sources change at once whose numbers have a certain bit, but not of sources whose channels
are mixed. Where layers add up channels of equal numbers, as to a residual stream, this tells what each input depends
on, and these sources are done. In all passes after that no two sources change that some layer reads in common.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.evaluation import Run
from obc.model.groups import Side
from obc.model.shared_copy import parameter_uses, replace_parameter
from obc.structures.contractions import Contractions, contraction_of, is_contraction
from obc.structures.influence_sets import change, usual_passes, with_bit
from obc.structures.probing import Prober, changed, pattern
from obc.structures.units import Units
from obc.structures.watching import Watching
from obc.structures.weight_products import WeightProducts

# Size and sign of the invented numbers: a ReLU, a threshold or an activation that saturates hides some. What an input
# notices for any of them counts.
_KINDS = ((1.0, 1), (30.0, -1))
# In all. A block of a YOLO takes some 250.
_MOST_IN_ALL = 6000
# Single channels of a source that are changed to see whether each changes most of what a module reads.
_SAMPLED = 16
_TOO_MANY = "running the model to find which channels go together takes {} passes"

# Key of a source -> module that it reaches -> (inputs,) bool: which of them notice that all its channels change.
_Noticed = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Source:
    """Something with channels that later layers read.

    Attributes:
        name: the layer, the embedding, the parameter, or the buffer.
        size: number of channels.
        parameter: name of the parameter or buffer whose entries are changed; None for a layer, whose output is.
        dim: the parameter's dimension of channels.
        side: "in" if they are channels that products read along this dimension.
    """

    name: str
    size: int
    parameter: str | None = None
    dim: int = 0
    side: Side = "out"


@dataclass
class Influence:
    """What the channels of one source influence.

    Attributes:
        inputs: module -> (inputs, channels) bool: which input depends on which channel.
        ends: what else reads the channels, in words: the model's output, recurrent layers, weights outside layers.
        mixed: module -> whether one channel alone changes most of what it reads.
        unexamined: why it was not examined which channel influences what; ``inputs`` then make all of them go together.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    mixed: dict[str, bool] = field(default_factory=dict)
    unexamined: str = ""


class TooManyPassesError(RuntimeError):
    """Finding out would take too many forward passes; the message says how many."""


def weight_products(model: nn.Module, run: Run, rank: int, other_vectors: Collection[str] = ()) -> WeightProducts:
    """The products with weights that no layer is called for, and which channels their weights have."""
    products = WeightProducts(rank)
    prober, products.learning = Prober(model, run, products, other_vectors=other_vectors), True
    prober.read({})
    names = dict.fromkeys(name for one in products.found for name in one.weights)
    tensors = {**dict(prober.model.named_parameters()), **dict(prober.model.named_buffers())}
    for name in names:
        for dim, size in enumerate(tensors[name].shape):
            if size > 1:
                half = torch.arange(size, device="cpu") < size // 2
                _read(prober, {name: Source(name, size, name, dim)}, {name: half})
    products.learning = False
    return products


def influences(
    model: nn.Module,
    run: Run,
    sources: Mapping[str, Source],
    products: WeightProducts | None = None,
    contractions: Contractions | None = None,
    other_vectors: Collection[str] = (),
) -> tuple[dict[str, Influence], int]:
    """(key of each source -> its influence, number of forward passes).

    Where all sources would take more than 6000 passes, only those are examined that share their passes with others.

    Raises:
        TooManyPassesError: there are so many sources that it takes more to see what each of them reaches.
    """
    if len(_KINDS) * len(sources) > _MOST_IN_ALL:
        raise TooManyPassesError(_TOO_MANY.format(f"up to {len(_KINDS) * len(sources)}"))
    prober = Prober(model, run, products, contractions, other_vectors)
    if contractions is not None:
        _learn(prober, sources, contractions)
        if not contractions.found:
            return {}, prober.passes
    found, noticed = _reached(prober, sources)
    if contractions is not None:
        for key in _apart_from_products(sources, found):
            found[key].inputs.clear()
    sets = [{key: sources[key] for key in keys} for keys in _together(prober, found)]
    at_once = len(sets) + 2 * len(_KINDS) * (max((one.size for one in sources.values()), default=1)).bit_length()
    told: set[str] = set()
    if len(sets) > 1 and prober.passes + at_once <= _MOST_IN_ALL:
        mixing = _mixing(prober, sources, sets, noticed[0])
        several = [key for key in sources if key not in mixing and not prober.meeting(key)]
        told = _all_wide(prober, {key: sources[key] for key in mixing}, noticed[0], found)
        told |= _tell_at_once(prober, {key: sources[key] for key in several}, noticed, found)
        left = {key: one for key, one in found.items() if key not in told}
        sets = [{key: sources[key] for key in keys} for keys in _together(prober, left)]
    passes = [len(_KINDS) * usual_passes(_sizes(one)) for one in sets]
    takes = f"more than {_MOST_IN_ALL}"
    if sum(passes) > _MOST_IN_ALL:
        takes = f"up to {sum(passes)}"
        sets = _within(_MOST_IN_ALL, [pair for pair in zip(sets, passes, strict=True) if len(pair[0]) > 1])
    examined = set(told)
    for one in sets:
        if prober.passes > _MOST_IN_ALL:
            break
        _exclude(prober, one, found)
        examined |= one.keys()
    for key, influence in found.items():
        if influence.inputs and key not in examined:
            influence.unexamined = _TOO_MANY.format(takes)
            influence.inputs = {name: _all_together(one) for name, one in influence.inputs.items()}
    return found, prober.passes


def _learn(prober: Prober, sources: Mapping[str, Source], contractions: Contractions) -> None:
    """Change single channels of every source, far apart; then others beside those that are in some places only."""
    contractions.learning, left = True, {*sources}
    while left and prober.passes < _MOST_IN_ALL:
        _read(prober, sources, {})
        if not contractions.products:
            break
        for more in (0, 1):
            for key, source in ((key, one) for key, one in sources.items() if key in left):
                for channel in sorted({share * source.size // 3 + more for share in range(3)}):
                    if channel < source.size:
                        _read(prober, sources, {key: torch.arange(source.size, device="cpu") == channel})
            left &= contractions.placed
        left = contractions.learned()
    contractions.learning = False


def _apart_from_products(sources: Mapping[str, Source], found: Mapping[str, Influence]) -> set[str]:
    """The sources that go together with none whose channels a product of activations ends, by what they reach.

    They need no search of their own here. A product's layers may have to go with others of their module, of their size.
    """
    numbers = {key: number for number, key in enumerate(sources)}
    together, first = Units(len(sources)), dict[str, int]()
    for key, number in numbers.items():
        for one in (f"{sources[key].name} itself", *map(contraction_of, found[key].inputs)):
            together.join(number, first.setdefault(one, number))
    sets: dict[int, set[str]] = {}
    for key, number in numbers.items():
        sets.setdefault(together.find(number), set()).add(key)
    reached = {number: {name for key in keys for name in found[key].inputs} for number, keys in sets.items()}
    ended = [sets[number] for number, names in reached.items() if any(map(is_contraction, names))]
    alike = {key: (source.name.rpartition(".")[0], source.size) for key, source in sources.items()}
    own = {alike[key] for keys in ended for key in keys}
    siblings = [keys for keys in sets.values() if all(alike[key] in own for key in keys)]
    return {*sources}.difference(*ended, *siblings)


def _within(most: int, sets: list[tuple[dict[str, Source], int]]) -> list[dict[str, Source]]:
    """The largest sets, as many of them as take no more than ``most`` passes in all."""
    chosen, passes = [], 0
    for one, takes in sorted(sets, key=lambda pair: -len(pair[0])):
        if passes + takes <= most:
            chosen.append(one)
            passes += takes
    return chosen


def _all_together(possible: Tensor) -> Tensor:
    """Few marks of inputs and channels that join all of them: the first channel with all inputs, and the reverse."""
    marks = torch.zeros_like(possible)
    marks[0], marks[:, 0] = True, True
    return marks


def _sizes(sources: Mapping[str, Source]) -> dict[str, int]:
    return {key: source.size for key, source in sources.items()}


def _reached(prober: Prober, sources: Mapping[str, Source]) -> tuple[dict[str, Influence], list[_Noticed]]:
    """The modules that each source reaches, with every input marked, and its ends; and which inputs notice it."""
    found, noticed = {key: Influence() for key in sources}, list[_Noticed]()
    for scale, sign in _KINDS:
        prober.scale, prober.sign = scale, sign
        before, ends_before = _read_watching(prober, sources, {})
        finite = {
            name: torch.stack(one).isfinite().all(0) for name, one in before.items() if len({*map(len, one)}) == 1
        }
        noticed.append({key: {} for key in sources})
        for key, source in sources.items():
            now, ends = _read_watching(prober, sources, {key: torch.ones(source.size, dtype=torch.bool, device="cpu")})
            for name, differs in changed(before, now).items():
                if bool(differs.any()):
                    whole = torch.ones(len(differs), source.size, dtype=torch.bool, device="cpu")
                    found[key].inputs.setdefault(name, whole)
                    noticed[-1][key][name] = differs & finite[name]
            mine = found[key].ends
            mine += [end for end, value in ends.items() if ends_before.get(end) != value and end not in mine]
    return found, noticed


def _mixing(
    prober: Prober, sources: Mapping[str, Source], sets: Sequence[Collection[str]], noticed: _Noticed
) -> list[str]:
    """The sources whose channels with odd numbers reach most of the inputs of a module that all their channels do."""
    prober.scale, prober.sign = _KINDS[0]
    before, found = _read(prober, sources, {}), list[str]()
    for keys in sets:
        now = changed(before, _read(prober, sources, {key: with_bit(sources[key].size, 0, 1) for key in keys}))
        for key in keys:
            if any(name in now and 4 * now[name].sum() > 3 * one.sum() for name, one in noticed[key].items()):
                found.append(key)
    return found


def _all_wide(
    prober: Prober, sources: Mapping[str, Source], noticed: _Noticed, found: Mapping[str, Influence]
) -> set[str]:
    """Those of many channels of which each of 16, spread over all, changes most of what one module reads of them.

    Then all their channels are taken to do so, and stay: of positions, or of what a softmax mixes.
    """
    prober.scale, prober.sign = _KINDS[0]
    wide = {key: {*noticed[key]} for key, one in sources.items() if one.size > 2 * _SAMPLED and one.side == "out"}
    before = _read(prober, sources, {}) if wide else {}
    for keys in _together(prober, {key: found[key] for key in wide}):
        for turn in range(_SAMPLED):
            sizes = {key: sources[key].size for key in keys if wide[key]}
            if not sizes:
                break
            single = {
                key: torch.arange(size, device="cpu") == turn * (size - 1) // (_SAMPLED - 1)
                for key, size in sizes.items()
            }
            now = changed(before, _read(prober, sources, single))
            for key in sizes:
                wide[key] = {
                    name
                    for name in wide[key] & now.keys()
                    if 2 * (now[name] & noticed[key][name]).sum() > noticed[key][name].sum()
                }
    for key, names in wide.items():
        found[key].mixed |= dict.fromkeys(names, True)
    return {key for key, names in wide.items() if names}


def _tell_at_once(
    prober: Prober, sources: Mapping[str, Source], noticed: Sequence[_Noticed], found: Mapping[str, Influence]
) -> set[str]:
    """Change channels of these sources at once; those of which it is then known what depends on them.

    None of them mixes channels: it would hide what the others do.
    """
    several = [key for key, one in sources.items() if one.size > 1 and found[key].inputs]
    told = {key: {name: torch.zeros_like(one) for name, one in found[key].inputs.items()} for key in several}
    for (prober.scale, prober.sign), seen in zip(_KINDS, noticed, strict=True):
        numbers = _numbers_read(prober, {key: sources[key] for key in several})
        for key in several:
            for name, places in seen[key].items():
                number = numbers.get(name, torch.full((len(places),), -1, device="cpu"))[places]
                if key in told and bool(((number >= 0) & (number < sources[key].size)).all()):
                    told[key][name][places, number] = True
                else:
                    told.pop(key, None)
    for key, inputs in told.items():
        _note(prober, sources, key, found[key], inputs)
    return set(told)


def _numbers_read(prober: Prober, sources: Mapping[str, Source]) -> dict[str, Tensor]:
    """Module -> for each input the number of the only channels of any source that it depends on; -1: there are others.

    An input that differs in exactly one of the two passes for each bit depends on one number, and the bits spell it.
    """
    before, numbers, sizes = _read(prober, sources, {}), dict[str, Tensor](), _sizes(sources)
    for bit in range(max((size - 1 for size in sizes.values()), default=0).bit_length()):
        zero, one = (
            changed(before, _read(prober, sources, {key: with_bit(size, bit, value) for key, size in sizes.items()}))
            for value in (0, 1)
        )
        for name in zero.keys() & one.keys():
            number = numbers.setdefault(name, torch.zeros(len(one[name]), dtype=torch.int64, device="cpu"))
            numbers[name] = torch.where(zero[name] != one[name], number | one[name].long() << bit, -1)
    return numbers


def _together(prober: Prober, found: Mapping[str, Influence]) -> list[list[str]]:
    """Sources in sets; no two of a set reach the same module, or are in the weight of the same product."""
    sets: list[tuple[set[str], list[str]]] = []
    for key, influence in found.items():
        if not influence.inputs:
            continue
        own = influence.inputs.keys() | prober.meeting(key)
        taken = next((one for one in sets if not one[0] & own), None)
        if taken is None:
            taken = (set(), [])
            sets.append(taken)
        taken[0].update(own)
        taken[1].append(key)
    return [keys for _, keys in sets]


def _exclude(prober: Prober, sources: Mapping[str, Source], found: Mapping[str, Influence]) -> None:
    """Mark the inputs that do not depend on a channel."""
    total = {(key, name): torch.zeros_like(one) for key in sources for name, one in found[key].inputs.items()}
    useful: dict[str, list[Tensor]] = {}
    for prober.scale, prober.sign in _KINDS:
        before = _read(prober, sources, {})
        everything = {key: torch.ones(source.size, dtype=torch.bool, device="cpu") for key, source in sources.items()}
        noticed = changed(before, _read(prober, sources, everything))
        finite = {name: torch.stack(readings).isfinite().all(0) for name, readings in before.items() if name in noticed}
        possible = {
            (key, name): (noticed[name] & finite[name])[:, None].repeat(1, sources[key].size)
            for key, name in total
            if name in noticed
        }

        def excluded(chosen: Mapping[str, Tensor], before: Any = before, possible: Any = possible) -> set[str]:
            """Change these channels; the sources of which some channels are now excluded."""
            now, more = changed(before, _read(prober, sources, chosen)), set()
            for (key, name), one in possible.items():
                if name in now and key in chosen:
                    unnoticed = one & ~now[name][:, None] & chosen[key]
                    if bool(unnoticed.any()):
                        more.add(key)
                        one &= ~unnoticed
            return more

        def may(key: str, possible: Any = possible, marks: Any = possible) -> Tensor:
            """(inputs, channels) bool: which channels of a source the inputs that it reaches may depend on."""
            return torch.cat([marks[part] for part in possible if part[0] == key])

        keys = {key for key, _ in possible}
        sizes = {key: size for key, size in _sizes(sources).items() if key in keys}
        if sizes:
            change(sizes, excluded, may, partial(may, marks=total), useful)
        for part, one in possible.items():
            total[part] |= one
    for key in sources:
        _note(prober, sources, key, found[key], {name: one for (own, name), one in total.items() if own == key})


def _note(
    prober: Prober, sources: Mapping[str, Source], key: str, influence: Influence, inputs: Mapping[str, Tensor]
) -> None:
    """Record what the inputs depend on, and which modules read one channel everywhere."""
    for name, one in inputs.items():
        influence.inputs[name] = one
        influence.mixed[name] = bool(one.any()) and _mixes(prober, sources, key, name, one)


def _mixes(prober: Prober, sources: Mapping[str, Source], key: str, name: str, possible: Tensor) -> bool:
    """Whether a single channel, changed alone, changes more than half of the inputs of a module that any does."""
    wide = 2 * possible.sum(0) > possible.any(1).sum()
    if sources[key].size == 1 or not bool(wide.any()):
        return False
    one = torch.zeros(sources[key].size, dtype=torch.bool, device="cpu")
    one[int(wide.int().argmax())] = True
    for prober.scale, prober.sign in _KINDS:
        before = _read(prober, sources, {})
        now = changed(before, _read(prober, sources, {key: one}))
        if name in now and 2 * int(now[name].sum()) > int(possible.any(1).sum()):
            return True
    return False


def _read(prober: Prober, sources: Mapping[str, Source], selected: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """What all modules read if these channels are changed."""
    uses, originals = parameter_uses(prober.model.modules()), []
    for key, channels in selected.items():
        source = sources[key]
        if source.parameter is not None and bool(channels.any()):
            owner, _, attribute = source.parameter.rpartition(".")
            holder = prober.model.get_submodule(owner)
            old = getattr(holder, attribute)
            uses.setdefault(id(old), [(holder._buffers, attribute)])
            originals.append((replace_parameter(uses, old, _altered(old.detach(), source.dim, channels)), old))
    try:
        layers = {sources[key].name: one for key, one in selected.items() if sources[key].parameter is None}
        return prober.read(
            layers, [f"{sources[key].parameter}:{sources[key].dim}" for key in selected.keys() - layers.keys()]
        )
    finally:
        for new, old in reversed(originals):
            uses[id(old)] = uses.pop(id(new))  # of two dimensions of one parameter the first is restored next
            for parameters, attribute in uses[id(old)]:
                parameters[attribute] = old


def _read_watching(
    prober: Prober, sources: Mapping[str, Source], selected: Mapping[str, Tensor]
) -> tuple[dict[str, list[Tensor]], dict[str, list[str]]]:
    """The same, and what reads channels besides modules."""
    watching = Watching(prober)
    try:
        with watching:
            read = _read(prober, sources, selected)
    finally:
        watching.remove()
    watching.note("the model's output", prober.returned)
    return read, watching.seen


def _altered(tensor: Tensor, dim: int, channels: Tensor) -> Tensor:
    """``tensor`` with other numbers in these channels, of the size of the largest entry or more."""
    more = pattern(tensor.shape, torch.Generator().manual_seed(1)) * (1 + float(tensor.abs().max()))
    places = channels.view([-1 if axis == dim else 1 for axis in range(tensor.dim())])
    return torch.where(places.to(tensor.device), tensor + more.to(tensor), tensor)
