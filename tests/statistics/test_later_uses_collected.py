"""Functional uses that begin in a late batch, or of weights that layers compute: summed as calls, or named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import obc
from obc.model.kept import Kept
from obc.recovery import compensate

IN, WIDTH, OUT, BATCHES, LATE = 6, 8, 12, 8, 5


class Net(nn.Module):
    """``use(layer, x)`` is added in the batches from ``begin`` on, whose first entry says their number."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], begin: int, image: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(IN, WIDTH)
        self.middle = nn.Conv1d(WIDTH, OUT, 1) if image else nn.Linear(WIDTH, OUT)
        self.last, self.use, self.begin, self.image = nn.Linear(OUT, 4), use, begin, image
        self.read: list[Tensor] = []  # what ``middle`` reads

    def forward(self, x: Tensor) -> Tensor:
        number = round(float(x[0, 0]))
        x = self.first(x).tanh()
        x = x[..., None] if self.image else x
        y = self.middle(x)
        self.read.append(x.detach())
        if number >= self.begin:
            y = y + self.use(self.middle, x.sin())
            self.read.append(x.sin().detach())
        output: Tensor = self.last(y.tanh().flatten(1))
        return output


def linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def product(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.t()


def convolved(layer: Any, x: Tensor) -> Tensor:
    return F.conv1d(x, layer.weight, layer.bias)


def einsum(layer: Any, x: Tensor) -> Tensor:
    return torch.einsum("bi,oi->bo", x, layer.weight)


def cast(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype).detach() * 1.0)


def standardised(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, (layer.weight - layer.weight.mean()) / layer.weight.std())


def written_out(layer: Any, x: Tensor) -> Tensor:
    return (x[:, None] * layer.weight).sum(-1)


def called(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer(x)
    return result


def called_without_bias(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer(x) - layer.bias
    return result


def masked(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.3)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer)


def detached(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.detach(), layer.bias.data)


def kept_transpose(layer: Any, x: Tensor) -> Tensor:
    """Made in the first late batch, and used again in later ones."""
    layer.kept = getattr(layer, "kept", layer.weight.t())
    result: Tensor = x @ layer.kept
    return result


def kept_copy(layer: Any, x: Tensor) -> Tensor:
    layer.kept = getattr(layer, "kept", layer.weight * 2)
    return F.linear(x, layer.kept)


def loss(model: Any, batch: Tensor) -> Tensor:
    output: Tensor = model(batch)
    return output.square().mean()


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda layer: None,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "masked": masked,
}
AS_CALLS: dict[Any, Any] = {
    linear: called,
    detached: called,
    convolved: called,
    product: called_without_bias,
    kept_transpose: called_without_bias,
}
NAMED = {kept_copy: "mul", einsum: "einsum", written_out: "mul", cast: "mul", standardised: "sub"}


def batches_for() -> list[Tensor]:
    torch.manual_seed(1)
    batches = [torch.randn(5, IN) for _ in range(BATCHES)]
    for number, batch in enumerate(batches):
        batch[0, 0] = number
    return batches


def net(use: Any, begin: int, computed: str = "parameter", image: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net(use, begin, image or use is convolved)
    COMPUTED[computed](model.middle)
    return model.eval()


@pytest.mark.sampled(members=12)
@pytest.mark.parametrize("computed", list(COMPUTED))
@pytest.mark.parametrize("begin", [0, LATE])
@pytest.mark.parametrize("use", list(AS_CALLS))
def test_sums_are_those_of_everything_that_the_layer_reads(use: Any, begin: int, computed: str) -> None:
    model, batches = net(use, begin, computed), batches_for()
    found = obc.collect(model, batches, statistics=["gram", "moments"], progress=False)
    model.read.clear()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    x = torch.cat([one.transpose(1, -1).reshape(-1, WIDTH) for one in model.read]).double()
    assert found.gram["middle"].count == len(x) == 5 * (2 * BATCHES - begin)
    torch.testing.assert_close(found.gram["middle"].total, x.t() @ x, check_dtype=False, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.moments["middle"].mean, x.mean(0), check_dtype=False, rtol=1e-5, atol=1e-5)
    assert found.coverage["gram"]["middle"] == "input"


@pytest.mark.parametrize("computed", list(COMPUTED))
@pytest.mark.parametrize("begin", [0, LATE])
@pytest.mark.parametrize("use", list(NAMED))
def test_uses_that_no_call_stands_for_are_named(use: Any, begin: int, computed: str) -> None:
    model = net(use, begin, computed)
    with pytest.warns(UserWarning, match=f"gram of a part of the inputs of 'middle' .{NAMED[use]} also uses its wei"):
        found = obc.collect(model, batches_for(), statistics=["gram"], progress=False)
    assert f"{NAMED[use]} also uses its weight" in found.coverage["gram"]["middle"]
    assert found.coverage["gram"]["last"] == "input"


def test_all_weights_in_a_product_are_named() -> None:
    def joined(layer: Any, x: Tensor) -> Tensor:
        both = torch.cat([layer.weight, model.other.weight])
        result: Tensor = F.linear(x, both).unflatten(-1, (2, OUT)).sum(1) + model.other(x)
        return result

    model: Any = net(joined, LATE)
    model.other = nn.Linear(WIDTH, OUT)
    with pytest.warns(UserWarning, match="part of the inputs of 'middle' .*, 'other'"):
        found = obc.collect(model, batches_for(), statistics=["gram"], progress=False)
    for name in ("middle", "other"):
        assert "cat also uses its weight" in found.coverage["gram"][name]


def test_a_use_under_a_transform_is_named() -> None:
    def transformed(layer: Any, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: torch.func.vmap(torch.dot, (0, None))(layer.weight * row.cos(), row))(x)

    with pytest.warns(UserWarning, match="mul also uses its weight"):
        found = obc.collect(net(transformed, LATE), batches_for(), statistics=["gram"], progress=False)
    assert found.coverage["gram"]["last"] == "input"


def test_a_weight_gradient_has_all_uses() -> None:
    found = obc.collect(net(einsum, LATE), batches_for(), loss, statistics=["weight_gradients"], progress=False)
    assert found.coverage["weight_gradients"]["middle"] == "weight gradient"


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("mode", ["correct", "ls", "seq"])
@pytest.mark.parametrize("use", [*AS_CALLS, *NAMED])
def test_compensation_sees_or_names_late_uses(use: Any, mode: Any) -> None:
    results, reports, batches = [], [], batches_for()
    for one in (use, AS_CALLS.get(use, called)):
        model = net(one, LATE, image=use is convolved)
        pruned = copy.deepcopy(model)
        plan = obc.PruningPlan({"first": Kept(torch.arange(6)), "middle": Kept(in_channels=torch.arange(6))})
        plan.apply(pruned)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reports.append(compensate(pruned, model, plan, batches, mode=mode, held_out=0.125, progress=False))
        named = [str(one.message) for one in caught if "also uses its weight" in str(one.message)]
        assert len(named) == (one in NAMED)
        results.append(pruned.middle.weight)
    assert any("middle: " in note for note in reports[0].notes) == (use in NAMED)
    if use in AS_CALLS:
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


ALIASES: dict[str, Callable[[Any], Any]] = {
    "buffer": lambda layer: layer.register_buffer("kept", layer.weight.data),
    "attribute": lambda layer: setattr(layer, "kept", layer.weight.detach()),
    "transposed": lambda layer: setattr(layer, "kept", layer.weight.t()),
    "part": lambda layer: layer.register_buffer("kept", layer.weight.data[:4]),
}


def aliased(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = x @ (layer.kept if layer.kept.shape[0] == WIDTH else layer.kept.t())
    return result.sum(-1, keepdim=True) if result.shape[-1] == 4 else result


@pytest.mark.parametrize("begin", [0, LATE])
@pytest.mark.parametrize("kind", list(ALIASES))
def test_a_tensor_that_shares_a_weights_memory_is_the_weight(kind: str, begin: int) -> None:
    model, batches = net(aliased, begin), batches_for()
    ALIASES[kind](model.middle)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = obc.collect(model, batches, statistics=["gram"], progress=False)
    named = [one for one in caught if "also uses its weight" in str(one.message)]
    assert len(named) == (kind == "part")
    if kind != "part":
        model.read.clear()
        with torch.no_grad():
            for batch in batches:
                model(batch)
        x = torch.cat(model.read).double()
        torch.testing.assert_close(found.gram["middle"].total, x.t() @ x, check_dtype=False, rtol=1e-5, atol=1e-5)
    assert type(model.middle.kept) is Tensor
