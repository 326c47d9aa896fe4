"""Chains: rows that follow from other rows are found, confirmed, watched, and given up if they no longer hold."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import class_loss as loss
from torch import Tensor, nn
from torch.nn import functional as F

import obc
from obc.scoring.errors import ChainError

pytestmark = pytest.mark.usefixtures("gates")

BATCH = 6


def convolutions(between: Callable[[], nn.Module], norm: bool = True) -> nn.Module:
    """conv, perhaps a BatchNorm with statistics of its own, something between, conv, pooling, linear."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8)] if norm else []
    for one in norms:
        nn.init.normal_(one.weight)
        nn.init.normal_(one.bias)
        nn.init.normal_(one.running_mean)
    layers = [nn.Conv2d(3, 8, 3), *norms, between(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 5)).eval()


def images(batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 3, 9, 9, generator=generator), torch.randint(5, (BATCH,), generator=generator))
        for _ in range(batches)
    ]


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def chained(scores: obc.Scores) -> dict[str, str]:
    """Module -> what its coverage says of chains."""
    return {name: how.split(", ", 1)[1] for name, how in scores.coverage.items() if " from " in how}


def assert_same(scores: obc.Scores, expected: obc.Scores) -> None:
    assert set(scores) == set(expected)
    for name in expected:
        for side in ("out_channels", "in_channels"):
            there, here = getattr(expected[name], side), getattr(scores[name], side)
            if there is not None:
                torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5 * float(there.max()), msg=f"{name}.{side}")


@pytest.mark.parametrize("between", [nn.ReLU, nn.LeakyReLU, lambda: nn.MaxPool2d(2, 1), lambda: nn.ReLU(inplace=True)])
def test_what_lies_between_is_homogeneous(between: Callable[[], nn.Module]) -> None:
    model = convolutions(between)
    scores = obc.score(model, images(), loss)
    assert chained(scores) == {
        "0": "out channels from the gradient of the norm behind it",
        "3": "out channels from the row of 6, in channels from the row of 1",
    }
    assert_same(scores, obc.score(model, images(), loss, chains=False))


@pytest.mark.parametrize("between", [nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid])
def test_what_lies_between_is_not_homogeneous(between: Callable[[], nn.Module]) -> None:
    """ReLU6 agrees with ReLU as long as nothing saturates: the graph tells them apart, numbers would not."""
    scores = obc.score(convolutions(between), images(), loss)
    assert "in channels from" not in scores.coverage["3"]
    assert scores.coverage["0"].endswith("out channels from the gradient of the norm behind it")
    without_norm = obc.score(convolutions(between, norm=False), images(), loss)
    assert set(chained(without_norm)) == {"2"}  # from the linear layer behind pooling and flatten


class Ghost(nn.BatchNorm2d):
    """A BatchNorm with statistics for each of two parts of the batch; in eval mode it reads those of the first."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.running_mean, self.running_var = torch.randn(2 * width), torch.rand(2 * width) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var = (one[: self.num_features] for one in (self.running_mean, self.running_var))
        return F.batch_norm(x, mean, var, self.weight, self.bias)


def test_a_norm_with_more_statistics_than_channels_gives_no_chain() -> None:
    model = convolutions(nn.ReLU)
    model[1] = Ghost(8).eval()
    scores = obc.score(model, images(), loss)
    assert "0" not in chained(scores)
    assert_same(scores, obc.score(model, images(), loss, chains=False))


def test_sample_rows_follow_too() -> None:
    model = convolutions(nn.ReLU, norm=False)
    scores = obc.score(model, images(), losses, rows="sample")
    assert chained(scores) == {"0": "out channels from the row of 2", "2": "out channels from the row of 5"}
    assert_same(scores, obc.score(model, images(), losses, rows="sample", chains=False))


def test_chains_are_off_by_one_argument() -> None:
    assert not chained(obc.score(convolutions(nn.ReLU), images(), loss, chains=False))


def test_grouped_queries_and_gated_feed_forward() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = [torch.randint(32, (2, 7)) for _ in range(3)]

    def next_token(model: nn.Module, batch: Tensor) -> Tensor:
        value: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
        return value

    scores = obc.score(model, tokens, next_token)
    layer = "model.layers.0"
    assert chained(scores) == {
        f"{layer}.self_attn.v_proj": f"out channels from the row of {layer}.self_attn.o_proj",
        f"{layer}.mlp.up_proj": f"out channels from the row of {layer}.mlp.down_proj",
    }
    assert_same(scores, obc.score(model, tokens, next_token, chains=False))


class Branching(nn.Module):
    """Two layers; what happens between them, and who else reads the first one's output, may change with every call."""

    def __init__(self, *ways: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.other = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.ways = itertools.cycle(ways)

    def forward(self, x: Tensor) -> Tensor:
        y, way = self.first(x), next(self.ways)
        if way == "relu":
            return self.second(y.relu())
        if way == "gelu":
            return self.second(F.gelu(y))
        if way == "read twice":
            return self.second(y.relu()) + self.other(y)
        return self.other(F.gelu(y))


def vectors(batches: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(BATCH, 6, generator=generator), torch.randint(4, (BATCH,), generator=generator))
        for _ in range(batches)
    ]


def test_a_second_reader_shows_in_the_numbers() -> None:
    assert not chained(obc.score(Branching("read twice"), vectors(3), loss))


@pytest.mark.parametrize("later", ["gelu", "elsewhere"])
def test_another_way_in_a_later_row(later: str, caplog: pytest.LogCaptureFixture) -> None:
    """The row is repeated: its batch is passed twice, and the model takes the same way again."""
    ways = ("relu", "relu", later, later, "relu")
    scores = obc.score(Branching(*ways), vectors(4), loss)
    assert not chained(scores)
    assert scores.num_rows == 4
    assert "another path than in the checking row" in caplog.text
    expected = obc.score(Branching("relu", "relu", later, "relu"), vectors(4), loss, chains=False)
    assert_same(scores, expected)


def test_changes_in_place_keep_their_gate() -> None:
    """In-place changes give another graph than changes of a copy: a chain would break in the first later row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)).eval()
    generator = torch.Generator().manual_seed(2)
    batches = [(torch.randn(4, 5, 6, generator=generator), torch.randint(4, (4, 5), generator=generator))] * 3

    def tokens_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    scores = obc.score(model, batches, tokens_loss)
    assert scores.coverage["0"] == "gate on a copy"
    assert "left_out" not in scores.metadata


class DeadEnd(nn.Module):
    """The second reader of the norm's output leads nowhere, so that it is not read by gates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.dead, self.head = nn.Conv2d(8, 2, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        self.dead(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_reader_without_gradient_watches_no_chain() -> None:
    model = DeadEnd().eval()
    scores = obc.score(model, images(), loss)
    assert "left_out" not in scores.metadata
    assert scores.coverage["conv"].endswith("out channels from the gradient of the norm behind it")
    assert_same(scores, obc.score(model, images(), loss, chains=False))


def test_a_loop_of_ones_own_is_told_to_repeat_the_row() -> None:
    model = Branching("relu", "gelu", "gelu", "relu")
    scorer = obc.JacobianScorer(model)
    first, second, third = vectors(3)
    with scorer:
        with scorer.row():
            loss(model, first).backward()
        assert chained(obc.Scores({}, num_rows=1, coverage=scorer.scores().coverage, metadata={}))
        with pytest.raises(ChainError, match="repeat this row"), scorer.row():
            loss(model, second).backward()
        for batch in (second, third):
            with scorer.row():
                loss(model, batch).backward()
    assert scorer.count_rows() == 3
    apart = Branching("relu", "relu", "gelu", "relu")  # the first for the check on a sample
    assert_same(scorer.scores(), obc.score(apart, vectors(3), loss, chains=False))


def test_a_norm_in_train_mode_after_the_checking_row_breaks_the_chain() -> None:
    model = convolutions(nn.ReLU)
    scorer = obc.JacobianScorer(model)
    first, second, _ = images()
    with scorer:
        with scorer.row():
            loss(model, first).backward()
        model.train()
        with pytest.raises(ChainError, match="another path"), scorer.row():
            loss(model, second).backward()


def test_a_forward_before_the_row() -> None:
    model = convolutions(nn.ReLU)
    scorer = obc.JacobianScorer(model)
    with scorer:
        for batch in images():
            value = loss(model, batch)
            with scorer.row():
                value.backward()
    assert chained(scorer.scores())
    assert_same(scorer.scores(), obc.score(model, images(), loss, chains=False))


def test_resumed_scorers_have_the_same_chains() -> None:
    model, batches = convolutions(nn.ReLU), images(4)
    unbroken = obc.score(model, batches, loss)

    def rows(scorer: obc.JacobianScorer, some: list[Any]) -> None:
        with scorer:
            for batch in some:
                with scorer.row():
                    loss(model, batch).backward()

    before, after = obc.JacobianScorer(model), obc.JacobianScorer(model)
    rows(before, batches[:2])
    state = before.state_dict()
    json.dumps(state["chains"])  # plain values, for checkpoints
    after.load_state_dict(state)
    rows(after, batches[2:])
    assert chained(after.scores()) == chained(unbroken)
    for name in unbroken:
        assert torch.equal(after.scores()[name].out_channels, unbroken[name].out_channels)


def test_the_graph_of_a_row_is_not_kept_after_it() -> None:
    model = convolutions(nn.ReLU)
    scorer = obc.JacobianScorer(model)
    with scorer:
        for batch in images():
            with scorer.row():
                loss(model, batch).backward()
            assert not scorer._parts.plan.chains.outputs


class GatedLayers(nn.Module):
    """Two gated layers; with one side of each read, nothing brings a gradient to the outputs of the first one's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gates = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(8, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for gate, up, down in zip(self.gates, self.ups, self.downs, strict=True):
            x = down(F.relu(gate(x)) * up(x))
        return x


def test_an_output_that_nothing_else_brings_a_gradient_keeps_its_gate(caplog: pytest.LogCaptureFixture) -> None:
    model = GatedLayers()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sides = {name: ["in" if "downs" in name else "out"] for name in linear}
    with caplog.at_level(logging.WARNING):
        scores = obc.score(model, vectors(4), loss, modules=sides)
    assert not caplog.records
    assert_same(scores, obc.score(GatedLayers(), vectors(4), loss, modules=sides, chains=False))
    assert set(chained(scores)) == {"gates.1", "ups.1"}
