"""Residuals e_u of a unit's input channels, or x_u itself, and the sums of e . dL/dx that form a criterion's rows.

A row belongs to a batch, a sample, or a number of consecutive tokens of a sample: it is the part at these positions of
the sum over positions of e . dL/dx. The rows of a sample's tokens add up to the sample's row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from obc.criteria.subject import Subject
from obc.criteria.surgeon import inverse, second_moment
from obc.criteria.units import Consumer, consumers_of
from obc.model.absorbing import norms_behind
from obc.model.autocast import without_autocast
from obc.model.evaluation import evaluating
from obc.model.usable_batches import UsableBatches
from obc.statistics.reader import flat_rows, input_dim
from obc.statistics.results import Statistics
from obc.statistics.routed import RoutedInput


@dataclass(frozen=True)
class Cut:
    """The extent of one row: a batch, a sample, or a number of consecutive tokens of a sample.

    Attributes:
        per_sample: every sample has its own rows.
        tokens: tokens per row; None: the whole sample.
    """

    per_sample: bool
    tokens: int | None = None

    @property
    def several(self) -> bool:
        """Whether a batch gives several rows."""
        return self.per_sample or self.tokens is not None

    def summed(self, product: Tensor, samples: int) -> Tensor:
        """(all samples' positions, columns) to (rows, columns), or (columns,) of a batch; the last may be shorter."""
        if not self.several:
            return product.sum(0)
        by_sample = product.unflatten(0, (samples, -1))
        if self.tokens is None:
            return by_sample.sum(1)
        padded = F.pad(by_sample, (0, 0, 0, -by_sample.shape[1] % self.tokens))
        return padded.unflatten(1, (-1, self.tokens)).sum(2).flatten(0, 1)


def free_of_means(subject: Subject) -> set[str]:
    """Names of the consumers where the mean of what they lose costs nothing: a bias, or a BatchNorm behind, takes it.

    The model runs once on one batch, if it has BatchNorms.
    """
    found = {one.name: one for group in subject.groups for one in consumers_of(group, subject.model)}
    layers = {name: one.module for name, one in found.items() if not one.has_bias and not one.routed}
    with_bias = {name for name, one in found.items() if one.has_bias}
    batch = next(iter(UsableBatches.of(subject.batches)), None) if layers else None
    if batch is None:
        return with_bias
    with evaluating(subject.model):
        absorbed = norms_behind(subject.model, layers, lambda: subject.forward_fn(subject.model, batch))
    return with_bias | absorbed.keys()


@dataclass(eq=False)
class Residuals:
    """One consumer of one group: how e follows from its input, and the rows read there.

    Attributes:
        group: name of the group.
        consumer: the layer.
        matrix: (units * k, in): e = matrix (x - mean); None if e is x_u itself.
        mean: (in,).
        rows: the rows of every batch so far: (units,), for samples and tokens (rows, units).
    """

    group: str
    consumer: Consumer
    matrix: Tensor | None = None
    mean: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, group: str, consumer: Consumer, statistics: Statistics, ridge: float, centred: bool) -> Residuals:
        """Residuals of a consumer whose Gram matrix was collected; ``ridge`` is relative to the mean diagonal.

        ``centred``: x is taken without its mean.
        """
        inverted = inverse(second_moment(consumer, statistics, centred), ridge, consumer.name)
        channels = consumer.channels
        blocks = inverted[channels[:, :, None], channels[:, None, :]]
        matrix = torch.linalg.solve(blocks, inverted[channels]).flatten(0, 1)
        found = statistics.gram[consumer.name]
        mean = (
            found.sum.cpu() / found.count if centred else torch.zeros(len(inverted), dtype=torch.float64, device="cpu")
        )
        return cls(group, consumer, matrix, mean)

    def read(self, x: Tensor, grad: Tensor, cut: Cut, samples: int) -> Tensor:
        """(units,), or (rows, units): the sum over positions and the unit's channels of e . dL/dx."""
        dim = input_dim(self.consumer.module, x)
        return cut.summed(self._products(flat_rows(x, dim), flat_rows(grad, dim)), samples)

    def read_expert(self, routed: RoutedInput, grad: Tensor, cut: Cut, samples: int) -> Tensor:
        """The same for an expert's down projection, from the gradient of the mixture's output, (all tokens, features).

        Tokens that were not routed to the expert add nothing to their rows.
        """
        products = self._products(routed.x, routed.at_input(self.consumer.module, grad))
        if cut.several:
            everywhere = products.new_zeros(routed.total, products.shape[1])
            products = everywhere.index_add_(0, routed.tokens, products)
        return cut.summed(products, samples)

    def _products(self, x: Tensor, grad: Tensor) -> Tensor:
        """(positions, units) the sum over the unit's channels of e . dL/dx, of (positions, in) inputs and gradients."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, grad = x.to(dtype), grad.to(dtype)
        channels = self.consumer.channels.to(x.device)
        if self.matrix is None or self.mean is None:
            residuals = x[:, channels.flatten()]
        else:
            with without_autocast():
                residuals = (x - self.mean.to(x)) @ self.matrix.to(x).mT
        return (residuals * grad[:, channels.flatten()]).unflatten(-1, tuple(channels.shape)).sum(-1)
