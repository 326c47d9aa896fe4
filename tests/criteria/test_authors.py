"""Scores against numbers of the authors' formulas, which fixtures/authors.py computes without obc."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obc import criteria
from obc.criteria import Subject, group_scores
from obc.model.groups import ChannelGroup, Slice
from obc.model.latency_table import LatencyTable
from obc.statistics import Blocks
from obc.statistics.run import collect

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "authors.json").read_text())
INPUTS = {name: torch.tensor(values, dtype=torch.float64) for name, values in FIXTURE["inputs"].items()}
SAMPLES, HIDDEN = len(INPUTS["x"]), len(INPUTS["down"])
TOKENS = INPUTS["x"].shape[1]

# H = 2 sum x x^T / samples in DarwinLM's and SlimGPT's code, E[x x^T] over tokens here.
HESSIAN = 2 * TOKENS
LATENCY = LatencyTable({"layer": {4: 1e-3, 6: 2.5e-3}})

# What scores it, and the common factor of all units that the authors' code has and obc leaves out.
CRITERIA: dict[str, tuple[Any, float]] = {
    "flap": (criteria.FLAP(code=True), 1.0),
    "flap_heads": (criteria.FLAP(code=True), 1.0),
    "wanda_sp": ("wanda_sp", TOKENS**0.5 / HIDDEN),
    "wanda_sp_heads": ("wanda_sp", TOKENS**0.5 / HIDDEN),
    "minitron": ("minitron", 1.0),
    "minitron_heads": ("minitron", 1.0),
    "cfsp": (criteria.CFSP(power=0.5), 3 / HIDDEN / SAMPLES**0.25),
    "llm_pruner_element": ("llm_pruner_element", 1.0),
    "llm_pruner_vector": ("llm_pruner_vector", 1.0),
    "nirvana": ("nirvana", 1.0),
    "nvit": ("nvit", 1.0),
    "nvit_heads": (criteria.NViT(criteria.NViT.CODE_WEIGHTS), 1.0),
    "nvit_latency": (criteria.NViT(latency=LATENCY, eta=0.5), 1.0),
    "darwinlm": ("obs", HESSIAN),
    "darwinlm_heads": ("obs", HESSIAN),
    "slimgpt": (criteria.OBS(greedy=False), HESSIAN),
    "slimgpt_heads": ("slimgpt", HESSIAN),
    "gaprune": (criteria.GAPrune(list(INPUTS["general"][:, None]), code=True), 1.0),
    "reap": (criteria.REAP("softmax"), 1.0),
    "reap_renormalised": ("reap", 1.0),
    "expert_frequency": ("expert_frequency", 1.0),
    "expert_norm": ("expert_norm", 1.0),
}
BY_SAMPLES = ("nvit", "nvit_heads", "nvit_latency", "gaprune")  # each sample is a batch


class Block(nn.Module):
    """A residual branch that multiplies by one matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Gated(nn.Module):
    """The feed-forward layer of the fixture."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (linear(INPUTS[name]) for name in ("gate", "up", "down"))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).relu() * self.up(x))


class Experts(nn.Module):
    """All experts of the fixture in one module, as the transformers library has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(INPUTS["expert_gate_up"].clone())
        self.down_proj = nn.Parameter(INPUTS["expert_down"].clone())

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for token, chosen in enumerate(indices.tolist()):
            for slot, expert in enumerate(chosen):
                gate, up = (self.gate_up_proj[expert] @ hidden[token]).chunk(2)
                output[token] += weights[token, slot] * (self.down_proj[expert] @ (gate.relu() * up))
        return output


class Mixture(nn.Module):
    """The mixture of the fixture: two experts a token, weighted by the softmax over these two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = linear(INPUTS["router"]), Experts()

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.flatten(0, -2)
        values, indices = self.gate(hidden).topk(2)
        return self.experts(hidden, indices, values.softmax(-1)).view_as(x)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def needed_statistics(criterion: Any) -> set[str]:
    """Names of the statistics that a criterion needs."""
    return {one if isinstance(one, str) else one.name for one in criteria.get(criterion).needs}


def make_subject(units: str, by_samples: bool) -> Subject:
    model: nn.Module = Mixture() if units == "experts" else Gated()
    if units == "experts":
        each = torch.arange(len(INPUTS["router"]))[:, None]
        slices = (Slice("gate", "out", each), Slice("experts", "out", each))
    else:
        channels = torch.arange(6).reshape(-1, 2 if units == "heads" else 1)
        slices = (Slice("gate", "out", channels), Slice("up", "out", channels), Slice("down", "in", channels))
    group = ChannelGroup("layer", slices, units)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean() / 2

    batches = list(INPUTS["x"][:, None]) if by_samples else [INPUTS["x"]]
    return Subject(
        model,
        (group,),
        batches,  # type: ignore[arg-type]
        loss,
        lambda m, b: m(b),
        "gate",
        "batch",
        torch.Generator(),
    )


def accuracy(criterion: Any) -> float:
    """Relative: rows, weight gradients and norms of experts' outputs are summed in float32."""
    in_float32 = {"rows", "weight_gradients", "experts"}
    return 1e-6 if in_float32 & needed_statistics(criterion) or isinstance(criterion, criteria.GAPrune) else 1e-9


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_those_of_the_authors_formula(name: str) -> None:
    criterion, factor = CRITERIA[name]
    expected = FIXTURE["scores"][name]
    subject = make_subject(expected["units"], name in BY_SAMPLES)
    if name == "cfsp":  # its shares are by blocks, which one layer has none of; its scores need moments alone
        criterion.needs = ("moments",)
    scores = group_scores(criterion, subject)["layer"].double()
    truth = torch.tensor(expected["scores"], dtype=torch.float64)
    torch.testing.assert_close(scores * factor, truth, rtol=accuracy(criterion), atol=1e-12)


def test_blocks_are_scored_as_by_the_authors_formula() -> None:
    weight = INPUTS["mixed"].mT
    model = nn.Sequential(Block(weight), Block(weight))
    statistics = Blocks(modules=["0"])
    sums = collect(model, [INPUTS["x"]], statistics=[statistics], progress=False).blocks["0"]
    scores = {"block_influence": criteria.BlockInfluence(), "angular_distance": criteria.AngularDistance("all")}
    for name, criterion in scores.items():
        assert criterion.of_block(sums) == pytest.approx(FIXTURE["scores"][name]["scores"][0], rel=1e-9)


def test_every_number_names_the_code_that_it_is_of() -> None:
    assert set(FIXTURE["scores"]) == {*CRITERIA, "block_influence", "angular_distance"}
    assert all(", commit " in entry["source"] for entry in FIXTURE["scores"].values())
