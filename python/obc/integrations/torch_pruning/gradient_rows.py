"""Rows read from gradients that the user's own loop left in ``.grad``.

For interfaces that provide a model after ``loss.backward()``. Each call contracts every gradient at once into a row r =
<w, dL/dw> per channel; no gradient is kept, and ``.grad`` remains the user's.

A loop may zero the gradients between rows or let them add up. A hook that fires once, before the next backward adds to
a gradient, subtracts from the row what was there already, so that the row holds only the new part.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from obc import ops
from obc.distribution import obc_version
from obc.model.rules import Rule, channel_count, rule_for
from obc.scoring.coverage import Coverage
from obc.scoring.reading.flat_row import FlatRow, Slot, end_row
from obc.scoring.results.scores import ChannelScores, Scores


@dataclass
class _Contraction:
    """The destination of the sums of one parameter times its gradient: one slot for each dimension that holds channels.

    Attributes:
        slots: (dimension, slot) pairs.
        groups: conv groups.
        is_weight: dimensions 0 and 1 of a layer's weight, read in one pass; otherwise each slot is read separately.
    """

    slots: dict[int, Slot] = field(default_factory=dict)
    groups: int = 1
    is_weight: bool = False


class GradientRows:
    """The scores of a model whose gradients another loop computes.

    Args:
        model: the model. Its parameters must stay the same objects: make a new instance after pruning.

    Attributes:
        num_rows: number of rows in :meth:`scores`.
        pending_rows: number of rows that :meth:`commit` has not added yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.num_rows = self.pending_rows = 0
        self._parameters = dict(model.named_parameters())
        self._contractions = {parameter: _Contraction() for parameter in self._parameters.values()}
        self._flats: dict[tuple[torch.device, torch.dtype], FlatRow] = {}
        self._modules: dict[str, tuple[Rule, Slot, Slot | None]] = {}
        self._unscored: dict[str, str] = {}
        for name, module in model.named_modules():
            rule = rule_for(module)
            if isinstance(rule, Rule):
                self._plan_module(name, module, rule)
            elif rule is not None:
                self._unscored[name] = rule
        self._raw = {name: p for name, p in self._parameters.items() if not self._contractions[p].slots}
        for name, parameter in self._raw.items():
            for axis, size in enumerate(parameter.shape):
                self._slot(name, parameter, axis, size)
        for flat in self._flats.values():
            flat.allocate()
        self._totals = {flat: torch.zeros_like(flat.scores) for flat in self._flats.values()}
        self._handles: dict[nn.Parameter, torch.utils.hooks.RemovableHandle] = {}
        self._reached: set[nn.Parameter] = set()
        self._backward_seen = False

    def _plan_module(self, name: str, module: nn.Module, rule: Rule) -> None:
        weight = getattr(module, rule.weight)
        if not isinstance(weight, nn.Parameter):
            self._unscored[name] = "a parametrisation computes its weight, so the weight has no gradient"
            return
        out = self._slot(name, weight, rule.out_axis, channel_count(module, rule, rule.out_axis))
        in_ = None
        if rule.in_axis is not None:
            in_ = self._slot(name, weight, rule.in_axis, channel_count(module, rule, rule.in_axis))
        self._contractions[weight].groups = rule.groups
        self._contractions[weight].is_weight |= not rule.elementwise
        if rule.bias is not None:
            bias = getattr(module, rule.bias)
            if isinstance(bias, nn.Parameter):
                self._contractions[bias].slots[bias.dim() - 1] = out
        self._modules[name] = (rule, out, in_)

    def _slot(self, name: str, parameter: nn.Parameter, axis: int, size: int) -> Slot:
        """The slot of one dimension; modules that share a weight share it."""
        slots = self._contractions[parameter].slots
        if axis not in slots:
            kind = (parameter.device, ops.accumulation_dtype(parameter.dtype))
            slots[axis] = self._flats.setdefault(kind, FlatRow(*kind)).add(name, size)
        return slots[axis]

    def is_of(self, model: nn.Module) -> bool:
        """Whether ``model`` is this model, with the same parameters."""
        if model is not self.model:
            return False
        now = dict(model.named_parameters())
        return now.keys() == self._parameters.keys() and all(now[name] is p for name, p in self._parameters.items())

    @torch.no_grad()
    def end_row(self, loss_scale: float = 1.0) -> None:
        """Contract the present gradients into a row and add its squares to the pending ones.

        A row that is not finite is left out with a warning that names the module.
        """
        new = [
            (parameter, parameter.grad)
            for parameter in self._contractions
            # If a backward did not reach a parameter, its gradient still is that of an earlier row.
            if parameter.grad is not None and not (self._backward_seen and parameter in self._handles)
        ]
        self._reached.update(parameter for parameter, _ in new)
        self._contract(new, sign=1)
        flats = list(self._flats.values())
        ended = end_row(flats, loss_scale)
        if bool(ended.finite):
            self.pending_rows += 1
        else:
            faults = (flat.first_fault(values[:, 0]) for flat, values in zip(flats, ended.values, strict=True))
            first = next(label for label in faults if label is not None)
            warnings.warn(f"a row is not finite, first in {first!r}, and was left out", stacklevel=3)
        self._watch()

    def _watch(self) -> None:
        self._backward_seen = False
        for parameter in self._contractions:
            if parameter.requires_grad and parameter not in self._handles:
                self._handles[parameter] = parameter.register_hook(partial(self._before_backward, parameter))

    @torch.no_grad()
    def _before_backward(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Subtract from the row that begins what ``parameter.grad`` already holds; fires once per row."""
        self._backward_seen = True
        self._handles.pop(parameter).remove()
        if parameter.grad is not None:
            self._contract([(parameter, parameter.grad)], sign=-1)

    def _contract(self, gradients: list[tuple[nn.Parameter, Tensor]], sign: int) -> None:
        weights: dict[torch.device, list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter, grad in gradients:
            grad = grad.to_dense() if grad.is_sparse else grad
            contraction = self._contractions[parameter]
            if contraction.is_weight:
                weights.setdefault(parameter.device, []).append((parameter, grad))
                continue
            for axis, slot in contraction.slots.items():
                self._add(slot, ops.channel_dot(parameter, grad, axis), sign)
        for pairs in weights.values():
            contractions = [self._contractions[parameter] for parameter, _ in pairs]
            layers, grads = [parameter for parameter, _ in pairs], [grad for _, grad in pairs]
            dots = ops.weight_dot_list(layers, grads, groups=[contraction.groups for contraction in contractions])
            for axis, axis_dots in enumerate(dots):
                for contraction, dot in zip(contractions, axis_dots, strict=True):
                    if axis in contraction.slots:
                        self._add(contraction.slots[axis], dot, sign)

    @staticmethod
    def _add(slot: Slot, dot: Tensor, sign: int) -> None:
        slot.of(slot.flat.row).add_(dot, alpha=sign)

    def commit(self) -> None:
        """Add the pending rows to the scores."""
        for flat, total in self._totals.items():
            total += flat.scores
            flat.scores.zero_()
        self.num_rows += self.pending_rows
        self.pending_rows = 0

    def zero_scores(self) -> None:
        """Forget the committed rows."""
        for total in self._totals.values():
            total.zero_()
        self.num_rows = 0
        self._stop_watching()

    def drop_pending(self) -> None:
        """Forget the rows that were not committed."""
        for flat in self._flats.values():
            flat.scores.zero_()
        self.pending_rows = 0
        self._stop_watching()

    def _stop_watching(self) -> None:
        """Remove every hook: the next row uses the gradients as they then are."""
        for flat in self._flats.values():
            flat.row.zero_()
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def scores(self) -> Scores:
        """The committed scores, per module."""
        coverage = {name: Coverage.unscored(reason) for name, reason in self._unscored.items()}
        channels = {}
        for name, (rule, out, in_) in self._modules.items():
            if getattr(self.model.get_submodule(name), rule.weight) in self._reached:
                coverage[name] = Coverage("weight gradient at hand")
                channels[name] = ChannelScores(self._total(out), None if in_ is None else self._total(in_))
            else:
                coverage[name] = Coverage.unscored("no gradient reached it in any row")
        metadata = {"model": type(self.model).__name__, "rows": "batch", "obc": obc_version() or "unknown"}
        return Scores(channels, num_rows=self.num_rows, coverage=coverage, metadata=metadata)

    def parameter_scores(self) -> dict[str, dict[int, Tensor]]:
        """The committed scores of parameters outside scored modules: name -> dimension -> (size,)."""
        return {
            name: {axis: self._total(slot) for axis, slot in self._contractions[parameter].slots.items()}
            for name, parameter in self._raw.items()
            if parameter in self._reached
        }

    def _total(self, slot: Slot) -> Tensor:
        return slot.of(self._totals[slot.flat]).clone().float()
