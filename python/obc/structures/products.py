"""Products outside layers, such as those of hand-written attention: their MACs as a function of the groups' widths.

The products that the model executes between its layers' own are listed with their sizes: matrix products, ``einsum``,
attention's, recurrent layers' and convolutions with computed kernels. Then one unit of each group is removed on a copy,
and the list is made again: a size that is smaller by d depends on the group, by d per unit removed. Sizes are linear in
the widths (heads times positions, the size of a head), so the MACs, their product, are a polynomial.

This takes one forward pass, and one more for each group if there are any such products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from obc.model.evaluation import Run
from obc.model.groups import ChannelGroup
from obc.model.hooks import hooked
from obc.model.names import named_modules
from obc.model.shared_copy import shared_copy
from obc.structures.comparison import run_alike
from obc.structures.counted_macs import counting_products
from obc.structures.polynomial import Polynomial, Size
from obc.structures.protocol import Provable

Sizes = tuple[int, ...]
# More sizes of one product can't vary in a polynomial of degree two.
_DEGREE = 2


@dataclass(frozen=True)
class Extent:
    """One size of a product.

    Attributes:
        size: in the model when the products were found.
        per_unit: (group, what one of its units contributes) for the groups that it depends on.
    """

    size: int
    per_unit: tuple[tuple[str, float], ...] = ()


@dataclass
class Products:
    """Products outside layers.

    Attributes:
        counts: the sizes of a product -> how many products there are with these.
        widths: the groups' widths when the products were found.
        unfollowed: group -> why it is not known what its units contribute; taken to be nothing.
    """

    counts: Counter[tuple[Extent, ...]] = field(default_factory=Counter)
    widths: dict[str, int] = field(default_factory=dict)
    unfollowed: dict[str, str] = field(default_factory=dict)

    def add_to(self, polynomial: Polynomial, groups: Sequence[ChannelGroup]) -> None:
        """Add the MACs to a polynomial in the present widths of ``groups``.

        If more than two sizes of a product vary, the two that vary most do, and the others keep their present size.
        """
        for extents, count in self.counts.items():
            sizes = [self._size(extent, groups) for extent in extents]
            now = [polynomial.present(size) for size in sizes]
            share = [
                0.0 if size.per_unit is None else float(size.per_unit.abs().max()) / max(present, 1.0)
                for size, present in zip(sizes, now, strict=True)
            ]
            varying = sorted(range(len(sizes)), key=lambda place: -share[place])[:_DEGREE]
            polynomial.add(count, *(size if place in varying else Size(now[place]) for place, size in enumerate(sizes)))

    def _size(self, extent: Extent, groups: Sequence[ChannelGroup]) -> Size:
        if not extent.per_unit:
            return Size(float(extent.size))
        fixed = extent.size - sum(factor * self.widths[name] for name, factor in extent.per_unit)
        factors = dict(extent.per_unit)
        return Size(
            fixed, torch.tensor([factors.get(group.name, 0.0) for group in groups], dtype=torch.float64, device="cpu")
        )


def find_products(structure: Provable, run: Run, layers: Collection[str]) -> Products:
    """Find the products outside ``layers``, and how their sizes depend on the widths of the structure's groups.

    Args:
        structure: its model is not changed.
        run: ``run(model)`` runs it on inputs that are always the same.
        layers: names of the layers whose own products are counted otherwise.
    """
    found = Products(widths={group.name: group.size for group in structure.groups})
    before = products_in(shared_copy(structure.model), run, layers)
    per_unit: list[list[dict[str, float]]] = [[{} for _ in sizes] for sizes in before]
    for group in structure.groups if before else ():
        if group.size < 2:
            continue  # nothing can be removed from it
        twin = structure.twin(shared_copy(structure.model))
        try:
            twin.remove({group.name: torch.tensor([group.size - 1], device="cpu")})
            after = products_in(twin.model, run, layers)
        except Exception as error:  # the model's own code, which may not run at every width
            found.unfollowed[group.name] = f"{type(error).__name__}: {error}"
            continue
        if [len(sizes) for sizes in after] != [len(sizes) for sizes in before]:
            found.unfollowed[group.name] = f"the model runs {len(after)} products instead of {len(before)}"
            continue
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            for dim, (one, other) in enumerate(zip(old, new, strict=True)):
                if one != other:
                    per_unit[place][dim][group.name] = float(one - other)
    for sizes, factors in zip(before, per_unit, strict=True):
        extents = (Extent(size, tuple(one.items())) for size, one in zip(sizes, factors, strict=True))
        found.counts[tuple(extents)] += 1
    return found


def products_in(model: nn.Module, run: Run, layers: Collection[str]) -> list[Sizes]:
    """The sizes of every product outside ``layers`` in one run, in the order in which they run.

    Args:
        model: it gets hooks while it runs.
        run: ``run(model)`` runs it.
        layers: names of modules whose products are left out.
    """
    found: list[Sizes] = []
    inside = 0

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal inside
        inside += 1

    def end(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal inside
        inside -= 1

    def note(sizes: Sizes) -> None:
        if not inside:
            found.append(sizes)

    handles = []
    for name, module in named_modules(model):
        if name in layers:
            handles += [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)]
    with hooked(handles), counting_products(model, note):
        run_alike(model, run)
    return found
