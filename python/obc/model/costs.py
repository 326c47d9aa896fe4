"""The cost of a model as a function of how many units each group keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obc.model.curves import Curve


class Costs:
    """The cost of a model whose group g keeps w_g units: constant + linear . e + e^T quadratic e.

    The effective width e_g is the width w_g; a group with a curve, whose seconds are not proportional to its width, has
    the curve's value at w_g. A layer from a_g w_g to a_h w_h channels costs c a_g a_h w_g w_h; a layer that reads a
    concatenation or a fixed input also has linear parts. Every layer between two groups is such a product, so the
    polynomial is exact. A group that is a whole block has width 1 or 0; the block's cost apart from its groups'
    channels is linear in that width. At width 0 the groups inside the block count as 0 wide.

    Attributes:
        names: the groups' names, in the order of the vectors.
        widths: (groups,) the present number of units of each group.
        constant: the cost that no group changes.
        linear: (groups,) float64.
        quadratic: (groups, groups) float64, symmetric.
        unit: what is counted: "macs", "parameters", "active_parameters", "bytes" or "seconds".
        inside: name of a group that is a whole block or branch -> names of the groups that vanish with it.
        curves: group -> effective width at every width; for groups not named it is the width.

    Raises:
        ValueError: shapes don't fit the number of names, a name occurs twice, a value is not finite, or a curve ends
            below its group's width.
    """

    def __init__(
        self,
        names: Sequence[str],
        widths: Sequence[int] | Tensor,
        *,
        constant: float = 0.0,
        linear: Tensor | None = None,
        quadratic: Tensor | None = None,
        unit: str = "macs",
        inside: Mapping[str, Sequence[str]] | None = None,
        curves: Mapping[str, Curve] | None = None,
    ) -> None:
        size = len(names)
        self.names, self.unit, self.constant = tuple(names), unit, float(constant)
        self.widths = torch.as_tensor(widths, dtype=torch.float64, device="cpu")
        self.linear = torch.zeros(size, dtype=torch.float64, device="cpu") if linear is None else linear.double()
        quadratic = (
            torch.zeros(size, size, dtype=torch.float64, device="cpu") if quadratic is None else quadratic.double()
        )
        if self.widths.shape != (size,) or self.linear.shape != (size,) or quadratic.shape != (size, size):
            raise ValueError(
                f"costs of {size} groups need {size} widths and linear terms and a {size} x {size} quadratic, got "
                f"{tuple(self.widths.shape)}, {tuple(self.linear.shape)} and {tuple(quadratic.shape)}"
            )
        self.quadratic = (quadratic + quadratic.T) / 2
        if len(set(self.names)) != size:
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"two groups of the costs are named {twice!r}; rename one of them")
        values = torch.cat([self.linear, self.quadratic.flatten(), self.widths])
        if not (bool(values.isfinite().all()) and math.isfinite(self.constant)):
            raise ValueError("costs and widths must be finite")
        self.inside = {name: tuple(names) for name, names in (inside or {}).items()}
        place = {name: index for index, name in enumerate(self.names)}
        if unknown := [one for name, names in self.inside.items() for one in (name, *names) if one not in place]:
            raise ValueError(f"inside= names {unknown[0]!r}, but the costs have no such group")
        self._inside = {place[name]: [place[one] for one in names] for name, names in self.inside.items()}
        self.curves = dict(curves or {})
        if unknown := [name for name in self.curves if name not in place]:
            raise ValueError(f"curves= names {unknown[0]!r}, but the costs have no such group")
        self._curves = {place[name]: curve for name, curve in self.curves.items()}
        for group, curve in self._curves.items():
            if curve.widest < self.widths[group]:
                raise ValueError(
                    f"the curve of {self.names[group]!r} ends at width {curve.widest}; the group has "
                    f"{int(self.widths[group])} units"
                )

    @property
    def sizes(self) -> dict[str, int]:
        """Name of a group -> its present width."""
        return {name: int(width) for name, width in zip(self.names, self.widths, strict=True)}

    def effective(self, widths: Tensor | None = None) -> Tensor:
        """(groups,) effective widths, by default of the present model; 0 for groups in a block of width 0."""
        w = (self.widths if widths is None else widths).double().clone()
        gone = [group for block, groups in self._inside.items() if w[block] == 0 for group in groups]
        for group, curve in self._curves.items():
            w[group] = curve.at(int(w[group]))
        w[gone] = 0.0
        return w

    def total(self, widths: Tensor | None = None) -> float:
        """The cost at ``widths``, by default of the present model."""
        e = self.effective(widths)
        return float(self.constant + self.linear @ e + e @ self.quadratic @ e)

    def freed(self, lost: Mapping[str, int]) -> float:
        """The cost that is saved when each group of ``lost`` loses that many units."""
        gone = torch.tensor([lost.get(name, 0) for name in self.names], dtype=torch.float64, device="cpu")
        return self.total() - self.total(self.widths - gone)

    def marginal(self, widths: Tensor | None = None) -> Tensor:
        """(groups,) the exact saving from removing one more unit of each group at ``widths``."""
        e, now = self.effective(widths), self.widths if widths is None else widths
        step = torch.ones_like(e)
        for group, curve in self._curves.items():
            step[group] = e[group] - curve.at(int(now[group]) - 1)
        freed = step * (self.linear + 2 * self.quadratic @ e - step * self.quadratic.diagonal())
        for block, inside in self._inside.items():
            gone = torch.zeros_like(e)
            gone[block], gone[inside] = step[block], e[inside]
            freed[block] = self.linear @ gone + 2 * gone @ self.quadratic @ e - gone @ self.quadratic @ gone
        return freed

    def only(self, names: Sequence[str]) -> Costs:
        """The costs as a function of the groups ``names``; others keep their widths unless their block is removed."""
        place = {name: index for index, name in enumerate(self.names)}
        chosen, w = {place[name] for name in names}, self.effective()
        constant, linear, quadratic = self.constant, self.linear.clone(), self.quadratic.clone()
        for group in (index for index in range(len(self.names)) if index not in chosen):
            enclosing = [block for block, groups in self._inside.items() if group in groups and block in chosen]
            cross, own = 2 * quadratic[group] * w[group], linear[group] * w[group]
            own += quadratic[group, group] * w[group] ** 2
            cross[group] = 0.0
            quadratic[group, :] = quadratic[:, group] = 0.0
            if not enclosing:
                constant += float(own)
                linear += cross
                continue
            block = min(enclosing, key=lambda one: len(self._inside[one]))  # the innermost
            linear[block] += own
            for other in cross.nonzero().flatten().tolist():
                if other == block or other in self._inside[block]:
                    linear[other] += cross[other]
                else:
                    quadratic[block, other] += cross[other] / 2
                    quadratic[other, block] += cross[other] / 2
        order = torch.tensor([place[name] for name in names], dtype=torch.int64, device="cpu")
        inside = {name: [one for one in self.inside[name] if one in names] for name in names if name in self.inside}
        return Costs(
            names,
            self.widths[order],
            constant=constant,
            linear=linear[order],
            quadratic=quadratic[order][:, order],
            unit=self.unit,
            inside=inside,
            curves={name: self.curves[name] for name in names if name in self.curves},
        )

    @classmethod
    def fixed(cls, costs: Mapping[str, float], widths: Mapping[str, int], unit: str = "macs") -> Costs:
        """Costs in which every unit of a group saves the same, ``costs[group]``, whatever the other widths.

        Raises:
            ValueError: the two name different groups.
        """
        if set(costs) != set(widths):
            different = ", ".join(map(repr, sorted(set(costs) ^ set(widths))))
            raise ValueError(f"costs and widths must name the same groups; only one of them has {different}")
        linear = torch.tensor([float(value) for value in costs.values()], dtype=torch.float64, device="cpu")
        return cls(list(costs), [widths[name] for name in costs], linear=linear, unit=unit)
