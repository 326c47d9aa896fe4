"""The sweep over networks of other libraries, on hand-made networks: what is right, wrong, refused or ends early.

``make sweep-libraries`` installs the libraries, runs all of it, and writes the page.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_libraries import FILES, library, packages
from sweep_library_table import general, page, summary
from sweep_networks import Architecture, Seen, drawn, examine
from sweep_processes import forked
from torch import Tensor, nn

from obc.structures.traced import TorchPruningStructure

PAGE = Path(__file__).parents[2] / "docs" / "library_models.md"


class HandMade(nn.Module):
    """A stem, a residual block with a grouped convolution, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.PReLU(16))
        self.narrow, self.grouped = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.grouped(self.narrow(x).relu())).mean((2, 3)))


def hand_made(**attributes: Any) -> Architecture:
    return Architecture("hand_made", type("Changed", (HandMade,), attributes), drawn(3, 8, 8))


def test_a_right_network_is_compared_scored_and_pruned() -> None:
    seen = examine("own", hand_made())
    assert not seen.wrong
    assert not seen.built
    assert not seen.refused
    assert seen.groups == seen.compared == 2
    assert seen.error is not None
    assert seen.error < 1e-12
    assert seen.scored is not None
    assert seen.scored < 1e-4
    assert seen.half is not None
    assert seen.pruned is not None
    assert seen.half < seen.pruned <= 0.5


def test_units_other_than_those_that_are_masked_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = TorchPruningStructure.remove

    def others(self: TorchPruningStructure, units: Mapping[str, Tensor]) -> None:
        sizes = {group.name: group.size for group in self.groups}
        remove(self, {name: (gone + 1).remainder(sizes[name]).sort().values for name, gone in units.items()})

    structure = TorchPruningStructure(HandMade().eval(), torch.randn(2, 3, 8, 8))
    monkeypatch.setattr("sweep_networks.TorchPruningStructure", lambda *args, **options: structure)
    monkeypatch.setattr(TorchPruningStructure, "remove", others)
    assert re.fullmatch(r"sliced and masked differ by .*", examine("own", hand_made()).wrong)


def test_what_goes_wrong_on_another_batch_size_is_seen() -> None:
    def forward(self: HandMade, x: Tensor) -> Tensor:
        return HandMade.forward(self, x) + (len(x) == 3) * self.narrow.out_channels

    assert examine("own", hand_made(forward=forward)).wrong.startswith("sliced and masked differ")


def test_what_goes_wrong_in_train_mode_is_seen() -> None:
    def forward(self: HandMade, x: Tensor) -> Tensor:
        return HandMade.forward(self, x) + self.training * self.narrow.out_channels

    seen = examine("own", hand_made(forward=forward))
    assert re.fullmatch(r"sliced and masked differ by \S+ in train mode", seen.wrong)


def test_a_network_that_does_not_run_is_not_built() -> None:
    def forward(self: HandMade, x: Tensor) -> Tensor:
        raise KeyError("no such key")

    seen = examine("own", hand_made(forward=forward))
    assert seen.built == "KeyError: 'no such key'"
    assert not seen.wrong


@pytest.mark.parametrize(("error", "wrong"), [(KeyError("lost"), True), (ValueError("name such layers"), False)])
def test_an_error_for_users_is_a_refusal_and_any_other_is_wrong(
    monkeypatch: pytest.MonkeyPatch, error: Exception, wrong: bool
) -> None:
    def prune(*args: Any, **given: Any) -> None:
        raise error

    monkeypatch.setattr("obc.prune", prune)
    seen = examine("own", hand_made())
    assert bool(seen.wrong) == wrong
    assert str(error) in (seen.wrong if wrong else seen.refused)


def _work(job: str) -> str:
    if job == "killed":
        os._exit(1)
    while job == "late":
        pass
    return job.upper()


def test_jobs_return_or_say_how_they_ended() -> None:
    ended = {job: (result, how) for job, result, how in forked(["fine", "killed", "late"], _work, (1, 4), 2)}
    assert ended == {
        "fine": ("FINE", ""),
        "killed": (None, "the process ended without a word"),
        "late": (None, "not done after 1 s"),
    }


def test_a_page_counts_what_is_seen() -> None:
    rows = [
        Seen("a", "b", groups=3, compared=2, error=1e-15, half=0.3, pruned=0.49, left_out={"x.y.z reads 3 | 4": 2}),
        Seen("a", "c", refused="ValueError: nothing can be pruned"),
        Seen("a", "d", wrong="it differs"),
        Seen("a", "e", built="no such layer"),
    ]
    counts = (
        "4 networks: 3 built, of which 1 are pruned to half of their MACs, 1 are refused with a reason or not done "
        "in time; 1 wrong, 1 not built."
    )
    assert summary(rows) == counts
    lines = page(rows, {"a": "1.0"}).splitlines()
    assert counts in lines
    assert "| b | 3 (2 compared) | 1e-15 | 0.30 | 0.49 | 2: a layer reads N / N |" in lines
    assert "| c | 0 |  |  |  | ValueError: nothing can be pruned |" in lines
    assert "| d | 0 |  |  |  | WRONG: it differs |" in lines
    assert "| e | 0 |  |  |  | not built: no such layer |" in lines
    longer = page([Seen("b", "f")], {"b": "2.0"}, "\n".join(lines))
    assert [line for line in longer.splitlines() if line.startswith("## ")] == ["## a 1.0", "## b 2.0"]
    assert set(lines) < set(longer.splitlines())


def test_reasons_lose_names_and_numbers() -> None:
    assert general("features.stage1.conv, b.c and 'd.e' read 12 of 1.5e-3") == "layers read N of N"
    assert general("EinopsError:  Error in\n rearrange") == "EinopsError: Error in rearrange"


@pytest.mark.parametrize("name", FILES)
def test_every_library_has_architectures_and_nothing_on_the_page_is_wrong(name: str) -> None:
    names = [architecture.name for architecture in library(name).architectures()]
    assert packages([name])
    assert len(names) == len(set(names)) > 0
    sections = [part for part in PAGE.read_text().split("\n## ") if part.startswith(f"{name} ")]
    assert len(sections) == 1
    assert "WRONG" not in sections[0]
    listed = {line.split(" | ")[0].removeprefix("| ") for line in sections[0].splitlines()[6:]}
    assert listed <= set(names)
