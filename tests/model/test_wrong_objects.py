"""What a caller may pass by mistake, in every call that takes it: each message names it and what to pass instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from wrong_arguments import X, loss, network

import obc
from obc.integrations.torch_pruning import prune_step
from obc.recovery.fusion import fuse_units
from obc.recovery.mean_bias import absorb_means
from obc.structures.traced import TorchPruningStructure
from obc.structures.transformers import TransformersStructure, save_pruned


def prune(model: nn.Module, **options: Any) -> obc.PruningResult:
    given = {"loss_fn": loss, "steps": 1, "progress": False, "round_to": 4}
    return obc.prune(model, X, [X, X], **{**given, **options})


# --- plans and state dicts ---------------------------------------------------------------------------------------

ON_A_PLAN: dict[str, Callable[[Any], Any]] = {
    "compensate": lambda plan: obc.compensate(network(), network(), plan, [X, X]),
    "absorb_means": lambda plan: absorb_means(network(), network(), plan, [X]),
    "fuse_units": lambda plan: fuse_units(network(), network(), plan, []),
    "recalibrate_norms": lambda plan: obc.recalibrate_norms(network(), [X], original_model=network(), plan=plan),
    "equivalent_pruning": lambda plan: obc.equivalent_pruning(network(), network().state_dict(), plan),
    "recover": lambda plan: obc.recover(network(), network(), [X], steps=1, lr=0.1, train="folded", plan=plan),
    "save_pruned": lambda plan: save_pruned(network(), plan, "never written"),
    "prune_step": lambda plan: prune_step(torch_pruning.pruner.BasePruner(network(), X, lambda group: None), plan),
    "TransformersStructure": lambda plan: TransformersStructure(network(), plan=plan),
}


@pytest.mark.parametrize("call", ON_A_PLAN)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: "plan.json", r"got str; pass obc\.PruningPlan\.load\(path\)"),
        (lambda: prune(network()), r"got PruningResult; pass its plan, result\.plan"),
        (lambda: {"0": [1, 2]}, "got dict$"),
    ],
    ids=["path", "result", "dict"],
)
def test_what_is_no_plan(call: str, wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"plan must be an obc.PruningPlan, {message}"):
        ON_A_PLAN[call](wrong())


ON_A_STATE_DICT: dict[str, Callable[[Any, obc.PruningResult], Any]] = {
    "verify": lambda weights, result: result.plan.verify(weights, result.model),
    "from_models": lambda weights, result: obc.PruningPlan.from_models(weights, result.model),
    "put_slices": lambda weights, result: result.plan.put_slices(weights, result.model),
    "equivalent_pruning": lambda weights, result: obc.equivalent_pruning(result.model, weights, result.plan),
}


@pytest.mark.parametrize("call", ON_A_STATE_DICT)
def test_a_model_instead_of_its_state_dict(call: str) -> None:
    with pytest.raises(TypeError, match=r"must be a state dict, got Sequential; pass the unpruned model's state_dict"):
        ON_A_STATE_DICT[call](network(), prune(network()))


@pytest.mark.parametrize("call", ["verify", "equivalent_pruning"])
def test_a_pruned_model_with_other_values_is_said_to_be_changed(call: str) -> None:
    result = prune(network())
    with torch.no_grad():
        result.model[0].weight.mul_(2)
    with pytest.raises(obc.PlanError, match=r"^0\.weight: .*compensated or trained.*as pruning left it"):
        ON_A_STATE_DICT[call](network().state_dict(), result)


@pytest.mark.parametrize("side", ["out_channels", "in_channels"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1], "got list$"),
        (torch.tensor([0, 1], dtype=torch.int32), r"got torch\.int32 \(2,\)$"),
        (torch.tensor([True, False]), r"got torch\.bool \(2,\); of a mask pass mask\.nonzero\(\)\[:, 0\]$"),
        (torch.tensor([[0], [1]]), r"got torch\.int64 \(2, 1\)$"),
        (torch.tensor([3, 0, 3]), "got 3 twice$"),
    ],
    ids=["list", "int32", "mask", "matrix", "twice"],
)
def test_channels_kept_that_are_no_indices(side: str, indices: Any, message: str) -> None:
    with pytest.raises(obc.PlanError, match=f"^{side} must be a tensor .* each once, {message}"):
        obc.Kept(**{side: indices})


# --- names -------------------------------------------------------------------------------------------------------

ON_NAMES: dict[str, Callable[[Any], Any]] = {
    "score": lambda names: obc.score(network(), [X], loss, modules=names),
    "prune": lambda names: prune(network(), ignored_layers=names),
    "traced": lambda names: TorchPruningStructure(network(), X, ignored_layers=names),
    "transformers": lambda names: TransformersStructure(network(), ignored_layers=names),
    "Blocks": lambda names: obc.collect(network(), [X], statistics=[obc.statistics.Blocks(modules=names)]),
    "ByBlock": lambda names: obc.collect(
        network(), [X], statistics="gram", by_block=obc.statistics.ByBlock(blocks=names)
    ),
    "Distillation": lambda names: obc.Distillation(hidden=0.1, modules=names),
}


@pytest.mark.parametrize("call", ON_NAMES)
def test_one_name_instead_of_a_list(call: str) -> None:
    with pytest.raises(ValueError, match=r"must be a list or another iterable, got '0'; of a single one, pass \[it\]"):
        ON_NAMES[call]("0")


def test_one_layer_and_a_class_of_layers() -> None:
    with pytest.raises(ValueError, match="ignored_layers must be a list or another iterable, got Linear"):
        prune(model := network(), ignored_layers=model[0])
    with pytest.raises(ValueError, match=r"ignored_layers: got <class '.*Linear'>; pass layers of the model, or"):
        prune(network(), ignored_layers=[nn.Linear])


# --- batches and losses ------------------------------------------------------------------------------------------


def used_up() -> Any:
    batches = iter([X])
    next(batches)
    return batches


ON_BATCHES: dict[str, Callable[[Any], Any]] = {
    "score": lambda batches: obc.score(network(), batches, loss),
    "collect": lambda batches: obc.collect(network(), batches, statistics="gram"),
    "prune": lambda batches: obc.prune(network(), X, batches, loss),
    "recover": lambda batches: obc.recover(network(), network(), batches, steps=1, lr=0.1),
    "compensate": lambda batches: obc.compensate(network(), network(), prune(network()).plan, batches),
}


@pytest.mark.parametrize("call", ON_BATCHES)
def test_a_generator_that_is_used_up(call: str) -> None:
    with pytest.raises(ValueError, match="a generator can be read only once"):
        ON_BATCHES[call](used_up())


def _with_backward(model: nn.Module, batch: Tensor) -> Tensor:
    loss(model, batch).backward()
    return loss(model, batch)


def _samples_with_backward(model: nn.Module, batch: Tensor) -> Tensor:
    _with_backward(model, batch)
    return model(batch).square().mean(1)


@pytest.mark.parametrize("options", [{}, {"check": False}, {"micro_batch": 3}, {"rows": "sample"}], ids=str)
def test_a_loss_that_calls_backward(options: dict[str, Any]) -> None:
    """Its gradient would be added to the row, whose squares would then be four times too large."""
    wrong = _samples_with_backward if options.get("rows") == "sample" else _with_backward
    with pytest.raises(ValueError, match="batch 0: loss_fn called backward, which would count twice"):
        obc.score(network(), [X], wrong, **options)


def test_a_loss_that_differentiates_by_its_inputs_is_no_backward() -> None:
    def penalised(model: nn.Module, batch: Tensor) -> Tensor:
        inputs = batch.clone().requires_grad_()
        value = loss(model, inputs)
        (gradient,) = torch.autograd.grad(value, inputs, create_graph=True)
        return value + gradient.square().sum()

    scores = obc.score(network().double(), [X.double()], penalised)["3"].in_channels
    model = network().double()
    (gradient,) = torch.autograd.grad(penalised(model, X.double()), model[3].weight)
    torch.testing.assert_close(scores, (model[3].weight * gradient).sum(0).square().detach().float())


@pytest.mark.parametrize("criterion", ["jacobian", "l1"])
def test_a_loss_that_fails_in_prune_has_a_note_on_its_batch(criterion: str) -> None:
    def wrong(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)["loss"]

    with pytest.raises(IndexError) as raised:
        prune(network(), loss_fn=wrong, criterion=criterion)
    note, *others = raised.value.__notes__
    assert note == "loss_fn(model, batch) failed; this batch is float32 (8, 3) on cpu"
    assert not any("failed" in other for other in others)


def test_the_cause_comes_before_its_consequences(caplog: pytest.LogCaptureFixture) -> None:
    """A loss that always fails is no fault of the counting of MACs; one that fails only when they are counted is."""

    def wrong(model: nn.Module, batch: Tensor) -> Tensor:
        raise LookupError("no such loss")

    with pytest.raises(LookupError, match="no such loss") as raised:
        prune(network(), loss_fn=wrong)
    assert raised.value.__context__ is None
    assert not caplog.messages

    def uncountable(model: nn.Module, batch: Tensor) -> Tensor:
        if torch._C._len_torch_dispatch_stack():
            raise RuntimeError("not inside a counter")
        return loss(model, batch)

    result = prune(network(), loss_fn=uncountable)
    assert any("MACs could not be counted" in warning for warning in result.report.warnings)


def test_weights_that_are_not_finite_are_the_cause() -> None:
    def broken() -> nn.Module:
        model = network()
        with torch.no_grad():
            model[3].weight.fill_(torch.nan)
        return model

    with pytest.warns(UserWarning, match="not finite"), pytest.raises(RuntimeError, match=r"not finite .* 3\.weight$"):
        obc.score(broken(), [X], loss)
    with pytest.warns(UserWarning, match="not finite"), pytest.raises(RuntimeError, match=r"not finite .* 3\.weight$"):
        prune(broken())


# --- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"round_to": 16}, "round_to=16"),
        ({"min_units": 8, "round_to": None}, "min_units=8"),
        ({"max_pruning_ratio": 0.0}, "round_to=4 or relax max_pruning_ratio=0.0"),
        ({"protected_blocks": 1}, r"round_to=4 or relax protected_blocks=\(1, 1\)"),
    ],
    ids=str,
)
def test_a_budget_out_of_reach_names_the_limits(limits: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"macs=0\.5 is out of reach.*\('0': 8 of 8 units\); .*relax {said}"):
        prune(network(), macs=0.5, **limits)


def test_a_budget_out_of_reach_without_limits_only_asks_for_more() -> None:
    model = copy.deepcopy(network())
    with pytest.raises(ValueError, match=r"\('0': 1 of 8 units\); let more remain \(not pruned"):
        prune(model, macs=0.01, round_to=None)
