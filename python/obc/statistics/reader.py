"""What every statistic is: options that make a reader for one model, and the reader that hooks into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from obc.model.groups import ChannelGroup
from obc.model.layouts import layout_of
from obc.model.names import named_modules
from obc.model.rules import Rule, channel_count, rule_for
from obc.model.sharding import is_dtensor
from obc.scoring.coverage import Coverage
from obc.statistics.errors import StatisticsError
from obc.statistics.part import Part, is_running_again
from obc.statistics.sums import Sums

Groups = Sequence[ChannelGroup] | None
Handle = Any


class Statistic(Protocol):
    """One statistic and its options.

    Attributes:
        name: under which its results are found.
        backward: whether it needs gradients, and so a loss.
    """

    name: ClassVar[str]
    backward: ClassVar[bool]

    def reader(self, model: nn.Module, groups: Groups, part: Part) -> Reader:
        """What reads it of this model, of what these groups need."""

    def identity(self) -> dict[str, Any]:
        """The options as plain values: what a run that goes on from a checkpoint must have in common."""


class Reader:
    """Reads one statistic while the model runs.

    Attributes:
        sums: what was read.
        coverage: module -> how it is read, or why not.
    """

    def __init__(self, sums: Sums, part: Part) -> None:
        self.sums, self.part = sums, part
        self.coverage: dict[str, Coverage] = {}
        self.called: set[str] = set()

    def attach(self) -> list[Handle]:
        """Hook into the model; the handles undo it."""
        raise NotImplementedError

    def begin(self) -> None:
        """A batch is read, or read again."""
        self.sums.begin()

    def backward_begins(self) -> None:
        """A backward of the part begins; only the last one of each part counts."""

    def part_ends(self) -> None:
        """The part, forward and backward, is over."""

    def batch_ends(self) -> None:
        """All parts of the batch are over."""

    def result(self, fields: Mapping[str, Tensor]) -> Any:
        """What the sums of one module are given back as."""
        raise NotImplementedError

    def bytes(self) -> int:
        """What the sums and one batch's summands take, as far as it is known before the run."""
        return 0

    def final_coverage(self) -> dict[str, Coverage]:
        """The coverage, with what was never called named."""
        never = Coverage.unread(
            "never called; its weight may be used by another module's forward, or no batch reached it"
        )
        return {name: how if name in self.called or not how.scored else never for name, how in self.coverage.items()}


def consumers(model: nn.Module, groups: Groups) -> tuple[dict[str, nn.Module], dict[str, Coverage]]:
    """The layers whose inputs are read, and the consumers that can't be read with the reason.

    Args:
        model: the model.
        groups: whose consumers; None: every linear layer and convolution.
    """
    modules = dict(named_modules(model))
    if groups is None:
        return {name: module for name, module in modules.items() if layout_of(module) is not None}, {}
    found: dict[str, nn.Module] = {}
    unread: dict[str, Coverage] = {}
    for group in groups:
        for part in group.consumers:
            module = modules.get(part.module)
            if part.side == "in" and module is not None and layout_of(module) is not None:
                found[part.module] = module
            elif part.side == "in" or part.module not in modules:
                what = "a tensor" if module is None else type(module).__name__
                unread[part.module] = Coverage.unread(
                    f"{what} has no input of its own that holds the channels of its units"
                )
    return found, unread


def input_width(module: nn.Module) -> int:
    """Channels of the layer's input."""
    rule = rule_for(module)
    assert isinstance(rule, Rule)
    assert rule.in_axis is not None
    return channel_count(module, rule, rule.in_axis)


def input_dim(module: nn.Module, x: Tensor) -> int:
    """The channels' dimension in the layer's input, counted from the start."""
    rule = rule_for(module)
    assert isinstance(rule, Rule)
    assert rule.in_dim is not None
    return rule.in_dim % x.dim()


class InputReader(Reader):
    """Reads the inputs of layers.

    Args:
        sums: of the statistic.
        part: what is run.
        model: whose layers.
        groups: whose consumers' inputs; None: those of every layer.
    """

    def __init__(self, sums: Sums, part: Part, model: nn.Module, groups: Groups) -> None:
        super().__init__(sums, part)
        self.layers, unread = consumers(model, groups)
        self.coverage = dict.fromkeys(self.layers, Coverage("input")) | unread

    def attach(self) -> list[Handle]:
        return [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, module in self.layers.items()
        ]

    def read(self, name: str, x: Tensor, channel_dim: int) -> None:
        """Add what the input of one call gives; ``x`` has samples along dim 0."""
        raise NotImplementedError

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if not self.part.reading or is_running_again():
                return
            with torch.no_grad():
                x = self.checked_input(name, module, args, kwargs).detach()
                channel_dim = input_dim(module, x)
                if channel_dim == 0:  # without a dimension of samples
                    x, channel_dim = x.unsqueeze(0), 1
                self.note_call(name, x, channel_dim)
                if x.numel():
                    self.read(name, x, channel_dim)

        return hook

    def checked_input(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The layer's input."""
        x = first_tensor(args, kwargs)
        if x is None:
            raise StatisticsError(f"{name!r} was called without a tensor; leave it out with groups=")
        if is_dtensor(x):
            raise StatisticsError(
                f"the input of {name!r} lies on several processes: statistics need whole inputs; collect before the "
                "model is split by tensor parallelism"
            )
        width = input_width(module)
        if x.shape[input_dim(module, x)] != width:
            raise StatisticsError(f"{name!r} has {width} in channels, its input has shape {tuple(x.shape)}")
        return x

    def note_call(self, name: str, x: Tensor, channel_dim: int) -> None:
        """The coverage says that the layer was called, and where padding counts."""
        self.called.add(name)
        if self.part.ignores_mask(x, channel_dim):
            assert self.part.valid is not None
            shapes = f"{tuple(x.shape)} does not fit attention_mask {tuple(self.part.valid.shape)}"
            self.coverage[name] = Coverage("input", f"padding counts: {shapes}")


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating tensor among a call's arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def flat_rows(x: Tensor, channel_dim: int) -> Tensor:
    """(positions, C) of a layer's input."""
    return x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim])
