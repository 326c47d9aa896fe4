"""Score on several processes: each has batches of its own, and the scores are those of all of them.

torchrun --nproc-per-node 2 examples/two_processes.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.nn import functional as F

import obc


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a batch of (inputs, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    """Print how many rows were read, and the least important channels; the same on every process."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    data = [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(8)]
    mine = data[accelerator.process_index :: accelerator.num_processes]
    # combine="scores": every process has rows of its own. combine="row" makes one row of all processes' batches.
    scores = obc.score(model, mine, loss_fn, process_group=distributed.group.WORLD, combine="scores", progress=False)
    accelerator.print(f"{scores.num_rows} rows on {accelerator.num_processes} processes")
    channels = scores["0"].out_channels
    assert channels is not None
    accelerator.print("least important channels:", channels.argsort()[:5].tolist())
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
