"""Which layers' means a BatchNorm absorbs: a shift of the output, and of the norm's mean, changes nothing then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from obc.model.absorbing import norms_behind


class Net(nn.Module):
    """A layer, a norm, and what ``wiring`` makes of them."""

    def __init__(self, layer: nn.Module, norm: nn.Module, wiring: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm, self.wiring = layer, norm, wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def also_added(net: Net, x: Tensor) -> Tensor:
    y = net.layer(x)
    return net.norm(y) + y


def conv() -> nn.Module:
    return nn.Conv2d(3, 4, 1, bias=False)


CASES = {
    "conv": (conv, nn.BatchNorm2d, lambda net, x: F.relu(net.norm(net.layer(x))), (2, 3, 5, 5), True),
    "transposed": (
        lambda: nn.ConvTranspose2d(3, 4, 2),
        nn.BatchNorm2d,
        lambda net, x: net.norm(net.layer(x)),
        (2, 3, 5, 5),
        True,
    ),
    "linear": (lambda: nn.Linear(3, 4), nn.BatchNorm1d, lambda net, x: net.norm(net.layer(x)), (6, 3), True),
    "called twice": (
        conv,
        nn.BatchNorm2d,
        lambda net, x: net.norm(net.layer(x)) + net.norm(net.layer(x.flip(0))),
        (2, 3, 5, 5),
        True,
    ),
    "dropout first": (
        conv,
        nn.BatchNorm2d,
        lambda net, x: net.norm(F.dropout(net.layer(x), training=False)),
        (2, 3, 5, 5),
        True,
    ),
    "shape is asked": (conv, nn.BatchNorm2d, lambda net, x: shape_asked(net, x), (2, 3, 5, 5), True),
    "activation first": (conv, nn.BatchNorm2d, lambda net, x: net.norm(F.relu(net.layer(x))), (2, 3, 5, 5), False),
    "also added": (conv, nn.BatchNorm2d, also_added, (2, 3, 5, 5), False),
    "sum first": (conv, nn.BatchNorm2d, lambda net, x: net.norm(net.layer(x) * x.mean()), (2, 3, 5, 5), False),
    "once without": (
        conv,
        nn.BatchNorm2d,
        lambda net, x: net.norm(net.layer(x)) + F.relu(net.layer(x)),
        (2, 3, 5, 5),
        False,
    ),
    "tokens": (lambda: nn.Linear(3, 4), nn.BatchNorm1d, lambda net, x: net.norm(net.layer(x)), (2, 4, 3), False),
    "other norm": (
        conv,
        lambda size: nn.GroupNorm(2, size),
        lambda net, x: net.norm(net.layer(x)),
        (2, 3, 5, 5),
        False,
    ),
}


def shape_asked(net: Net, x: Tensor) -> Tensor:
    y = net.layer(x)
    return net.norm(y).reshape(y.shape)


@pytest.mark.parametrize("name", CASES)
def test_a_mean_is_absorbed_where_a_batchnorm_alone_reads_it(name: str) -> None:
    torch.manual_seed(0)
    layer, norm, wiring, shape, absorbed = CASES[name]
    net, x = Net(layer(), norm(4), wiring).eval(), torch.randn(shape)
    assert norms_behind(net, {"layer": net.layer}, lambda: net(x)) == ({"layer": ["norm"]} if absorbed else {})
    before, shift = net(x), torch.tensor([1.0, -2.0, 3.0, 0.5])
    along = shift if x.dim() != 4 else shift[:, None, None]
    net.layer.register_forward_hook(lambda module, args, output: output + along)
    if isinstance(net.norm, nn.modules.batchnorm._BatchNorm):
        net.norm.running_mean += shift
    if absorbed:
        assert_close(net(x), before)
    else:
        assert not torch.allclose(net(x), before, atol=1e-3)
    assert not net.layer._forward_pre_hooks
