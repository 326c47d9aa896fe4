"""A loss without labels: random projections of the model's output, whose rows tell how much the output changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from obc.model.evaluation import call_on_batch, tensors_in
from obc.scoring.scorer import Rows


def label_free_loss(
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    *,
    rows: Rows = "batch",
    seed: int = 0,
    centre: bool | None = None,
) -> LabelFreeLoss:
    """The loss v . z of each sample, with z the model's output and v ~ N(0, I): for :func:`obc.score` without labels.

    r[n, c] = w_c . d(v . z)/dw_c, so that over v the mean of r^2 is |J_c w_c|^2: how far the output moves to first
    order when channel c goes.

    Args:
        forward_fn: ``forward_fn(model, batch)`` returns the outputs; by default
            :func:`obc.model.evaluation.call_on_batch`.
        rows: "batch": the mean over the samples, a scalar. "sample": the vector (B,).
        seed: v of sample b of row n depends on (seed, n, b) alone: the same in every run, however the batch is split.
        centre: v minus its mean over the classes, so that a shift of all logits, which no softmax sees, does not count.
            Classes lie along dim 1 of images (B, C, H, W), along the last dim of all else. None: centre, unless the
            output is hidden states.
    """
    return LabelFreeLoss(forward_fn, rows, seed, centre)


class LabelFreeLoss:
    """What :func:`label_free_loss` makes: ``loss(model, batch)``.

    z is the output itself where it is a tensor, of a mapping or a transformers output ``logits``, else
    ``last_hidden_state``, otherwise the first floating tensor. Positions that ``batch["attention_mask"]`` leaves out
    don't count.
    """

    def __init__(
        self, forward_fn: Callable[[nn.Module, Any], Any] | None, rows: Rows, seed: int, centre: bool | None
    ) -> None:
        if rows not in ("batch", "sample"):
            raise ValueError(f"rows must be 'batch' or 'sample', got {rows!r}")
        self.forward_fn, self.rows, self.seed, self.centre = forward_fn or call_on_batch, rows, seed, centre
        # What a run that goes on from a checkpoint must have in common with the one before.
        self.identity = {"label_free_seed": seed, "label_free_centre": centre}
        self._row = self._sample = 0

    def seek(self, row: int, sample: int = 0) -> None:
        """The next call is of row ``row``, from its sample ``sample`` on. Without it, calls go on within one row."""
        self._row, self._sample = row, sample

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        z, is_hidden = _floating_output(self.forward_fn(model, batch))
        v = torch.stack([self._draw(z[0], self._sample + index) for index in range(len(z))])
        self._sample += len(z)
        classes = 1 if z.dim() >= 4 else -1
        centre = not is_hidden if self.centre is None else self.centre
        if centre and z.dim() > 1 and z.shape[classes] > 1:
            v = v - v.mean(classes, keepdim=True)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and z.dim() == 3 and mask.shape == z.shape[:2]:
            v = v * mask.unsqueeze(-1)
        losses = (v * z.to(v.dtype)).flatten(1).sum(1) if z.dim() > 1 else v * z
        return losses if self.rows == "sample" else losses.mean()

    def _draw(self, like: Tensor, sample: int) -> Tensor:
        """v of one sample, float32 (float64 for float64), on the device of the output."""
        state = np.random.SeedSequence((self.seed, self._row, sample)).generate_state(1, np.uint64)
        generator = torch.Generator(like.device).manual_seed(int(state[0]) >> 1)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.randn(like.shape, generator=generator, dtype=dtype, device=like.device)


def _floating_output(output: Any) -> tuple[Tensor, bool]:
    """The output to project, and whether it is hidden states."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return _with_samples(output), False
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return _with_samples(value), name == "last_hidden_state"
    for tensor in tensors_in(output):
        if tensor.is_floating_point():
            return _with_samples(tensor), False
    raise ValueError(f"forward_fn returned no floating tensor but {type(output).__name__}; pass one that does")


def _with_samples(output: Tensor) -> Tensor:
    if output.dim() == 0 or len(output) == 0:
        raise ValueError(
            f"label-free rows need an output with samples along dim 0, got shape {tuple(output.shape)}; pass a "
            "forward_fn that returns one"
        )
    return output
