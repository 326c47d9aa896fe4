"""Records one pruning step of Torch-Pruning: which indices every layer of every group kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from obc.model.depth import Depth, outer_lists, with_lists
from obc.model.kept import Kept, PlanError, staying, with_columns
from obc.model.layouts import layout_of, split_by_group
from obc.model.linear_like import is_linear
from obc.model.plan import PruningPlan, refuse_non_plans
from obc.model.quantized import refuse_quantised
from obc.model.refusals import refuse_unprunable
from obc.structures.traced_items import GroupItem, items_of


def prune_step(pruner: Any, plan: PruningPlan | None = None) -> PruningPlan:
    """Run ``pruner.step()`` and record what every layer kept, root and coupled, outputs and inputs.

    Torch-Pruning's own history contains root layers only, and is wrong if indices are passed to ``group.prune``.

    Args:
        pruner: a Torch-Pruning pruner (``BasePruner`` or a subclass).
        plan: the plan of the previous steps, recorded on the same model; None at the first step.

    Returns:
        The plan of all steps so far, in terms of the unpruned model. ``plan`` itself is not changed.

    Raises:
        PlanError: the model can't be pruned as it is (:mod:`obc.model.refusals`), or a recurrent layer is to be
            pruned.
        TypeError: ``pruner`` is no pruner of Torch-Pruning, or ``plan`` no plan.
    """
    if plan is not None:
        refuse_non_plans(plan)
    if not hasattr(pruner, "DG"):
        raise TypeError(f"pruner must be a pruner of Torch-Pruning, got {type(pruner).__name__}")
    refuse_unprunable(pruner.model)
    refuse_quantised(pruner.model)
    # What the pruner read when it was built: the unpruned model's, unless an earlier pruner pruned it before.
    heads = {module: pruner.init_num_heads.get(module, now) for module, now in pruner.num_heads.items()}
    recorder = PlanRecorder(pruner.DG, plan, heads, pruner.layer_init_out_ch)
    for group in pruner.step(interactive=True):
        recorder.record(group)
        group.prune()
    before = Depth() if plan is None else plan.depth
    return PruningPlan(recorder.kept, with_lists(before, outer_lists(pruner.model), recorder.kept))


def holds_channels(module: nn.Module) -> bool:
    """Whether a module has one value per channel or normalises over channels, so that a plan needs an entry for it."""
    has_statistics = isinstance(module, _NormBase) and module.running_mean is not None
    over_channels = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
    return has_statistics or over_channels or next(module.parameters(), None) is not None


class PlanRecorder:
    """Records what every layer kept, group after group.

    Args:
        graph: Torch-Pruning's dependency graph of the model.
        plan: plan of the previous steps, in terms of the unpruned model.
        heads: query, key or value projection -> number of heads in the unpruned model.
        widths: out channels of the unpruned model's layers, at least of those with heads.

    Attributes:
        kept: module or parameter name -> what was kept; changes with every record.
    """

    def __init__(
        self,
        graph: Any,
        plan: PruningPlan | None = None,
        heads: Mapping[nn.Module, int] | None = None,
        widths: Mapping[nn.Module, int] | None = None,
    ) -> None:
        self.graph = graph
        self.kept: dict[str, Kept] = dict(plan or {})
        self._names = {module: name for name, module in graph.model.named_modules()}
        self._heads, self._widths = dict(heads or {}), dict(widths or {})
        self._before = plan or PruningPlan()

    def record(self, group: Any) -> None:
        """Record what ``group`` is about to remove; call it before ``group.prune()``."""
        for item in items_of(group):
            if not item.channels:
                continue
            if isinstance(item.target, nn.Parameter):
                self._parameter(item)
            elif item.target in self._names and holds_channels(item.target):
                self._module(item)
        self._attention_blocks(group)

    def _parameter(self, item: GroupItem) -> None:
        size = item.target.shape[item.dim]
        stay = staying(size, torch.tensor(item.channels, device="cpu"))
        self._note(self.graph._param_to_name[item.target], Kept(stay, dim=item.dim, out_size=size))

    def _module(self, item: GroupItem) -> None:
        module, removed = item.target, torch.tensor(item.channels, device="cpu")
        name = self._names[module]
        if isinstance(module, nn.RNNBase):
            raise PlanError(
                f"{name}: what Torch-Pruning removes from a {type(module).__name__} is not recorded; list it in "
                "ignored_layers, or prune with obc.prune, which records it"
            )
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            raise PlanError(f"{name}: a LayerNorm over {tuple(module.normalized_shape)} can't be recorded; ignore it")
        step = Kept()
        if item.writes and (size := self.graph.get_out_channels(module)) is not None:
            step = Kept(staying(size, removed), out_size=size)
        # Norms and embeddings have one set of channels, on the output side.
        reads = layout_of(module) is not None or isinstance(module, nn.MultiheadAttention)
        size = self.graph.get_in_channels(module) if reads and item.reads else None
        if size is not None:
            repeat = repeat_of(item.channels, item.roots, size) if is_linear(module) else 1
            step = with_columns(replace(step, in_size=size), staying(size, removed), repeat)
        self._note(name, step)

    def _note(self, name: str, step: Kept) -> None:
        self.kept[name] = step.after(self.kept.get(name))

    def _attention_blocks(self, group: Any) -> None:
        """Split a compressor of queries, keys or values by head, as long as every head kept equally many channels."""
        projections = {item.target for item in items_of(group) if item.target in self._heads}
        for module in projections:
            name = self._names[module]
            if (kept := self.kept.get(name)) is None:
                continue
            fused = len(projections) == 1 and is_linear(module)
            before = self._before.get(name, Kept()).out_channels
            if before is not None and len(before) == self._widths[module]:
                continue  # an earlier pruner's plan already says what became of the unpruned model's heads
            self.kept[name] = in_blocks(kept, self._heads[module] * (3 if fused else 1), self._widths[module])


def in_blocks(kept: Kept, blocks: int, width: int) -> Kept:
    """``kept`` with a compressor that is split by head, as long as every head kept equally many channels.

    Args:
        kept: of a projection of queries, keys or values.
        blocks: that heads, or their thirds, form in its outputs.
        width: number of outputs before pruning.
    """
    if kept.out_channels is None:
        return kept
    even = width % blocks == 0 and split_by_group(kept.out_channels, width, blocks) is not None
    return replace(kept, out_blocks=blocks if even else 1)


def repeat_of(removed: Sequence[int], roots: Sequence[int] | None, size: int) -> int:
    """The number of consecutive columns per root channel after a flatten; 1 if the indices don't tell."""
    if roots is None or len(roots) != len(removed):
        return 1
    pairs = sorted(zip(removed, roots, strict=True), key=lambda pair: pair[0])
    repeat = size
    for _, run in itertools.groupby(enumerate(pairs), key=lambda entry: (entry[1][1], entry[1][0] - entry[0])):
        columns = [column for _, (column, _) in run]
        repeat = math.gcd(repeat, columns[0], len(columns))
    return repeat
