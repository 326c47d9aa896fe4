"""A wrapped model has other names than the plan: every call says so, where it would find nothing to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import obc
from obc.model.depth import BlockList, Depth
from obc.recovery.mean_bias import absorb_means

BATCHES = [torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DataParallel": (nn.DataParallel, "module"),
    "AveragedModel": (AveragedModel, "module"),
    "own": (Wrapper, "inner"),
    "twice": (lambda model: Wrapper(Wrapper(model)), "inner.inner"),
}


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, nn.Module, obc.PruningPlan]:
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    ).eval()
    pruned = copy.deepcopy(original)
    result = obc.prune(pruned, BATCHES[0], BATCHES, lambda model, x: model(x).square().mean(), macs=0.5, progress=False)
    return original, pruned, result.plan


CALLS: dict[str, Callable[[nn.Module, nn.Module, obc.PruningPlan], Any]] = {
    "compensate": lambda pruned, original, plan: obc.compensate(pruned, original, plan, BATCHES),
    "mean": lambda pruned, original, plan: absorb_means(pruned, original, plan, BATCHES),
    "equivalent pruning": lambda pruned, original, plan: obc.equivalent_pruning(pruned, original.state_dict(), plan),
    "recalibrate norms": lambda pruned, original, plan: obc.recalibrate_norms(
        pruned, BATCHES, original_model=original, plan=plan
    ),
    "verify": lambda pruned, original, plan: plan.verify(original.state_dict(), pruned),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_pruned_model_is_refused_by_the_name_of_what_is_inside(
    case: tuple[nn.Module, nn.Module, obc.PruningPlan], wrapper: str, call: str
) -> None:
    original, pruned, plan = case
    wrap, part = WRAPPERS[wrapper]
    copied = copy.deepcopy(pruned)
    with pytest.raises(obc.PlanError, match=f"the plan has an entry for .*pass its part '{part}', which has all"):
        CALLS[call](wrap(copied), original, plan)
    for mine, other in zip(copied.state_dict().values(), pruned.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


# Compiled models are refused elsewhere by what they are, but a plan is applied without running the model.
APPLIED = WRAPPERS | {"compiled": (torch.compile, "_orig_mod")}


@pytest.mark.parametrize("wrapper", APPLIED)
def test_a_plan_is_not_applied_to_a_wrapped_model(
    case: tuple[nn.Module, nn.Module, obc.PruningPlan], wrapper: str
) -> None:
    original, pruned, plan = case
    wrap, part = APPLIED[wrapper]
    wrapped = wrap(copy.deepcopy(original))
    with pytest.raises(obc.PlanError, match=f"which the model lacks; pass its part '{part}', which has all of them"):
        plan.apply(wrapped)
    inner = wrapped.get_submodule(part)
    for name, tensor in inner.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name])
    plan.apply(inner).load_state_dict(pruned.state_dict())
    assert torch.equal(inner(BATCHES[0]), pruned(BATCHES[0]))


@pytest.mark.parametrize("wrapper", APPLIED)
def test_a_plan_of_removed_blocks_is_not_applied_to_a_wrapped_model(wrapper: str) -> None:
    wrap, part = APPLIED[wrapper]
    plan = obc.PruningPlan(depth=Depth(lists={"blocks": BlockList(3, (1,))}))
    wrapped = wrap(nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(size, 3) for size in (3, 4, 5))}))
    with pytest.raises(obc.PlanError, match=f"entry for 'blocks', which the model lacks; pass its part '{part}'"):
        plan.apply(wrapped)
    blocks = plan.apply(wrapped.get_submodule(part)).get_submodule("blocks")
    assert [block.in_features for block in blocks] == [3, 5]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_original_is_refused_by_the_name_that_it_has(
    case: tuple[nn.Module, nn.Module, obc.PruningPlan], wrapper: str
) -> None:
    original, pruned, plan = case
    wrap, part = WRAPPERS[wrapper]
    with pytest.raises(obc.PlanError, match=rf"lacks '0\.weight' .* has '{part}\.0\.weight': of a wrapped model"):
        plan.verify(wrap(original).state_dict(), pruned)
    with pytest.raises(obc.PlanError, match="of a wrapped model, pass that of the model inside"):
        obc.equivalent_pruning(copy.deepcopy(pruned), wrap(original).state_dict(), plan)


def test_a_plan_of_another_model_is_refused(case: tuple[nn.Module, nn.Module, obc.PruningPlan]) -> None:
    _, _, plan = case
    other = nn.ModuleDict({"a": nn.Linear(3, 3), "2": nn.Sequential(nn.Linear(3, 3))})
    with pytest.raises(obc.PlanError, match="which the pruned model lacks; pass the plan made for it"):
        obc.compensate(other, copy.deepcopy(other), plan, BATCHES)
