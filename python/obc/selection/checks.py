"""Checks the arguments of ``obc.select`` and converts them to one form."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obc.model.arguments import instance, listed, number, one_of
from obc.model.costs import Costs
from obc.selection.greedy import EffectiveWidths, RemovalCosts
from obc.selection.interactions import FORMS

# Groups that keep less than this share of their units are named: a network rarely recovers from it.
NARROW = 0.1
# Warnings should point at the caller of obc.select: this function, _order within select, select, its caller.
_CALLER = 4


class FewRowsWarning(UserWarning):
    """There are fewer rows than units; it holds in every step of a pruning, with other numbers."""


class ShareWarning(UserWarning):
    """A budget seems to be meant as a share; what a share leaves to free in a last step may be as small."""


def check_arguments(
    selection: str, shrinkage: float | None, form: str | None, max_bytes: int, budget: float, per_cost: bool
) -> None:
    """Raise if an argument is out of range."""
    one_of("selection", selection, ("joint", "independent"))
    one_of("per_cost", per_cost, (True, False))
    if shrinkage is not None:
        number("shrinkage", shrinkage)
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage!r}")
    one_of("form", form, (None, *FORMS))
    number("max_bytes", max_bytes)
    number("budget", budget.item() if isinstance(budget, Tensor) and budget.numel() == 1 else budget)
    if max_bytes < 0:
        raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
    if not (math.isfinite(budget) and budget >= 0):
        raise ValueError(f"the budget, how much to free, must be finite and not negative, got {budget!r}")


def checked_rows(rows_by_group: Mapping[str, Tensor], selection: str) -> list[Tensor]:
    """The rows, or scores, of every group: float64, on one device."""
    instance("rows_by_group", rows_by_group, Mapping, "a mapping of groups' names to rows")
    if not rows_by_group:
        raise ValueError("there are no groups to select from")
    for name, values in rows_by_group.items():
        instance(f"rows_by_group[{name!r}]", values, Tensor, "a tensor of rows, (N, units)")
    device = next(iter(rows_by_group.values())).device
    found, counts = [], {}
    for name, values in rows_by_group.items():
        if not values.is_floating_point():
            raise TypeError(f"{name!r}: rows must be floating point, got {values.dtype}")
        if values.dim() != 2 and not (values.dim() == 1 and selection == "independent"):
            wanted = "(N, units)" if selection == "joint" else "(N, units), or (units,) scores"
            scores = "; of scores, pass selection='independent'" if values.dim() == 1 else ""
            got = f"got shape {tuple(values.shape)}{scores}"
            raise ValueError(f"{name!r}: {selection} selection needs rows {wanted}, {got}")
        if values.numel() == 0:
            what = "no units" if values.shape[-1] == 0 else "no rows"
            raise ValueError(f"{name!r} has {what}: its shape is {tuple(values.shape)}; leave the group out, or score")
        values = values.detach().to(device)
        bad = ~values.isfinite()
        if bad.any():
            *row, unit = bad.nonzero()[0].tolist()
            place = f"unit {unit}" + (f" in row {row[0]}" if row else "")
            raise ValueError(f"{name!r}: {place} is {float(values[bad][0])}; leave rows that are not finite out")
        if values.dim() == 2:
            counts[name] = len(values)
        found.append(values)
    if len(set(counts.values())) > 1:
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise ValueError(
            f"all groups need the same rows, got {counts[least]} rows of {least!r} and {counts[most]} of {most!r}"
        )
    return found


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """(C, N) float64, one line per unit."""
    sizes = [values.shape[1] for values in rows]
    units = torch.empty(sum(sizes), len(rows[0]), dtype=torch.float64, device=rows[0].device)
    for part, values in zip(units.split(sizes), rows, strict=True):
        part.copy_(values.T)
    return units


def limits(
    names: Sequence[str],
    sizes: Sequence[int],
    min_units: int | Mapping[str, int],
    round_to: int | Mapping[str, int] | None,
) -> tuple[list[int], list[int]]:
    """Per group, the lowest permitted width, and the number that its width must be a multiple of."""
    least = _by_group("min_units", names, min_units, 0)
    multiples = _by_group("round_to", names, 1 if round_to is None else round_to, 1)
    # A group whose lowest multiple exceeds its width loses nothing.
    lowest = [
        min(size, math.ceil(units / multiple) * multiple)
        for size, units, multiple in zip(sizes, least, multiples, strict=True)
    ]
    return lowest, multiples


def _by_group(what: str, names: Sequence[str], values: int | Mapping[str, int], smallest: int) -> list[int]:
    if isinstance(values, Mapping):
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"{what} names groups without rows: {named(unknown)}")
    by_group = {name: values.get(name, 1) if isinstance(values, Mapping) else values for name in names}
    for name, value in by_group.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"{what} of {name!r} must be an integer of at least {smallest}, got {value!r}")
    return list(by_group.values())


def removal_costs(
    names: Sequence[str],
    sizes: Sequence[int],
    costs: Costs | Mapping[str, float | Tensor],
    lowest: Sequence[int],
    device: torch.device,
) -> RemovalCosts:
    """The costs that removals free, for the groups with rows, in their order; ``lowest`` holds their lowest widths."""
    instance("costs", costs, (Costs, Mapping), "an obc.selection.Costs, or a mapping of groups' names to numbers")
    missing = sorted(set(names) - set(costs.names if isinstance(costs, Costs) else costs))
    if missing:
        raise ValueError(f"there are rows but no costs of {named(missing)}: are these rows of another model?")
    if isinstance(costs, Costs):
        return _of_polynomial(names, sizes, costs, lowest, device)
    extra = sorted(set(costs) - set(names))
    if extra:
        raise ValueError(f"there are costs but no rows of {named(extra)}: are these rows of another model?")
    by_unit = any(isinstance(value, Tensor) and value.dim() > 0 for value in costs.values())
    parts = []
    for name, size in zip(names, sizes, strict=True):
        instance(f"costs[{name!r}]", costs[name], (numbers.Real, Tensor), "a number or a tensor")
        values = torch.as_tensor(costs[name], dtype=torch.float64, device=device)
        if values.dim() and values.shape != (size,):
            raise ValueError(f"costs of {name!r} must be one number or ({size},), got shape {tuple(values.shape)}")
        _check_costs(name, values)
        parts.append(values.expand(size) if by_unit else values.reshape(1))
    values = torch.cat(parts)
    nothing = values.new_zeros(len(names))
    return RemovalCosts(
        nothing if by_unit else values, values.new_zeros(len(names), len(names)), values if by_unit else None
    )


def _of_polynomial(
    names: Sequence[str], sizes: Sequence[int], costs: Costs, lowest: Sequence[int], device: torch.device
) -> RemovalCosts:
    if costs.inside:
        costs = costs.only(names)
    place = {name: index for index, name in enumerate(costs.names)}
    order = torch.tensor([place[name] for name in names], device="cpu")
    for name, size, width in zip(names, sizes, costs.widths[order].tolist(), strict=True):
        if size != width:
            raise ValueError(
                f"{name!r} has rows of {size} units and costs of {width:g}: are these rows of another model, or of "
                "this one before it was pruned?"
            )
    for name, value in zip(names, costs.marginal()[order], strict=True):
        _check_costs(name, value)
    slope = costs.linear + 2 * costs.quadratic @ costs.effective()
    curves = {index: costs.curves[name] for index, name in enumerate(names) if name in costs.curves}
    effective = EffectiveWidths(curves, sizes, lowest, device) if curves else None
    return RemovalCosts(slope[order].to(device), costs.quadratic[order][:, order].to(device), None, effective)


def _check_costs(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()) or bool((values < 0).any()):
        raise ValueError(f"{name!r}: what a unit frees must be finite and not negative, got {float(values.min())}")


def warn_if_free(
    names: Sequence[str], sizes: Sequence[int], costs: RemovalCosts, inside: Mapping[int, Sequence[int]]
) -> None:
    """Warn of groups whose units free nothing; a whole block frees the costs of the groups ``inside`` it."""
    if costs.unit_costs is not None:
        free = torch.stack([part.amax() for part in costs.unit_costs.split(list(sizes))]) == 0
    else:
        widths = torch.tensor(sizes, dtype=torch.float64, device=costs.slope.device)
        taken = torch.ones_like(widths) if costs.effective is None else costs.effective.taken(widths, widths)
        free = (costs.slope - taken * costs.curvature.diagonal()) * taken == 0
        for block, inner in inside.items():
            free[block] &= bool(free[list(inner)].all())
    if bool(free.any()):
        groups = named([name for name, is_free in zip(names, free.tolist(), strict=True) if is_free])
        warnings.warn(f"removing units of {groups} frees nothing, so all of them stay", stacklevel=_CALLER)


def warn_if_a_share(budget: float, costs: RemovalCosts) -> None:
    """Warn of a budget below 1 that the removal of any unit exceeds: it seems to be meant as a share."""
    if not 0 < budget < 1:
        return
    alone = costs.slope - costs.curvature.diagonal() if costs.unit_costs is None else costs.unit_costs
    freed = alone[alone > 0]
    if len(freed) and costs.effective is None and float(freed.min()) >= 1:
        warnings.warn(
            f"the budget {float(budget):g} is no share, but how much to free, in the unit of the costs: one unit frees "
            f"{float(freed.min()):g} at least; for a share pass it times the costs' total",
            ShareWarning,
            stacklevel=_CALLER,
        )


def warn_if_all_equal(values: Tensor, what: str) -> None:
    """Warn if all ``values``, scores (C,) or rows (C, N), are equal."""
    if len(values) > 1 and bool((values == values[0]).all()):
        zero = "zero" if not values.any() else "equal"
        warnings.warn(f"all {what} are {zero}: the choice is arbitrary, and takes the first units", stacklevel=_CALLER)


def warn_if_few_rows(units: Tensor) -> None:
    """Warn if ``units``, (C, N), have fewer rows than units."""
    if units.shape[1] < units.shape[0]:
        warnings.warn(
            f"{units.shape[1]} rows are fewer than the {units.shape[0]} units to choose from, so they can't tell all "
            "interactions from noise, and interactions are shrunk; more batches help, or rows of samples or tokens "
            "where they are of batches",
            FewRowsWarning,
            stacklevel=_CALLER,
        )


def warn_if_narrow(removed: Mapping[str, Tensor], sizes: Sequence[int]) -> None:
    """Warn of groups that keep less than the share ``NARROW`` of their units."""
    kept = {name: (size - len(units), size) for (name, units), size in zip(removed.items(), sizes, strict=True)}
    narrow = [f"{name!r} ({left} of {size})" for name, (left, size) in kept.items() if left < NARROW * size]
    if narrow:
        warnings.warn(
            f"fewer than a tenth of the units stay in {listed(narrow)}; raise min_units, or let more of the model "
            "remain",
            stacklevel=_CALLER - 1,
        )


def named(names: Sequence[str]) -> str:
    """The first five names in quotes, and how many more there are."""
    return listed([repr(name) for name in names], 5)
