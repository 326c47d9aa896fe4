"""obc.score(..., micro_batch=...): a row in parts is the row of the whole batch; checkpointing goes with it."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import models
import nasty
import pytest
import torch
from parity import errors
from torch import Tensor, nn
from transformers import BatchEncoding

import obc
from obc.model.batches import part_of, samples_in

pytestmark = pytest.mark.usefixtures("gates")

# Parts and the whole batch differ only by the order of float32 sums.
TOLERANCE = 1e-5


def assert_same(got: obc.Scores, expected: obc.Scores) -> None:
    sides = {name: (channels.out_channels, channels.in_channels) for name, channels in expected.items()}
    worst = errors(got, sides)
    assert max(worst.values()) <= TOLERANCE, worst
    assert got.num_rows == expected.num_rows


@pytest.mark.sampled
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 9])
@pytest.mark.parametrize("family", ["residual_cnn", "llama", "norms", "tied"])
def test_parts_give_the_scores_of_the_whole(family: str, micro_batch: int, rows: str) -> None:
    case = getattr(models, family)()
    whole = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    parts = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, micro_batch=micro_batch)
    assert_same(parts, whole)


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_parts_of_what_no_gate_serves(rows: str) -> None:
    case = nasty.NASTY["functional-weight"]()
    whole = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    parts = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, micro_batch=2)
    assert_same(parts, whole)


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_lists_with_an_entry_for_each_sample_are_cut_with_the_tensors(rows: str) -> None:
    """As a detector's targets are: before, the first samples' came with every part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    batches = [
        {"x": torch.randn(4, 5), "targets": [{"at": torch.randn(n, 3)} for n in (1, 4, 2, 3)], "weight": [1, 2, 3, 4]}
        for _ in range(3)
    ]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        samples = zip(model(batch["x"]), batch["targets"], batch["weight"], strict=False)
        losses = torch.stack([weight * (y - target["at"]).square().mean() for y, target, weight in samples])
        return losses if rows == "sample" else losses.mean()

    assert_same(obc.score(model, batches, loss, rows=rows, micro_batch=3), obc.score(model, batches, loss, rows=rows))


def test_no_part_is_larger_than_asked() -> None:
    case, seen = models.residual_cnn(), []

    def noting(model: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return case.loss(model, batch)

    obc.score(case.model, case.batches, noting, micro_batch=3)
    assert seen == [1] + [3, 1] * 3  # the check comes first


@pytest.mark.parametrize("micro_batch", [0, -1])
def test_parts_of_less_than_one_sample(micro_batch: int) -> None:
    with pytest.raises(ValueError, match=f"micro_batch must be a positive integer, got {micro_batch}"):
        obc.score(nn.Linear(3, 2), [torch.ones(2, 3)], lambda m, b: m(b).sum(), micro_batch=micro_batch)


def test_a_batch_without_a_tensor_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="a batch of type str has no tensor"):
        obc.score(nn.Linear(3, 2), ["two words"], lambda m, b: m(torch.ones(2, 3)).sum(), micro_batch=1)


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: (x, y, "name"),
        lambda x, y: [x, {"inner": y}],
        lambda x, y: Pair(x, y),
        lambda x, y: {"x": x, "y": (y, 3), "scale": torch.tensor(2.0)},
        lambda x, y: UserDict(x=x, y=y),
        lambda x, y: BatchEncoding({"x": x, "y": y}),
    ],
    ids=["tuple", "nested", "namedtuple", "mapping", "user-dict", "tokenizer"],
)
def test_batches_of_every_form_are_split(wrap: Any) -> None:
    x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
    batch = wrap(x, y)
    part = part_of(batch, 1, 3, samples_in(batch))
    assert type(part) is type(batch)
    expected = wrap(x[1:3], y[1:3])
    leaves = [torch.utils._pytree.tree_leaves(dict(b) if isinstance(b, UserDict) else b) for b in (part, expected)]
    assert len(leaves[0]) == len(leaves[1])
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*leaves, strict=True))
    assert samples_in(batch) == 5  # the batch itself is what it was


# --- activation checkpointing --------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_activation_checkpointing_composes(
    family: str, use_reentrant: bool, rows: str, micro_batch: int | None
) -> None:
    """Checkpointing also works in eval mode, where transformers does not use it, and without dropout."""
    case = getattr(models, family)()
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    plain = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows)
    case.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    before = [(module.training, vars(module).get("_gradient_checkpointing_func")) for module in case.model.modules()]
    seen: list[bool] = []
    layer = next(module for module in case.model.modules() if hasattr(module, "_gradient_checkpointing_func"))
    inner = next(module for module in layer.modules() if isinstance(module, nn.Linear))
    handle = inner.register_forward_pre_hook(lambda *_: seen.append(layer.training))
    scores = obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, micro_batch=micro_batch)
    handle.remove()
    parts = len(case.batches) * (2 if micro_batch else 1)
    assert len(seen) >= 2 * parts  # each part's forward runs again in its backward
    assert not any(seen)
    assert_same(scores, plain)
    after = [(module.training, vars(module).get("_gradient_checkpointing_func")) for module in case.model.modules()]
    assert after == before
