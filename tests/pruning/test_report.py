"""The report of a pruning: scores and provenance are those of the run, and every kind of report is read back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import obc
from obc.model.readable import count
from obc.pruning import PruningReport
from obc.pruning.report import Change
from obc.structures.traced import TorchPruningStructure


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def pruned(**options: Any) -> tuple[nn.Module, list[Any], obc.PruningResult]:
    """(the unpruned model, batches, the result)"""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 160, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 5),
    ).eval()  # fmt: skip
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(10)]
    original = copy.deepcopy(model)
    return (
        original,
        batches,
        obc.prune(model, batches[0][0], batches, loss_fn, macs=0.6, steps=2, progress=False, **options),
    )


def test_scores_are_those_of_the_unpruned_model() -> None:
    original, batches, result = pruned()
    rows = obc.score(original, batches, loss_fn, keep_rows=True, progress=False).rows
    groups = {group.name: group for group in TorchPruningStructure(original, batches[0][0]).groups}
    assert set(result.report.scores) == set(groups) == {"0", "3"}
    for name, found in result.report.scores.items():
        gates = groups[name].gate_rows(rows)
        assert gates is not None
        expected = gates.double().square().sum(0).sort().values
        assert found == sorted(found)
        if name == "0":
            torch.testing.assert_close(torch.tensor(found).double(), expected, rtol=1e-4, atol=1e-12)
        else:  # of 160 units 121 quantiles, from the least to the largest
            assert len(found) == 121
            assert (found[0], found[-1]) == pytest.approx((float(expected[0]), float(expected[-1])), rel=1e-4)


def test_provenance_says_what_was_asked_for() -> None:
    _, _, result = pruned(criterion="l1", allocation="uniform", seed=7)
    said = result.report.provenance
    expected = {"model": "Sequential", "criterion": "l1", "allocation": "uniform", "budget": "macs=0.6", "seed": "7"}
    assert {name: said[name] for name in expected} == expected
    assert said["torch"] == torch.__version__
    assert said["dtype"] == "float32"


@pytest.mark.parametrize("compensate", [None, "mean", "ls", "correct"])
def test_every_kind_of_report_is_read_back_and_drawn(compensate: Any, tmp_path: Path) -> None:
    _, _, result = pruned(compensate=compensate)
    result.report.save(tmp_path / "report.json")
    found = PruningReport.load(tmp_path / "report.json")
    if found.compensation is not None:
        assert result.report.compensation is not None
        found.compensation.decompressors = result.report.compensation.decompressors  # matrices are not written
    assert found == result.report
    page = found.html()
    before, after = result.report.widths["3"]
    assert f"{before} → {after}" in page
    assert f"{before} → {after}" in result._repr_html_()
    if compensate in ("ls", "correct"):
        assert result.report.compensation is not None
        assert f"{result.report.compensation.final_error:.4f}" in page
        assert all(f"<code>{name}</code>" in page for name in result.report.compensation.layers)


def test_a_printed_report_is_short() -> None:
    """Amounts have units; groups that kept everything are counted, the narrowest come first, equal reasons once."""
    widths = {f"layers.{place}": (1000, 1000 - 10 * place) for place in range(40)}
    report = PruningReport(macs_before=6_148_276_224, macs_after=3_074_138_112, widths=widths)
    report.known["memory"] = Change(376_642_000, 188_321_000, "bytes: weights")
    report.left_out = {f"left.{place}": "too odd" for place in range(9)}
    lines = str(report).splitlines()
    assert lines[0] == "MACs: 6.15 G -> 3.07 G (50.0% remain)"
    assert lines[2] == "memory: 359.2 MiB -> 179.6 MiB: weights (50.0% remain)"
    assert [line.split() for line in lines[3:5]] == [
        ["layers.39", "1000", "->", "610"],
        ["layers.38", "1000", "->", "620"],
    ]
    assert lines[23:26] == [
        "  and 19 more groups that lost less; the report's widths hold all",
        "  groups that kept all units: 1",
        "  left.0, left.1, left.2 and 6 more: not pruned: too odd",
    ]


def test_a_warning_comes_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Logged while pruning runs, or printed with the report; a report that was read prints all."""
    report = PruningReport()
    report.warn("groups are narrow")
    report.warn("groups are narrow")
    report.warnings.append("found later")
    assert caplog.messages == ["obc.prune: groups are narrow"]
    assert str(report).splitlines()[-2:] == [
        "warning: found later",
        "warnings logged while pruning ran: 1",
    ]
    report.save(tmp_path / "report.json")
    read = PruningReport.load(tmp_path / "report.json")
    assert read == report
    assert str(read).splitlines()[-2:] == ["warning: groups are narrow", "warning: found later"]
    with caplog.at_level("ERROR", logger="obc"):
        silent = PruningReport()
        silent.warn("nobody saw this")
    assert str(silent).splitlines()[-1] == "warning: nobody saw this"


@pytest.mark.parametrize("trial", [False, True])
def test_too_few_rows_are_said_once_whatever_the_steps_and_trials(
    trial: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()  # fmt: skip
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(10)]
    options: dict[str, Any] = {"compensate": "ls"} if trial else {}
    report = obc.prune(model, batches[0][0], batches, loss_fn, macs=0.5, steps=3, progress=False, **options).report
    assert ("criteria tried" in report.provenance) == trial
    said = [message for message in caplog.messages if "rows are fewer" in message]
    assert len(said) == (report.provenance["selection"] == "joint")
    assert [f"obc.prune: {warning}" for warning in report.warnings] == [
        message for message in caplog.messages if message.startswith("obc.prune: ")
    ]


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (9999, "9999"), (10_000, "10.0 k"), (999_999, "1.00 M"), (94_160_448, "94.2 M"), (6.1e11, "610 G")],
)
def test_counts_have_three_digits(number: float, said: str) -> None:
    assert count(number) == said


def test_what_a_share_leaves_to_free_is_not_taken_for_a_share() -> None:
    """The last step frees 0.3911 parameters, less than any unit has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(4)]
    result = obc.prune(model, torch.randn(2, 6), batches, loss_fn, params=0.7, progress=False)
    assert not [one for one in result.report.warnings if "is no share" in one]
