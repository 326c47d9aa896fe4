"""A layer as a matrix product: its input as rows, each read by one output position, and a change of its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc.model.rules import Rule
from obc.recovery.normal_equations import WeightChange
from obc.recovery.stream_points import Routing
from obc.statistics.part import Part

# Convolutions have far more positions than a regression needs: draw this many rows per column, over all batches.
_ROWS_PER_COLUMN = 32
# A position whose stream is this much smaller than the batch's average, in mean square, gets no larger weight.
_SMALLEST_STREAM = 1e-4
# A channel that enters the sum with a factor this much smaller than the largest can't correct it.
_SMALLEST_FACTOR = 1e-3


def columns_of(module: nn.Module, layout: Rule) -> tuple[int, int, int]:
    """(blocks, columns, outputs) of the matrix that the layer multiplies with; a convolution's columns include taps."""
    weight: Any = module.weight
    if layout.transposed:  # transformers' Conv1D: (in, out)
        return 1, weight.shape[0], weight.shape[1]
    return layout.groups, weight[0].numel(), weight.shape[0] // layout.groups


def drawn_rows(module: nn.Module, layout: Rule, positions: int, batches: int) -> Any:
    """The positions of a batch to read: indices, or a slice for all of them."""
    if not layout.convolution:
        return slice(None)
    wanted = -(-_ROWS_PER_COLUMN * columns_of(module, layout)[1] // batches)
    if positions <= wanted:
        return slice(None)
    # The same positions in every batch, so that the result depends neither on the order nor on the process.
    return torch.randperm(positions, generator=torch.Generator().manual_seed(0), device="cpu")[:wanted].sort().values


def valid_rows(batch: Any, x: Tensor, routing: Routing | None = None) -> Tensor | slice:
    """Indices of the positions of ``x``, (B, T, C) or (B * T, C), that the batch's mask keeps; without one, all.

    With ``routing`` the positions of ``x``, (n, C), are the tokens that an expert got.
    """
    part = Part()
    part.begin(batch)
    if routing is not None:
        if part.valid is None or part.valid.numel() != routing.total:
            return slice(None)
        return part.valid.flatten().to(routing.tokens.device)[routing.tokens].nonzero()[:, 0]
    valid = part.valid_positions(x, -1)
    return slice(None) if valid is None else valid.flatten().nonzero()[:, 0]


def input_rows(module: nn.Module, layout: Rule, x: Tensor, rows: Any) -> Tensor:
    """(blocks, rows, columns) of the layer's input."""
    if not layout.convolution:
        return x.reshape(-1, x.shape[-1])[rows][None]
    patches = _patches(module, x)
    dims = (patches.dim() - 2) // 2
    positions = patches.movedim(1, 1 + dims)  # (batch, *positions, channels, *taps)
    shape = positions.shape[: 1 + dims]
    index = torch.arange(shape.numel(), device=x.device)[rows if isinstance(rows, slice) else rows.to(x.device)]
    taken = positions[torch.unravel_index(index, shape)]
    return taken.unflatten(1, (layout.groups, -1)).flatten(2).transpose(0, 1)


def channel_rows(x: Tensor, layout: Rule, repeat: int = 1) -> Tensor:
    """(positions, channels) of a layer's input or output; after a flatten every column of a channel is a position."""
    if layout.convolution:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    return rows if repeat == 1 else rows.unflatten(1, (-1, repeat)).transpose(1, 2).flatten(0, 1)


def output_rows(layout: Rule, y: Tensor, rows: Any) -> Tensor:
    """(blocks, rows, outputs) of a tensor of the layer's output shape, at the same positions."""
    taken = channel_rows(y, layout)[rows if isinstance(rows, slice) else rows.to(y.device)]
    return taken.unflatten(1, (layout.groups, -1)).transpose(0, 1)


def stream_weights(stream: Tensor) -> Tensor:
    """(rows,): one over the mean square of the unpruned stream, (blocks, rows, channels), at every position.

    Norms that read a stream of tokens divide by its size, so the relative error counts. With equal weights a few
    special tokens, whose stream is many times larger, would determine the regression of a transformer.
    """
    squares = stream.double().square().mean((0, 2))
    return 1 / squares.clamp_min(max(_SMALLEST_STREAM * float(squares.mean()), torch.finfo(torch.float64).tiny))


def _patches(module: Any, x: Tensor) -> Tensor:
    """(batch, channels, *positions, *taps) of a convolution's input, a view of the padded input."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for dim, (taps, stride, dilation) in enumerate(sizes, 2):
        x = x.unfold(dim, dilation * (taps - 1) + 1, stride)[..., ::dilation]
    return x


def apply_change(module: nn.Module, layout: Rule, change: WeightChange, norm: _BatchNorm | None = None) -> None:
    """weight += change, in place; the same for the bias, or for the mean that ``norm`` subtracts from the output."""
    weight: Any = module.weight
    flat = change.weight.flatten(0, 1)
    added = flat.mT if layout.transposed else flat.reshape(weight.shape)
    weight.copy_((weight.double() + added.to(weight.device)).to(weight.dtype))
    if change.bias is not None:
        constant: Any = module.bias if norm is None else norm.running_mean
        added = change.bias.flatten().to(constant.device) * (1 if norm is None else -1)
        constant.copy_((constant.double() + added).to(constant.dtype))


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b; half precision is subtracted in float32."""
    return a - b if a.dtype in (torch.float32, torch.float64) else a.float() - b.float()


def inverse_scale(scale: Tensor | float, point: Tensor, dim: int) -> tuple[Tensor | None, Tensor | float]:
    """(1 / scale, 0 where a channel can't correct anything; scale)."""
    if isinstance(scale, float):
        if scale == 1.0:
            return None, 1.0
        scale = torch.full((point.shape[dim],), scale, device=point.device)
    usable = scale.abs() > _SMALLEST_FACTOR * scale.abs().max()
    return torch.where(usable, 1 / torch.where(usable, scale, torch.ones_like(scale)), torch.zeros_like(scale)), scale
