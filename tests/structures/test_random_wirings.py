"""Random wirings between layers are pruned exactly or left out, never wrongly.

``make wirings`` draws OBC_WIRINGS networks from the number OBC_WIRINGS_FIRST on; the closing lines count them.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from random_wirings import Wired, random_wired, without

from obc.structures.traced import TorchPruningStructure

FIRST = int(os.environ.get("OBC_WIRINGS_FIRST", "0"))
WIRINGS = range(FIRST, FIRST + int(os.environ.get("OBC_WIRINGS", "12")))
SIZE = 6
counts: Counter[str] = Counter()
COUNTED = ("groups exact", "groups left out", "wrong", "networks that Torch-Pruning can't trace")


@pytest.fixture(scope="module", autouse=True)
def _print_counts(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        said = ", ".join(f"{counts[key]} {key}" for key in COUNTED)
        print(f"\nwirings: {counts['networks']} random networks: {said}")


def removed_in_steps(net: Wired, x: Tensor, seed: int) -> TorchPruningStructure:
    """A structure of a copy of ``net`` without some units of every group, removed in two steps."""
    structure = TorchPruningStructure(copy.deepcopy(net), x)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        structure.remove(
            {
                group.name: torch.randperm(group.size, generator=generator)[: max(1, group.size // 3)]
                for group in structure.groups
                if group.size > 1
            }
        )
    return structure


def _raised_by_torch_pruning(error: BaseException) -> bool:
    """Its own arithmetic fails on some views when it traces; that is said, and nothing is pruned."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    return "torch_pruning" in frames[-1].filename and any(frame.name == "trace" for frame in frames)


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("seed", sorted({*WIRINGS, 318}))  # 318: halves exchanged at another place in every width
def test_a_random_wiring_is_pruned_exactly_or_left_out(seed: int) -> None:
    net = random_wired(seed)
    x = torch.randn(3, 6, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    counts["networks"] += 1
    try:
        structure = removed_in_steps(net, x, seed)
    except Exception as error:
        if not _raised_by_torch_pruning(error):
            raise
        counts["networks that Torch-Pruning can't trace"] += 1
        return
    counts["groups left out"] += len(structure.left_out) - 1  # the head's width is the output's
    expected, got = without(net, structure.plan, SIZE)(x), structure.model(x)
    exact = torch.allclose(got, expected, rtol=1e-9, atol=1e-9)
    counts["groups exact" if exact else "wrong"] += len(structure.groups) or (not exact)
    assert exact, f"{net}\nleft out: {structure.left_out}"
