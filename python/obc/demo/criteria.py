"""The criteria that the demo compares, each used as a Torch-Pruning user would use it.

Torch-Pruning's own criteria keep their defaults. Taylor and the Jacobian Criterion read the same batches: Taylor the
gradient of their summed losses, the Jacobian Criterion one row per batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from obc.demo.data import Split
from obc.integrations.torch_pruning import JacobianImportance

ROWS = 50  # batches of training images, as in the paper

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Ranking:
    """A way to rank channels.

    Attributes:
        name: as printed.
        importance: creates Torch-Pruning's importance.
        score: (importance, pruner, split) fills it before a step; does nothing for criteria that use weights alone.
    """

    name: str
    importance: Callable[[], Any]
    score: Callable[[Any, Any, Split], None]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a batch (images, labels)."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def batch_size(split: Split) -> int:
    """The size that cuts ``split`` into ``ROWS`` batches."""
    return -(-len(split) // ROWS)


def _no_score(importance: Any, pruner: Any, split: Split) -> None:
    """Random numbers and weights need no data."""


def _taylor(importance: Any, pruner: Any, split: Split) -> None:
    pruner.model.zero_grad()
    for batch in split.batches(batch_size(split)):
        loss(pruner.model, batch).backward()


def _jacobian(importance: JacobianImportance, pruner: Any, split: Split) -> None:
    importance.score(pruner.model, split.batches(batch_size(split)), loss, pruner=pruner, progress=False)


CRITERIA = (
    Ranking("random", tp.importance.RandomImportance, _no_score),
    Ranking("L1", partial(tp.importance.GroupMagnitudeImportance, p=1), _no_score),
    Ranking("Taylor", tp.importance.GroupTaylorImportance, _taylor),
    Ranking("Jacobian", JacobianImportance, _jacobian),
)
