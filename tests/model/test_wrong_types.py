"""An argument of a wrong type, in every call that takes it: the error names the argument, what it must be and the type
received, before anything runs; none comes from inside obc or torch."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from wrong_arguments import X, loss, network

import obc
from obc.integrations.torch_pruning import prune_step
from obc.scoring import label_free_loss
from obc.structures.traced import TorchPruningStructure
from obc.structures.transformers import TransformersStructure

NET = network()
SCORES = obc.score(NET, [X, X], loss, keep_rows=True)
STRUCTURE = TorchPruningStructure(NET, X)
GROUPS = STRUCTURE.groups
COSTS = STRUCTURE.costs("macs")
PLAN = obc.PruningPlan({"0": obc.Kept(out_channels=torch.arange(4))})


def prune(**given: Any) -> Any:
    options = {"batches": [X, X], "loss_fn": loss, "steps": 1, "progress": False}
    return obc.prune(network(), X, **(options | given))


def select(**given: Any) -> Any:
    rows = {group.name: group.gate_rows(SCORES.rows) for group in GROUPS}
    return obc.select(**({"rows_by_group": rows, "costs": COSTS, "budget": 20.0} | given))


def recover(**given: Any) -> Any:
    return obc.recover(network(), network(), **({"batches": [X, X], "steps": 1, "lr": 0.1} | given))


def compensate(**given: Any) -> Any:
    return obc.compensate(PLAN.apply(network()), network(), PLAN, [X, X], **given)


def folded() -> obc.EquivalentPruning:
    return obc.equivalent_pruning(PLAN.apply(network()), network().state_dict(), PLAN)


Calls = dict[str, Callable[[Any], Any]]

# The argument's name, in the message -> calls that take it, by name.
MODELS: Calls = {
    "Distillation.loss: student": lambda one: obc.Distillation().loss(one, network(), X),
    "Distillation.loss: teacher": lambda one: obc.Distillation().loss(network(), one, X),
    "accuracy": lambda one: obc.quality.accuracy(one, [X]),
    "memory_estimate": lambda one: obc.memory_estimate(one, X, loss),
    "transformer_groups": obc.transformer_groups,
    "dequantize": obc.dequantize,
    "plain_layers": lambda one: obc.plain_layers(one, X),
    "structure": lambda one: TorchPruningStructure(one, X),
    "Scores.verify": SCORES.verify,
    "PruningPlan.apply": PLAN.apply,
    "PruningPlan.verify": lambda one: PLAN.verify(network().state_dict(), one),
    "PruningPlan.put_slices": lambda one: PLAN.put_slices(network().state_dict(), one),
    "recalibrate_norms": lambda one: obc.recalibrate_norms(network(), [X], original_model=3 if one is None else one),
}
FUNCTIONS: dict[str, Calls] = {
    "loss_fn": {
        "score": lambda one: obc.score(network(), [X], one),
        "memory_estimate": lambda one: obc.memory_estimate(network(), X, one),
        "collect": lambda one: obc.collect(network(), [X], one, statistics="gradient_moments"),
        "prune": lambda one: prune(loss_fn=one),
    },
    "forward_fn": {
        "prune": lambda one: prune(forward_fn=one),
        "collect": lambda one: obc.collect(network(), [X], statistics="gram", forward_fn=one),
        "recalibrate_norms": lambda one: obc.recalibrate_norms(network(), [X], one),
        "compensate": lambda one: compensate(forward_fn=one),
        "Distillation": lambda one: obc.Distillation(forward_fn=one),
        "label_free_loss": label_free_loss,
        "structure": lambda one: TorchPruningStructure(network(), X, forward_fn=one),
    },
    "run": {"measure_latency": lambda one: obc.measure_latency(STRUCTURE, one)},
    "timer": {"measure_latency": lambda one: obc.measure_latency(STRUCTURE, lambda model: model(X), timer=one)},
    "on_step": {"prune": lambda one: prune(on_step=one)},
    "evaluate": {"recover": lambda one: recover(evaluate=one)},
}
PATHS: Calls = {
    "Scores.save": SCORES.save,
    "Scores.load": obc.Scores.load,
    "Scores.plot": SCORES.plot,
    "PruningPlan.save": PLAN.save,
    "PruningPlan.load": obc.PruningPlan.load,
    "PruningReport.load": obc.pruning.PruningReport.load,
    "LatencyTable.load": obc.LatencyTable.load,
    "Statistics.load": obc.Statistics.load,
}
CHECKPOINTS: Calls = {
    "score": lambda one: obc.score(network(), [X], loss, checkpoint=one),
    "collect": lambda one: obc.collect(network(), [X], statistics="gram", checkpoint=one),
    "recover": lambda one: recover(checkpoint=one),
}
COUNTS: dict[str, Calls] = {
    "micro_batch": {
        "score": lambda one: obc.score(network(), [X], loss, micro_batch=one),
        "collect": lambda one: obc.collect(network(), [X], statistics="gram", micro_batch=one),
        "memory_estimate": lambda one: obc.memory_estimate(network(), X, loss, micro_batch=one),
        "prune": lambda one: prune(micro_batch=one),
    },
    "every": {
        "score": lambda one: obc.score(network(), [X], loss, every=one),
        "collect": lambda one: obc.collect(network(), [X], statistics="gram", every=one),
    },
}
NUMBERS: dict[str, Calls] = {
    "loss_scale": {"score": lambda one: obc.score(network(), [X], loss, loss_scale=one)},
    "budget": {"select": lambda one: select(budget=one)},
    "max_bytes": {"select": lambda one: select(max_bytes=one)},
    "shrinkage": {"select": lambda one: select(shrinkage=one), "prune": lambda one: prune(shrinkage=one)},
    "max_pruning_ratio": {
        "select": lambda one: select(max_pruning_ratio=one),
        "prune": lambda one: prune(max_pruning_ratio={"0": one}),
    },
    "lr": {"recover": lambda one: recover(lr=one)},
    "warmup": {"recover": lambda one: recover(warmup=one)},
    "weight_decay": {"recover": lambda one: recover(weight_decay=one)},
    "clip": {"recover": lambda one: recover(clip=one)},
    "hidden": {"Distillation": lambda one: obc.Distillation(hidden=one)},
    "temperature": {"Distillation": lambda one: obc.Distillation(temperature=one)},
    "ridge": {"compensate": lambda one: compensate(ridge=one)},
    "held_out": {"compensate": lambda one: compensate(held_out=one)},
    **{
        name: {
            "param_groups": lambda one, name=name: folded().param_groups(**({"lr": 1, "weight_decay": 0} | {name: one}))
        }
        for name in ("lr_div", "wd_div")
    },
    "the strength of '0'": {"prune": lambda one: prune(allocation={"0": one})},
}
GROUP_LISTS: Calls = {
    "Scores.group": SCORES.group,
    "collect": lambda one: obc.collect(network(), [X], statistics="gram", groups=one),
}
CHOICES: dict[str, Calls] = {
    "rows": {
        "score": lambda one: obc.score(network(), [X], loss, rows=one),
        "JacobianScorer": lambda one: obc.JacobianScorer(network(), rows=one),
    },
    "selection": {"select": lambda one: select(selection=one)},
    "per_cost": {"select": lambda one: select(per_cost=one)},
    "per_macs": {"prune": lambda one: prune(per_macs=one)},
    "form": {"select": lambda one: select(form=one)},
    "factors": {"equivalent_pruning": lambda one: obc.equivalent_pruning(network(), {}, PLAN, factors=one)},
    "train": {"recover": lambda one: recover(train=one)},
}
MAPPINGS: dict[str, Calls] = {
    "num_heads": {"prune": lambda one: prune(num_heads=one)},
    "in_channel_groups": {"structure": lambda one: TorchPruningStructure(network(), X, in_channel_groups=one)},
    "rows_by_group": {"select": lambda one: select(rows_by_group=one)},
    "kept": {"PruningPlan": obc.PruningPlan},
    "units": {
        "TorchPruningStructure.remove": lambda one: TorchPruningStructure(network(), X).remove(one),
        "TransformersStructure.remove": lambda one: TransformersStructure(network()).remove(one),
    },
}
OBJECTS: dict[str, Calls] = {
    "memory_use": {"prune": lambda one: prune(memory_use=one)},
    "structure": {
        "prune": lambda one: prune(structure=one),
        "measure_latency": lambda one: obc.measure_latency(one, lambda model: model(X)),
    },
    "costs": {"select": lambda one: select(costs=one)},
    "distillation": {"recover": lambda one: recover(distillation=one)},
    "process_group": {
        "score": lambda one: obc.score(network(), [X], loss, process_group=one),
        "recalibrate_norms": lambda one: obc.recalibrate_norms(network(), [X], process_group=one),
    },
}


def _each(calls: dict[str, Calls]) -> list[Any]:
    return [pytest.param(name, call, id=f"{call}-{name}") for name, several in calls.items() for call in several]


def _refused(call: Callable[[Any], Any], value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        call(copy.copy(value))
    assert not hasattr(raised.value, "__notes__"), "nothing of the caller's has run"


@pytest.mark.parametrize("value", [None, "model.pt", network().state_dict(), np.ones(3)], ids=type)
@pytest.mark.parametrize("call", MODELS)
def test_what_is_no_model(call: str, value: Any) -> None:
    _refused(MODELS[call], value, r"(model|original_model|student|teacher) must be a torch\.nn\.Module, got ")


@pytest.mark.parametrize("value", ["loss", 3, [loss], torch.ones(2), np.ones(2)], ids=type)
@pytest.mark.parametrize(("name", "call"), _each(FUNCTIONS))
def test_what_is_no_function(name: str, call: str, value: Any) -> None:
    _refused(FUNCTIONS[name][call], value, rf"^{name} must be a function, got ")


@pytest.mark.parametrize("value", [None, 1, ["a"], b"a", torch.ones(2)], ids=type)
@pytest.mark.parametrize("call", PATHS)
def test_what_is_no_path(call: str, value: Any, capfd: Any) -> None:
    _refused(PATHS[call], value, "^path must be the path of a file")
    print("still open")  # loading from 1 used to read, and close, the standard output
    assert "still open" in capfd.readouterr().out


@pytest.mark.parametrize("value", [1, ["a"], b"a", torch.ones(2)], ids=type)
@pytest.mark.parametrize("call", CHECKPOINTS)
def test_what_is_no_checkpoint(call: str, value: Any) -> None:
    _refused(CHECKPOINTS[call], value, "^checkpoint must be the path of a file")


@pytest.mark.parametrize("value", ["2", 1.5, [2], torch.ones(2), np.ones(2)], ids=type)
@pytest.mark.parametrize(("name", "call"), _each(COUNTS))
def test_what_is_no_count(name: str, call: str, value: Any) -> None:
    _refused(COUNTS[name][call], value, rf"^{name} must be a positive integer, got ")


@pytest.mark.parametrize("value", ["0.5", [0.5], torch.ones(2), np.ones(2), {"zebra": None}], ids=type)
@pytest.mark.parametrize(("name", "call"), _each(NUMBERS))
def test_what_is_no_number(name: str, call: str, value: Any) -> None:
    _refused(NUMBERS[name][call], value, rf"^{name} must be a number, got ")


@pytest.mark.parametrize("value", ["0", ["0"], {"0": 3}, 3, torch.ones(2)], ids=type)
@pytest.mark.parametrize("call", GROUP_LISTS)
def test_what_is_no_group(call: str, value: Any) -> None:
    _refused(GROUP_LISTS[call], value, r"^(groups must be a list|each of groups must be a group of obc\.transformer)")


@pytest.mark.parametrize("value", ["zebra", 3, [3], np.ones(2), torch.ones(2)], ids=type)
@pytest.mark.parametrize(("name", "call"), _each(CHOICES))
def test_what_is_no_choice(name: str, call: str, value: Any) -> None:
    _refused(CHOICES[name][call], value, rf"^{name} must be ")


@pytest.mark.parametrize("value", ["zebra", 3, ["zebra"], np.ones(2), torch.ones(2)], ids=type)
@pytest.mark.parametrize(("name", "call"), _each(MAPPINGS))
def test_what_is_no_mapping(name: str, call: str, value: Any) -> None:
    _refused(MAPPINGS[name][call], value, rf"^{name} must be a mapping")


@pytest.mark.parametrize("value", ["zebra", 3, ["zebra"], np.ones(2), torch.ones(2)], ids=type)
@pytest.mark.parametrize(("name", "call"), _each(OBJECTS))
def test_what_is_another_object(name: str, call: str, value: Any) -> None:
    _refused(OBJECTS[name][call], value, rf"^{name} must be (an? |one of obc\.structures)")


def test_values_in_mappings() -> None:
    _refused(
        lambda one: select(rows_by_group={"a": one}), None, r"^rows_by_group\['a'\] must be a tensor .*, got None$"
    )
    rows = {"a": torch.ones(2, 3)}
    _refused(
        lambda one: obc.select(rows, {"a": one}, 1.0), "3", r"^costs\['a'\] must be a number or a tensor, got '3'$"
    )
    _refused(obc.PruningPlan, {"0": [1, 2]}, r"^kept\['0'\] must be an obc\.Kept, got list$")
    _refused(lambda one: obc.JacobianScorer(network(), modules={"0": one}), "in", r"^modules\['0'\] must be a list")
    _refused(lambda one: obc.JacobianScorer(network(), modules=[one]), network(), "^each of modules must be a name")


@pytest.mark.parametrize("value", [None, "state", 3, [1], torch.ones(2)], ids=type)
def test_what_is_no_state_and_no_tokens(value: Any) -> None:
    _refused(obc.JacobianScorer(network()).load_state_dict, value, r"^state must be what state_dict\(\) gave, got ")
    if not isinstance(value, torch.Tensor):
        _refused(
            lambda one: obc.quality.perplexity(network(), one, length=4), value, "^tokens must be a tensor of token"
        )


def test_what_is_no_pruner_and_no_rows() -> None:
    _refused(prune_step, network(), "^pruner must be a pruner of Torch-Pruning, got Sequential")
    _refused(
        lambda one: obc.select({"a": one}, {"a": 1.0}, 2), torch.ones(4), "of scores, pass selection='independent'$"
    )
    with pytest.raises(KeyError, match="no such module when it was scored; did you mean 'out'"):
        obc.score(nn.Sequential(OrderedDict(out=nn.Linear(3, 2))), [X], loss)["our"]


def test_tensors_with_one_entry_are_budgets() -> None:
    rows, costs = {"a": torch.randn(9, 4)}, {"a": torch.ones(4)}
    assert len(obc.select(rows, costs, costs["a"].sum() / 2)["a"]) == 2


W = torch.ones(4, 3)


def test_scales_may_be_tensors_of_one_entry() -> None:
    for scale in (2.0, 2, np.float64(2), torch.tensor(2.0), torch.tensor([2.0])):
        scores = torch.zeros(3)
        assert obc.ops.end_row(scores, torch.full((3,), 4.0), scale)
        assert scores.tolist() == [4.0] * 3
    with pytest.raises(TypeError, match=r"^obc::end_row: loss_scale must be a number, got tensor"):
        obc.ops.end_row(torch.zeros(3), torch.ones(3), torch.ones(3))


def test_counts_may_be_numpys() -> None:
    one = np.int64(1)
    assert obc.ops.channel_dot(W, W, one).tolist() == [4.0] * 3
    assert obc.ops.weight_dot(W, W, groups=one)[0].tolist() == [3.0] * 4
    assert obc.ops.weight_dot_list([W], [W], groups=[one])[0][0].tolist() == [3.0] * 4
    assert obc.ops.fold(W, groups=one, in_repeat=one).tolist() == W.tolist()


def test_lists_of_layers_may_be_any_iterables() -> None:
    """An iterator used to be read before the operator saw it: the result was empty."""
    layers = [torch.randn(4, 3), torch.randn(2, 5)]
    wanted = [(layer * layer).sum(1) for layer in layers]
    for given in (lambda: layers, lambda: tuple(layers), lambda: iter(layers), lambda: nn.ParameterList(layers)):
        found, _ = obc.ops.weight_dot_list(given(), (layer for layer in layers))
        torch.testing.assert_close(found, wanted)


TENSORS: Calls = {
    "channel_dot: activation": lambda one: obc.ops.channel_dot(one, W, 1),
    "channel_dot: grad": lambda one: obc.ops.channel_dot(W, one, 1),
    "channel_moments: x": lambda one: obc.ops.channel_moments(one, 1),
    "weight_dot: weight": lambda one: obc.ops.weight_dot(one, W),
    "weight_dot: grad": lambda one: obc.ops.weight_dot(W, one),
    "weight_dot_list: weights[0]": lambda one: obc.ops.weight_dot_list([one], [W]),
    "weight_dot_list: grads[1]": lambda one: obc.ops.weight_dot_list([W, W], [W, one]),
    "weight_moments: weight": lambda one: obc.ops.weight_moments(one, W),
    "weight_moments: grad": lambda one: obc.ops.weight_moments(W, one),
    "fold: weight": lambda one: obc.ops.fold(one, W),
    "end_row: scores": lambda one: obc.ops.end_row(one, W[0]),
    "end_row: row": lambda one: obc.ops.end_row(W[0].clone(), one),
}
OPTIONAL_TENSORS: Calls = {
    "channel_moments: mask": lambda one: obc.ops.channel_moments(W, 1, one),
    "weight_dot: bias": lambda one: obc.ops.weight_dot(W, W, one, W[0]),
    "weight_dot_list: biases[0]": lambda one: obc.ops.weight_dot_list([W], [W], [one], [W[0]]),
    "fold: compressor": lambda one: obc.ops.fold(W, one),
    "fold: decompressor": lambda one: obc.ops.fold(W, None, one),
    "end_row: groups": lambda one: obc.ops.end_row(W[0].clone(), W[0].clone(), 1.0, one),
}
LISTS: Calls = {
    "weight_dot_list: weights": lambda one: obc.ops.weight_dot_list(one, [W]),
    "weight_dot_list: grads": lambda one: obc.ops.weight_dot_list([W], one),
}
INTEGERS: Calls = {
    "channel_dot: channel_dim": lambda one: obc.ops.channel_dot(W, W, one),
    "channel_moments: channel_dim": lambda one: obc.ops.channel_moments(W, one),
    "weight_dot: groups": lambda one: obc.ops.weight_dot(W, W, groups=one),
    "weight_dot_list: groups[0]": lambda one: obc.ops.weight_dot_list([W], [W], groups=[one]),
    "fold: groups": lambda one: obc.ops.fold(W, groups=one),
    "fold: in_repeat": lambda one: obc.ops.fold(W, in_repeat=one),
}
TRUTHS: Calls = {
    "channel_dot: per_sample": lambda one: obc.ops.channel_dot(W, W, 1, one),
    "weight_dot: transposed": lambda one: obc.ops.weight_dot(W, W, transposed=one),
    "weight_dot_list: transposed[0]": lambda one: obc.ops.weight_dot_list([W], [W], transposed=[one]),
}
NO_TENSORS = (W.numpy(), "w", 3, [W])
WRONG = (
    (TENSORS, "a tensor", (None, *NO_TENSORS)),
    (OPTIONAL_TENSORS, "a tensor", NO_TENSORS),
    (LISTS, "a list with one entry per layer", (None, 3)),
    (INTEGERS, "an integer", (None, 1.0, "1", W.numpy(), W)),
    (TRUTHS, "True or False", (None, "no", 2, W)),
)


@pytest.mark.parametrize("backend", obc.backends.available())
def test_what_an_operator_does_not_take(backend: str) -> None:
    for calls, kind, values in WRONG:
        for argument, call in calls.items():
            for value in values:
                with (
                    obc.use_backend(backend),
                    pytest.raises(TypeError, match=re.escape(f"obc::{argument} must be {kind}, got ")),
                ):
                    call(value)


@pytest.mark.parametrize("op", ["channel_dot", "weight_dot", "weight_moments", "fold", "end_row"])
def test_none_to_the_dispatcher(op: str) -> None:
    """torch passes None on in the place of a tensor."""
    with pytest.raises(TypeError, match=f"^obc::{op}: .* must be a tensor, got None"):
        getattr(torch.ops.obc, op)(None, W, *[0] * (op == "channel_dot"))


def test_a_path_object_is_a_path(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert obc.PruningPlan.load(str(tmp_path / "plan.json")).keys() == PLAN.keys()
