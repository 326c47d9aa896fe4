"""Measures a latency table: the layers of every group alone, at a few widths of the group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from obc.model.arguments import instance, positive, refuse_uncallable
from obc.model.depth import PLACE_ATTRIBUTES, plain_attributes
from obc.model.evaluation import Run, device_of, evaluating, tensors_in, without_cache
from obc.model.groups import ChannelGroup, Side
from obc.model.hooks import hooked
from obc.model.latency_table import LatencyTable, SharedSeconds, device_name
from obc.model.names import common, is_within, named_modules, outwards
from obc.model.shared_copy import shared_copy
from obc.model.timing import median_seconds
from obc.selection.uniform import permitted_widths
from obc.structures.protocol import Limits, Provable

# Seconds of a call; the second argument is the device that does the work.
Timer = Callable[[Callable[[], Any], torch.device], float]
POINTS = 8


def measure_latency(
    structure: Provable, run: Run, *, points: int = POINTS, round_to: int | None = None, timer: Timer | None = None
) -> LatencyTable:
    """Time the layers of every group of ``structure`` at a few widths, on the model's device.

    For every group and width, a copy that shares the model's weights loses the other units and runs once. Then the
    group's layers run alone, repeatedly, on the inputs that they had: the layers of its slices, or the smallest module
    that contains them if no other group lies in it, so that attention's products and activations count. Groups with
    equal shapes are measured once. The unpruned model is timed as a whole; ``rest`` is what its groups do not account
    for.

    Args:
        structure: the structure; its model is not changed.
        run: ``run(model)`` runs it on inputs that are always the same, such as one batch.
        points: the number of widths, about equally spaced up to the group's own.
        round_to: widths of channels are multiples of this.
        timer: ``timer(call, device)`` returns the seconds of ``call()``; by default the median of 15 calls
            (:func:`obc.model.timing.median_seconds`).

    Raises:
        ValueError: fewer than two points.
        TypeError: an argument is of another type.
    """
    if not hasattr(structure, "groups"):
        raise TypeError(f"structure must be one of obc.structures, got {type(structure).__name__}")
    instance("run", run, Callable, "a function")  # type: ignore[arg-type]
    refuse_uncallable(timer=timer)
    positive("points", points)
    if points < 2:
        raise ValueError(f"a latency table needs at least 2 widths a group, got points={points}")
    return _Measurement(structure, run, points, round_to, timer or _median).table()


def _median(call: Callable[[], Any], device: torch.device) -> float:
    return median_seconds([call], device)[0]


@dataclass(frozen=True)
class _Call:
    """The arguments of a module's call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def shapes(self) -> tuple[Hashable, ...]:
        return tuple((tuple(one.shape), one.dtype) for one in tensors_in((self.args, dict(self.kwargs))))


class _Measurement:
    def __init__(self, structure: Provable, run: Run, points: int, round_to: int | None, timer: Timer) -> None:
        self.structure, self.run, self.timer = structure, run, timer
        self.points, self.round_to = points, round_to
        self.groups = {group.name: group for group in structure.groups}
        self.device = device_of(structure.model)
        self.calls = self._calls(structure.model, None)
        self.places = _places(list(self.groups.values()), set(self.calls))
        self._known: dict[Hashable, dict[int, list[float]]] = {}

    def table(self) -> LatencyTable:
        model = self.structure.model
        by_width = {name: self._seconds(group) for name, group in self.groups.items()}
        full: dict[str, float] = {}  # place -> seconds in the unpruned model
        for name, widths in by_width.items():
            full |= widths[self.groups[name].size]
        shares = _Shares(self.groups, self.places)
        seconds = {
            name: {width: max(0.0, sum(shares.own(name, full, now))) for width, now in widths.items()}
            for name, widths in by_width.items()
        }
        parameter = next(model.parameters(), None)
        on_cpu = self.device.type == "cpu"
        table = LatencyTable(
            seconds,
            0.0,
            shares.pairs(full),
            device_name(model),
            None if parameter is None else str(parameter.dtype).removeprefix("torch."),
            torch.get_num_threads() if on_cpu else None,
            [list(one.shape) for call in self.calls.get("", ()) for one in tensors_in((call.args, dict(call.kwargs)))],
        )
        whole = self._time(lambda: self.run(model), model)
        inside = self.structure.costs("parameters").inside
        return replace(table, rest=max(0.0, whole - table.costs(self.groups.values(), inside).total()))

    # --- one group --------------------------------------------------------------------------------------------------

    def _seconds(self, group: ChannelGroup) -> dict[int, dict[str, float]]:
        """Width -> place of the group -> its seconds."""
        places, model = self.places[group.name], self.structure.model
        widths = tuple((part.side, tuple(part.channels.shape)) for part in group.slices)
        key = (group.kind, widths, *(_described(model.get_submodule(one), self.calls[one]) for one in places))
        if key not in self._known:
            self._known[key] = {width: self._at(group, width, places) for width in self._widths(group)}
        return {width: dict(zip(places, times, strict=True)) for width, times in self._known[key].items()}

    def _widths(self, group: ChannelGroup) -> list[int]:
        if group.is_depth:
            return [group.size]
        limits = getattr(self.structure, "limits", Limits())
        multiple = limits.multiple(group.name, self.round_to)
        least = max(1, limits.min_units.get(group.name, 1))
        allowed = permitted_widths(group.size, least, multiple, limits.widths.get(group.name))
        wanted = [group.size * point / self.points for point in range(1, self.points + 1)]
        return sorted({min(allowed, key=lambda width: (abs(width - one), width)) for one in wanted} | {group.size})

    def _at(self, group: ChannelGroup, width: int, places: Sequence[str]) -> list[float]:
        model, calls = self.structure.model, self.calls
        if width < group.size:
            model = shared_copy(self.structure.model)
            twin = self.structure.twin(model)
            twin.remove({group.name: torch.arange(width, group.size, device="cpu")})
            calls = self._calls(model, places)
        found = []
        for place in places:
            module = model.get_submodule(place)
            found.append(sum(self._time(partial(module, *call.args, **call.kwargs), model) for call in calls[place]))
        return found

    def _time(self, call: Callable[[], Any], model: nn.Module) -> float:
        with evaluating(model), without_cache(model), torch.no_grad():
            return self.timer(call, self.device)

    def _calls(self, model: nn.Module, places: Collection[str] | None) -> dict[str, list[_Call]]:
        calls: dict[str, list[_Call]] = {}

        def record(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(name, []).append(_Call(args, kwargs))

        handles = [
            module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
            for name, module in named_modules(model)
            if places is None or name in places
        ]
        with hooked(handles), evaluating(model), without_cache(model), torch.no_grad():
            self.run(model)
        return calls


def _described(module: nn.Module, calls: Sequence[_Call]) -> Hashable:
    """A key that is equal for modules that do the same work."""
    parameters = tuple((name, tuple(one.shape), one.dtype) for name, one in module.named_parameters())
    attributes = tuple(
        (key, value)
        for inner in module.modules()
        for key, value in plain_attributes(inner).items()
        if key not in PLACE_ATTRIBUTES
    )
    return repr(module), parameters, attributes, tuple(call.shapes() for call in calls)


# --- dividing the time by group -----------------------------------------------------------------------------------


def _places(groups: Sequence[ChannelGroup], called: Collection[str]) -> dict[str, list[str]]:
    """Group -> names of the modules that are timed for it."""
    own = {part.module for group in groups if not group.is_depth for part in group.slices} & set(called)
    found: dict[str, list[str]] = {}
    for group in groups:
        layers = dict.fromkeys(_running(part.module, called) for part in group.slices)
        # A module with a bare parameter is timed for it, unless it contains layers that are timed separately.
        found[group.name] = [
            one
            for one in layers
            if one and (one in own or group.is_depth or not any(is_within(two, one) for two in own))
        ]
    channels = [group.name for group in groups if not group.is_depth]
    layers_of = {name: found[name] for name in channels}
    for name in channels:
        outer = _running(common(layers_of[name]), called)
        others = [one for other in channels if other != name for one in layers_of[other]]
        if outer and not any(is_within(one, outer) or is_within(outer, one) for one in others):
            found[name] = [outer]
    return found


def _running(name: str, called: Collection[str]) -> str:
    """The module of this name, or the innermost one around it that runs by itself; "" if that is the model."""
    return next(one for one in outwards(name) if one in called or not one)


class _Shares:
    """How a layer's time is divided among the groups in it.

    The groups on one side of a layer get shares in proportion to their channels. A layer with outputs in g and inputs
    in h is shared by both.
    """

    def __init__(self, groups: Mapping[str, ChannelGroup], places: Mapping[str, Sequence[str]]) -> None:
        self._groups = groups
        self._of_place: dict[str, dict[Side, dict[str, float]]] = {}
        for name, group in groups.items():
            for place in places[name] if not group.is_depth else ():
                sides = self._of_place.setdefault(place, {"out": {}, "in": {}})
                for part in group.slices:
                    if is_within(part.module, place):
                        sides[part.side][name] = sides[part.side].get(name, 0.0) + part.channels.numel()
        for sides in self._of_place.values():
            for by_group in sides.values():
                total = sum(by_group.values())
                for name in by_group:
                    by_group[name] /= total

    def own(self, name: str, full: Mapping[str, float], now: Mapping[str, float]) -> list[float]:
        """The group's part of the seconds ``now``, for each place; ``full``: seconds in the unpruned model."""
        return [seconds - full[place] * (1 - self._share(place, name)) for place, seconds in now.items()]

    def _share(self, place: str, name: str) -> float:
        if self._groups[name].is_depth:
            return 1.0
        outputs, inputs = (side.get(name, 0.0) for side in self._of_place[place].values())
        return outputs + inputs - outputs * inputs

    def pairs(self, full: Mapping[str, float]) -> list[SharedSeconds]:
        found: dict[tuple[str, str], float] = {}
        for place, sides in self._of_place.items():
            for one, share in sides["out"].items():
                for other, another in sides["in"].items():
                    if one != other:
                        key = (min(one, other), max(one, other))
                        found[key] = found.get(key, 0.0) + full[place] * share * another
        return [SharedSeconds(key, seconds) for key, seconds in found.items()]
