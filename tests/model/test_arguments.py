"""Checks of arguments: what is no set of batches, no number, or no known name is refused with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import obc
from obc.model.arguments import meant, number, one_of, positive

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def compensated(batches: Any) -> None:
    model, original = network(), network()
    plan = obc.prune(model, X, [X, X], loss, progress=False).plan
    obc.compensate(model, original, plan, batches)


CALLS: dict[str, Callable[[Any], Any]] = {
    "score": lambda batches: obc.score(network(), batches, loss),
    "collect": lambda batches: obc.collect(network(), batches, statistics="gram"),
    "collect by block": lambda batches: obc.collect(network(), batches, statistics="gram", by_block=True),
    "prune": lambda batches: obc.prune(network(), X, batches, loss),
    "compensate": compensated,
    "recalibrate_norms": lambda batches: obc.recalibrate_norms(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), batches
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batches", [{"input_ids": X}, 3, "text.txt"], ids=["mapping", "number", "name"])
def test_what_is_no_set_of_batches_is_refused(call: str, batches: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"iterable of batches, got {type(batches).__name__}; of a single .*\[batch\]"
    ):
        CALLS[call](batches)


def test_known_names_that_are_spelled_alike_are_named() -> None:
    with pytest.raises(ValueError, match="one of 'gram', 'moments', 3, got 'grm'; did you mean 'gram'\\?"):
        one_of("statistics", "grm", ["gram", "moments", 3])
    assert meant("layer2", ["layers.2", "layer.2"]) == "; did you mean 'layer.2' or 'layers.2'?"
    assert meant("SEQ", ["ls", "seq"]) == "; did you mean 'seq'?"
    assert meant("zebra", ["gram"]) == meant(7, ["gram"]) == ""


@pytest.mark.parametrize("value", ["half", None, True, 1j, torch.tensor(0.5)], ids=repr)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="macs must be a number, got "):
        number("macs", value)


@pytest.mark.parametrize("value", ["2", 1.5, 0, -1, True, None], ids=repr)
def test_what_is_no_positive_integer_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="steps must be a positive integer, got "):
        positive("steps", value)


def test_numbers_of_numpy_are_numbers() -> None:
    positive("steps", np.int64(3))
    number("macs", np.float32(0.5))
    number("macs", 1)


@pytest.mark.parametrize(("option", "close"), [("row", "rows"), ("keep_row", "keep_rows"), ("device", None)])
def test_unknown_options_of_score_are_named_as_its_own(option: str, close: str | None) -> None:
    meant_one = f"; did you mean .*'{close}'" if close else ""
    with pytest.raises(TypeError, match=f"obc.score got an unexpected keyword argument '{option}'{meant_one}"):
        obc.score(network(), [X], loss, **{option: "batch"})
