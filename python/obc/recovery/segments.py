"""A model as a chain of modules that pass one tensor on: decoder layers, residual blocks, layers of a plain chain.

The chain is found by watching one forward pass: a module follows another if its input is the very tensor that the other
returned. Of all chains, the one is chosen whose modules hold the most layers of interest, in the most pieces; a layer
counts for a module only if the module also contains the sum that the layer's output enters. A chain is used only if its
modules, run one by one on the inputs seen, return the outputs seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from obc.model.autocast import PresentAutocast
from obc.model.evaluation import stream_of
from obc.model.hooks import Reached, hooked
from obc.model.names import is_within


@dataclass
class _Event:
    """A module's only call in the watched pass."""

    name: str
    start: int
    inputs: list[int]
    end: int = -1
    output: int = -1


class _Watcher:
    """Records every module's call with input and output tensors; keeps the tensors so that their ids stay unique."""

    def __init__(self, model: nn.Module) -> None:
        self.events: dict[str, _Event] = {}
        self.repeated: set[str] = set()
        self.alive: list[Any] = []
        self.clock = 0
        self.handles: list[Any] = []
        for name, module in model.named_modules():
            if name:
                self.handles.append(module.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True))
                self.handles.append(module.register_forward_hook(partial(self._end, name)))

    def _begin(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin the event of the module ``name``; a second call is recorded as a repetition."""
        if name in self.events:
            self.repeated.add(name)
            return
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.alive += tensors
        self.events[name] = _Event(name, self.clock, [id(tensor) for tensor in tensors])
        self.clock += 1

    def _end(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        event = self.events[name]
        tensor = stream_of(output)
        event.end, self.clock = self.clock, self.clock + 1
        if tensor is None or name in self.repeated:
            return
        self.alive.append(tensor)
        event.output = id(tensor)

    def sources(self, event: _Event) -> list[str]:
        """The modules, inner and outer, that returned one of the event's inputs as it was when the event began."""
        found = []
        for other in self.events.values():
            is_source = (
                other.output in event.inputs and 0 <= other.end < event.start and other.name not in self.repeated
            )
            if is_source and self._last(other, event):
                found.append(other.name)
        return found

    def needs_more(self, event: _Event, source: str, path: Sequence[str]) -> bool:
        """Whether the event's module needs, besides the stream, a tensor made on the path from its source."""
        start, stream = self.events[path[0]].start, self.events[source].output
        others = set(event.inputs) - {stream}
        return any(other.output in others and other.start >= start for other in self.events.values())

    def _last(self, source: _Event, event: _Event) -> bool:
        """Whether nothing else returned the same tensor, changed in place, between the two."""
        return not any(
            other.output == source.output
            and source.end < other.end < event.start
            and not source.name.startswith(f"{other.name}.")
            for other in self.events.values()
        )


def find_chain(model: nn.Module, run: Callable[[], Any], scopes: Mapping[str, str], layers: Sequence[str]) -> list[str]:
    """The names of the chain's modules in order; empty if no module contains one of the layers.

    Args:
        scopes: layer -> the innermost module that contains it and its point.
    """
    watcher = _Watcher(model)
    with hooked(watcher.handles), torch.no_grad():
        run()
    events = [event for event in watcher.events.values() if event.name not in watcher.repeated and event.output != -1]
    best: dict[str, tuple[int, int, str | None]] = {}
    for event in sorted(events, key=lambda event: event.end):
        covered = sum(is_within(scopes[layer], event.name) for layer in layers)
        sources = [name for name in watcher.sources(event) if name in best]
        candidates = [
            (best[name][0], best[name][1], name)
            for name in sources
            if not watcher.needs_more(event, name, _path(best, name))
        ]
        before = max(candidates, default=(0, 0, None), key=lambda entry: entry[:2])
        best[event.name] = (before[0] + covered, before[1] + (covered > 0), before[2])
    if not best:
        return []
    path = _path(best, max(best, key=lambda name: best[name][:2]))
    # What comes before the first layer of interest is the same in both models.
    first = next((place for place, name in enumerate(path) if best[name][0] > 0), len(path))
    return path[first:]


def _path(best: Mapping[str, tuple[int, int, str | None]], last: str | None) -> list[str]:
    path = []
    while last is not None:
        path.append(last)
        last = best[last][2]
    return path[::-1]


@dataclass
class Arguments:
    """The arguments of a module in the chain, without the stream, and the autocast around it."""

    leaves: list[Any]
    spec: Any
    stream: int
    autocast: PresentAutocast = field(default_factory=PresentAutocast, compare=False)

    @classmethod
    def of(cls, args: Any, kwargs: Any, stream: Tensor | None) -> Arguments:
        """The arguments of a call; ``stream`` is the stream among them, None means the first floating tensor."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if stream is None:
            place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        else:
            place = next(i for i, leaf in enumerate(leaves) if leaf is stream)
        return cls([None if i == place else leaf for i, leaf in enumerate(leaves)], spec, place)

    def call(self, module: nn.Module, stream: Tensor) -> Any:
        """Call the module with these arguments and ``stream``, under the autocast of the call that was seen."""
        leaves = [stream if i == self.stream else leaf for i, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with self.autocast():
            return module(*args, **kwargs)

    def same_as(self, other: Arguments) -> bool:
        """Whether both hold the same objects in the same places."""
        return (
            self.spec == other.spec
            and self.stream == other.stream
            and all(a is b or _equal(a, b) for a, b in zip(self.leaves, other.leaves, strict=True))
        )


def _equal(a: Any, b: Any) -> bool:
    plain = (int, float, bool, str, type(None))
    return isinstance(a, plain) and isinstance(b, plain) and a == b


@dataclass
class ChainBatch:
    """One batch between two modules of the chain."""

    stream: Tensor
    arguments: list[Arguments]
    device: torch.device

    def on_device(self) -> Tensor:
        """A copy of the stream, because a module may change its input in place."""
        return self.stream.to(self.device) if self.stream.device != self.device else self.stream.clone()

    def call(self, module: nn.Module, place: int) -> Any:
        """Run the chain's module at ``place`` on it."""
        return self.arguments[place].call(module, self.on_device())


def capture(
    model: nn.Module, chain: Sequence[str], run: Callable[[], Any], first_only: bool
) -> tuple[Tensor, list[Arguments]]:
    """The stream before the chain, and every module's other arguments; the run stops when the last are known.

    Args:
        model: the model, run once.
        first_only: all modules get the arguments of the first one, and the run stops there.
    """
    streams: list[Tensor] = []
    found: list[Arguments] = []
    expected: list[Tensor | None] = [None]
    wanted = 1 if first_only else len(chain)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = Arguments.of(args, kwargs, expected[0])
        if not found:
            leaf = pytree.tree_leaves((args, kwargs))[arguments.stream]
            streams.append(leaf.detach().clone())
        found.append(arguments)
        if len(found) == wanted:
            raise Reached

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        expected[0] = stream_of(output)

    handles = []
    for name in chain:
        module = model.get_submodule(name)
        # Before the caller's own hooks, which run again when the module is run alone.
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    with hooked(handles), torch.no_grad(), contextlib.suppress(Reached):
        run()
    return streams[0], found * len(chain) if first_only else found


def captured(model: nn.Module, chain: Sequence[str], runs: Iterable[Callable[[], Any]]) -> Iterator[ChainBatch]:
    """The batches before the chain, one for each run.

    If all modules got the same objects from one batch, the runs on later ones stop at the first module.
    """
    shared = False
    for run in runs:
        start, arguments = capture(model, chain, run, first_only=shared)
        shared = shared or all(known.same_as(arguments[0]) for known in arguments)
        yield ChainBatch(start.detach(), arguments, start.device)


def replays(model: nn.Module, chain: Sequence[str], run: Callable[[], Any]) -> str | None:
    """None if the chain, run module by module, gives the same as the model's run; otherwise why not.

    The stream before the chain is changed in both, because the modules' other arguments must not depend on it.
    """
    start, arguments = capture(model, chain, run, first_only=False)
    changed = start * 1.25
    shown: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        place = arguments[0].stream
        return pytree.tree_unflatten([changed.clone() if i == place else leaf for i, leaf in enumerate(leaves)], spec)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensor = stream_of(output)
        shown.append(torch.empty(0, device="cpu") if tensor is None else tensor.detach().clone())

    handles = [model.get_submodule(name).register_forward_hook(after, with_kwargs=True) for name in chain]
    handles.append(model.get_submodule(chain[0]).register_forward_pre_hook(before, with_kwargs=True, prepend=True))
    with hooked(handles), torch.no_grad():
        run()
    with torch.no_grad():
        for _ in range(2):  # twice, to notice a module that keeps something from one run to the next
            stream: Tensor | None = changed
            for name, given, seen in zip(chain, arguments, shown, strict=True):
                assert stream is not None
                stream = stream_of(given.call(model.get_submodule(name), stream.clone()))
                if stream is None or stream.shape != seen.shape or not close(stream, seen):
                    return f"{name}, run alone, returns something else than inside the model"
    return None


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, which may differ with batch size or kernel."""
    return bool((a.double() - b.double()).norm() <= 1e-3 * b.double().norm())
