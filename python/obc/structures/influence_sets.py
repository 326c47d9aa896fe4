"""Which sets of channels change, pass after pass, until it is known which channels each input depends on.

In each pass some channels change, and an input that does not notice depends on none of them. Of few channels those
change first whose numbers have a certain bit. Then every input is left with the channels that differ from its own in
some bits only, and those change one by one; channels that no input may both depend on change in one pass. Many channels
are numbered: one by one, in halves side by side, head by head, and so on. If all but a few numbers change, and some
input does not notice, its channels have these numbers; then the bits of the numbers tell the same of all other inputs
in a few passes. Then a few single ones change: if each shows that inputs go together which might, nothing more is
needed. Otherwise random sets change: small ones tell of inputs that depend on many channels, large ones of many
channels at once; both are drawn until nothing more is excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

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


# Changes channels of each source; the sources of which some channels are now excluded.
_Excluded = Callable[[Mapping[str, Tensor]], set[str]]
# (inputs, channels) bool: which channels of a source the inputs that it reaches may depend on.
_May = Callable[[str], Tensor]


def change(
    sizes: Mapping[str, int], excluded: _Excluded, may: _May, marked: _May, useful: dict[str, list[Tensor]]
) -> None:
    """Change channels of sources of these sizes until it is known what depends on them.

    Args:
        sizes: source -> number of channels.
        excluded: changes channels.
        may: what inputs may depend on, as far as it is known.
        marked: what they depend on according to other invented numbers; it need not be excluded.
        useful: source -> numberings that told something with other invented numbers; those that do now are added.
    """
    if max(sizes.values()) <= _FEW:
        _change_few(sizes, excluded, may, marked)
        return
    _change_by_numbers(sizes, excluded, may, useful)
    if _unsettled(sizes, excluded, may, marked):
        in_vain = 0
        for chosen in _random_sets(sizes):
            in_vain = 0 if excluded(chosen) else in_vain + 1
            if in_vain == _IN_VAIN:
                return


def with_bit(size: int, bit: int, value: int) -> Tensor:
    """(size,) bool: the channels whose numbers have this bit."""
    return (torch.arange(size, device="cpu") >> bit) & 1 == value


def _change_few(sizes: Mapping[str, int], excluded: _Excluded, may: _May, marked: _May) -> None:
    """Change the channels whose numbers have certain bits, then single ones, until it is known which an input notices.

    This is exact for an input that notices fewer than 16 channels, or misses one of them after the bits.
    """
    for bit in range(_bits(max(sizes.values()))):
        for value in (0, 1):
            excluded({key: with_bit(size, bit, value) for key, size in sizes.items()})
    left = {key: may(key) for key in sizes}
    noticed = {key: torch.zeros_like(one) for key, one in left.items()}
    while chosen := {
        key: one for key in sizes if bool((one := _single(may(key), left[key], noticed[key], marked(key))).any())
    }:
        excluded(chosen)
        for key, channels in chosen.items():
            noticed[key] |= may(key) & channels


def _bits(most: int) -> int:
    """How many bits of the numbers of up to so many channels are worth two passes each."""
    return (most - 1).bit_length() if most > _ENOUGH else 0


def _single(may: Tensor, left: Tensor, noticed: Tensor, marked: Tensor) -> Tensor:
    """(channels,) bool: channels to change at once, of which each input may depend on one at most.

    Args:
        may: (inputs, channels) bool: the channels that an input may still depend on.
        left: the same after the bits.
        noticed: those that it is known to notice.
        marked: those that it depends on according to other invented numbers: where many change, as in a softmax that
            saturates, none of them may be noticed, and each alone still is.
    """
    enough = (noticed.sum(1) >= _ENOUGH) & (may == left).all(1) & (2 * may.sum(1) > may.shape[1])
    unknown = (may.sum(1) > 1) & ~enough
    wanted, reach = (may & ~noticed & unknown[:, None]).any(0), (may | marked) & unknown[:, None]
    generator = torch.Generator().manual_seed(0)
    taken, chosen = torch.zeros_like(unknown), torch.zeros_like(wanted)
    for channel in torch.randperm(len(wanted), generator=generator, device="cpu").tolist():
        if wanted[channel] and not bool((reach[:, channel] & taken).any()):
            chosen[channel] = True
            taken |= reach[:, channel]
    return chosen


def _change_by_numbers(
    sizes: Mapping[str, int], excluded: _Excluded, may: _May, useful: dict[str, list[Tensor]]
) -> None:
    """Change the channels whose numbers have certain bits, in the numberings that tell something."""
    numberings = {key: useful.get(key) or numberings_of(size) for key, size in sizes.items()}
    left = dict.fromkeys(sizes, _MOST_NUMBERINGS)
    for turn in range(max(map(len, numberings.values()))):
        numbers = {key: own[turn] for key, own in numberings.items() if left[key] and turn < len(own)}
        told = excluded({key: ~torch.isin(own, _some_of(own)) for key, own in numbers.items()}) if numbers else set()
        numbers = {key: numbers[key] for key in told}
        useful |= {key: [*useful.get(key, []), own] for key, own in numbers.items()}
        for bit in range(max((int(own.max()).bit_length() for own in numbers.values()), default=0)):
            for value in (0, 1):
                excluded({key: (own >> bit) & 1 == value for key, own in numbers.items()})
        for key, own in numbers.items():
            most = int(may(key).sum(1).max()) if may(key).numel() else 0
            left[key] = left[key] - 1 if most > int(own.bincount().max()) else 0


def _unsettled(sizes: Mapping[str, int], excluded: _Excluded, may: _May, marked: _May) -> list[str]:
    """Change up to 16 sets of single channels; the sources some of whose inputs may still not go together.

    An input that noticed 16 and missed none is taken to depend on all that it may.
    """
    left = {key: may(key) for key in sizes}
    noticed = {key: torch.zeros_like(one) for key, one in left.items()}
    for turn in range(_ENOUGH + 1):
        many = {key: (noticed[key].sum(1) >= _ENOUGH) & (may(key) == left[key]).all(1) for key in sizes}
        known = {key: marked(key) | noticed[key] | ((may(key).sum(1) == 1) | many[key])[:, None] for key in sizes}
        unsettled = [key for key in sizes if not torch.equal(_parts(may(key)), _parts(may(key) & known[key]))]
        if not unsettled or turn == _ENOUGH:
            break
        chosen = {key: _single(may(key), left[key], noticed[key], marked(key)) for key in unsettled}
        excluded(chosen)
        for key, channels in chosen.items():
            noticed[key] |= may(key) & channels
    return unsettled


def _parts(linked: Tensor) -> Tensor:
    """(inputs,) the first of the inputs that each goes together with, directly or by others.

    Args:
        linked: (inputs, channels) bool: inputs that share a channel go together.
    """
    rows, columns = linked.nonzero(as_tuple=True)
    none = torch.full(linked.shape[1:], len(linked), device="cpu")
    parts, before = torch.arange(len(linked), device="cpu"), none
    while not torch.equal(parts, before):
        before = parts
        channels = none.scatter_reduce(0, columns, parts[rows], "amin")
        parts = parts.scatter_reduce(0, rows, channels[columns], "amin")
    return parts


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


def usual_passes(sizes: Mapping[str, int]) -> int:
    """The most sets of channels that are changed; of few channels those where an input depends on few, or on most."""
    most = max(sizes.values())
    if most <= _FEW:
        return min(most, 2 * _bits(most) + 2 * _ENOUGH)
    numberings = max(len(numberings_of(size)) for size in set(sizes.values()))
    return numberings + _MOST_NUMBERINGS * 2 * (most - 1).bit_length() + _ENOUGH + _MOST_PASSES


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
