"""Break-even: above how many positions per step a fold is cheaper than the explicit 1x1 layers it stands for.

With T output positions, kernel area s, and o x i channels pruned to k x j, a forward needs these multiplications:

    explicit  T (o i s + k o + i j)          folded  T k j s + F

where F is the fold's own number, for any batch. The backward needs twice as many of each. They are equal at T*.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obc.model.arguments import listed
from obc.model.evaluation import call, evaluating
from obc.model.functional_uses import calling_layers
from obc.model.hooks import hooked
from obc.model.layouts import layer_of
from obc.recovery.folds import FoldedWeight


def break_even(fold: FoldedWeight, original: Tensor) -> float:
    """T* of one layer."""
    rows, columns = fold.factors()
    kept_rows, kept_columns, mixing = original.shape[0], original.shape[1], 0
    if rows is not None:
        blocks = rows.shape[0] if rows.dim() == 3 else 1
        kept_rows = blocks * rows.shape[-2]
        mixing += kept_rows * original.shape[0] // blocks
    if columns is not None:
        blocks = columns.shape[0] if columns.dim() == 3 else 1
        kept_columns = blocks * columns.shape[-1] * fold.in_repeat // fold.groups
        mixing += columns.shape[-1] * original.shape[1] * fold.groups  # for each of in_repeat columns
    naive = kept_rows * kept_columns * original.shape[2:].numel()
    return fold.multiplications(original) / (original.numel() + mixing - naive)


def positions(model: nn.Module, names: Sequence[str], example_inputs: Any) -> dict[str, int]:
    """The number of positions at which one forward pass applies these layers' weights; unreached layers are omitted.

    Args:
        model: the naively pruned model; run in eval mode, without gradients.
        example_inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
    """
    seen: dict[str, int] = {}

    def count(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        layout, weight = layer_of(module)
        activation = args[0] if layout.transposed else output  # rows of a weight stored (in, out) are its inputs
        seen[name] = seen.get(name, 0) + activation.numel() // max(1, weight.shape[0])

    handles = [model.get_submodule(name).register_forward_hook(partial(count, name)) for name in names]
    with hooked(handles), evaluating(model), torch.no_grad():
        calling_layers(call)(model, example_inputs)
    return seen


def warn_below(break_evens: Mapping[str, float], seen: Mapping[str, int]) -> None:
    """Warn of layers with fewer positions in ``seen`` than their break-even, naming both numbers."""
    few = [
        f"{name} (T = {seen[name]}, T* = {threshold:.0f})"
        for name, threshold in break_evens.items()
        if seen.get(name, threshold) < threshold
    ]
    if few:
        warnings.warn(
            f"with fewer than T* positions per step, folding costs more than explicit 1x1 layers: {listed(few)}; "
            f"use larger batches, share one fold between micro-batches (EquivalentPruning.accumulate), or use "
            f"factors='reduced'",
            stacklevel=3,
        )
