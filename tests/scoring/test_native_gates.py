"""Gates in C++: the same rows as those in Python, to the bit, and the same behaviour at the edges of autograd."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import Case
from nasty import NASTY
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import obc
from obc.backends import native_gates
from obc.scoring import ScoringError
from obc.scoring.reading.gates import Gate, pass_gate

needs_library = pytest.mark.skipif(
    native_gates.why_unavailable() is not None, reason=f"no gates in C++: {native_gates.why_unavailable()}"
)

ORDINARY = {
    "residual-cnn": models.residual_cnn,
    "conv1d": lambda: models.convolutions(1),
    "conv3d": lambda: models.convolutions(3),
    "norms": models.norms,
    "linears": models.linears,
    "tied": models.tied,
    "llama": models.llama,
    "vit": models.vit,
}


def rows_of(make: Callable[[], Case], rows: Any, monkeypatch: pytest.MonkeyPatch, native: bool, **options: Any) -> Any:
    monkeypatch.setenv(native_gates.SWITCH, "1" if native else "0")
    torch.manual_seed(0)
    case = make()
    return obc.score(case.model, case.batches, case.loss_fn(rows), rows=rows, keep_rows=True, **options)


@needs_library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("name", [*ORDINARY, *NASTY])
def test_rows_are_those_of_the_gates_in_python_to_the_bit(
    name: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = {**ORDINARY, **NASTY}[name]
    ours, theirs = (rows_of(make, rows, monkeypatch, native) for native in (True, False))
    assert ours.coverage == theirs.coverage
    for module in ours:
        for side in ("out_channels", "in_channels"):
            got, expected = (getattr(scores.rows[module], side) for scores in (ours, theirs))
            assert (got is None) == (expected is None)
            if got is not None:
                assert torch.equal(got, expected), f"{module} {side}"


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1, 7), (1, 6, 3), (0, 6, 2)], ids=str)
@pytest.mark.parametrize(("per_sample", "fold"), [(False, 1), (True, 1), (False, 3), (True, 2)])
def test_one_gate(dtype: torch.dtype, shape: tuple[int, ...], per_sample: bool, fold: int) -> None:
    activation = torch.randn(shape, dtype=torch.float64).to(dtype)
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    size = (shape[0], 6 // fold) if per_sample else (6 // fold,)
    found = []
    for native in (native_gates.library(), None):
        gate = torch.zeros(size, dtype=sums, requires_grad=True)
        gate.grad = row = torch.ones(size, dtype=sums)
        before = row._version
        gated = pass_gate(native, activation, gate, 1, per_sample, fold)
        assert type(gated.grad_fn).__name__ == ("CppFunction" if native else "GateBackward")
        assert gated.data_ptr() == activation.data_ptr()
        assert gated.stride() == activation.view_as(activation).stride()
        gated.backward(grad)
        gated = pass_gate(native, activation, gate, 1, per_sample, fold)
        gated.backward(grad)  # adds, in place
        assert gate.grad is row
        assert row._version > before
        found.append(row)
    assert torch.equal(*found)


@pytest.fixture
def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def read(model: nn.Module, backward: Callable[[Tensor], None], rows: int = 2) -> Tensor:
    """The last of a few rows of one batch, before it is squared."""
    scorer = obc.JacobianScorer(model, keep_rows=True)
    with scorer:
        for _ in range(rows):
            with scorer.row():
                backward(model(torch.linspace(-1, 1, 8).view(2, 4)))
    kept = scorer.scores().rows
    assert kept is not None
    return torch.cat([kept[name].out_channels[-1] for name in ("0", "2")])


@pytest.mark.usefixtures("gates")
def test_a_graph_that_is_kept_adds_each_time(linear: nn.Module) -> None:
    def twice(output: Tensor) -> None:
        output.sum().backward(retain_graph=True)
        output.sum().backward()

    once = read(linear, lambda output: output.sum().backward())
    torch.testing.assert_close(read(linear, twice), 2 * once)


@pytest.mark.usefixtures("gates")
def test_a_gradient_asked_for_by_itself_is_no_part_of_the_row(linear: nn.Module) -> None:
    def asks_first(output: Tensor) -> None:
        seed = torch.ones_like(output, requires_grad=True)
        middle = (output * seed).sum()
        torch.autograd.grad(middle, seed, retain_graph=True)
        torch.autograd.grad(output.sum(), output, retain_graph=True)
        output.sum().backward()

    once = read(linear, lambda output: output.sum().backward())
    assert torch.equal(read(linear, asks_first), once)


@pytest.mark.usefixtures("gates")
def test_a_second_backward_without_its_graph_is_an_error_of_autograd(linear: nn.Module) -> None:
    def twice(output: Tensor) -> None:
        output.sum().backward()
        output.sum().backward()

    with pytest.raises(RuntimeError, match="second time"):
        read(linear, twice)


@pytest.mark.usefixtures("gates")
def test_create_graph_is_refused(linear: nn.Module) -> None:
    with pytest.raises(ScoringError, match="create_graph"):
        read(linear, lambda output: output.sum().backward(create_graph=True))


@pytest.mark.usefixtures("gates")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segments(linear: nn.Sequential, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", linear[0])
            self.add_module("2", linear[2])

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.get_submodule("0")(x.requires_grad_())
            for _ in range(2):  # used twice, both in one row
                out: Tensor = checkpoint(self._rest, hidden, use_reentrant=reentrant)
            return out + checkpoint(self._rest, hidden, use_reentrant=reentrant)  # type: ignore[no-any-return]

        def _rest(self, hidden: Tensor) -> Tensor:
            return self.get_submodule("2")(hidden.tanh())

    once = read(linear, lambda output: output.sum().backward())
    torch.testing.assert_close(read(Checkpointed().eval(), lambda output: output.sum().backward()), 2 * once)


@pytest.mark.usefixtures("gates")
def test_saved_activations_pass_the_users_hooks(linear: nn.Module) -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    once = read(linear, lambda output: output.sum().backward())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert torch.equal(read(linear, lambda output: output.sum().backward()), once)
    assert packed


@needs_library
def test_backwards_of_several_threads_add_up() -> None:
    gate = torch.zeros(64, requires_grad=True)
    gate.grad = row = torch.zeros(64)
    ones, times, threads = torch.ones(3, 64), 200, 4
    outputs = [pass_gate(native_gates.library(), ones, gate, 1, False, 1) for _ in range(times * threads)]

    def work(mine: list[Tensor]) -> None:
        for output in mine:
            output.backward(ones)

    workers = [threading.Thread(target=work, args=(outputs[first::threads],)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(row, torch.full((64,), 3.0 * times * threads))


@needs_library
def test_what_is_not_a_plain_tensor_is_left_to_python() -> None:
    library = native_gates.library()
    gate = torch.zeros(4, requires_grad=True)

    class Own(Tensor):
        pass

    others = [torch.ones(2, 4).as_subclass(Own), torch.ones(2, 4, dtype=torch.int64), "no tensor"]
    assert all(library.gate(other, gate, 1, False, 1) is NotImplemented for other in others)
    with torch.no_grad():
        assert library.gate(torch.ones(2, 4), gate, 1, False, 1) is NotImplemented
    with torch.inference_mode():
        inference = torch.ones(2, 4)
    assert library.gate(inference, gate, 1, False, 1) is NotImplemented
    with pytest.raises(IndexError, match="channel_dim 2 is outside"):
        library.gate(torch.ones(2, 4), gate, 2, False, 1)


def test_a_backend_asked_for_by_name_sums_in_the_gates_too(linear: nn.Module) -> None:
    with obc.use_backend("reference"):
        assert native_gates.library() is None
        read(linear, lambda output: output.sum().backward())


def test_without_a_library_for_this_torch_gates_are_pythons(
    linear: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = read(linear, lambda output: output.sum().backward())
    for cached in (native_gates.why_unavailable, native_gates._load):
        monkeypatch.setattr(native_gates, cached.__name__, cached.__wrapped__)
    missing = tmp_path / "gates-torch0.0.so"
    monkeypatch.setattr(native_gates, "path", lambda: missing)
    assert native_gates.library() is None
    assert native_gates.why_unavailable() == (
        "gates-torch0.0.so was not built: install obc again with this torch, a C++20 compiler and Python's headers"
    )
    monkeypatch.setattr("obc.scoring.reading.module_readers.pass_gate", _only_python)
    assert torch.equal(read(linear, lambda output: output.sum().backward()), expected)


def _only_python(native: Any, *arguments: Any) -> Tensor:
    assert native is None
    return Gate.apply(*arguments)  # type: ignore[no-any-return]
