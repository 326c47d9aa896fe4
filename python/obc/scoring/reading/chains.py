"""Chains: rows that follow from other rows, so that one read of an activation serves two layers.

Take a layer's output y and the next layer's input x. If everything between them is homogeneous of degree one in y
(ReLU, pooling, a product with something else, attention in its values) and nothing else reads y, Euler's theorem gives

    sum over positions of y * dL/dy = sum over positions of x * dL/dx

so the output's row is the input's row, summed over the copies of y (flatten, grouped queries). If an affine BatchNorm
in eval mode comes before, its row gamma g_gamma + beta g_beta is the same, and the convolution before it has

    r = gamma (g_gamma + mean / std * g_beta).

Candidates are found in the graph that autograd records in the checking row, and used only if both sides agree there
numerically (a second reader of y would show). In every later row each input checks that the graph still leads to the
same node; if not, the row is dropped and repeated without that chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obc.scoring.errors import ChainError
from obc.scoring.reading.chain_candidates import Candidate
from obc.scoring.reading.flat_row import FlatRow, Slot
from obc.scoring.reading.gradients import NormGradients

# Largest accepted difference of the two sides, relative to the largest entry: only the order of their sums differs.
_TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-9}


class Chains:
    """The chains of a model that held in its checking row.

    Attributes:
        slots: slots that need no gate -> the chain that gives their row.
        outputs: graph node of every output without a gate in the current row.
        held: slots whose chains held so far in the current row.
    """

    def __init__(self) -> None:
        self.slots: dict[Slot, str] = {}
        self.outputs: dict[Slot, Any] = {}
        self._chains: dict[Slot, _Copy | _Before] = {}
        self._seen_by: dict[Slot, list[_Copy | _Before]] = {}
        self.held: set[Slot] = set()
        self._fill: _Fill | None = None  # made by the first row that needs it

    def confirm(self, candidates: Iterable[Candidate], norms: Iterable[NormGradients]) -> None:
        """Keep the candidates whose two sides agree in the current row."""
        views = _views(norms)
        sources: set[Slot] = set()
        # Norms first: they have gradients of their own, so the rows that follow from them need no gate at all.
        for candidate in sorted(candidates, key=lambda one: one.source is not None):
            if candidate.slot in self.slots or candidate.slot in sources or candidate.source in self.slots:
                continue
            chain = _Before(candidate, views) if candidate.source is None else _Copy.of(candidate, candidate.source)
            if chain is None or not chain.agrees():
                continue
            self._add(chain)
            if candidate.source is not None:
                sources.add(candidate.source)

    def _add(self, chain: _Copy | _Before) -> None:
        self._chains[chain.slot] = chain
        self.slots[chain.slot] = chain.follows_from
        self._fill = None
        self._seen_by.setdefault(chain.link.seen_by, []).append(chain)

    def drop(self, slot: Slot) -> None:
        """Remove this slot's chain: it has a gate again."""
        chain = self._chains.pop(slot)
        del self.slots[slot]
        self._seen_by[chain.link.seen_by].remove(chain)
        self._fill = None

    def forget_row(self) -> None:
        """Forget what was kept of the checking row."""
        self.outputs.clear()
        self.held.clear()

    def look(self, activation: Tensor, slot: Slot) -> None:
        """Check that ``activation``, an input whose row is in ``slot``, still comes from where its chains begin.

        Raises:
            ChainError: it does not.
        """
        for chain in self._seen_by.get(slot, ()):
            if not chain.link.holds(activation.grad_fn, self.outputs):
                raise ChainError(f"the input of {slot.label!r} took another path than in the checking row")
            self.held.add(chain.slot)

    def links(self, slot: Slot) -> tuple[Any, ...]:
        """The checks of :meth:`look` for the input whose row is in ``slot``, for a gate in C++.

        One (slot, whether it is the input's own, norm, the norm's weight, path) for each chain.
        """
        links = [chain.link for chain in self._seen_by.get(slot, ())]
        return tuple(
            (link.slot, link.slot is link.seen_by, link.norm, getattr(link.norm, "weight", None), link.path)
            for link in links
        )

    def refuse_unseen(self) -> None:
        """Raise if an output without a gate reached no input that its row follows from.

        Raises:
            ChainError: it names the output.
        """
        for slot in self.outputs:
            if slot not in self.held:
                raise ChainError(f"the output of {slot.label!r} took another path than in the checking row")

    def give_up(self) -> None:
        """Remove all chains, so that every slot has a gate again."""
        for by_slot in (self.slots, self.outputs, self._chains, self._seen_by, self.held):
            by_slot.clear()
        self._fill = None

    def bind(self, norms: Iterable[NormGradients]) -> None:
        """Look up where the norms' gradients lie now."""
        views = _views(norms)
        for chain in self._chains.values():
            if isinstance(chain, _Before):
                chain.bind(views)
        self._fill = None

    def fill(self) -> None:
        """Compute the rows that follow from other rows, for the modules that took part in the current row."""
        if len(self.held) == len(self._chains):
            if self._fill is None:
                self._fill = _Fill(self._chains.values())
            self._fill.run()
            return
        for slot, chain in self._chains.items():
            if slot in self.held:
                slot.of(slot.flat.values).copy_(chain.row())

    def state(self, slots: list[Slot], norms: Mapping[str, nn.Module]) -> list[list[Any]]:
        """The state as plain values: positions among ``slots`` and names of ``norms``."""
        place = {slot: index for index, slot in enumerate(slots)}
        name = {norm: key for key, norm in norms.items()}
        state = []
        for chain in self._chains.values():
            link = chain.link
            source = None if link.source is None else place[link.source]
            norm = None if link.norm is None else name[link.norm]
            shape = [chain.repeats, chain.width] if isinstance(chain, _Copy) else []
            state.append(
                [place[link.slot], place[link.seen_by], [list(step) for step in link.path], source, norm, *shape]
            )
        return state

    def load(self, state: Iterable[Sequence[Any]], slots: list[Slot], norms: Mapping[str, nn.Module]) -> None:
        """Restore a :meth:`state`; attaching the scorer then calls :meth:`bind`."""
        for place, seen_by, steps, source, norm, *shape in state:
            path = tuple((name, index) for name, index in steps)
            from_slot = None if source is None else slots[source]
            link = Candidate(slots[place], slots[seen_by], path, from_slot, None if norm is None else norms[norm])
            self._add(_Before(link, {}) if from_slot is None else _Copy(link, from_slot, *shape))


def _views(norms: Iterable[NormGradients]) -> dict[int, Tensor]:
    return {id(p): view for one in norms for p, view in zip(one.parameters, one.views, strict=True)}


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.numel() == 0:
        return False
    largest = other.abs().amax()
    return bool(largest > 0) and bool((one - other).abs().amax() <= _TOLERANCE[one.dtype] * largest)


class _Copy:
    """The row of ``slot`` is ``source`` viewed as (blocks, repeats, width) and summed over the repeats."""

    def __init__(self, link: Candidate, source: Slot, repeats: int, width: int) -> None:
        self.link, self.slot = link, link.slot
        self.source, self.repeats, self.width = source, repeats, width
        self.follows_from = f"the row of {source.label}"

    @classmethod
    def of(cls, link: Candidate, source: Slot) -> _Copy | None:
        """The copy that agrees with the current rows, or None."""
        slot = link.slot
        if slot.flat is not source.flat or slot.size == 0 or source.size % slot.size:
            return None
        repeats = source.size // slot.size
        widths = [1] if repeats == 1 else [width for width in range(1, slot.size + 1) if slot.size % width == 0]
        return next((copy for copy in (cls(link, source, repeats, width) for width in widths) if copy.agrees()), None)

    def row(self) -> Tensor:
        rows = self.source.of(self.source.flat.values)
        if self.repeats == 1:
            return rows
        return rows.unflatten(0, (-1, self.repeats, self.width)).sum(1).flatten(0, 1)

    def agrees(self) -> bool:
        return _agree(self.row(), self.slot.of(self.slot.flat.values))


class _Before:
    """r = gamma * g_gamma + (gamma * mean / std) * g_beta.

    ``terms``: (factor, gradient) of the norm's weight, then of its bias; empty if the gradients can't be used.
    """

    follows_from = "the gradient of the norm behind it"

    def __init__(self, link: Candidate, views: Mapping[int, Tensor]) -> None:
        self.link, self.slot = link, link.slot
        self.terms: list[tuple[Tensor, Tensor]] = []
        self.bind(views)

    def bind(self, views: Mapping[int, Tensor]) -> None:
        """Look up the gradients; without usable ones the chain gives no row."""
        norm: Any = self.link.norm
        gradients = [views.get(id(norm.weight)), views.get(id(norm.bias))]
        # The two terms cancel, and half precision is too coarse for that.
        right = norm.weight.dtype == self.slot.flat.dtype and norm.weight.numel() == self.slot.size
        right = right and norm.running_mean is not None and norm.running_mean.numel() == self.slot.size
        if not right or any(gradient is None for gradient in gradients):
            return
        weight = norm.weight.detach()
        factors = (weight.clone(), weight * norm.running_mean / (norm.running_var + norm.eps).sqrt())
        self.terms = [(f, view) for f, view in zip(factors, gradients, strict=True) if view is not None]

    def row(self) -> Tensor:
        (weight, weight_gradient), (bias, bias_gradient) = self.terms
        return weight * weight_gradient + bias * bias_gradient

    def agrees(self) -> bool:
        return (
            bool(self.terms) and self.slot.flat.samples is None and _agree(self.row(), self.slot.of(self.slot.flat.row))
        )


class _Fill:
    """Computes all chains of a model with a few operations on flat vectors, instead of a few for every chain.

    The order does not matter, because no chain's source is another chain's slot.
    """

    def __init__(self, chains: Iterable[_Copy | _Before]) -> None:
        self._alone: list[_Copy] = []
        copies: dict[FlatRow, list[_Copy]] = {}
        befores: dict[tuple[FlatRow, int, int], list[_Before]] = {}
        for chain in chains:
            if isinstance(chain, _Before):
                weight, bias = (gradient.untyped_storage().data_ptr() for _, gradient in chain.terms)
                befores.setdefault((chain.slot.flat, weight, bias), []).append(chain)
            elif chain.repeats == 1:
                copies.setdefault(chain.slot.flat, []).append(chain)
            else:
                self._alone.append(chain)
        self._copies = [
            (flat, _channels(flat, [one.slot for one in some]), _channels(flat, [one.source for one in some]))
            for flat, some in copies.items()
        ]
        self._befores = [
            (flat, _channels(flat, [one.slot for one in some]), _Term(some, 0), _Term(some, 1))
            for (flat, _, _), some in befores.items()
        ]

    def run(self) -> None:
        for flat, slots, sources in self._copies:
            rows = flat.values
            rows[slots] = rows[sources]
        for flat, slots, weights, biases in self._befores:
            flat.row[slots] = weights.product() + biases.product()
        for chain in self._alone:
            chain.slot.of(chain.slot.flat.values).copy_(chain.row())


def _channels(flat: FlatRow, slots: Iterable[Slot]) -> Tensor:
    """The entries of these slots in their flat row, one slot after another."""
    return torch.cat([torch.arange(slot.start, slot.stop, device=flat.device) for slot in slots])


class _Term:
    """Term ``index`` of several chains, factor times gradient; the gradients are views of one vector."""

    def __init__(self, chains: Sequence[_Before], index: int) -> None:
        terms = [chain.terms[index] for chain in chains]
        first = terms[0][1]
        self._whole = first.as_strided((first.untyped_storage().nbytes() // first.element_size(),), (1,), 0)
        places = [torch.arange(len(view), device=view.device) + int(view.storage_offset()) for _, view in terms]
        self._places = torch.cat(places)
        self._factors = torch.cat([factor for factor, _ in terms])

    def product(self) -> Tensor:
        return self._factors * self._whole[self._places]
