"""Scores of the inputs of recurrent layers: all weights that read an input times their gradients, squared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import obc


class Net(nn.Module):
    """A recurrent layer between linear ones, on packed sequences if ``lengths`` are given."""

    def __init__(self, kind: type[nn.RNNBase], lengths: list[int] | None, **options: Any) -> None:
        super().__init__()
        self.first, self.lengths = nn.Linear(5, 8), lengths
        self.tried = kind(8, 6, batch_first=True, **options)
        self.head = nn.Linear(12 if options.get("bidirectional") else 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Any = self.first(x).relu()
        if self.lengths is None:
            return self.head(self.tried(y)[0])
        y = pack_padded_sequence(y, torch.tensor(self.lengths), batch_first=True)
        return self.head(pad_packed_sequence(self.tried(y)[0], batch_first=True)[0])


def _truth(net: Net, losses: list[Tensor]) -> Tensor:
    weights = [one for name, one in net.tried.named_parameters() if name.startswith("weight_ih_l0")]
    total = torch.zeros(8, dtype=torch.float64)
    for loss in losses:
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        rows = [(weight * grad).sum(0) for weight, grad in zip(weights, gradients, strict=True)]
        total += torch.stack(rows).sum(0).detach().square()
    return total


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("lengths", [None, [7, 5, 4]])
def test_batch_rows_of_inputs(kind: type[nn.RNNBase], options: dict[str, Any], lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    net = Net(kind, lengths, **options).double().eval()
    batches = [torch.randn(3, 7, 5, dtype=torch.float64) for _ in range(3)]
    scores = obc.score(net, batches, lambda model, x: model(x).square().mean())
    truth = _truth(net, [net(x).square().mean() for x in batches])
    torch.testing.assert_close(scores["tried"].in_channels.double(), truth, rtol=1e-6, atol=0)
    assert scores["tried"].out_channels is None
    assert str(scores.coverage["tried"]).startswith("gate (unchecked)")
    scores.verify(net)


def test_sample_rows_of_inputs() -> None:
    torch.manual_seed(0)
    net = Net(nn.LSTM, None, bidirectional=True).double().eval()
    batches = [torch.randn(3, 7, 5, dtype=torch.float64) for _ in range(2)]
    scores = obc.score(net, batches, lambda model, x: model(x).square().mean((1, 2)), rows="sample")
    truth = _truth(net, [one for x in batches for one in net(x).square().mean((1, 2))])
    torch.testing.assert_close(scores["tried"].in_channels.double(), truth, rtol=1e-6, atol=0)


def test_sample_rows_of_packed_sequences_are_refused_by_name() -> None:
    torch.manual_seed(0)
    net = Net(nn.GRU, [7, 5, 4]).double().eval()
    batches = [torch.randn(3, 7, 5, dtype=torch.float64) for _ in range(2)]
    scores = obc.score(net, batches, lambda model, x: model(x).square().mean((1, 2)), rows="sample")
    assert "16 entries along dim 0, but there are 3 samples" in str(scores.coverage["tried"])
