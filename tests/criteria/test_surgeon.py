"""Optimal Brain Surgeon's state: updates after removals agree with the definition."""

import pytest
import torch

from obc.criteria.surgeon import ConsumerState, inverse
from obc.criteria.units import Consumer


@pytest.mark.parametrize("gone", [[4], [0, 5]], ids=["one unit", "two units"])
def test_first_order_terms_follow_removals(gone: list[int]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 5).double()
    x = torch.randn(64, 12, dtype=torch.float64)
    consumer = Consumer("layer", layer, torch.arange(12).reshape(6, 2), layer.weight.detach().mT.contiguous())
    gram = x.mT @ x / len(x)
    state = ConsumerState(consumer, gram, consumer.columns.clone(), inverse(gram, 1e-2, "layer"))
    state.first_order()
    for units in (gone, [2]):
        state.remove(torch.tensor(units))
    want = (gram @ state.columns * state.columns).sum(1).abs().reshape(6, 2).sum(1)
    torch.testing.assert_close(state.first_order(), want, rtol=1e-9, atol=1e-12)
    assert float(want[gone].abs().max()) < 1e-12 < float(want.max())
