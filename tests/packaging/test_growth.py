"""The overhead grows linearly: twice the layers take about twice the calls of Python functions, in every entry point.

A loop over all layers inside a loop over all layers shows here before it shows on a model of thousands of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import obc
from obc.structures.transformers import TransformersStructure

LAYERS = (16, 48)
# The most that three times as many layers may multiply the calls by. Work that is done once lowers the factor, nested
# loops over the layers raise it towards 9.
MOST = 3.3


def calls(job: Callable[[], object]) -> int:
    """The number of Python functions that ``job`` calls."""
    found = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal found
        found += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        job()
    finally:
        sys.setprofile(before)
    return found


def stack(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(4, 4), nn.LayerNorm(4))])


def llama(layers: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()


def square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def squares(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean(1)


STACK = [torch.randn(2, 4, generator=torch.Generator().manual_seed(0))]
TOKENS = {"input_ids": torch.arange(8).view(2, 4)}
DEPTH = ("layers", "sublayers", "ffn", "heads")
STATISTICS = (obc.statistics.Gram(), obc.statistics.Moments(), obc.statistics.Rows())

JOBS: dict[str, tuple[Callable[[int], nn.Module], Callable[[Any], object]]] = {
    "score": (stack, lambda model: obc.score(model, STACK, square, progress=False)),
    "sample rows": (stack, lambda model: obc.score(model, STACK, squares, rows="sample", progress=False)),
    "collect": (
        stack,
        lambda model: obc.collect(model, STACK, square, statistics=STATISTICS, progress=False),
    ),
    "structure": (llama, TransformersStructure),
    "costs of blocks": (llama, lambda model: TransformersStructure(model, DEPTH).costs("macs")),
    "proof": (llama, lambda model: TransformersStructure(model, example_inputs=TOKENS)),
}


@pytest.mark.sampled(members=3)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "proof")) for name in JOBS])
def test_calls_grow_with_the_layers(name: str) -> None:
    build, job = JOBS[name]
    few, many = (build(layers) for layers in LAYERS)
    calls(lambda: job(few))  # imports, and what a process does only once
    fewer, more = calls(lambda: job(few)), calls(lambda: job(many))
    assert more <= MOST * fewer
