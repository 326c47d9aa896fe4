"""Finds where a layer's output ends up: in a residual stream, or in no sum.

A model runs with hooks at some layers, under a mode that sees every torch function. The output y of such a layer is
followed through operations on single channels (dropout, a factor, a BatchNorm in eval mode) into a sum with another
tensor of the same shape, and through further sums as long as nothing else uses them: in ``x + attention(x)`` this is
the sum, in ``x + attention(x) + mlp(x)`` the sum of all three. It is the layer's *point*. A layer whose output first
goes elsewhere, such as through an activation or a norm over channels, has its own output as its point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from obc.model.absorbing import IDENTITIES
from obc.model.hooks import Reached, hook_before_others

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_MULTIPLICATIONS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}


@dataclass(frozen=True, eq=False)
class Routing:
    """The tokens that one expert of a mixture got in one call.

    Attributes:
        tokens: (n,) int64, ascending: which of the call's tokens.
        total: how many tokens the call had.
        gates: (n,) the factors of the expert's outputs.
    """

    tokens: Tensor
    total: int
    gates: Tensor

    def where(self, counted: Tensor) -> Routing:
        """The same for the tokens where ``counted``, (n,) bool, is true."""
        return Routing(self.tokens[counted], self.total, self.gates[counted])

    def among(self, other: Routing) -> Tensor:
        """(n,) bool: which of these tokens are the other's too."""
        return torch.isin(self.tokens, other.tokens)


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        x: the layer's input.
        point: the sum, or the layer's own output.
        scale: the factors with which the output enters the sum, a number or one per channel.
        summed: whether the point is a sum.
        stack: the modules, outermost first, that are running at both the call and the sum; known only if ``observe``
            got the whole model.
        closed: how many points were complete before this one.
        source: the id of the tensor that the layer reads; of experts, of the one that they all read.
        routing: for an expert's layer (:mod:`obc.recovery.unfused`), the tokens that its rows stand for.
    """

    x: Tensor
    point: Tensor
    scale: Tensor | float = 1.0
    summed: bool = False
    stack: list[str] = field(default_factory=list)
    closed: int = 0
    source: int = 0
    routing: Routing | None = None

    @property
    def scope(self) -> str:
        """The innermost module that contains the layer and its point."""
        return self.stack[-1]

    def where(self, counted: Tensor) -> Call:
        """An expert's call without the tokens for which ``counted``, (n,) bool, is false."""
        assert self.routing is not None
        return replace(self, x=self.x[counted], point=self.point[counted], routing=self.routing.where(counted))


def of_same_tokens(full: Call, pruned: Call) -> tuple[Call, Call]:
    """Two calls of one layer; for an expert, reduced to the tokens that both calls got."""
    if full.routing is None or pruned.routing is None:
        return full, pruned
    return full.where(full.routing.among(pruned.routing)), pruned.where(pruned.routing.among(full.routing))


@dataclass
class _Trace:
    """A tensor that contains the outputs of some calls, with their factors."""

    tensor: Tensor  # so that no other tensor gets its id
    calls: list[tuple[Call, Tensor | float]]
    summed: bool = False


@dataclass
class Seen:
    """The calls seen in a run.

    Attributes:
        calls: by layer, in the order of the calls.
        output: output of the run; None if it was stopped.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    output: Any = None


class _Observer(TorchFunctionMode):
    def __init__(
        self, modules: Mapping[str, nn.Module], own: set[str], stop_after: int | None, whole: nn.Module | None
    ) -> None:
        super().__init__()
        self.whole, self.stack = whole, [""]
        self.alive: list[Tensor] = []
        self.modules, self.own, self.stop_after = modules, own, stop_after
        self.seen = Seen()
        self.traces: dict[int, _Trace] = {}
        self.waiting = self.closed = 0
        self.handles: list[Any] = []

    def __enter__(self) -> _Observer:
        for name, module in self.whole.named_modules() if self.whole is not None else ():
            if name:
                self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name)))
        for name, module in self.modules.items():
            # Before the caller's own hooks, which change the output after the layer.
            self.handles.append(hook_before_others(module, partial(self._record, name), with_kwargs=True))
        for name, module in self.whole.named_modules() if self.whole is not None else ():
            if name:
                self.handles.append(module.register_forward_hook(lambda *_: self.stack.pop() and None))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        for handle in self.handles:
            handle.remove()
        for trace in list(self.traces.values()):
            self._close(trace)

    def _record(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Record a call of the layer ``name`` and begin to follow its output."""
        x = args[0] if args else next(iter(kwargs.values()))
        routing, source = getattr(module, "routing", None), getattr(module, "reads", x)
        call = Call(x.detach(), output.detach(), stack=list(self.stack), source=id(source), routing=routing)
        if self.whole is not None:
            self.alive.append(source)
        self.seen.calls.setdefault(name, []).append(call)
        if name in self.own:
            call.x, call.point = x.clone(), output.detach().clone()  # either may be changed in place later
            self._stop_when_done()
        else:
            call.x = x.clone()
            self.traces[id(output)] = _Trace(output, [(call, 1.0)])
            self.waiting += 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        traced = self._traced(args, kwargs) if self.traces else []
        if not traced:
            return func(*args, **kwargs)
        handed_on = self._handed_on(getattr(func, "__name__", ""), traced, args, kwargs)
        if handed_on is None:
            # The numbers are taken before the function runs, because it may change the tensor in place. A function that
            # returns no tensor only asked for a shape or the like.
            before = [(trace, trace.tensor.detach().clone()) for trace in traced] if _may_write(func) else []
            result = func(*args, **kwargs)
            if any(isinstance(part, Tensor) for part in (result if isinstance(result, (tuple, list)) else [result])):
                for trace in traced:
                    self._close(trace, next((copy for other, copy in before if other is trace), None))
                self._stop_when_done()
            return result
        for trace in traced:
            self.traces.pop(id(trace.tensor), None)
        result = func(*args, **kwargs)
        handed_on.tensor = result
        self.traces[id(result)] = handed_on
        if self.whole is not None and handed_on.summed:
            for call, _ in handed_on.calls:
                call.stack = [name for name in call.stack if name in self.stack]
        return result

    def _traced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[_Trace]:
        found: list[_Trace] = []
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                trace = self.traces.get(id(tensor))
                if trace is not None and trace.tensor is tensor and not any(trace is other for other in found):
                    found.append(trace)
        return found

    @staticmethod
    def _handed_on(
        name: str, traced: Sequence[_Trace], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> _Trace | None:
        """The result's trace, if the function acts on every channel separately; else None."""
        first = traced[0]
        calls = [entry for trace in traced for entry in trace.calls]
        if name in _ADDITIONS and len(args) == 2 and kwargs.get("alpha", 1) == 1:
            other = args[1] if args[0] is first.tensor else args[0]
            if isinstance(other, Tensor) and other.shape == first.tensor.shape:
                return _Trace(first.tensor, calls, summed=True)
            return None
        if len(traced) > 1 or first.summed:
            return None
        if name in IDENTITIES:
            return _Trace(first.tensor, calls)
        scale = _factor(name, first.tensor, args, kwargs)
        return None if scale is None else _Trace(first.tensor, [(call, known * scale) for call, known in calls])

    def _close(self, trace: _Trace, values: Tensor | None = None) -> None:
        if self.traces.pop(id(trace.tensor), None) is None:
            return
        self.waiting -= len(trace.calls)
        point = (trace.tensor.detach().clone() if values is None else values) if trace.summed else None
        for call, scale in trace.calls:
            call.closed, self.closed = self.closed, self.closed + 1
            if point is not None:
                call.point, call.scale, call.summed = point, scale, True

    def _stop_when_done(self) -> None:
        seen = sum(len(calls) for calls in self.seen.calls.values())
        if self.stop_after is not None and self.waiting == 0 and seen >= self.stop_after:
            raise Reached


def observe(
    run: Callable[[], Any],
    modules: Mapping[str, nn.Module],
    own: set[str],
    stop_after: int | None = None,
    whole: nn.Module | None = None,
) -> Seen:
    """Run a model or a part of it without gradients; returns what its layers saw and where their outputs went.

    Args:
        own: layers whose own output is wanted, wherever it goes.
        stop_after: stop the run after this many calls with known points.
        whole: the model, if every call's stack is wanted.
    """
    observer = _Observer(modules, own, stop_after, whole)
    try:
        with torch.no_grad(), observer:
            observer.seen.output = run()
    except Reached:
        pass
    return observer.seen


def _factor(name: str, tensor: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | float | None:
    """The factor by which a function multiplies each channel of ``tensor``; None if it does something else."""
    if name in _MULTIPLICATIONS and len(args) == 2:
        other = args[1] if args[0] is tensor else args[0]
        if isinstance(other, (int, float)) and not isinstance(other, bool):
            return float(other)
        is_last = isinstance(other, Tensor) and other.dim() == 1 and other.shape[0] == tensor.shape[-1]
        return other.detach() if is_last else None
    if name == "batch_norm" and args and args[0] is tensor:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        values = {"weight": None, "training": False, "eps": 1e-5, **dict(zip(names, args, strict=False)), **kwargs}
        if values["training"] or values.get("running_var") is None:
            return None
        inverse = (values["running_var"].detach() + values["eps"]).rsqrt()
        return inverse if values["weight"] is None else inverse * values["weight"].detach()
    return None


def _may_write(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") or name in {"relu", "relu6", "hardtanh", "elu", "silu", "hardswish", "leaky_relu", "gelu"}
