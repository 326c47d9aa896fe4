"""A loss without labels: random projections of the output. Its rows tell how much the output changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from obc.model.arguments import one_of, refuse_uncallable
from obc.model.batches import RowKind, attention_mask
from obc.model.evaluation import call_on_batch, main_output

Metric = Literal["euclidean", "kl"]


def label_free_loss(
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    *,
    rows: RowKind = "batch",
    seed: int = 0,
    centre: bool | None = None,
    metric: Metric = "euclidean",
) -> LabelFreeLoss:
    """The loss v . z of each sample for :func:`obc.score` without labels; z is the model's output, v ~ N(0, M).

    r[n, c] = w_c . d(v . z)/dw_c. The mean of r^2 over v is (J_c w_c)^T M (J_c w_c): how far the output moves, to first
    order, when channel c is removed. Rows of ``metric="kl"`` see only what changes the probabilities, and suit language
    models and classifiers; for embeddings and regression "euclidean" is right.

    Args:
        forward_fn: ``forward_fn(model, batch)`` returns the outputs; by default
            :func:`obc.model.evaluation.call_on_batch`.
        rows: "batch": the mean over the samples, a scalar. "sample": a vector (B,).
        seed: v of sample b of row n depends only on (seed, n, b), so it is the same however the batch is split.
        centre: subtract v's mean over the classes, so that a shift of all logits, which a softmax ignores, does not
            count. Classes lie along dim 1 of images (B, C, H, W), otherwise along the last dim. None centres unless the
            output is hidden states.
        metric: "euclidean": M = I. "kl": z are logits, p = softmax(z) over the classes, and M = diag(p) - p p^T, the
            Fisher information, so that r^2 / 2 of a sample is on average the KL divergence between its probabilities
            and those without the channel, to second order. Classes whose logit is minus infinity don't count.

    Raises:
        ValueError: ``rows`` or ``metric`` is unknown, or ``centre`` is False with "kl"; when called, the output has no
            samples, or with "kl" no classes.
    """
    return LabelFreeLoss(forward_fn, rows, seed, centre, metric)


class LabelFreeLoss:
    """The loss that :func:`label_free_loss` returns: ``loss(model, batch)``. Arguments and errors: see
    :func:`label_free_loss`.

    z is the output if that is a tensor; of a mapping or transformers output it is ``logits``, else
    ``last_hidden_state``, else the first floating tensor. Positions masked by ``batch["attention_mask"]`` don't
    count.
    """

    def __init__(
        self,
        forward_fn: Callable[[nn.Module, Any], Any] | None,
        rows: RowKind,
        seed: int,
        centre: bool | None,
        metric: Metric = "euclidean",
    ) -> None:
        refuse_uncallable(forward_fn=forward_fn)
        one_of("rows", rows, get_args(RowKind))
        one_of("metric", metric, get_args(Metric))
        if metric == "kl" and centre is False:
            raise ValueError("metric='kl' is centred: a shift of all logits changes no probability; leave out centre")
        self.forward_fn, self.rows, self.seed, self.centre = forward_fn or call_on_batch, rows, seed, centre
        self.metric = metric
        # What must match when a run resumes from a checkpoint.
        self.identity = {"label_free_seed": seed, "label_free_centre": centre, "label_free_metric": metric}
        self._row = self._sample = 0

    def seek(self, row: int, sample: int = 0) -> None:
        """Make the next call belong to row ``row``, from ``sample`` on; otherwise calls continue the same row."""
        self._row, self._sample = row, sample

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        z, is_hidden = _floating_output(self.forward_fn(model, batch))
        v = torch.stack([self._draw(z[0], self._sample + index) for index in range(len(z))])
        self._sample += len(z)
        classes = 1 if z.dim() >= 4 else -1
        centre = not is_hidden if self.centre is None else self.centre
        if self.metric == "kl":
            v = _of_fisher_information(v, z, classes, is_hidden)
            # p log p is zero for a masked class: as z of minus infinity it has p = 0 and v = 0, whose product is NaN.
            z = z.masked_fill(z == -math.inf, 0)
        elif centre and z.dim() > 1 and z.shape[classes] > 1:
            v = v - v.mean(classes, keepdim=True)
        mask = attention_mask(batch)
        if mask is not None and z.dim() == 3 and mask.shape == z.shape[:2]:
            v = v * mask.unsqueeze(-1)
        losses = (v * z.to(v.dtype)).flatten(1).sum(1) if z.dim() > 1 else v * z
        return losses if self.rows == "sample" else losses.mean()

    def _draw(self, like: Tensor, sample: int) -> Tensor:
        """v of one sample, float32 (float64 for a float64 output), on the output's device."""
        state = np.random.SeedSequence((self.seed, self._row, sample)).generate_state(1, np.uint64)
        generator = torch.Generator(like.device).manual_seed(int(state[0]) >> 1)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.randn(like.shape, generator=generator, dtype=dtype, device=like.device)


def _of_fisher_information(v: Tensor, z: Tensor, classes: int, is_hidden: bool) -> Tensor:
    """N(0, diag(p) - p p^T) from v ~ N(0, I), p = softmax(z) along the dimension ``classes``."""
    if is_hidden or z.dim() < 2 or z.shape[classes] < 2:
        what = "hidden states" if is_hidden else "an output"
        raise ValueError(
            f"metric='kl' needs logits of two classes or more, got {what} of shape {tuple(z.shape)}; use "
            "metric='euclidean'"
        )
    p = z.detach().to(v.dtype).softmax(classes)
    scaled = p.sqrt() * v
    return scaled - p * scaled.sum(classes, keepdim=True)


def _floating_output(output: Any) -> tuple[Tensor, bool]:
    """The output to project, and whether it is hidden states."""
    found = main_output(output)
    if found is None or not found[1].is_floating_point():
        raise ValueError(f"forward_fn returned {type(output).__name__}, expected a floating tensor")
    return _with_samples(found[1]), found[0] == "last_hidden_state"


def _with_samples(output: Tensor) -> Tensor:
    if output.dim() == 0 or len(output) == 0:
        raise ValueError(
            f"label-free rows need an output with samples along dim 0, got shape {tuple(output.shape)}; with "
            "labels=False return the model's outputs, not a loss"
        )
    return output
