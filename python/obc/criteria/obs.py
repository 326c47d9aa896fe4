"""Optimal Brain Surgeon on a consumer's input: the output error when a unit is removed and the others take over.

With G = E[x x^T] + lambda I, P = G^-1 and W_u the consumer's columns of unit u, the output error and the weight that
attains it are

    e_u = tr(W_u (P_uu)^-1 W_u^T),        W' = W - W_u (P_uu)^-1 P_u:

which is the error of least squares on the kept channels, so ``compensate="ls"`` is the update.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from obc.criteria.protocol import About, Criterion
from obc.criteria.surgeon import ConsumerState, second_moment
from obc.criteria.units import consumers_of
from obc.model.arguments import one_of
from obc.model.groups import ChannelGroup
from obc.selection.allocation import LogProfile
from obc.statistics.gram import Gram, Held
from obc.statistics.results import Statistics

# At most this many removals one by one; larger groups lose several units between two updates of the inverse.
_GREEDY_STEPS = 512


class OBS(Criterion):
    """e_u = sum over consumers of tr(W_u (P_uu)^-1 W_u^T): SlimGPT, ZipLM, OBS-Diff, DarwinLM's and Tyr's local part.

    Greedy: units are removed one by one, and P and W are updated after each. A unit's score is its error when removed,
    but at least that of any unit removed before, so that the order is kept. Heads are whole blocks (P_uu)^-1.

    Args:
        greedy: False scores every unit as if it were the first to be removed.
        heads: "exact": the whole block, as in ZipLM and DarwinLM. "cholesky": sum over the head's columns j of
            |W_:j|^2 / d_j with d the squared diagonal of the Cholesky factor of the head's block of P, as in SlimGPT.
        first_order: add Tyr's term: sum over the unit's columns of |(G W^T)_j . W_j|, with G the undamped Gram matrix.
        ridge: lambda, relative to the mean diagonal.
        to: where the Gram matrices are held (:class:`obc.statistics.Gram`).

    Raises:
        ValueError: ``heads`` has another value.
    """

    name = "obs"
    about = About(
        "SlimGPT, ZipLM, OBS-Diff, DarwinLM and Tyr (local part)",
        "SlimGPT arXiv 2412.18110; ZipLM arXiv 2302.04089; code IST-DASLab/DarwinLM, AMD-AGI/Tyr-the-Pruner",
        "tr(W_u (P_uu)^-1 W_u^T), P = (E[x x^T] + lambda I)^-1; greedy with updates",
        "forward",
        differs="SlimGPT's code takes diagonals of Cholesky factors for heads: heads='cholesky'; Tyr's its first-order "
        "term without abs, weighted by half the curvature: first_order=True has the paper's with abs",
        missing="sequential collection on the model pruned so far; Tyr's weighted error accumulation",
    )
    update = "ls"

    def __init__(
        self,
        greedy: bool = True,
        heads: Literal["exact", "cholesky"] = "exact",
        first_order: bool = False,
        ridge: float = 1e-2,
        to: Held = "device",
    ) -> None:
        one_of("heads", heads, ("exact", "cholesky"))
        self.greedy, self.heads, self.first_order, self.ridge, self.to = greedy, heads, first_order, ridge, to
        self.needs = (Gram(to=to),)

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the saliencies of the group, added over consumers; None if no consumer was read."""
        states = [
            ConsumerState.of(consumer, second_moment(consumer, statistics), self.ridge)
            for consumer in consumers_of(group, model)
            if consumer.name in statistics.gram
        ]
        return self.scores_from(states, group.size) if states else None

    def scores_from(self, states: list[ConsumerState], units: int) -> Tensor:
        """(units,) scores of a group, from the ``states`` of its consumers, which removal changes."""
        if not self.greedy:
            return self._errors(states)
        scores = torch.full((units,), float("inf"), dtype=torch.float64, device="cpu")
        alive = torch.ones(units, dtype=torch.bool, device="cpu")
        step, highest = -(-units // _GREEDY_STEPS), 0.0
        while bool(alive.any()):
            errors = self._errors(states).masked_fill(~alive, float("inf"))
            gone = errors.argsort(stable=True)[: min(step, int(alive.sum()))]
            for unit in gone.tolist():
                highest = max(highest, float(errors[unit]))
                scores[unit] = highest
            alive[gone] = False
            for state in states:
                state.remove(gone)
        return scores

    def _errors(self, states: list[ConsumerState]) -> Tensor:
        total = torch.stack([state.errors(self.heads) for state in states]).sum(0)
        if self.first_order:
            total = total / 2 + torch.stack([state.first_order() for state in states]).sum(0)
        return total


class SlimGPT(OBS):
    """OBS with SlimGPT's heads and its ratios, which grow logarithmically from the first to the last layer.

    Args:
        ridge: lambda, relative to the mean diagonal.
        first: lost share of the first block, up to a common factor (:class:`obc.selection.allocation.LogProfile`).
        last: lost share of the last block.
        to: where the Gram matrices are held (:class:`obc.statistics.Gram`).
    """

    name = "slimgpt"
    about = About(
        "SlimGPT",
        "arXiv 2412.18110",
        "tr(W_u (P_uu)^-1 W_u^T), heads by Cholesky diagonals; ratios grow logarithmically with depth",
        "forward",
        kinds="heads, feed-forward channels",
        differs="its code removes channels in batches of 64 to 1024, each ranked by errors before the batch; here a "
        "batch is a 512th of the group, one channel in small groups: OBS(greedy=False) is one batch of all",
        missing="collection layer by layer on the pruned model's activations",
    )

    def __init__(self, ridge: float = 1e-2, first: float = 0.0625, last: float = 0.25, to: Held = "device") -> None:
        super().__init__(heads="cholesky", ridge=ridge, to=to)
        self.allocation = LogProfile(first, last)
