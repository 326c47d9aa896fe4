"""torch.set_default_device: what obc creates lies with its data, not where scripts create theirs.

Without a GPU the default device "meta" shows the same fault: whatever was created there has no values. Models and
batches are built on the CPU, as a script's that moves them itself. Left out is what only torch and transformers create:
from_pretrained puts a model on the default device on purpose, and so does a data loader its random order.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import class_loss, labelled_images, llama, token_losses
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import obc
from obc.backends import use_backend
from obc.integrations.transformers import TransformersStructure, load_pruned, save_pruned
from obc.structures.traced import TorchPruningStructure

SOURCES = Path(obc.__file__).parent
# torch's functions that create tensors on the default device (torch.utils._device._device_constructors).
CREATE = {function.__name__ for function in _device_constructors()}


def on_the_cpu(build: Callable[[], Any]) -> Callable[[], Any]:
    """``build`` under the default device of the models and batches."""

    def built() -> Any:
        with torch.device("cpu"):
            torch.manual_seed(0)
            return build()

    return built


@on_the_cpu
def cnn() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 16, 5)).eval()


tiny_llama = on_the_cpu(llama)
IMAGES = labelled_images(8, 3)
OPERANDS = torch.randn(2, 4, 6, 3, generator=torch.Generator().manual_seed(0)).unbind()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return token_losses(model, batch).mean()


def scores(path: Path, rows: str) -> Any:
    model = cnn()
    loss_fn = (
        class_loss
        if rows == "batch"
        else lambda one, batch: nn.functional.cross_entropy(one(batch[0]), batch[1], reduction="none")
    )
    found = obc.score(model, IMAGES, loss_fn, rows=rows, keep_rows=True, checkpoint=path / "ckpt", every=1)
    found.save(path / "scores.safetensors")
    loaded = obc.Scores.load(path / "scores.safetensors")
    structure = TorchPruningStructure(model, IMAGES[0][0])
    grouped = loaded.group(structure.groups)
    rows_of = loaded.rows["0"].out_channels
    chosen = obc.select({"0": rows_of}, obc.selection.Costs.fixed({"0": 10.0}, {"0": 8}), 30.0)
    return [vars(found["0"]), dict(grouped), chosen, loaded.rows["6"].in_channels]


def cnn_by(criterion: str | None, **options: Any) -> Callable[[Path], Any]:
    """``obc.prune`` of the CNN, and its plan through a file."""

    def job(path: Path) -> Any:
        model = cnn()
        result = obc.prune(
            model, IMAGES[0][0], IMAGES, class_loss, macs=0.6, criterion=criterion, progress=False, **options
        )
        result.plan.save(path / "plan.json")
        again = obc.PruningPlan.load(path / "plan.json").apply(cnn())
        return [result.model.state_dict(), {name: list(tensor.shape) for name, tensor in again.state_dict().items()}]

    return job


def recovered(path: Path) -> Any:
    """Everything that starts from a plan."""
    original, pruned = cnn(), cnn()
    structure = TorchPruningStructure(pruned, IMAGES[0][0])
    structure.remove({group.name: torch.arange(3, device="cpu") for group in structure.groups})
    found, state, plan = [], original.state_dict(), structure.plan
    for mode in ("ls", "seq", "correct"):
        model = copy.deepcopy(pruned)
        obc.compensate(model, original, plan, IMAGES, mode=mode)
        found.append(model.state_dict())
    folded = obc.equivalent_pruning(copy.deepcopy(pruned), state, plan)
    found += [folded.model(IMAGES[0][0]), folded.merge().state_dict()]
    matched = obc.PruningPlan.from_models(state, pruned)
    model = copy.deepcopy(pruned)
    obc.recalibrate_norms(model, IMAGES)
    return [*found, model.state_dict(), {name: kept.out_channels for name, kept in matched.items()}]


def trained(train: str) -> Callable[[Path], Any]:
    """``obc.recover``, interrupted and resumed."""

    def job(path: Path) -> Any:
        original, pruned = cnn(), cnn()
        structure = TorchPruningStructure(pruned, IMAGES[0][0])
        structure.remove({group.name: torch.arange(3, device="cpu") for group in structure.groups})
        options = {"train": train, "plan": structure.plan, "lr": 1e-3, "steps": 2, "progress": False}
        return [obc.recover(pruned, original, IMAGES, **options).losses, pruned.state_dict()]

    return job


def llama_by(criterion: str, **options: Any) -> Callable[[Path], Any]:
    """``obc.prune`` of a tiny Llama, saved and loaded."""

    def job(path: Path) -> Any:
        case = tiny_llama()
        kinds = ("heads", "ffn", "layers") if criterion == "jacobian" else ("heads", "ffn")
        result = obc.prune(
            case.model,
            None,
            case.batches,
            loss,
            criterion=criterion,
            params=0.8,
            steps=1,
            structure=TransformersStructure(case.model, kinds),
            progress=False,
            **options,
        )
        save_pruned(result.model, result.plan, path / "pruned")
        loaded = load_pruned(path / "pruned")
        buffers = dict(loaded.named_buffers())
        assert all(tensor.device.type == "cpu" for tensor in (*buffers.values(), *loaded.parameters()))
        return [result.model.state_dict(), loaded.state_dict(), buffers]

    return job


def statistics(path: Path) -> Any:
    names = ["rows", "moments", "gram", "gradient_moments"]
    found = obc.collect(cnn(), IMAGES, class_loss, statistics=names, progress=False)
    found.save(path / "statistics.safetensors")
    loaded = obc.Statistics.load(path / "statistics.safetensors")
    return [vars(one) for name in names[1:] for one in getattr(loaded, name).values()]


def quality(path: Path) -> Any:
    model, case = cnn(), tiny_llama()
    tokens = torch.cat([batch.flatten() for batch in case.batches])
    return [
        obc.quality.accuracy(model, IMAGES),
        obc.quality.agreement(model, cnn(), IMAGES),
        obc.quality.cosine(model, cnn(), IMAGES),
        vars(obc.quality.perplexity(case.model, tokens, length=8)),
    ]


def operators(backend: str) -> Callable[[Path], Any]:
    """Every operator on one backend."""

    def job(path: Path) -> Any:
        x, grad = OPERANDS
        scores, row = x.flatten().clone(), grad.flatten().clone()
        with use_backend(backend):
            return [
                obc.ops.channel_dot(x, grad, 1),
                obc.ops.channel_dot(x, grad, 1, per_sample=True),
                obc.ops.channel_moments(x, 1),
                obc.ops.weight_dot(x, grad),
                obc.ops.weight_dot_list([x, grad], [grad, x]),
                obc.ops.weight_moments(x, grad),
                obc.ops.fold(x, x[:, :2, 0].T.contiguous()),
                obc.ops.end_row(scores, row),
                scores,
            ]

    return job


JOBS: dict[str, Callable[[Path], Any]] = {
    "score-batch": lambda path: scores(path, "batch"),
    "score-sample": lambda path: scores(path, "sample"),
    "prune": cnn_by(None, steps=2, compensate=True),
    **{f"prune-{name}": cnn_by(name, steps=1) for name in ("l2", "taylor", "kfac_obs", "random")},
    "recover": recovered,
    **{f"train-{train}": trained(train) for train in ("naive", "folded", "lora")},
    "llama-depth": llama_by("jacobian"),
    "llama-tokens": llama_by("token_jacobian", compensate=True),
    "collect": statistics,
    "quality": quality,
    **{f"operators-{name}": operators(name) for name in ("reference", "cpu")},
}


def leaves(found: Any) -> Iterator[Any]:
    """Tensors and numbers inside nested results, in order."""
    if isinstance(found, Mapping):
        for value in found.values():
            yield from leaves(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from leaves(value)
    elif dataclasses.is_dataclass(found):
        yield from leaves(vars(found))
    elif isinstance(found, (Tensor, int, float)):
        yield found


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", JOBS)
def test_results_do_not_depend_on_the_default_device(name: str, tmp_path: Path) -> None:
    for folder in ("plain", "meta"):
        (tmp_path / folder).mkdir()
    expected = list(leaves(JOBS[name](tmp_path / "plain")))
    torch.set_default_device("meta")
    try:
        found = list(leaves(JOBS[name](tmp_path / "meta")))
    finally:
        torch.set_default_device(None)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert not isinstance(one, Tensor) or one.device.type == "cpu"
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def without_device(tree: ast.AST) -> list[int]:
    """The lines that create a tensor and name no device."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).removeprefix("torch.") in CREATE
        and ast.unparse(node.func).startswith("torch.")
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]


def test_every_tensor_is_created_on_a_named_device() -> None:
    """``torch.Generator()`` needs none: it lies on the CPU under any default device."""
    assert without_device(ast.parse("torch.zeros(2)\ntorch.arange(3, device=x.device)\ntorch.zeros_like(x)")) == [1]
    found = {path: without_device(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES.rglob("*.py")}
    assert len(found) > 100
    assert not {f"{path.relative_to(SOURCES)}:{line}" for path, lines in found.items() for line in lines}
