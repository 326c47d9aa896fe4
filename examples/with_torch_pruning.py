"""The Jacobian Criterion as an importance under Torch-Pruning's own pruner, and folded fine-tuning afterwards.

python examples/with_torch_pruning.py
"""

from __future__ import annotations

import copy

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

import obc
from obc.integrations.torch_pruning import JacobianImportance, prune_step


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a batch of (images, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    """Prune half of the channels in two steps, fold, train, merge."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    batches = [(torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))) for _ in range(16)]
    original = copy.deepcopy(model)

    importance = JacobianImportance()
    pruner = tp.pruner.BasePruner(
        model, batches[0][0], importance, pruning_ratio=0.5, iterative_steps=2, global_pruning=True,
        ignored_layers=[model[-1]],
    )  # fmt: skip
    plan = None
    for _ in range(2):
        importance.score(model, batches, loss_fn, pruner=pruner)  # again before every step
        plan = prune_step(pruner, plan)  # instead of pruner.step(): the same, with a record of what was kept
    assert plan is not None
    plan.verify(original.state_dict(), model)
    print({name: len(kept.out_channels) for name, kept in plan.items() if kept.out_channels is not None})

    folded = obc.equivalent_pruning(model, original.state_dict(), plan)
    optimizer = torch.optim.SGD(folded.param_groups(lr=0.01, weight_decay=5e-4), momentum=0.9)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    print(folded.merge())


if __name__ == "__main__":
    main()
