"""A latency table: each group's seconds by width, and the model costs that follow."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import nn

from obc.files import atomic_write, built, read_fields
from obc.model.costs import Costs
from obc.model.curves import Curve
from obc.model.evaluation import device_of
from obc.model.groups import ChannelGroup

_FORMAT = "obc.LatencyTable/1"


class LatencyTableError(ValueError):
    """A latency table is damaged or does not fit the model."""


@dataclass(frozen=True)
class SharedSeconds:
    """Seconds of layers that belong to two groups, one at their output and one at their input.

    Attributes:
        groups: the names of the two groups.
        seconds: these layers' seconds when both groups are at their widest; included in the seconds of both.
    """

    groups: tuple[str, str]
    seconds: float


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of every group's layers, at a few widths of the group.

    Between two widths of the table the seconds are interpolated linearly; below the smallest width they are those of
    the smallest; they never fall as the width grows (:class:`obc.model.curves.Curve`). Let f_g(w) be the seconds of
    group g at width w, F_g those at the table's largest width, and s_gh what g and h share. Then the model takes

        rest + sum_g (F_g - sum_h s_gh) p_g + sum_{g<h} s_gh p_g p_h,     p_g = f_g(w_g) / F_g

    seconds. If only one group becomes narrower, this is exactly what the table says. A layer whose inputs and outputs
    both become narrower is thus counted once.

    :func:`obc.structures.latency.measure_latency` measures a table; a table of other hardware may be used instead.

    Attributes:
        seconds: group -> width -> seconds of its layers; for a group that is a whole block, with everything in the
            block at width 1.
        rest: seconds that no group changes.
        shared: seconds of layers that belong to two groups.
        device: where it was measured: "cpu" or the name of the GPU; None means any device.
        dtype: dtype of the parameters.
        threads: number of CPU threads; None on a GPU.
        batch: shapes of the inputs used for the measurement.

    Raises:
        LatencyTableError: a width or time is out of range, or a shared group has no seconds.
    """

    seconds: Mapping[str, Mapping[int, float]]
    rest: float = 0.0
    shared: Sequence[SharedSeconds] = ()
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    batch: Sequence[Sequence[int]] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for name in self.seconds:
            self._curve(name)
        for value in (self.rest, *(one.seconds for one in self.shared)):
            if not (math.isfinite(value) and value >= 0):
                raise LatencyTableError(f"seconds must be finite and not negative, got {value!r}")
        for one in self.shared:
            if lost := [name for name in one.groups if name not in self.seconds]:
                raise LatencyTableError(
                    f"the latency table lists {lost[0]!r} among shared layers, but has no seconds for it"
                )

    def _curve(self, name: str) -> Curve:
        try:
            return Curve(self.seconds[name])
        except ValueError as error:
            raise LatencyTableError(f"the latency table's {name!r}: {error}") from error

    @cached_property
    def curves(self) -> Mapping[str, Curve]:
        """Group -> its seconds at every width."""
        return {name: self._curve(name) for name in self.seconds}

    def at(self, name: str, width: int) -> float:
        """Seconds of the layers of the group ``name`` at a width.

        Raises:
            LatencyTableError: the table has no such group, or ends below this width.
        """
        self.check_groups({name: width})
        return self.curves[name].at(width)

    def check_groups(self, widths: Mapping[str, int]) -> None:
        """Raise if the table lacks one of the groups of ``widths`` or ends below its width.

        Raises:
            LatencyTableError: the message names the group.
        """
        for name, width in widths.items():
            if name not in self.seconds:
                known = ", ".join(map(repr, list(self.seconds)[:5])) or "none"
                raise LatencyTableError(
                    f"the latency table has no group {name!r} (it has {known}{' ...' if len(self.seconds) > 5 else ''}"
                    "); measure a table of this model with obc.measure_latency, or pass the layers in ignored_layers"
                )
            if width > self.curves[name].widest:
                raise LatencyTableError(
                    f"the latency table ends at {self.curves[name].widest} units of {name!r}, which has {width}; "
                    "it is of another model, or of this model after pruning"
                )

    def check_device(self, model: nn.Module) -> None:
        """Raise if the table belongs to another device than the model's.

        Raises:
            LatencyTableError: the message names both devices.
        """
        here = device_name(model)
        if self.device is not None and self.device != here:
            raise LatencyTableError(
                f"the latency table was measured on {self.device!r}, and the model is on {here!r}; to prune for the "
                "other device on this one, pass dataclasses.replace(table, device=None)"
            )

    def costs(self, groups: Iterable[ChannelGroup], inside: Mapping[str, Sequence[str]] | None = None) -> Costs:
        """The seconds of a model with these groups, as costs for :func:`obc.select`.

        Args:
            inside: whole block or branch -> groups that vanish with it (:class:`obc.model.costs.Costs`).

        Raises:
            LatencyTableError: the table lacks a group, or ends below its width.
        """
        groups = list(groups)
        names, place = [group.name for group in groups], {group.name: index for index, group in enumerate(groups)}
        self.check_groups({group.name: group.size for group in groups})
        full = {name: self.curves[name].at(self.curves[name].widest) for name in names}
        linear = torch.tensor([full[name] for name in names], dtype=torch.float64, device="cpu")
        quadratic = torch.zeros(len(names), len(names), dtype=torch.float64, device="cpu")
        for one in self.shared:
            present = [place[name] for name in one.groups if name in place]
            if len(present) == 2:  # otherwise the other group has no units left and is no longer a group
                linear[present] -= one.seconds
                quadratic[present[0], present[1]] += one.seconds
        inside = {name: [one for one in inner if one in place] for name, inner in (inside or {}).items()}
        blocks = [name for name in names if name in inside]
        shared = {one.groups: one.seconds for one in self.shared}
        for name in blocks:
            nested = {deeper for inner in inside[name] for deeper in inside.get(inner, ())}
            direct = [inner for inner in inside[name] if inner not in nested]
            twice = sum(value for (a, b), value in shared.items() if a in direct and b in direct)
            linear[place[name]] -= sum(full[inner] for inner in direct) - twice
        depth = {group.name for group in groups if group.is_depth}
        curves = {
            name: self.curves[name].scaled(1 / full[name]) for name in names if name not in depth and full[name] > 0
        }
        return Costs(
            names,
            [group.size for group in groups],
            constant=self.rest,
            linear=linear.clamp_min(0.0),
            quadratic=quadratic,
            unit="seconds",
            inside=inside,
            curves=curves,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, for :meth:`load`.

        Raises:
            OSError: the file can't be written; an existing file is left unchanged.
        """
        with atomic_write(path) as file:
            file.write((json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table written by :meth:`save`.

        Raises:
            LatencyTableError: the file is not a latency table, or is damaged.
            OSError: the file can't be read.
        """
        try:
            table: LatencyTable = built(read_fields(path, _FORMAT), cls)
        except ValueError as error:
            raise LatencyTableError(f"{os.fspath(path)} is not a latency table: {error}") from error
        return table

    def __str__(self) -> str:
        where = [self.device or "any device", *([self.dtype] if self.dtype else [])]
        where += [f"{self.threads} threads"] if self.threads else []
        where += ["inputs " + ", ".join("x".join(map(str, shape)) for shape in self.batch)] if self.batch else []
        return f"latency table of {len(self.seconds)} groups ({', '.join(where)})"


def device_name(model: nn.Module) -> str:
    """The name of the GPU that a model's first tensor is on; otherwise the device type, such as "cpu"."""
    device = device_of(model)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
