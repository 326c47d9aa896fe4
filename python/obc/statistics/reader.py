"""The two halves of a statistic: its options, and the reader that hooks into one model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from obc.model.errors import described
from obc.model.evaluation import device_of, first_floating
from obc.model.experts import fused_experts
from obc.model.groups import ChannelGroup
from obc.model.layouts import layout_of
from obc.model.names import named_modules
from obc.model.rules import Rule, channel_count, complex_weight, rule_for
from obc.model.sharding import is_dtensor
from obc.scoring.coverage import Coverage
from obc.statistics.errors import StatisticsError
from obc.statistics.part import Part, is_running_again
from obc.statistics.routed import RoutedInput, expert_count, expert_name, inner_width, unreadable
from obc.statistics.sums import Sums

Groups = Sequence[ChannelGroup] | None
Handle = Any


class Statistic(Protocol):
    """One statistic and its options.

    Attributes:
        name: key of its results.
        backward: whether it needs gradients, and thus a loss.
    """

    name: ClassVar[str]
    backward: ClassVar[bool]

    def reader(self, model: nn.Module, groups: Groups, part: Part) -> Reader:
        """The reader of this statistic for one model; it reads only what these groups need."""


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
        """A batch begins, for the first time or again."""
        self.sums.begin()

    def backward_begins(self) -> None:
        """A backward of the part begins; only the last one of each part counts."""

    def part_ends(self) -> None:
        """The part, forward and backward, is over."""

    def batch_ends(self) -> None:
        """All parts of the batch are over."""

    def window(self, block: str) -> str | None:
        """The block whose input is still needed when ``block`` returns; None if no window ends at it."""
        return None

    def take_window(self, block: str, x: Tensor) -> None:
        """Take the input ``x`` of ``block``, which ran earlier."""

    def result(self, fields: Mapping[str, Tensor]) -> Any:
        """The result of one module, from its sums."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Bytes of the sums and one batch's summands, as far as known before the run."""
        return 0

    def final_coverage(self) -> dict[str, Coverage]:
        """The coverage, in which modules that were never called are named."""
        never = Coverage.unread(
            "never called; its weight may be used by another module's forward, or no batch reached it"
        )
        return {name: how if name in self.called or not how.scored else never for name, how in self.coverage.items()}


class Readers(dict[str, Reader]):
    """The readers of one run, by the names of their statistics, and the part of a batch that all of them see."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def begin(self) -> None:
        """A batch begins, for the first time or again."""
        for reader in self.values():
            reader.begin()

    @contextlib.contextmanager
    def reading(self, part: Any, read: bool = True) -> Iterator[None]:
        """Inside the block the model runs on this part of a batch; with ``read=False`` unread."""
        self.part.begin(part)
        self.part.reading = read
        try:
            yield
        finally:
            self.part.reading = False
        self.part_ends()

    def part_ends(self) -> None:
        """The part, forward and backward, is over."""
        for reader in self.values():
            reader.part_ends()

    @torch.inference_mode()  # tensors of forward passes may be changed in place only here
    def commit(self, batch: int) -> None:
        """All parts of the batch are over."""
        for reader in self.values():
            reader.batch_ends()
            reader.sums.commit(batch)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(reader.bytes() for reader in self.values())


def consumers(model: nn.Module, groups: Groups) -> tuple[dict[str, nn.Module], dict[str, Coverage]]:
    """The layers whose inputs are read, and the unreadable consumers with the reason.

    Modules that hold all experts of a mixture are among the layers.

    Args:
        groups: the groups whose consumers to read; None: every linear layer and convolution, and every mixture.
    """
    modules = dict(named_modules(model))
    found: dict[str, nn.Module] = {}
    unread: dict[str, Coverage] = {}
    if groups is None:
        found = {name: module for name, module in modules.items() if _has_inputs(module)}
        reasons = {name: reason for name, module in found.items() if (reason := complex_weight(module)) is not None}
        unread = {name: Coverage.unread(reason) for name, reason in reasons.items()}
        return {name: module for name, module in found.items() if name not in unread}, unread
    for group in groups:
        for part in group.consumers:
            module = modules.get(part.module)
            if part.side == "in" and module is not None and _has_inputs(module):
                found[part.module] = module
            elif part.side == "in" or part.module not in modules:
                what = "a tensor" if module is None else type(module).__name__
                unread[part.module] = Coverage.unread(f"{what} has no input whose channels are those of its units")
    return found, unread


def _has_inputs(module: nn.Module) -> bool:
    return layout_of(module) is not None or fused_experts(module) is not None


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
    """Reads the inputs of layers, and those of the down projections of fused experts.

    Args:
        groups: the groups whose consumers' inputs are read; None: every layer.

    Attributes:
        layers: name -> layer.
        mixtures: name -> module that holds all experts of a mixture.
        widths: name -> channels of its input; each expert has its own name, such as "mlp.experts[3]".
    """

    def __init__(self, sums: Sums, part: Part, model: nn.Module, groups: Groups) -> None:
        super().__init__(sums, part)
        found, unread = consumers(model, groups)
        self.layers = {name: module for name, module in found.items() if layout_of(module) is not None}
        self.mixtures: dict[str, nn.Module] = {}
        for name, module in found.items():
            if name in self.layers:
                continue
            if (reason := unreadable(module)) is None:
                self.mixtures[name] = module
            else:
                unread[name] = Coverage.unread(reason)
        self.widths = {name: input_width(module) for name, module in self.layers.items()}
        for name, module in self.mixtures.items():
            self.widths |= {expert_name(name, e): inner_width(module) for e in range(expert_count(module))}
        self.coverage = dict.fromkeys(self.widths, Coverage("input")) | unread
        part.calls.readers += bool(self.mixtures)
        self._latest: _Reading | None = None

    def begin(self) -> None:
        """A batch begins: forget what was read last."""
        super().begin()
        self._latest = None

    def part_ends(self) -> None:
        """Add what was read last: the next part reads other tensors."""
        with torch.inference_mode():  # tensors of forward passes may be changed in place only here
            self._end_reading()

    def attach(self) -> list[Handle]:
        """Hook before every layer, and after every mixture of experts."""
        handles: list[Handle] = []
        for name, module in self.layers.items():
            handles.append(module.register_forward_pre_hook(partial(self._read_input, name), with_kwargs=True))
        for name, module in self.mixtures.items():
            # The readers of routed inputs forget those of the call before.
            handles.append(module.register_forward_pre_hook(lambda module, args: self.part.calls.begin()))
            handles.append(module.register_forward_hook(partial(self._read_mixture, name), with_kwargs=True))
        return handles

    def device_of(self, name: str) -> torch.device:
        """The device of the weight that is read under this name."""
        module = self.layers.get(name) or self.mixtures[name.rpartition("[")[0]]
        return device_of(module)

    def read(
        self, name: str, x: Tensor, channel_dim: int, valid: Tensor | None, routed: RoutedInput | None
    ) -> dict[str, Tensor]:
        """Read one call, by field. The result is added to the sums of the layer and of others that read the same
        tensor.

        Args:
            x: its input, with samples along dim 0.
            channel_dim: channel dimension of ``x``.
            valid: (B, T) bool, if padding is excluded from it.
            routed: for an expert, which tokens these are. Each counts as a sample.
        """
        raise NotImplementedError

    def final_coverage(self) -> dict[str, Coverage]:
        """The coverage, in which modules that were never called and experts without tokens are named."""
        found = super().final_coverage()
        for name, module in self.mixtures.items():
            for expert in range(expert_count(module)):
                one = expert_name(name, expert)
                if one not in self.called and self.coverage[one].scored:
                    found[one] = Coverage.unread("no token was routed to it, pass more batches")
        return found

    @torch.no_grad()
    def _read_input(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Read a layer's input; may return other arguments for the call, as torch's hooks do."""
        if not self.part.reading or is_running_again():
            return
        given = self.checked_input(name, module, args, kwargs)
        x, channel_dim = given.detach(), input_dim(module, given)
        if channel_dim == 0:  # it has no dimension of samples
            x, channel_dim = x.unsqueeze(0), 1
        self.note_call(name, x, channel_dim)
        if self._latest is not None and self._latest.is_of(given, channel_dim, name):
            self._latest.modules.append(name)
            return
        self._end_reading()
        if x.numel():
            fields = self.read(name, x, channel_dim, self.part.valid_positions(x, channel_dim), None)
            self._latest = _Reading(given, channel_dim, name, fields, self.part)

    def _end_reading(self) -> None:
        """Add the last reading to the sums; modules called from now on don't share it."""
        if self._latest is not None:
            for field, values in self._latest.fields.items():
                self.sums.add(tuple(self._latest.modules), field, values)
            self._latest = None

    @torch.no_grad()
    def _read_mixture(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not self.part.reading or is_running_again():
            return
        for one, routed in self.routed(name, module, [*args, *kwargs.values()], output):
            for field, values in self.read(one, routed.x, 1, None, routed).items():
                self.sums.add(one, field, values)

    def routed(self, name: str, module: nn.Module, arguments: list[Any], output: Any) -> list[tuple[str, RoutedInput]]:
        """(expert's name, its input without padding) of every expert that got tokens; notes why there are none."""
        names = [expert_name(name, expert) for expert in range(expert_count(module))]
        if not self.coverage[names[0]].scored:
            return []
        inputs = self.part.calls.inputs(module, arguments, output)
        if isinstance(inputs, str):
            self.coverage |= dict.fromkeys(names, Coverage.unread(inputs))
            return []
        valid = self.part.valid_positions(arguments[0], 1)
        found = []
        for one, routed in zip(names, inputs, strict=True):
            if len(routed.tokens):
                self.called.add(one)
            if valid is not None:
                routed = routed.where(valid.reshape(-1)[routed.tokens])
            if len(routed.tokens):
                found.append((one, routed))
        return found

    def checked_input(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The layer's input.

        Raises:
            StatisticsError: there is none, it is split over processes, or its width is not the layer's.
        """
        x = first_floating(args, kwargs)
        if x is None:
            what = described((*args, *kwargs.values()))
            raise StatisticsError(f"{name!r} needs a floating-point tensor, got {what}; leave it out with groups=")
        if is_dtensor(x):
            raise StatisticsError(
                f"the input of {name!r} is split over several processes, but statistics need all of it; collect before "
                "the model is split by tensor parallelism"
            )
        width = input_width(module)
        if x.shape[input_dim(module, x)] != width:
            raise StatisticsError(f"{name!r} has {width} in channels, its input has shape {tuple(x.shape)}")
        return x

    def note_call(self, name: str, x: Tensor, channel_dim: int) -> None:
        """Record in the coverage that the layer was called, and whether padding counts."""
        self.called.add(name)
        if self.part.ignores_mask(x, channel_dim):
            assert self.part.mask is not None
            shapes = f"{tuple(x.shape)} does not fit attention_mask {tuple(self.part.mask.shape)}"
            self.coverage[name] = Coverage("input", f"padding counts: {shapes}")


class _Reading:
    """The values read from a tensor, for consecutive modules that get it: query, key and value, gate and up.

    Attributes:
        modules: the modules that got it so far.
    """

    def __init__(self, x: Tensor, channel_dim: int, module: str, fields: Mapping[str, Tensor], part: Part) -> None:
        self.x, self.channel_dim, self.fields = x, channel_dim, fields
        self.modules = [module]
        # Tensors in inference mode have no version counter: values are compared, and on a GPU the host waits.
        self._values = part.copy_of(x) if x.is_inference() else None
        self._version = None if x.is_inference() else x._version

    def is_of(self, x: Tensor, channel_dim: int, module: str) -> bool:
        """Whether another module gets the same, unchanged tensor."""
        if x is not self.x or channel_dim != self.channel_dim or module in self.modules:
            return False
        if self._values is None:
            return x._version == self._version
        return torch.equal(x, self._values)


def flat_rows(x: Tensor, channel_dim: int) -> Tensor:
    """(positions, C) of a layer's input."""
    return x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim])
