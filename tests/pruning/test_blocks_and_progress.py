"""``obc.prune(blocks=...)``, a share of the prunable parameters; and lines of progress without a terminal."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from models import class_loss as loss
from torch import Tensor, nn
from transformers_families import FAMILIES

import obc
from obc import cli
from obc.model import progress


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 6, generator=generator), torch.randint(5, (4,), generator=generator)) for _ in range(8)]


class Embedded(nn.Module):
    """Nothing of its first layer depends on a width, nor of its last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Linear(6, 40), nn.Linear(40, 30), nn.Linear(30, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.embedding(x))
        return self.head(hidden + self.down(torch.relu(self.up(hidden))))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_share_of_what_can_be_pruned(share: float) -> None:
    torch.manual_seed(0)
    model = Embedded()
    before = parameters(model)
    result = obc.prune(model, torch.zeros(1, 6), batches(), loss, blocks=share, steps=2, ignored_layers=["embedding"])
    assert set(result.report.widths) == {"up"}
    # One unit of "up" is a row of 40 weights, a bias, and a column of 40 weights.
    assert model.up.out_features == int(share * 30)
    assert before - parameters(model) == (30 - int(share * 30)) * 81


@pytest.mark.filterwarnings("ignore")
def test_blocks_of_a_transformer_are_without_embeddings_and_head() -> None:
    case = FAMILIES["llama"]()
    layers = sum(parameter.numel() for parameter in case.model.model.layers.parameters())
    norms = sum(p.numel() for name, p in case.model.model.layers.named_parameters() if "norm" in name)
    report = obc.prune(case.model, batches=case.batches, loss_fn=case.loss, blocks=0.7, steps=1).report
    left = sum(parameter.numel() for parameter in case.model.model.layers.parameters())
    share = (left - norms) / (layers - norms)
    assert 0.6 < share <= 0.7
    assert report.parameters_before - report.parameters_after == layers - left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0.5, "macs": 0.5}, "macs=0.5 and blocks=0.5 are two budgets"),
        ({"blocks": 0.5, "macs": 0.5, "params": 0.5}, "are three budgets"),
        ({"blocks": 1.5}, r"blocks is the share that remains, in \(0, 1\], got 1.5"),
        ({"blocks": 0.01}, r"blocks=0\.01 is out of reach: 0\.03"),
        ({"blocks": 0.5, "steps": [0.7, 0.6]}, "shares of prunable parameters that descend to blocks=0.5"),
    ],
    ids=str,
)
def test_bad_shares_of_blocks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        obc.prune(Embedded(), torch.zeros(1, 6), batches(), loss, ignored_layers=["embedding"], **options)


# --- progress ---------------------------------------------------------------------------------------------------


class Clock:
    """Ten seconds later at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 10.0
        return self.now


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(progress, "time", Clock())
    caplog.set_level(logging.INFO, "obc.progress")
    return caplog


def said(lines: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in lines.records if record.name == "obc.progress"]


@pytest.mark.filterwarnings("ignore")
def test_a_line_every_30_seconds(lines: pytest.LogCaptureFixture) -> None:
    obc.score(Embedded(), batches(), loss)
    assert said(lines) == [
        "obc.score: batch 2 of 8, 30 s, about 60 s until batch 8",
        "obc.score: batch 5 of 8, 60 s, about 30 s until batch 8",
    ]


def test_a_new_pass_is_estimated_by_itself(lines: pytest.LogCaptureFixture) -> None:
    log = progress.ProgressLog("obc.prune", None)
    for done in (0, 1, 2, 3, 0, 1, 2, 3):
        log.tick(done, 4)
    assert said(lines) == [
        "obc.prune: batch 2 of 4, 30 s, about 20 s until batch 4",
        "obc.prune: batch 1 of 4, 60 s, about 30 s until batch 4",
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["correct", "seq"])
def test_compensation_says_its_part_and_layer(lines: pytest.LogCaptureFixture, mode: str) -> None:
    obc.prune(
        Embedded(),
        torch.zeros(1, 6),
        batches(),
        loss,
        blocks=0.7,
        steps=1,
        ignored_layers=["embedding"],
        compensate=mode,
    )
    found = [line for line in said(lines) if line.startswith("obc.compensate: ")]
    parts = {"correct": "correcting", "seq": "layer by layer"}
    assert any(line.startswith(f"obc.compensate: {parts[mode]}, batch ") for line in found)
    places = [tuple(map(int, re.findall(r"batch (\d+) of (\d+)", line)[0])) for line in found if "batch" in line]
    assert all(done < total for done, total in places), found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shown", [True, False])
def test_none_where_a_bar_is_shown_or_nothing_wanted(lines: pytest.LogCaptureFixture, shown: bool) -> None:
    obc.score(Embedded(), batches(), loss, progress=shown)
    assert said(lines) == []


@pytest.mark.filterwarnings("ignore")
def test_pruning_says_its_step_and_batch(lines: pytest.LogCaptureFixture) -> None:
    obc.prune(Embedded(), torch.zeros(1, 6), batches(), loss, blocks=0.7, steps=2, ignored_layers=["embedding"])
    assert said(lines)[0].startswith("obc.prune: step 1 of 2, batch 1 of 8")
    assert any(line.startswith("obc.prune: step 2 of 2, batch ") for line in said(lines))


def test_the_command_line_shows_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(parsed: Any) -> int:
        logging.getLogger("obc.progress").info("obc.prune: step 1 of 8, batch 3 of 50, 61 s")
        logging.getLogger("obc").info("a detail")
        return 0

    monkeypatch.setattr(cli, "_parser", lambda: _parser(run))
    assert cli.main(["anything"]) == 0
    assert capsys.readouterr().err == "obc.prune: step 1 of 8, batch 3 of 50, 61 s\n"
    assert not logging.getLogger("obc.progress").handlers


def _parser(run: Any) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.set_defaults(command=run)
    return parser
