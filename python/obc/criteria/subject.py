"""What a criterion scores: a model with its groups, and the data that it may run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from obc.model.batches import RowKind
from obc.model.evaluation import ForwardFn, LossFn
from obc.model.groups import ChannelGroup, Side, Slices
from obc.model.usable_batches import UsableBatches


@dataclass(frozen=True)
class Subject:
    """The model to score, and the data to use.

    Attributes:
        model: the present model.
        groups: its groups.
        batches: can be iterated repeatedly; non-finite ones are left out from then on.
        loss_fn: ``loss_fn(model, batch)``.
        forward_fn: ``forward_fn(model, batch)`` runs a forward pass.
        slices: whether the Jacobian Criterion reads every slice or the group's gate.
        rows: "batch" or "sample", for the Jacobian Criterion.
        generator: source of random numbers.
        micro_batch: number of samples run at once; None runs whole batches.
        confirmed: modules whose gates were confirmed by a weight's gradient, with the sides that are read; later rows
            of the same modules, even if pruned since, are not checked again.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    batches: UsableBatches
    loss_fn: LossFn
    forward_fn: ForwardFn
    slices: Slices = "gate"
    rows: RowKind = "batch"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    micro_batch: int | None = None
    confirmed: dict[str, tuple[nn.Module, set[Side]]] = field(default_factory=dict)
