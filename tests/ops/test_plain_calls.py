"""Which calls of the operators' public functions go through torch's dispatcher, and which straight to a backend."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import obc
from obc import ops
from obc.backends import native_gates
from obc.backends.operators import OPERATORS

# fold by matrix products is no operator on a CPU.
CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "channel_dot": lambda a, g: ops.channel_dot(a, g, 1),
    "channel_moments": lambda x, _: ops.channel_moments(x, 1),
    "weight_dot": lambda w, g: ops.weight_dot(w, g),
    "weight_dot_list": lambda w, g: ops.weight_dot_list([w], [g]),
    "weight_moments": lambda w, g: ops.weight_moments(w, g),
    "end_row": lambda scores, row: ops.end_row(scores.flatten(), row.flatten()),
}
DIFFERENTIABLE = ("channel_dot", "weight_dot")


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4), torch.randn(3, 4)


@pytest.fixture(autouse=True)
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that the dispatcher was asked for."""
    asked: list[str] = []

    class Asked:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(torch.ops.obc, name)

    monkeypatch.setattr(obc.ops.registration, "_dispatched", Asked())
    return asked


class Subclass(Tensor):
    pass


def test_every_operator_is_tried() -> None:
    assert {*CALLS, "fold"} == set(OPERATORS)


@pytest.mark.parametrize("op", CALLS)
def test_plain_tensors_go_straight_to_the_backend(op: str, pair: tuple[Tensor, Tensor], dispatched: list[str]) -> None:
    CALLS[op](*pair)
    with torch.no_grad():
        CALLS[op](torch.nn.Parameter(pair[0], requires_grad=op != "end_row"), pair[1])
    assert dispatched == []


@pytest.mark.skipif(native_gates.why_unavailable() is not None, reason="the library of gates was not built")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_channel_dot_without_python_is_the_operator_to_the_bit(
    dtype: torch.dtype, per_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, g = (torch.randn(3, 5, 4, 2).to(dtype).transpose(1, 2) for _ in range(2))
    expected = torch.ops.obc.channel_dot(a, g, -2, per_sample)
    monkeypatch.setattr(sys.modules["obc.ops.channel_dot"], "call", lambda *_: None)  # the checks in Python
    got = ops.channel_dot(a, g, -2, per_sample)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    with obc.use_backend("reference"):
        assert ops.channel_dot(a, g, -2, per_sample) is None
    monkeypatch.setenv(native_gates.SWITCH, "0")
    assert ops.channel_dot(a, g, -2, per_sample) is None


def in_dispatch_mode(call: Callable[..., Any], pair: tuple[Tensor, Tensor]) -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        call(*pair)
    assert any(name.startswith("obc.") for name in seen)


def in_function_mode(call: Callable[..., Any], pair: tuple[Tensor, Tensor]) -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        call(*pair)
    assert any(name.startswith("obc.") for name in seen)


def on_fakes(call: Callable[..., Any], pair: tuple[Tensor, Tensor]) -> None:
    with FakeTensorMode() as mode:
        call(*map(mode.from_tensor, pair))


def on_a_subclass(call: Callable[..., Any], pair: tuple[Tensor, Tensor]) -> None:
    call(pair[0].as_subclass(Subclass), pair[1])


def on_a_negated_view(call: Callable[..., Any], pair: tuple[Tensor, Tensor]) -> None:
    negated = torch.view_as_complex(torch.stack([pair[0], -pair[0]], -1)).conj().imag
    assert negated.is_neg()
    call(negated, pair[1])


def traced(call: Callable[..., Any], pair: tuple[Tensor, Tensor], pre_dispatch: bool) -> None:
    graph = make_fx(call, pre_dispatch=pre_dispatch)(*pair)
    assert "torch.ops.obc." in graph.code


def traced_by_jit(call: Callable[..., Any], pair: tuple[Tensor, Tensor]) -> None:
    graph = torch.jit.trace(call, pair, check_trace=False).graph
    assert "obc::" in str(graph)


ALWAYS = {
    "a dispatch mode": in_dispatch_mode,
    "a function mode": in_function_mode,
    "fakes": on_fakes,
    "a subclass": on_a_subclass,
    "a negated view": on_a_negated_view,
    "make_fx": functools.partial(traced, pre_dispatch=False),
    "make_fx before dispatch": functools.partial(traced, pre_dispatch=True),
    "jit.trace": traced_by_jit,
}


# torch writes to no negated view but by its own operators.
INTERCEPTED = [(op, way) for op in CALLS for way in ALWAYS if (op, way) != ("end_row", "a negated view")]


@pytest.mark.parametrize(("op", "way"), INTERCEPTED)
def test_what_intercepts_operators_sees_them(
    op: str, way: str, pair: tuple[Tensor, Tensor], dispatched: list[str]
) -> None:
    ALWAYS[way](CALLS[op], pair)
    assert set(dispatched) == {op}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_what_autograd_or_a_transform_records_is_dispatched(
    op: str, pair: tuple[Tensor, Tensor], dispatched: list[str]
) -> None:
    def total(a: Tensor, g: Tensor) -> Tensor:
        result = CALLS[op](a, g)
        return (result if isinstance(result, Tensor) else result[0]).sum()

    a, g = pair
    leaf = a.clone().requires_grad_()
    total(leaf, g).backward()
    assert torch.equal(leaf.grad, g)
    assert dispatched == [op]
    batch = torch.vmap(CALLS[op])(a[None], g[None])
    torch.testing.assert_close(batch, torch.utils._pytree.tree_map(lambda x: x[None], CALLS[op](a, g)))
    assert dispatched == [op] * 2


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_tangent_is_refused(op: str, place: int, pair: tuple[Tensor, Tensor]) -> None:
    """The dispatcher would return a result without one, as if the derivative were zero."""
    if place == 1 and op == "channel_moments":
        place = 0  # it has one input
    tangents = [torch.ones_like(one) if index == place else None for index, one in enumerate(pair)]
    with forward_ad.dual_level():
        duals = [
            one if tangent is None else forward_ad.make_dual(one, tangent)
            for one, tangent in zip(pair, tangents, strict=True)
        ]
        with pytest.raises(RuntimeError, match=rf"obc::{op} has no forward-mode derivative"):
            CALLS[op](*duals)
        CALLS[op](*pair)  # without a tangent it runs

    def of_one(one: Tensor) -> Any:
        return CALLS[op](*(one if index == place else other for index, other in enumerate(pair)))

    with pytest.raises(RuntimeError, match=rf"obc::{op} has no forward-mode derivative"):
        torch.func.jvp(of_one, (pair[place],), (torch.ones_like(pair[place]),))


RAW: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "channel_dot": lambda a, g: torch.ops.obc.channel_dot(a, g, 1),
    "channel_moments": lambda a, g: torch.ops.obc.channel_moments(a, 1, None),
    "weight_dot": lambda a, g: torch.ops.obc.weight_dot(a, g),
    "weight_dot_list": lambda a, g: torch.ops.obc.weight_dot_list([a], [g]),
    "weight_moments": lambda a, g: torch.ops.obc.weight_moments(a, g),
    "fold": lambda a, g: torch.ops.obc.fold(a, torch.ones(2, len(a))),
    "end_row": lambda a, g: torch.ops.obc.end_row(torch.zeros(a.numel()), a.flatten(), 1.0, None),
}


@pytest.mark.parametrize("op", RAW)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_tangent_is_refused_under_the_raw_name_too(op: str, recorded: bool, pair: tuple[Tensor, Tensor]) -> None:
    a, g = pair
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a.clone().requires_grad_(recorded and op != "end_row"), torch.ones_like(a))
        # What autograd records is refused by torch itself, before it comes to the operator.
        message = r"has no forward-mode derivative|You must implement the jvp function"
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            RAW[op](dual, g)
        RAW[op](a.clone(), g)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_fold_drops_no_tangent_either(backend: str | None, pair: tuple[Tensor, Tensor]) -> None:
    """Neither as matrix products nor as an operator."""
    with contextlib.nullcontext() if backend is None else obc.use_backend(backend), forward_ad.dual_level():
        weight = forward_ad.make_dual(*pair)
        with pytest.raises(RuntimeError, match=r"forward"):
            ops.fold(weight, torch.randn(2, 3))
