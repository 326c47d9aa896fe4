"""The functions through which ``obc.prune`` runs the caller's model: its loss, its outputs, and an example call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from obc.model.arguments import one_of, refuse_uncallable
from obc.model.autocast import in_present_autocast
from obc.model.batches import RowKind
from obc.model.errors import PruningError, on_batch
from obc.model.evaluation import ForwardFn, Function, LossFn, Run, call, call_on_batch, with_outputs
from obc.model.functional_uses import calling_layers
from obc.scoring.label_free import label_free_loss


@dataclass(frozen=True)
class Functions:
    """The caller's functions and what follows from them; each runs under the autocast of the call to ``obc.prune``.

    Attributes:
        loss_fn: the caller's ``loss_fn``, or None.
        forward_fn: the caller's ``forward_fn``; without both functions, calls the model on the batch.
        loss: ``loss(model, batch)`` is the loss whose rows are read.
        forward: ``forward(model, batch)`` returns the outputs to preserve.
        example: ``example(model, inputs)`` calls the model on its example inputs.
    """

    loss_fn: LossFn | ForwardFn | None
    forward_fn: ForwardFn | None
    loss: LossFn
    forward: ForwardFn
    example: ForwardFn

    @classmethod
    def of(
        cls, loss_fn: LossFn | ForwardFn | None, forward_fn: ForwardFn | None, labels: bool, rows: RowKind, seed: int
    ) -> Functions:
        """Convert the arguments of ``obc.prune``.

        Raises:
            ValueError: ``rows`` is unknown, or labels are used without a ``loss_fn``.
        """
        refuse_uncallable(loss_fn=loss_fn, forward_fn=forward_fn)
        if loss_fn is None:
            forward_fn = forward_fn or call_on_batch
        loss_fn, forward_fn = _as_here(loss_fn), _as_here(forward_fn)
        forward = forward_fn
        if forward is None:
            assert loss_fn is not None
            forward = _outputs_inside(loss_fn) if labels else loss_fn
        one_of("rows", rows, get_args(RowKind))
        if not labels:
            loss: LossFn = label_free_loss(forward, rows=rows, seed=seed)
        elif loss_fn is None:
            raise ValueError("loss_fn is needed if labels are used; labels=False scores by the model's outputs alone")
        else:
            loss = loss_fn
        return cls(loss_fn, forward_fn, loss, forward, _as_here(call))

    def run_on(self, batch: Any) -> Run:
        """``run(model)``: what ``forward_fn`` returns on the batch, or what the model returns while ``loss_fn`` runs.

        The loss itself is compared only if ``loss_fn`` calls parts of the model alone. It may also read weights (a
        penalty on their norm), and these differ legitimately, because they still contain masked units.
        """
        forward_fn, loss_fn = self.forward_fn, self.loss_fn

        def run(model: nn.Module) -> Any:
            if forward_fn is not None:
                with on_batch(model, batch, called="forward_fn"):
                    return forward_fn(model, batch)
            assert loss_fn is not None
            with on_batch(model, batch):
                loss, outputs = with_outputs(model, lambda: loss_fn(model, batch))
            return outputs or loss

        return run


def _as_here(function: Function) -> Function:
    """``function`` under the present autocast, with calls of layers in place of functional uses."""
    return calling_layers(in_present_autocast(function))


def _outputs_inside(loss_fn: LossFn) -> ForwardFn:
    """Returns the model's outputs while ``loss_fn`` runs."""

    def forward(model: nn.Module, batch: Any) -> list[Any]:
        try:
            with on_batch(model, batch):
                _, outputs = with_outputs(model, lambda: loss_fn(model, batch))
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
            raise PruningError(
                f"loss_fn needs gradients itself, but the outputs to preserve are computed without ({error}); pass "
                "forward_fn(model, batch) as well, which returns the outputs alone"
            ) from error
        if not outputs:
            raise ValueError(
                "loss_fn does not call the model itself, but parts of it or nothing; pass forward_fn as well"
            )
        return outputs

    return forward
