"""Errors that other code raises while obc uses it become one kind of error, which names the model, the layer and the
remedy; and outputs of any nesting are no error at all.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import labelled_images
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils import prune as masks

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.integrations.transformers import TransformersStructure
from obc.model.errors import layer_in
from obc.model.evaluation import tensors_in
from obc.structures.traced import TorchPruningStructure

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x: Tensor) -> Any:
        return self.wrapped(self.head(self.features(x).mean((2, 3))))

    def wrapped(self, logits: Tensor) -> Any:
        return logits


def data() -> list[tuple[Tensor, Tensor]]:
    return labelled_images(8, 12)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(tensors_in(model(batch[0]))[0], batch[1])


# --- outputs of any nesting -------------------------------------------------------------------------------------


@dataclass
class Record:
    logits: Any
    note: str = "text"
    missing: Any = None


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "None beside it": lambda z: {"logits": z, "loss": None},
    "a number beside it": lambda z: (z, 3),
    "text beside it": lambda z: [z, "text", 2.5, True],
    "a dataclass": Record,
    "dataclasses in lists": lambda z: [Record([z]), None],
    "a dict in a dataclass": lambda z: Record({"logits": (z, None)}),
    "labels beside it": lambda z: (z, z.argmax(1)),
}


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("options", [{}, {"labels": False}, {"compensate": "ls"}], ids=str)
def test_outputs_of_any_nesting(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Base, "wrapped", lambda self, z: OUTPUTS[kind](z))
    torch.manual_seed(0)
    model, original = Base(), copy.deepcopy(Base())
    original.load_state_dict(model.state_dict())
    result = obc.prune(model, EXAMPLE, data(), loss if "labels" not in options else None, macs=0.5, steps=2, **options)
    assert set(result.report.widths) == {"a", "b"}
    assert result.report.macs_after <= 0.5 * result.report.macs_before
    if "compensate" not in options:
        result.plan.verify(original.state_dict(), model)


def test_model_outputs() -> None:
    transformers = pytest.importorskip("transformers")
    z = torch.ones(2, 3)
    output = transformers.modeling_outputs.ImageClassifierOutput(logits=z, hidden_states=(z, z))
    assert len(tensors_in(output)) == 3
    assert all(tensor is z for tensor in tensors_in(output))


# --- errors -----------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("what it looks for")


class Raising(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"first": Inner()})

    def features(self, x: Tensor) -> Tensor:
        return self.inner["first"](super().features(x))


ERRORS: dict[str, tuple[Callable[[], nn.Module], Any, str, type[Exception]]] = {
    "inputs of another width": (
        Base,
        torch.zeros(1, 4, 8, 8),
        r"Base: running it on example_inputs failed in 'a': RuntimeError.*pass what its forward takes",
        RuntimeError,
    ),
    "too many inputs": (Base, (EXAMPLE, EXAMPLE), r"Base: running it on example_inputs failed: TypeError", TypeError),
    "a layer that raises": (Raising, EXAMPLE, r"Raising: .* failed in 'inner\.first': KeyError", KeyError),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_others_are_explained(case: str) -> None:
    build, example, message, cause = ERRORS[case]
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(obc.PruningError, match=message) as caught:
        obc.prune(model, example, data(), loss)
    assert isinstance(caught.value, ValueError)
    assert type(caught.value.__cause__) is cause
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_cannot_be_copied() -> None:
    model = Base()
    model.kept = threading.Lock()
    with pytest.raises(obc.PruningError, match=r"Base: copying it failed.*lock.*outside the model") as caught:
        obc.prune(model, EXAMPLE, data(), loss, macs=0.7, steps=1)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("call", [obc.recalibrate_norms, lambda m, b: obc.score(m, b, labels=False)])
def test_a_batch_that_the_model_is_not_called_on_in_this_way(call: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(obc.PruningError, match=r"calling it on a batch \(tuple\) failed in '0'.*pass forward_fn"):
        call(model, [(torch.zeros(2, 5, 8, 8), 1), (torch.zeros(2, 5, 8, 8), 1)])


def test_running_out_of_memory_is_not_explained() -> None:
    class Large(Base):
        def features(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        obc.prune(Large(), EXAMPLE, data(), loss)


def test_the_innermost_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(4, 3)))
    with pytest.raises(RuntimeError) as caught:
        model(torch.zeros(1, 3))
    assert layer_in(caught.value, model) == "1.1"
    assert layer_in(ValueError("never raised"), model) is None

    def fail_after_a_loop() -> None:
        for module in model.modules():
            layer = module
        raise ValueError(str(layer))

    with pytest.raises(ValueError, match="Linear") as raised:
        fail_after_a_loop()
    assert layer_in(raised.value, model) is None


# --- refused beforehand -----------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def changed(change: Callable[[Base], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Base()
        result = change(model)
        return result if isinstance(result, nn.Module) and result is not model.b else model

    return build


def mask(model: Base) -> None:
    masks.l1_unstructured(model.b, "weight", 0.3)


def lora(model: Base) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["head"]))


UNPRUNABLE: dict[str, tuple[Callable[[Base], Any], str]] = {
    "weight_norm": (lambda m: weight_norm(m.b), r"^b has a weight that WeightNorm computes.*obc.plain_layers"),
    "spectral_norm": (lambda m: spectral_norm(m.b), r"^b has a weight.*obc.plain_layers"),
    "masks": (mask, r"^b has a weight.*.*obc.plain_layers"),
    "parametrised": (lambda m: parametrizations.weight_norm(m.b), r"^b is parametrised.*obc.plain_layers"),
    "compiled": (torch.compile, "compiled; prune the model that was passed"),
    "scripted": (lambda m: torch.jit.script(nn.Sequential(m.a)), "ScriptModule.*prune the model it was made of"),
    "scripted part": (
        lambda m: setattr(m, "b", torch.jit.script(m.b)),
        "b is a ScriptModule.*put the module that it was made of in its place",
    ),
    "lazy": (
        lambda m: setattr(m, "head", nn.LazyLinear(5)),
        "head is a LazyLinear that has no weights yet; call the model once on an input",
    ),
    "DataParallel": (nn.DataParallel, r"wrapped in DataParallel; prune model\.module"),
    "DistributedDataParallel": (
        nn.parallel.DistributedDataParallel,
        r"wrapped in DistributedDataParallel; prune model\.module",
    ),
    "FullyShardedDataParallel": (
        lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
        r"wrapped in FullyShardedDataParallel; prune the model first",
    ),
    "a part in FullyShardedDataParallel": (
        lambda m: setattr(m, "b", FullyShardedDataParallel(m.b, device_id=torch.device("cpu"))),
        r"wrapped in FullyShardedDataParallel; prune the model first",
    ),
    "adapters": (lora, r"adapters of PEFT \('base_model\.model\.head' is a Linear\).*merge_and_unload\(\)"),
}


# TransformersStructure leaves these layers out (test_computed_weights).
COMPUTED = ("weight_norm", "spectral_norm", "masks", "parametrised")


@pytest.mark.parametrize("kind", UNPRUNABLE)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_pruned_as_it_is(kind: str, one_process: None) -> None:
    change, message = UNPRUNABLE[kind]
    model = changed(change)()
    with pytest.raises(obc.PlanError, match=message):
        TorchPruningStructure(model, EXAMPLE)
    if kind not in COMPUTED:
        with pytest.raises(obc.PlanError, match=message):
            TransformersStructure(model)
    with pytest.raises(obc.PruningError, match=message):
        obc.prune(model, EXAMPLE, data(), loss)


def test_the_remedies_work() -> None:
    model = Base()
    masks.l1_unstructured(model.b, "weight", 0.3)
    masks.remove(model.b, "weight")
    weight_norm(model.a)
    nn.utils.remove_weight_norm(model.a)
    spectral_norm(model.head)
    nn.utils.remove_spectral_norm(model.head)
    result = obc.prune(model, EXAMPLE, data(), loss, macs=0.5, steps=1)
    assert set(result.report.widths) == {"a", "b"}


def test_a_structure_of_another_model() -> None:
    model, other = Base(), Base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(obc.PruningError, match="made for another model, a Base, than the Base to be pruned"):
        obc.prune(model, None, data(), loss, structure=TorchPruningStructure(other, EXAMPLE))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
