"""Every criterion of obc as an importance of Torch-Pruning.

>>> importance = CriterionImportance("flap")
>>> pruner = tp.pruner.BasePruner(model, example_inputs, importance, global_pruning=True, ...)
>>> importance.score(model, batches)  # before every step: pruning changes the channels
>>> pruner.step()
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from obc.criteria import Subject, get
from obc.criteria.protocol import CriterionError, name_of
from obc.criteria.refusals import refuse_unread, said_of
from obc.criteria.scoring import functional_loss, needed, scores_of_read
from obc.model.evaluation import ForwardFn, LossFn, call_on_batch
from obc.model.groups import ChannelGroup, Side, Slice
from obc.model.usable_batches import UsableBatches
from obc.statistics.results import Statistics
from obc.statistics.run import collect
from obc.structures.traced_items import items_of

try:
    from torch_pruning.pruner.importance import Importance
except ImportError as error:
    raise ImportError("obc.integrations.torch_pruning needs Torch-Pruning: pip install torch-pruning") from error

logger = logging.getLogger("obc")


class CriterionImportance(Importance):
    """Importance of a group's root channels by a criterion of :mod:`obc.criteria`, with one unit per root channel.

    Scores are valid for the scored channels only. Score again after ``pruner.step()``; otherwise the next step raises.
    Each group is scored alone: criteria that search for sets of units search within a group. Groups that the criterion
    does not score keep their width; a warning names each of them once.

    Args:
        criterion: a name of ``obc.criteria.available()``, an object, or a function (group, statistics, model).
        seed: seed of the criterion "random".

    Raises:
        CriterionError: the criterion scores whole experts or blocks, which Torch-Pruning does not remove.
    """

    def __init__(self, criterion: str | Any, seed: int = 0) -> None:
        self.criterion = get(criterion)
        _refuse_other_units(self.criterion)
        self._generator = torch.Generator().manual_seed(seed)
        self._statistics: Statistics | None = None
        self._subject: Subject | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._unscored: set[str] = set()

    def score(
        self,
        model: nn.Module,
        batches: Iterable[Any] = (),
        loss_fn: LossFn | None = None,
        *,
        forward_fn: ForwardFn | None = None,
        micro_batch: int | None = None,
    ) -> Statistics:
        """Collect what the criterion needs of ``model``; criteria that only read weights need no batches.

        Criteria that run the model themselves keep the batches, and run when a group is scored.

        Args:
            model: the model to prune.
            batches: as for :func:`obc.collect`; a list if the criterion runs the model itself.
            loss_fn: ``loss_fn(model, batch)``, if the criterion needs gradients.
            forward_fn: ``forward_fn(model, batch)``; by default :func:`obc.model.evaluation.call_on_batch`.
            micro_batch: as for :func:`obc.collect`.
        """
        measures = hasattr(self.criterion, "measure")
        kept = UsableBatches(list(batches)) if measures else UsableBatches(())
        functional, forward = getattr(self.criterion, "functional", None), forward_fn or call_on_batch
        if functional is not None:
            loss_fn = functional_loss(functional, forward)
        loss = loss_fn or _no_loss
        self._subject = Subject(model, (), kept, loss, forward, "gate", "batch", self._generator, micro_batch)
        self._statistics = Statistics({}, rows=None, num_batches=0, coverage={})
        if not measures and (chosen := needed(self.criterion)):
            with said_of(self.criterion, (), [one.name for one in chosen]):
                self._statistics = collect(
                    model,
                    batches,
                    loss_fn if any(one.backward for one in chosen) else None,
                    statistics=chosen,
                    micro_batch=micro_batch,
                    forward_fn=forward_fn,
                )
        self._shapes = _shapes(model)
        return self._statistics

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """The importance of a group of Torch-Pruning; None if the criterion has nothing to score in it.

        Returns:
            (root channels,) float64 on the CPU, in the order of the group's root indices.

        Raises:
            RuntimeError: nothing was scored yet, or the model was pruned since.
        """
        if self._subject is None or self._statistics is None:
            raise RuntimeError(f"{name_of(self.criterion)!r} has no statistics yet: call .score(model, batches) first")
        model = group._DG.model
        found = channel_group(group, model)
        if found is None:
            return None
        now = _shapes(model)
        for part in found.slices:
            if now.get(part.module) != self._shapes.get(part.module):
                raise RuntimeError(
                    f"{part.module!r} was scored with a weight of shape {self._shapes.get(part.module)} and has "
                    f"{now.get(part.module)} now: it was pruned since; score again before the next step"
                )
        with said_of(self.criterion, (found,)):
            if hasattr(self.criterion, "measure"):
                with torch.enable_grad():
                    scores = self.criterion.measure(replace(self._subject, model=model, groups=(found,)))
            else:
                refuse_unread(self.criterion, needed(self.criterion), [found], self._statistics, model)
                scores = scores_of_read(self.criterion, [found], self._statistics, model)
        if found.name not in scores and found.name not in self._unscored:
            self._unscored.add(found.name)
            logger.warning("%s: the criterion %r does not score it, so it stays", found.name, name_of(self.criterion))
        return scores.get(found.name)


def _refuse_other_units(criterion: Any) -> None:
    about = getattr(criterion, "about", None)
    if about is not None and "channels" not in about.kinds and not about.kinds.startswith("all"):
        raise CriterionError(
            f"the criterion {name_of(criterion)!r} scores {about.kinds}, and Torch-Pruning removes channels; pass "
            f"another criterion, or use obc.prune, which removes {about.kinds} of transformers models"
        )


def channel_group(group: Any, model: nn.Module) -> ChannelGroup | None:
    """A group of Torch-Pruning with one unit per root channel; None if it has no named layer.

    Layers that give roots different numbers of channels, or for which Torch-Pruning gives no roots, are left out.
    """
    names = {module: name for name, module in model.named_modules()}
    place = {root: index for index, root in enumerate(next(items_of(group)).channels)}
    slices: dict[tuple[str, Side], list[list[int]]] = {}
    for item in items_of(group):
        if item.target not in names or item.roots is None:
            continue
        table = slices.setdefault((names[item.target], item.side), [[] for _ in place])
        for channel, root in zip(item.channels, item.roots, strict=True):
            if channel not in table[place[root]]:
                table[place[root]].append(channel)
    parts = [
        Slice(name, side, torch.tensor(table, dtype=torch.int64, device="cpu"))
        for (name, side), table in slices.items()
        if len({len(channels) for channels in table}) == 1
        and table[0]
        and next(model.get_submodule(name).parameters(), None) is not None
    ]
    return ChannelGroup(parts[0].module, tuple(parts)) if parts else None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }


def _no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise ValueError("this criterion needs gradients: pass loss_fn to score()")
