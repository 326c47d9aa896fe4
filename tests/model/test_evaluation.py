"""How a model is called on a batch, by what the ``forward`` requires; eval mode for the time of a block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obc
from obc.model import evaluation
from obc.model.evaluation import call, call_on_batch, evaluating
from obc.scoring import label_free_loss

A, B, LABELS = torch.ones(2, 3), torch.full((2, 3), 2.0), torch.zeros(2, dtype=torch.int64)


class Model(nn.Module):
    """Returns its arguments."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = forward  # type: ignore[method-assign]


def one(x: Any) -> Any:
    return {"x": x}


def two(x: Any, mask: Any) -> Any:
    return {"x": x, "mask": mask}


def optional(x: Any, mask: Any = None) -> Any:
    return {"x": x, "mask": mask}


def keywords(input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def any_keywords(**kwargs: Any) -> Any:
    return kwargs


def anything(*args: Any, **kwargs: Any) -> Any:
    return {"args": args} | kwargs


CASES: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
    "a tensor": (one, A, {"x": A}),
    "inputs and labels": (one, (A, LABELS), {"x": A}),
    "a list of inputs and labels": (one, [A, LABELS], {"x": A}),
    "inputs alone in a tuple": (one, (A,), {"x": A}),
    "a list as the one input": (one, ([A, B], LABELS), {"x": [A, B]}),
    "two inputs and labels": (two, (A, B, LABELS), {"x": A, "mask": B}),
    "two inputs": (two, (A, B), {"x": A, "mask": B}),
    "two inputs in a tuple, and labels": (two, ((A, B), LABELS), {"x": A, "mask": B}),
    "labels are no optional input": (optional, (A, LABELS), {"x": A, "mask": None}),
    "keywords": (keywords, {"input_ids": A, "labels": B}, {"input_ids": A, "attention_mask": None, "labels": B}),
    "keywords without those not taken": (two, {"x": A, "mask": B, "label": LABELS}, {"x": A, "mask": B}),
    "keywords of any name": (any_keywords, {"a": A, "label": LABELS}, {"a": A, "label": LABELS}),
    "a mapping as the one input": (one, {"image": A}, {"x": {"image": A}}),
    "keywords and labels": (optional, ({"x": A, "mask": B}, LABELS), {"x": A, "mask": B}),
    "arguments of any number": (anything, (A, LABELS), {"args": (A,)}),
}


def same(got: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return got is expected
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(same, got, expected))
    return got is expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "DataParallel"])
def test_a_model_is_called_on_a_batch_by_what_it_requires(case: str, wrapped: bool) -> None:
    forward, batch, expected = CASES[case]
    model: nn.Module = Model(forward)
    assert same(call_on_batch(nn.DataParallel(model) if wrapped else model, batch), expected)


def test_example_inputs_have_no_labels_beside_them() -> None:
    assert same(call(Model(optional), (A, B)), {"x": A, "mask": B})
    assert same(call(Model(optional), {"mask": B, "x": A}), {"x": A, "mask": B})
    assert same(call(Model(one), A), {"x": A})


def labelled(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 3, 6, 6), torch.randint(5, (8,))) for _ in range(count)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8, 5)).eval()


def inputs_alone(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def test_labelled_batches_need_no_forward_fn_in_recalibrate_norms() -> None:
    batches, model, twin = labelled(), network(), network()
    obc.recalibrate_norms(model, batches)
    obc.recalibrate_norms(twin, batches, inputs_alone)
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    mean = torch.stack([model[0](x).double().mean((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)


def test_labelled_batches_need_no_forward_fn_in_compensate() -> None:
    batches, original = labelled(), network()
    results = []
    for forward_fn in (None, inputs_alone):
        model = copy.deepcopy(original)
        plan = obc.prune(model, batches[0][0], batches, labels=False, steps=1, macs=0.6, progress=False).plan
        report = obc.compensate(model, original, plan, batches, forward_fn, progress=False)
        results.append((model.state_dict(), report.final_error))
    assert results[0][1] == results[1][1]
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name]), name


def test_labelled_batches_need_no_forward_fn_in_label_free_rows() -> None:
    batches, model = labelled(), network()
    by_itself = obc.score(model, batches, label_free_loss())
    told = obc.score(model, batches, label_free_loss(inputs_alone))
    assert torch.equal(by_itself["0"].out_channels, told["0"].out_channels)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("training", [True, False])
def test_cudnn_finds_recurrent_layers_in_train_mode_and_they_compute_as_in_eval_mode(
    kind: type[nn.RNNBase], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backward refuses eval mode. Here cuDNN is only pretended: what the layers compute is what is tested."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), kind(4, 5, num_layers=3, dropout=0.5)).train(training)
    x = torch.randn(6, 2, 4)
    with evaluating(model):
        expected, _ = model(x)
    monkeypatch.setattr(evaluation, "device_of", lambda module: torch.device("cuda"))
    with evaluating(model), evaluating(model):
        assert [module.training for module in model] == [False, True]
        torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=0)
    assert [module.training for module in model] == [training, training]
    assert model[1].dropout == 0.5


class OwnLoss(nn.Module):
    """Its loss is a method that calls forward, or, given a dict, forward calls the loss: as in ultralytics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Any) -> Tensor:
        return self.loss(x) if isinstance(x, dict) else self.layer(x)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.forward(batch["x"]).square().sum()


@pytest.mark.parametrize("overridden", [False, True])
@pytest.mark.parametrize("way", ["call", "forward", "method", "own loss", "hook", "twice", "failed"])
def test_outputs_inside_a_loss_are_those_of_the_outermost_calls(way: str, overridden: bool) -> None:
    torch.manual_seed(0)
    model, x = OwnLoss(), torch.randn(4, 3)
    if overridden:
        model.forward = model.forward
    before = dict(vars(model))
    with torch.no_grad():
        y = model.layer(x)
    if way == "hook":
        model.register_forward_hook(lambda module, args, output: 2 * output)

    def failed() -> Tensor:
        with pytest.raises(TypeError):
            model(x, x)
        return model.forward(x)

    ways: dict[str, tuple[Callable[[], Any], list[Tensor]]] = {
        "call": (lambda: model(x), [y]),
        "forward": (lambda: model.forward(x), [y]),
        "method": (lambda: model.loss({"x": x}), [y]),
        "own loss": (lambda: model({"x": x}), [y.square().sum()]),
        "hook": (lambda: model(x), [2 * y]),
        "twice": (lambda: model(x) + model.forward(-x), [y, 2 * model.layer.bias.detach() - y]),
        "failed": (failed, [y]),
    }
    run, expected = ways[way]
    result, outputs = evaluation.with_outputs(model, run)
    assert result.requires_grad
    torch.testing.assert_close(outputs, expected)
    assert vars(model) == before
    assert torch.equal(model.layer(x), y)
