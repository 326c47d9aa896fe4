"""Models that keep something from call to call, and losses that need gradients themselves."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from models import class_loss as loss
from models import labelled_images
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.model.errors import PruningError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.b(F.softplus(self.a(x)))).mean((2, 3)))


class Counts(Net):
    """Counts its calls, averages its outputs and keeps its largest output, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(5))
        self.register_buffer("largest", torch.zeros(1, 5), persistent=False)
        self.calls: Tensor
        self.average: Tensor
        self.largest: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.calls += 1
        self.average.mul_(0.9).add_(0.1 * y.detach().mean(0))
        self.largest = torch.maximum(self.largest, y.detach().amax(0, keepdim=True))
        return y


class Remembers(Net):
    """Adds a part of the image of the last call, which must not depend on what is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        last, self.last = x if self.last is None else self.last, x.detach()
        return super().forward(x + 0.5 * last)


class Logs(Net):
    """Collects numbers in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[float] = []
        self.by_size: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.log.append(float(y.detach().mean()))
        self.by_size[len(x)] = y.detach()
        return y


def data() -> list[tuple[Tensor, Tensor]]:
    return labelled_images(6, 16, torch.float64)


def penalised(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    outputs = model(x)
    (grad,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return F.cross_entropy(outputs, batch[1]) + grad.square().mean()


@pytest.mark.parametrize("kind", [Counts, Remembers, Logs])
@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 2, "compensate": "ls"}], ids=str)
def test_a_model_with_state_is_pruned_as_the_same_one_without(kind: type[Net], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    plain = Net().double().eval()
    pruned = copy.deepcopy(model)
    result = obc.prune(pruned, data()[0][0], data(), loss, macs=0.6, progress=False, **options)
    assert not result.report.unproved
    assert result.report.widths["a"][1] < 12
    if "compensate" in options:
        return
    plain.load_state_dict(model.state_dict(), strict=False)
    narrow = Net().double().eval()
    result.plan.apply(narrow).load_state_dict(
        {name: value for name, value in pruned.state_dict().items() if name in narrow.state_dict()}
    )
    for name, kept in result.plan.items():
        if kept.in_channels is not None:
            layer: Any = plain.get_submodule(name)
            mask = torch.zeros(layer.weight.shape[1], dtype=torch.float64).index_fill(0, kept.in_channels, 1.0)
            layer.weight.data *= mask.view(-1, *[1] * (layer.weight.dim() - 2))
    image = data()[1][0]
    torch.testing.assert_close(narrow(image), plain(image), rtol=1e-9, atol=1e-9)


def test_a_loss_that_needs_gradients_itself_says_what_compensation_needs() -> None:
    torch.manual_seed(0)
    model = Net().double().eval()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match="pass forward_fn"):
        obc.prune(model, data()[0][0], data(), penalised, macs=0.6, steps=1, compensate=True, progress=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    result = obc.prune(
        model,
        data()[0][0],
        data(),
        penalised,
        forward_fn=lambda one, batch: one(batch[0]),
        macs=0.6,
        steps=1,
        compensate=True,
        progress=False,
    )
    assert result.report.compensation is not None
    assert result.report.compensation.final_error <= result.report.compensation.naive_error


@pytest.mark.parametrize(
    ("scale", "message"), [(1e-12, None), (1e-20, "too small for float32"), (1e-30, "multiply it by a constant")]
)
def test_a_loss_whose_squares_float32_can_not_hold_is_refused(scale: float, message: str | None) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    batches = [(image.float(), labels) for image, labels in data()[:4]]

    def small(one: nn.Module, batch: Any) -> Tensor:
        return loss(one, batch) * scale

    if message is not None:
        with pytest.raises(ValueError, match=message):
            obc.score(model, batches, small, progress=False)
        return
    got, plain = obc.score(model, batches, small, progress=False), obc.score(model, batches, loss, progress=False)
    for name, one in plain.items():
        found = got[name].in_channels
        assert found is not None
        assert one.in_channels is not None
        torch.testing.assert_close(found.double() / scale**2, one.in_channels.double(), rtol=1e-4, atol=0)


class Branches(nn.Module):
    """A layer, and another whose output counts little."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.large, self.small, self.scale = nn.Linear(6, 5), nn.Linear(6, 5), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.scale * self.small(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "named"), [(1.0, False), (1e-12, False), (1e-21, True), (1e-30, True), (0.0, True)])
def test_a_module_whose_squares_float32_can_not_hold_is_named(
    scale: float, named: bool, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, batches = Branches(scale).to(dtype), torch.randn(3, 4, 6, dtype=dtype)
    with caplog.at_level(logging.WARNING, "obc"):
        scores = obc.score(model, list(batches), lambda one, x: one(x).square().mean(), progress=False)
    assert [text[:32] for text in caplog.messages] == ["all scores of 'small' are below "] * named
    expected = torch.zeros(6, dtype=torch.float64)
    for x in batches:
        twin = Branches(scale).double()
        twin.load_state_dict(model.state_dict())
        (gradient,) = torch.autograd.grad(twin(x.double()).square().mean(), twin.small.weight)
        expected += (twin.small.weight * gradient).sum(0).detach().square()
    assert (float(expected.max()) < 1e-38) == named
    if not named:
        found = scores["small"].in_channels
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
