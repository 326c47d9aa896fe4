"""What a model costs as a function of how many units each of its groups keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Costs:
    """MACs, or parameters, of a model whose group g keeps w_g units: constant + linear . w + w^T quadratic w.

    A layer from a_g w_g channels to a_h w_h costs c a_g a_h w_g w_h; a layer that reads a concatenation, or a fixed
    input, has linear parts too. Every layer between two groups is such a product, so the polynomial is exact. A group
    that is a whole block has width 1 or 0, and what the block costs besides its groups' channels is linear in it; at
    width 0 the groups inside it count as 0 wide.

    Attributes:
        names: of the groups, in the order of the vectors.
        widths: (groups,) units that each group has now.
        constant: what no group changes.
        linear: (groups,) float64.
        quadratic: (groups, groups) float64, symmetric.
        unit: "macs" or "parameters".
        inside: name of a group that is a whole block or branch -> names of the groups that vanish with it.

    Raises:
        ValueError: shapes do not fit the number of names, a name occurs twice, or a value is not finite.
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
    ) -> None:
        size = len(names)
        self.names, self.unit, self.constant = tuple(names), unit, float(constant)
        self.widths = torch.as_tensor(widths, dtype=torch.float64)
        self.linear = torch.zeros(size, dtype=torch.float64) if linear is None else linear.double()
        quadratic = torch.zeros(size, size, dtype=torch.float64) if quadratic is None else quadratic.double()
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
            raise ValueError(f"inside= names {unknown[0]!r}, which is no group of the costs")
        self._inside = {place[name]: [place[one] for one in names] for name, names in self.inside.items()}

    def counted(self, widths: Tensor) -> Tensor:
        """(groups,) the widths, 0 of groups that lie in a block of width 0."""
        w = widths.double().clone()
        for block, groups in self._inside.items():
            if w[block] == 0:
                w[groups] = 0.0
        return w

    def removal(self, group: int, widths: Tensor) -> Tensor:
        """(groups,) how many units of every group go with one unit of this one, at counted ``widths``."""
        gone = torch.zeros_like(widths)
        gone[group] = 1.0
        if (inside := self._inside.get(group)) is not None:
            gone[inside] = widths[inside]
        return gone

    def total(self, widths: Tensor | None = None) -> float:
        """The cost at ``widths``, by default as the model is now."""
        w = self.counted(self.widths if widths is None else widths)
        return float(self.constant + self.linear @ w + w @ self.quadratic @ w)

    def freed(self, lost: Mapping[str, int]) -> float:
        """What is freed when the groups named lose so many units each."""
        gone = torch.tensor([lost.get(name, 0) for name in self.names], dtype=torch.float64)
        return self.total() - self.total(self.widths - gone)

    def marginal(self, widths: Tensor | None = None) -> Tensor:
        """(groups,) what removing one unit of each group frees at ``widths``, exactly."""
        w = self.counted(self.widths if widths is None else widths)
        freed = self.linear + 2 * self.quadratic @ w - self.quadratic.diagonal()
        for block in self._inside:
            gone = self.removal(block, w)
            freed[block] = self.linear @ gone + 2 * gone @ self.quadratic @ w - gone @ self.quadratic @ gone
        return freed

    def only(self, names: Sequence[str]) -> Costs:
        """The same costs over some of the groups; the others keep their widths, unless a block takes them along."""
        place = {name: index for index, name in enumerate(self.names)}
        chosen, w = {place[name] for name in names}, self.counted(self.widths)
        constant, linear, quadratic = self.constant, self.linear.clone(), self.quadratic.clone()
        for group in (index for index in range(len(self.names)) if index not in chosen):
            around = [block for block, groups in self._inside.items() if group in groups and block in chosen]
            cross, own = 2 * quadratic[group] * w[group], linear[group] * w[group]
            own += quadratic[group, group] * w[group] ** 2
            cross[group] = 0.0
            quadratic[group, :] = quadratic[:, group] = 0.0
            if not around:
                constant += float(own)
                linear += cross
                continue
            block = min(around, key=lambda one: len(self._inside[one]))  # the innermost
            linear[block] += own
            for other in cross.nonzero().flatten().tolist():
                if other == block or other in self._inside[block]:
                    linear[other] += cross[other]
                else:
                    quadratic[block, other] += cross[other] / 2
                    quadratic[other, block] += cross[other] / 2
        order = torch.tensor([place[name] for name in names], dtype=torch.int64)
        inside = {name: [one for one in self.inside[name] if one in names] for name in names if name in self.inside}
        return Costs(
            names,
            self.widths[order],
            constant=constant,
            linear=linear[order],
            quadratic=quadratic[order][:, order],
            unit=self.unit,
            inside=inside,
        )

    @classmethod
    def fixed(cls, costs: Mapping[str, float], widths: Mapping[str, int], unit: str = "macs") -> Costs:
        """Every unit of a group frees the same, whatever the others' widths.

        Raises:
            ValueError: the two name different groups.
        """
        if set(costs) != set(widths):
            different = ", ".join(map(repr, sorted(set(costs) ^ set(widths))))
            raise ValueError(f"costs and widths must be of the same groups; only one of them has {different}")
        linear = torch.tensor([float(value) for value in costs.values()], dtype=torch.float64)
        return cls(list(costs), [widths[name] for name in costs], linear=linear, unit=unit)
