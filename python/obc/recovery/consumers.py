"""Layers that lost inputs: their original weights, their inputs as rows, and the effect of a decompressor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from obc import ops
from obc.model.kept import Kept, PlanError
from obc.model.layouts import layout_of, pads_with_zeros, split_by_group
from obc.model.names import named_modules
from obc.model.plan import PruningPlan
from obc.model.processes import Processes
from obc.model.rules import Rule
from obc.model.slicing import original_tensor, sliced, was_depthwise
from obc.recovery.layer_rows import channel_rows
from obc.recovery.moments import RegressionMoments, Solution


@dataclass
class PrunedConsumer:
    """A layer whose inputs were pruned."""

    module: nn.Module
    layout: Rule
    weight: Tensor  # kept out channels, all in channels
    positions: Tensor  # (blocks, kept in / blocks): the kept channels inside their block
    size: int  # channels of a block before pruning
    repeat: int

    @property
    def intercept(self) -> bool:
        """Whether a constant input adds the same to every output position, so that the bias can absorb it."""
        return self.has_bias and not pads_with_zeros(self.module) and not self.overlaps

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias."""
        return self.module.bias is not None

    @property
    def overlaps(self) -> bool:
        """Whether several input positions add to one output position, as in a transposed convolution."""
        return self.layout.convolution and self.layout.transposed

    def bytes(self, paired: bool) -> int:
        """The bytes that :meth:`moments` take."""
        blocks, kept = self.positions.shape
        return RegressionMoments.bytes_for(blocks, kept, self.size if paired else self.size - kept)

    def moments(self, paired: bool) -> RegressionMoments:
        """Empty moments of the layer's inputs; ``paired`` with the pruned model's own."""
        return RegressionMoments(self.positions, self.size, paired)

    def rows(self, x: Tensor) -> Tensor:
        """(positions, channels) of the layer's input."""
        return channel_rows(x, self.layout, self.repeat)

    def parameters(self) -> list[Tensor]:
        """Weight and, if there is one, bias, detached."""
        module: Any = self.module
        return [parameter.detach() for parameter in (module.weight, module.bias) if parameter is not None]

    def apply(self, solution: Solution) -> None:
        """weight = W D; bias += W intercept."""
        decompressor = solution.decompressor.to(self.weight)
        if self.layout.transposed:
            folded = ops.fold(self.weight, decompressor.mT, None, self.layout.groups)
        else:
            folded = ops.fold(self.weight, None, decompressor, self.layout.groups, self.repeat)
        module: Any = self.module
        module.weight.copy_(folded)
        if solution.intercept is not None:
            module.bias += self.through(solution.intercept.repeat_interleave(self.repeat))

    def through(self, constant: Tensor) -> Tensor:
        """The layer's output, apart from its bias, for an input that is ``constant`` (columns,) at every position."""
        weight = (self.weight.transpose(0, 1) if self.layout.transposed else self.weight).double()
        blocks = weight.flatten(2).sum(2) if self.layout.convolution else weight
        blocks = blocks.unflatten(0, (self.layout.groups, -1))
        outputs = blocks @ constant.to(blocks).reshape(self.layout.groups, -1, 1)
        return outputs.flatten().to(self.weight.dtype)


def find_consumers(
    pruned_model: nn.Module, original_model: nn.Module, plan: PruningPlan, *, verify: bool = True
) -> dict[str, PrunedConsumer]:
    """The layers whose inputs were pruned; ``verify`` checks their weights against the plan."""
    state_dict = original_model.state_dict()
    found = {}
    for name, module in named_modules(pruned_model):
        kept, layout = plan.get(name), layout_of(module)
        if kept is None or kept.in_channels is None or layout is None:
            continue
        if parametrize.is_parametrized(module):
            raise ValueError(f"{name} is parametrised; compensate the naive model, or merge first")
        weight = original_tensor(state_dict, f"{name}.weight")
        if was_depthwise(module, weight, kept):
            continue
        if verify:
            plan.verify_tensor(state_dict, name, module, "weight", module.weight.detach())  # type: ignore[union-attr, operator]
        in_channels = layout.sizes(weight)[1] // kept.in_repeat
        positions = split_by_group(kept.in_channels, in_channels, layout.groups)
        if positions is None:
            raise PlanError(f"{name}: its {layout.groups} groups keep unequal numbers of channels")
        rows = sliced(module, "weight", weight, Kept(kept.out_channels, out_size=kept.out_size), f"{name}.weight")
        found[name] = PrunedConsumer(module, layout, rows, positions, in_channels // layout.groups, kept.in_repeat)
    return found


def in_execution_order(
    consumers: Mapping[str, PrunedConsumer], called: Sequence[str], processes: Processes
) -> dict[str, PrunedConsumer]:
    """The consumers in the order of execution; those that the first batch did not reach come last."""
    places = {name: place for place, name in enumerate(called)}
    earliest = processes.least([places.get(name, len(consumers)) for name in consumers])
    return {
        name: consumers[name] for _, name in sorted(zip(earliest, consumers, strict=True), key=lambda entry: entry[0])
    }
