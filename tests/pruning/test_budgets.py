"""Budgets of latency and memory are met by their own count, reported before and after, and refused if impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counted_seconds import counted_seconds
from models import Case
from torch import Tensor, nn
from transformers_families import FAMILIES, qwen2_moe

import obc
from obc.pruning.budgets import Budget
from obc.pruning.report import PruningReport
from obc.structures.traced import TorchPruningStructure
from obc.structures.transformers import TransformersStructure

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock: what obc.prune measures by itself is counted."""
    monkeypatch.setattr("obc.structures.latency._median", counted_seconds)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.b(self.a(x).relu())).mean((2, 3)))


def image_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))] * 6


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run_of(case: Case) -> Any:
    return lambda model: case.loss(model, case.batches[0])


def by_table(table: obc.LatencyTable, structure: Any) -> float:
    return table.costs(structure.groups, structure.costs("parameters").inside).total()


# --- latency ---------------------------------------------------------------------------------------------------


def test_a_convolutional_network_meets_the_latency_that_is_measured_on_the_spot() -> None:
    torch.manual_seed(0)
    model, batches = Net().eval(), image_batches()
    result = obc.prune(model, batches[0][0], batches, image_loss, latency=0.6, steps=2)
    change = result.report.known["latency"]
    assert change.after <= 0.6 * change.before
    assert change.after > 0.5 * change.before  # no more than was asked for
    assert result.report.budget == "seconds"
    assert result.report.steps[-1].remaining == pytest.approx(change.after / change.before)
    # The timer counts MACs, and a microsecond a call: the table says nearly what they do.
    assert result.report.macs_after / result.report.macs_before == pytest.approx(0.6, abs=0.06)
    assert "float32" in change.counted
    assert "inputs 8x3x8x8" in change.counted
    assert result.report.seconds["latency"] > 0


@pytest.mark.sampled(members=1)
@pytest.mark.parametrize("family", ["vit", "llama", "moe"])
def test_transformers_meet_a_table_that_is_given(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = qwen2_moe() if family == "moe" else FAMILIES[family]()
    structure = TransformersStructure(case.model)
    table = obc.measure_latency(structure, run_of(case))
    table.save(tmp_path / "table.json")
    before = by_table(table, structure)
    result = obc.prune(
        case.model,
        batches=case.batches,
        loss_fn=case.loss,
        latency=0.75,
        latency_table=tmp_path / "table.json",
        structure=structure,
        steps=2,
    )
    assert by_table(table, structure) <= 0.75 * before
    assert result.report.known["latency"].after == by_table(table, structure)


def test_whole_blocks_compete_by_their_seconds() -> None:
    case = FAMILIES["llama"]()
    structure = TransformersStructure(case.model, ["ffn", "heads", "layers"])
    obc.prune(case.model, batches=case.batches, loss_fn=case.loss, latency=0.5, structure=structure, steps=1)
    taken = counted_seconds(lambda: run_of(case)(case.model), torch.device("cpu"))
    assert taken <= 0.55 * counted_seconds(lambda: run_of(case)(FAMILIES["llama"]().model), torch.device("cpu"))


def test_whole_blocks_alone_leave_a_model_that_saves_as_usual() -> None:
    """The report counts memory before the blocks leave their list; warnings are those of afterwards."""
    case = FAMILIES["llama"]()
    structure = TransformersStructure(case.model, ["layers"])
    result = obc.prune(case.model, batches=case.batches, loss_fn=case.loss, memory=0.6, structure=structure, steps=1)
    assert len(case.model.model.layers) == 1
    tied = {one.data_ptr(): one.nbytes for one in case.model.state_dict().values()}
    assert result.report.known["memory"].after == sum(tied.values())
    assert not any("save_pretrained" in warning for warning in result.report.warnings)


def test_rounded_widths_are_measured_at_multiples() -> None:
    torch.manual_seed(0)
    model, batches = Net().eval(), image_batches()
    result = obc.prune(model, batches[0][0], batches, image_loss, latency=0.6, steps=1, round_to=8)
    assert all(after % 8 == 0 for _, after in result.report.widths.values())


def test_a_table_beside_another_budget_is_reported() -> None:
    torch.manual_seed(0)
    model, batches = Net().eval(), image_batches()
    structure = TorchPruningStructure(model, batches[0][0])
    table = obc.measure_latency(structure, lambda copied: copied(batches[0][0]))
    result = obc.prune(model, batches[0][0], batches, image_loss, macs=0.5, steps=1, latency_table=table)
    change = result.report.known["latency"]
    assert change.before == by_table(table, TorchPruningStructure(Net(), batches[0][0]))
    assert change.after < change.before


def test_tables_that_do_not_fit_leave_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model, batches = Net().eval(), image_batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    full = {"stem": {16: 1.0}, "a": {32: 1.0}}
    for table, message in (
        (obc.LatencyTable({"stem": {16: 1.0}}), "no group 'a'"),
        (obc.LatencyTable(full | {"a": {16: 1.0}}), "ends at 16 units of 'a', which has 32"),
        (obc.LatencyTable(full, device="NVIDIA H100"), "measured on 'NVIDIA H100', and the model is on 'cpu'"),
        (obc.LatencyTable(full), r"latency=0.5 is out of reach: 1.0000 remain"),
    ):
        with pytest.raises(ValueError, match=message):
            obc.prune(model, batches[0][0], batches, image_loss, latency=0.5, latency_table=table)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


# --- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "moe"])
def test_weights_and_cache_meet_the_budget(family: str) -> None:
    torch.manual_seed(0)
    case = qwen2_moe() if family == "moe" else FAMILIES[family]()
    use = obc.MemoryUse(length=64, batch=4, dtype=torch.bfloat16)
    result = obc.prune(case.model, batches=case.batches, loss_fn=case.loss, memory=0.7, memory_use=use, steps=2)
    change = result.report.known["memory"]
    weights = {one.data_ptr(): one.numel() for one in case.model.state_dict().values()}
    with torch.no_grad():
        cache = case.model(input_ids=torch.zeros(4, 64, dtype=torch.int64), use_cache=True).past_key_values
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert change.after == 2 * (sum(weights.values()) + cached)
    assert change.after <= 0.7 * change.before
    assert change.counted == "bytes: weights and a cache of 4 x 64 tokens, bfloat16"


def test_bytes_may_be_given() -> None:
    torch.manual_seed(0)
    model, batches = Net().eval(), image_batches()
    result = obc.prune(model, batches[0][0], batches, image_loss, memory=30_000, steps=2)
    saved = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert result.report.known["memory"].after == saved
    assert 0.9 * 30_000 < saved <= 30_000
    model = Net().eval()
    with pytest.raises(ValueError, match=r"memory=100 is out of reach: \d+ bytes remain where") as error:
        obc.prune(model, batches[0][0], batches, image_loss, memory=100)
    least = int(str(error.value).split("reach: ")[1].split()[0])
    with pytest.raises(ValueError, match=rf"memory={least - 1} is out of reach: {least} bytes"):
        obc.prune(model, batches[0][0], batches, image_loss, memory=least - 1)
    obc.prune(model, batches[0][0], batches, image_loss, memory=least, steps=1)
    assert sum(4 * parameter.numel() for parameter in model.parameters()) <= least
    with pytest.raises(ValueError, match=r"memory=1e\+06 bytes is more than the .* that the unpruned model takes"):
        obc.prune(model, batches[0][0], batches, image_loss, memory=1e6)
    with pytest.raises(ValueError, match="steps is a number of steps"):
        obc.prune(model, batches[0][0], batches, image_loss, memory=30_000, steps=[0.8, 0.5])


# --- the budget, and the report ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": 0.5, "latency": 0.5}, "memory=0.5 and latency=0.5 are two budgets"),
        ({"latency": 1.5}, r"latency is the share that remains, in \(0, 1\], got 1.5"),
        ({"memory": 0.0}, r"in \(0, 1\], or a number of bytes above 1, got 0.0"),
        ({"memory": float("nan")}, "got nan"),
    ],
)
def test_bad_budgets(given: dict[Any, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.of(given)


def test_the_report_has_all_budgets_and_the_speed_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(
        "obc.pruning.measured.median_seconds",
        lambda calls, device: [counted_seconds(call, device) for call in calls],
    )
    case = qwen2_moe()
    unpruned = counted_seconds(lambda: run_of(case)(case.model), torch.device("cpu"))
    result = obc.prune(case.model, batches=case.batches, loss_fn=case.loss, params=0.7, steps=1, measure=True)
    report = result.report
    assert set(report.known) == {"blocks", "active_params", "memory"}
    assert all(change.after < change.before for change in report.known.values())
    assert report.speed is not None
    assert report.speed.before == pytest.approx(unpruned)
    assert report.speed.after == pytest.approx(counted_seconds(lambda: run_of(case)(case.model), torch.device("cpu")))
    report.save(tmp_path / "report.json")
    loaded = PruningReport.load(tmp_path / "report.json")
    assert loaded.known == report.known
    assert loaded.speed == report.speed
    page = loaded.html()
    assert "bytes: weights" in page
    assert "measured speed-up" in page
    assert "measured speed-up" in str(report)
