"""The Jacobian Criterion as an importance of Torch-Pruning (1.5.3 and later).

>>> importance = JacobianImportance()
>>> pruner = tp.pruner.BasePruner(model, example_inputs, importance, global_pruning=True, ...)
>>> importance.score(model, batches, loss_fn, pruner=pruner)  # before every step: pruning changes the channels
>>> pruner.step()
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from obc.integrations.torch_pruning.criterion_importance import CriterionImportance
from obc.integrations.torch_pruning.gradient_rows import GradientRows
from obc.integrations.torch_pruning.removable import removable_sides
from obc.model.evaluation import LossFn
from obc.model.rules import Rule, channel_count, rule_for
from obc.scoring.results.scores import ChannelScores, Scores
from obc.scoring.run import score
from obc.scoring.scorer import JacobianScorer
from obc.structures.traced_items import GroupItem, items_of
from obc.structures.traced_plan import prune_step

try:
    from torch_pruning.pruner.importance import GroupMagnitudeImportance
except ImportError as error:
    raise ImportError("obc.integrations.torch_pruning needs Torch-Pruning: pip install torch-pruning") from error

__all__ = ["CriterionImportance", "JacobianImportance", "prune_step"]

logger = logging.getLogger("obc")

_REDUCTIONS = ("sum", "mean", "max", "prod", "first", "gate", None)
_NORMALIZERS = ("sum", "standarization", "mean", "max", "gaussian", "lamp")  # spelt as in Torch-Pruning


class JacobianImportance(GroupMagnitudeImportance):
    """Importance of a group's root channels: the Jacobian Criterion of every slice removed with each of them.

    S_c = reduction over the group's layers m of sum over rows n of (w_m . dL_n/dw_m)^2, where w_m is the slice of layer
    m that is pruned with root channel c: for layers pruned at their output the weight's rows and the bias, for layers
    pruned at their input the weight's columns, for norms, embeddings and other per-channel parameters their entries. If
    a layer loses several slices with one root channel (a Linear after flatten), they are added first.

    There are four ways to fill it: :meth:`score`; your own loop within ``with importance.scorer(model) as scorer``;
    assigning :class:`obc.Scores` to ``importance.scores``; or, as in the paper's code, ``zero_score()``,
    ``zero_grad()``, then ``accumulate_grad(model)`` after every ``loss.backward()``, then ``accumulate_score(model)``.

    Scores are valid for the scored channels only. Score again after ``pruner.step()``; otherwise the next step raises.

    Args:
        group_reduction: "sum" (the criterion), "mean", "max", "prod", "first", "gate" (the last layer), or None for the
            unreduced (layers, channels).
        normalizer: None (the criterion), a callable, or one of Torch-Pruning's: "sum", "standarization", "mean",
            "max", "gaussian", "lamp", "sentinel_<quantile>". A group of zeros stays a group of zeros.
        strict: raise for a group with unscored layers; otherwise a warning names each of them once.

    Raises:
        ValueError: an unknown reduction or normalizer.
    """

    def __init__(
        self,
        group_reduction: str | None = "sum",
        normalizer: str | Callable[[Tensor], Tensor] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        if group_reduction not in _REDUCTIONS:
            got = repr(group_reduction) if isinstance(group_reduction, str) else f"a {type(group_reduction).__name__}"
            raise ValueError(
                f"group_reduction, the first argument, must be one of {_REDUCTIONS}, got {got}; scores are "
                "assigned later: importance.scores = scores, or importance.score(model, batches, loss_fn)"
            )
        if isinstance(normalizer, str) and normalizer not in _NORMALIZERS and not normalizer.startswith("sentinel_"):
            raise ValueError(
                f"normalizer must be None, a callable, 'sentinel_<quantile>' or one of {_NORMALIZERS}, "
                f"got {normalizer!r}"
            )
        super().__init__(group_reduction=group_reduction, normalizer=normalizer)
        self.strict = strict
        self._scores: Mapping[str, ChannelScores] | None = None
        self._parameter_scores: dict[str, dict[int, Tensor]] = {}
        self._rows: GradientRows | None = None
        self._named: set[str] = set()

    # --- filling ----------------------------------------------------------------------------------------------

    @property
    def scores(self) -> Mapping[str, ChannelScores] | None:
        """The scores in use, by module name; None before scoring. Assign :class:`obc.Scores` to use them."""
        return self._scores

    @scores.setter
    def scores(self, scores: Mapping[str, ChannelScores] | None) -> None:
        self._scores, self._parameter_scores = scores, {}
        self._named.clear()

    def score(
        self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn, *, pruner: Any = None, **options: Any
    ) -> Scores:
        """Score ``model`` by :func:`obc.score`, use the scores and return them.

        Args:
            model: the model that is pruned.
            batches: as for :func:`obc.score`.
            loss_fn: as for :func:`obc.score`.
            pruner: a pruner of ``model``; then only what it may remove is read.
            options: options of :func:`obc.score`.

        Raises:
            ValueError: the pruner belongs to another model, or ``modules`` is given as well.
        """
        if pruner is not None:
            if options.get("modules") is not None:
                raise ValueError("pass pruner or modules, not both: each says which modules are read")
            options["modules"] = removable_sides(pruner, model)
        scores = score(model, batches, loss_fn, **options)
        self.scores = scores
        return scores

    def scorer(self, model: nn.Module, **options: Any) -> JacobianScorer:
        """An :class:`obc.JacobianScorer` of ``model``; its scores are used once its ``with`` block ends."""
        return _FillingScorer(self, model, **options)

    # --- filling as in the paper's code -----------------------------------------------------------------------

    def zero_score(self) -> None:
        """Forget the scores."""
        self.scores = None
        if self._rows is not None:
            self._rows.zero_scores()

    def zero_grad(self) -> None:
        """Forget the rows that ``accumulate_score`` has not added yet. The model's gradients are left alone."""
        if self._rows is not None:
            self._rows.drop_pending()

    def accumulate_grad(self, model: nn.Module, loss_scale: float = 1.0) -> None:
        """Read one row from the gradients that ``loss.backward()`` left in the model.

        The gradients are contracted at once; none is kept. Zero them between rows or let them add up: a row is what was
        added since the previous one. The first row uses them as they are.

        Args:
            model: the model, with its gradients.
            loss_scale: the factor that the loss was multiplied by.

        Raises:
            RuntimeError: the model was pruned or replaced while its rows were being added up.
        """
        if self._rows is not None and not self._rows.is_of(model):
            if self._rows.pending_rows or self._scores is not None:
                raise RuntimeError(
                    "accumulate_grad: the model is another one, or was pruned, since the rows accumulated so far; call "
                    "zero_score() and zero_grad() first"
                )
            self._rows = None
        if self._rows is None:
            self._rows = GradientRows(model)
        self._rows.end_row(loss_scale)

    def accumulate_score(self, model: nn.Module) -> None:
        """Add the squares of the rows read since the last call to the scores.

        Raises:
            RuntimeError: there is no row of ``model``.
        """
        if self._rows is None or not self._rows.is_of(model):
            raise RuntimeError(
                "accumulate_score: no row of this model was accumulated; call accumulate_grad(model) first"
            )
        self._rows.commit()
        self.scores = self._rows.scores()
        self._parameter_scores = self._rows.parameter_scores()

    # --- the importance ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """The importance of a group of Torch-Pruning, or None if nothing in it has scores.

        Args:
            group: a ``tp.Group`` of all or some channels.

        Returns:
            (root channels,) float32 in the order of the group's root indices.

        Raises:
            RuntimeError: nothing was scored yet.
            ValueError: the scores belong to another model, or to this one before it was pruned; or (``strict``) a layer
                has no scores.
        """
        if self._scores is None:
            raise RuntimeError("JacobianImportance has no scores yet: call .score(model, batches, loss_fn) first")
        lookup = _Lookup(group._DG.model, self._scores, self._parameter_scores)
        place_of = {root: place for place, root in enumerate(next(items_of(group)).channels)}
        parts, covered = [], []
        for item in items_of(group):
            channels = lookup.channels(item) if item.channels else None
            if channels is None:
                continue
            if item.roots is None:
                self._say_uncoupled(lookup.name_of(item.target))
                continue
            places = torch.tensor([place_of[root] for root in item.roots], device=channels.device)
            part = channels.new_zeros(len(place_of))
            parts.append(part.index_add_(0, places, channels[item.channels]))
            covered.append(torch.zeros_like(part, dtype=torch.bool).index_fill_(0, places, True))
        self._name_unscored(lookup.unscored)
        if not parts:
            return None
        importance = _reduce_layers(self.group_reduction, parts, covered)
        if self.normalizer is None or not (callable(self.normalizer) or bool(importance.any())):
            return importance
        return self._normalize(importance, self.normalizer)

    def _name_unscored(self, unscored: Mapping[str, str]) -> None:
        new = {name: reason for name, reason in unscored.items() if name not in self._named}
        named = "; ".join(f"{name!r} ({reason})" for name, reason in new.items())
        if self.strict and new:
            raise ValueError(f"strict: layers to be pruned have no scores: {named}")
        self._named.update(new)
        if new:
            warnings.warn(f"layers are pruned without being scored: {named}", stacklevel=3)

    def _say_uncoupled(self, name: str) -> None:
        """Grouped queries: a key or value channel serves several roots, and Torch-Pruning does not say which."""
        if name not in self._named:
            self._named.add(name)
            logger.info("%r is left out of its group: Torch-Pruning gives it no root indices", name)


class _FillingScorer(JacobianScorer):
    """A scorer that passes its scores to an importance when its ``with`` block ends without an error."""

    def __init__(self, importance: JacobianImportance, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._importance = importance

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if kind is None:
            self._importance.scores = self.scores()


class _Lookup:
    """Finds the scores of what Torch-Pruning prunes, for one group.

    Args:
        model: the model to prune. Scores are found by its modules' names.
        scores: by module name.
        parameter_scores: by parameter name and dimension, for parameters outside scored modules.

    Attributes:
        unscored: module or parameter name -> why it has no scores, for all that was looked up.
    """

    def __init__(
        self,
        model: nn.Module,
        scores: Mapping[str, ChannelScores],
        parameter_scores: Mapping[str, Mapping[int, Tensor]],
    ) -> None:
        self._model, self._scores, self._parameter_scores = model, scores, parameter_scores
        self._names = {id(module): name for name, module in model.named_modules()}
        self._names.update((id(parameter), name) for name, parameter in model.named_parameters())
        self._read: set[tuple[int, int]] = set()
        self.unscored: dict[str, str] = {}
        if not set(scores) & set(self._names.values()):
            raise ValueError(
                f"the scores belong to another model: they contain {', '.join(map(repr, list(scores)[:3]))} ..., "
                f"none of which {type(model).__name__} has; score the model that is pruned"
            )

    def name_of(self, module: nn.Module | nn.Parameter) -> str:
        return self._names[id(module)]

    def channels(self, item: GroupItem) -> Tensor | None:
        """Scores of all channels of an item's target on the side that it prunes; None if there is nothing to add.

        Raises:
            ValueError: the target had another number of channels when it was scored.
        """
        target = item.target
        if isinstance(target, nn.Parameter):
            return self._of_parameter(target, item.dim)
        if isinstance(target, nn.MultiheadAttention):
            return self._of_attention(target)
        rule = rule_for(target)
        if rule is None and next(target.parameters(), None) is None:
            return None  # an operation, an activation, a norm without parameters
        name = self.name_of(target)
        if not isinstance(rule, Rule):
            self._note_unscored(name, rule or "a custom pruner prunes it, and obc does not know its channels")
            return None
        if isinstance(target, nn.PReLU) and target.num_parameters == 1:
            return None  # a single slope for all channels is not pruned
        return self._side(name, target, rule, out=item.writes)

    def _side(self, name: str, module: nn.Module, rule: Rule, out: bool) -> Tensor | None:
        axis = rule.out_axis if out else rule.in_axis
        values = None
        if name in self._scores:
            values = self._scores[name].out_channels if out else self._scores[name].in_channels
        if values is None or axis is None:
            self._note_unscored(name, "not among the scores")
            return None
        key = (id(getattr(module, rule.weight)), axis)
        if key in self._read:
            return None  # a tied weight: its score contains both uses and counts once
        self._read.add(key)
        count = channel_count(module, rule, axis)
        if not out and rule.groups > 1 and len(values) * rule.groups == count:
            values = values.repeat(rule.groups)  # scored with fold_groups=True
        self._verify(name, len(values), count, "out" if out else "in")
        return values

    def _of_attention(self, attention: nn.MultiheadAttention) -> Tensor | None:
        """Torch-Pruning removes a channel from the query, key, value and output projections, on both sides."""
        name = self.name_of(attention)
        names = (name, f"{name}.out_proj" if name else "out_proj")
        if any(part not in self._scores for part in names):
            self._note_unscored(name, "not among the scores")
            return None
        sides = [side for part in names for side in (self._scores[part].out_channels, self._scores[part].in_channels)]
        width = attention.embed_dim
        for side, count in zip(sides, (3 * width, width, width, width), strict=True):
            assert side is not None  # both are linear layers
            self._verify(name, len(side), count, "projections'")
        return torch.stack([side.reshape(-1, width).sum(0) for side in sides if side is not None]).sum(0)

    def _of_parameter(self, parameter: nn.Parameter, axis: int) -> Tensor | None:
        """A parameter that Torch-Pruning prunes alone: of an unknown layer, or of no layer."""
        name = self.name_of(parameter)
        if name in self._parameter_scores:
            values = self._parameter_scores[name][axis]
            self._verify(name, len(values), parameter.shape[axis], f"dimension {axis}")
            return values
        owner_name, _, attribute = name.rpartition(".")
        owner = self._model.get_submodule(owner_name)
        rule = rule_for(owner)
        if isinstance(rule, Rule) and attribute == rule.bias:
            return None  # counted with the layer's weight
        if isinstance(rule, Rule) and attribute == rule.weight and axis in (rule.out_axis, rule.in_axis):
            return self._side(owner_name, owner, rule, axis == rule.out_axis)
        self._note_unscored(name, "a parameter of no scored layer")
        return None

    def _verify(self, name: str, scored: int, present: int, side: str) -> None:
        if scored != present:
            raise ValueError(
                f"{name!r} was scored with {scored} {side} channels and has {present} now: it was pruned since; score "
                "the model again before the next step"
            )

    def _note_unscored(self, name: str, default: str) -> None:
        found = getattr(self._scores, "coverage", {}).get(name)
        self.unscored[name] = default if found is None else str(found.reason or found)


def _reduce_layers(reduction: str | None, parts: list[Tensor], covered: list[Tensor]) -> Tensor:
    """Reduce one vector per layer to one vector; ``covered`` says which root channels a layer has slices of."""
    layers = torch.stack([part.to(parts[0].device) for part in parts])
    if reduction == "sum":
        return layers.sum(0)
    if reduction == "mean":
        return layers.mean(0)
    if reduction == "max":
        return layers.amax(0)
    if reduction == "prod":
        return layers.where(torch.stack([part.to(layers.device) for part in covered]), 1).prod(0)
    if reduction == "first":
        return layers[0]
    if reduction == "gate":
        return layers[-1]
    return layers
