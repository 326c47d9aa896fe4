"""Finds, by running the model, which inputs of every layer each channel influences past nothing but operations.

Like :mod:`obc.structures.probing`, but for every source of channels on its own: a layer, an embedding, or a dimension
of a parameter or buffer outside layers. So an input may depend on channels of several layers that are added up, and on
several channels of one layer, as behind a gated unit. Sources that no layer reads in common are examined in the same
passes.

In each pass some channels change, and an input that does not notice depends on none of them. Of few channels those
change first whose numbers have a certain bit. Then every input is left with the channels that differ from its own in
some bits only, and those change one by one; channels that no input may both depend on change in one pass. Many channels
are numbered: one by one, in halves side by side, head by head, and so on. If all but a few numbers change, and some
input does not notice, its channels have these numbers; then the bits of the numbers tell the same of all other inputs
in a few passes. At the end random sets change: small ones tell this of inputs that depend on many channels, large ones
of many channels at once; both are drawn until nothing more is excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from obc.model.evaluation import Run, tensors_in
from obc.model.layouts import is_depthwise
from obc.model.names import joined, named_modules
from obc.model.recurrent import is_recurrent
from obc.model.shared_copy import parameter_uses, replace_parameter
from obc.structures.probing import Prober, changed, pattern, sums

# Size and sign of the invented numbers: a ReLU, a threshold or an activation that saturates hides some. What an input
# notices for any of them counts.
_KINDS = ((1.0, 1), (30.0, -1))
# Shares of the channels that change, by turns; None: those that did not in the pass before.
_SHARES = (0.5, None, 0.25, 0.125, 0.5, None, 0.0625)
_MOST_PASSES, _IN_VAIN = 200, 18
# Of up to this many channels every input notices, or not, each one alone.
_FEW = 256
# An input that noticed so many single channels, and missed none, is taken to depend on all that it may.
_ENOUGH = 16
# Numberings of many channels whose bits change, and the channels whose numbers do not at first, as shares of the size:
# several, because some may go together otherwise than the rest.
_MOST_NUMBERINGS = 4
_UNCHANGED = (0.0, 0.4, 0.7)
# In all. A block of a YOLO takes some 250.
_MOST_IN_ALL = 6000
_TOO_MANY = "running the model to find which channels go together takes {} passes"
_PRODUCTS = {
    *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.tensordot),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.__matmul__, Tensor.__rmatmul__),
}


@dataclass(frozen=True)
class Source:
    """Something with channels that later layers read.

    Attributes:
        name: the layer, the embedding, the parameter, or the buffer.
        size: number of channels.
        parameter: name of the parameter or buffer whose entries are changed; None for a layer, whose output is.
        dim: the parameter's dimension of channels.
    """

    name: str
    size: int
    parameter: str | None = None
    dim: int = 0


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


def influences(model: nn.Module, run: Run, sources: Mapping[str, Source]) -> tuple[dict[str, Influence], int]:
    """(key of each source -> its influence, number of forward passes).

    Where all sources would take more than 6000 passes, only those are examined that share their passes with others.

    Raises:
        TooManyPassesError: there are so many sources that it takes more to see what each of them reaches.
    """
    if len(_KINDS) * len(sources) > _MOST_IN_ALL:
        raise TooManyPassesError(_TOO_MANY.format(f"up to {len(_KINDS) * len(sources)}"))
    prober = Prober(model, run)
    found = _reached(prober, sources)
    sets = [{key: sources[key] for key in keys} for keys in _together(found)]
    passes = [len(_KINDS) * _usual_passes(_sizes(one)) for one in sets]
    takes = f"more than {_MOST_IN_ALL}"
    if sum(passes) > _MOST_IN_ALL:
        takes = f"up to {sum(passes)}"
        sets = _within(_MOST_IN_ALL, [pair for pair in zip(sets, passes, strict=True) if len(pair[0]) > 1])
    examined: set[str] = set()
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


def _reached(prober: Prober, sources: Mapping[str, Source]) -> dict[str, Influence]:
    """The modules that each source reaches, with every input marked, and its ends."""
    found = {key: Influence() for key in sources}
    for scale, sign in _KINDS:
        prober.scale, prober.sign = scale, sign
        before, ends_before = _read_watching(prober, sources, {})
        for key, source in sources.items():
            now, ends = _read_watching(prober, sources, {key: torch.ones(source.size, dtype=torch.bool, device="cpu")})
            for name, differs in changed(before, now).items():
                if bool(differs.any()):
                    whole = torch.ones(len(differs), source.size, dtype=torch.bool, device="cpu")
                    found[key].inputs.setdefault(name, whole)
            mine = found[key].ends
            mine += [end for end, value in ends.items() if ends_before.get(end) != value and end not in mine]
    return found


def _together(found: Mapping[str, Influence]) -> list[list[str]]:
    """Sources in sets; no two of a set reach the same module."""
    sets: list[tuple[set[str], list[str]]] = []
    for key, influence in found.items():
        own = set(influence.inputs)
        if not own:
            continue
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

        def most(key: str, possible: Any = possible) -> int:
            """The most channels of a source that an input may depend on."""
            return max((int(one.sum(1).max()) for (own, _), one in possible.items() if own == key), default=0)

        def may(key: str, possible: Any = possible) -> Tensor:
            """(inputs, channels) bool: which channels of a source the inputs that it reaches may depend on."""
            return torch.cat([one for (own, _), one in possible.items() if own == key])

        keys = {key for key, _ in possible}
        sizes = {key: size for key, size in _sizes(sources).items() if key in keys}
        if sizes and max(sizes.values()) <= _FEW:
            _change_few(sizes, excluded, may)
        elif sizes:
            _change_many(sizes, excluded, most)
        for part, one in possible.items():
            total[part] |= one
    for (key, name), one in total.items():
        found[key].inputs[name] = one
        found[key].mixed[name] = bool(one.any()) and _mixes(prober, sources, key, name, one)


def _change_few(
    sizes: Mapping[str, int], excluded: Callable[[Mapping[str, Tensor]], set[str]], may: Callable[[str], Tensor]
) -> None:
    """Change the channels whose numbers have certain bits, then single ones, until it is known which an input notices.

    This is exact for an input that notices fewer than 16 channels, or misses one of them after the bits.
    """
    for bit in range(_bits(max(sizes.values()))):
        for value in (0, 1):
            excluded({key: (torch.arange(size, device="cpu") >> bit) & 1 == value for key, size in sizes.items()})
    left = {key: may(key) for key in sizes}
    noticed = {key: torch.zeros_like(one) for key, one in left.items()}
    while chosen := {key: one for key in sizes if bool((one := _single(may(key), left[key], noticed[key])).any())}:
        excluded(chosen)
        for key, channels in chosen.items():
            noticed[key] |= may(key) & channels


def _bits(most: int) -> int:
    """How many bits of the numbers of up to so many channels are worth two passes each."""
    return (most - 1).bit_length() if most > _ENOUGH else 0


def _single(may: Tensor, left: Tensor, noticed: Tensor) -> Tensor:
    """(channels,) bool: channels to change at once, of which each input may depend on one at most.

    Args:
        may: (inputs, channels) bool: the channels that an input may still depend on.
        left: the same after the bits.
        noticed: those that it is known to notice.
    """
    enough = (noticed.sum(1) >= _ENOUGH) & (may == left).all(1) & (2 * may.sum(1) > may.shape[1])
    unknown = (may.sum(1) > 1) & ~enough
    may = may & unknown[:, None]
    wanted = (may & ~noticed).any(0)
    generator = torch.Generator().manual_seed(0)
    taken, chosen = torch.zeros_like(unknown), torch.zeros_like(wanted)
    for channel in torch.randperm(len(wanted), generator=generator, device="cpu").tolist():
        if wanted[channel] and not bool((may[:, channel] & taken).any()):
            chosen[channel] = True
            taken |= may[:, channel]
    return chosen


def _change_many(
    sizes: Mapping[str, int], excluded: Callable[[Mapping[str, Tensor]], set[str]], most: Callable[[str], int]
) -> None:
    """Change sets of channels by their numbers, then random ones."""
    numberings = {key: numberings_of(size) for key, size in sizes.items()}
    left = dict.fromkeys(sizes, _MOST_NUMBERINGS)
    for turn in range(max(map(len, numberings.values()))):
        numbers = {key: own[turn] for key, own in numberings.items() if left[key] and turn < len(own)}
        told = excluded({key: ~torch.isin(own, _some_of(own)) for key, own in numbers.items()}) if numbers else set()
        numbers = {key: numbers[key] for key in told}
        for bit in range(max((int(own.max()).bit_length() for own in numbers.values()), default=0)):
            for value in (0, 1):
                excluded({key: (own >> bit) & 1 == value for key, own in numbers.items()})
        for key, own in numbers.items():
            left[key] = left[key] - 1 if most(key) > int(own.bincount().max()) else 0
    in_vain = 0
    for chosen in _random_sets(sizes):
        in_vain = 0 if excluded(chosen) else in_vain + 1
        if in_vain == _IN_VAIN:
            return


def _some_of(numbers: Tensor) -> Tensor:
    return numbers[[int(share * len(numbers)) for share in _UNCHANGED]]


def numberings_of(size: int) -> list[Tensor]:
    """(size,) int64 each: numbers of channels, those with the most numbers first.

    Channel c has the number (c mod e) // d, for divisors d of e and e of the size: its own; its place in each of
    several parts, such as the halves of a gated unit; its head; its head in fused queries, keys and values.
    """
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    pairs = [(e // d, e, d) for e in divisors for d in divisors if e % d == 0 and e > d]
    return [torch.arange(size, device="cpu") % e // d for _, e, d in sorted(pairs, reverse=True)]


def _usual_passes(sizes: Mapping[str, int]) -> int:
    """The most sets of channels that are changed; of few channels those where an input depends on few, or on most."""
    most = max(sizes.values())
    if most <= _FEW:
        return min(most, 2 * _bits(most) + 2 * _ENOUGH)
    numberings = max(len(numberings_of(size)) for size in set(sizes.values()))
    return numberings + _MOST_NUMBERINGS * 2 * (most - 1).bit_length() + _MOST_PASSES


def _random_sets(sizes: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    chosen: dict[str, Tensor] = {}
    for turn in range(_MOST_PASSES):
        share = _SHARES[turn % len(_SHARES)]
        if share is None:
            chosen = {key: ~one for key, one in chosen.items()}
        else:
            chosen = {key: torch.rand(size, generator=generator, device="cpu") < share for key, size in sizes.items()}
        yield chosen


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
        return prober.read({sources[key].name: channels for key, channels in selected.items()})
    finally:
        for new, old in reversed(originals):
            for parameters, attribute in uses.pop(id(new)):
                parameters[attribute] = old


def _read_watching(
    prober: Prober, sources: Mapping[str, Source], selected: Mapping[str, Tensor]
) -> tuple[dict[str, list[Tensor]], dict[str, list[str]]]:
    """The same, and what reads channels besides modules."""
    watching = _Watching(prober.model)
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


class _Watching(TorchFunctionMode):
    """Notes what torch's attention, recurrent layers as first states, and products outside layers read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: dict[str, list[str]] = {}
        self._names: dict[int, str] = {}
        self._handles = []
        for name, module in named_modules(model):
            if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
                label = f"{name!r} ({type(module).__name__})"
                hook = partial(self._note_whole, label, 1 if is_recurrent(module) else 0)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        whole = [module for module in model.modules() if isinstance(module, (nn.RNNBase, nn.MultiheadAttention))]
        inside = {id(parameter) for module in whole for parameter in module.parameters()}
        for name, module in named_modules(model):
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.dim() > 1 and id(tensor) not in inside and not is_depthwise(module):
                    self._names[tensor.data_ptr()] = joined(name, key)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _note_whole(self, label: str, first: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note what a module reads not channel by channel: of a recurrent layer its first states, not its input."""
        self.note(label, tensors_in((args[first:], {key: one for key, one in kwargs.items() if key != "input"})))

    def note(self, label: str, tensors: list[Tensor]) -> None:
        """Add one number for each of the tensors that are read; it is text, so that NaN equals NaN."""
        self.seen.setdefault(label, []).extend(repr(float(sums(t.detach().reshape(1, -1), 0))) for t in tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            tensors = tensors_in((args, kwargs or {}))
            held = [name for t in tensors if (name := self._names.get(t.data_ptr())) is not None]
            if held:
                others = [t for t in tensors if t.data_ptr() not in self._names]
                self.note(f"a product outside layers with {held[0]!r}", others)
        return func(*args, **(kwargs or {}))
