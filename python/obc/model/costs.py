"""What a model costs as a function of how many units each of its groups keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Costs:
    """MACs, or parameters, of a model whose group g keeps w_g units: constant + linear . w + w^T quadratic w.

    A layer from a_g w_g channels to a_h w_h costs c a_g a_h w_g w_h; a layer that reads a concatenation, or a fixed
    input, has linear parts too. Every layer between two groups is such a product, so the polynomial is exact.

    Attributes:
        names: of the groups, in the order of the vectors.
        widths: (groups,) units that each group has now.
        constant: what no group changes.
        linear: (groups,) float64.
        quadratic: (groups, groups) float64, symmetric.
        unit: "macs" or "parameters".

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

    def total(self, widths: Tensor | None = None) -> float:
        """The cost at ``widths``, by default as the model is now."""
        w = self.widths if widths is None else widths.double()
        return float(self.constant + self.linear @ w + w @ self.quadratic @ w)

    def marginal(self, widths: Tensor | None = None) -> Tensor:
        """(groups,) what removing one unit of each group frees at ``widths``, exactly."""
        w = self.widths if widths is None else widths.double()
        return self.linear + 2 * self.quadratic @ w - self.quadratic.diagonal()

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
