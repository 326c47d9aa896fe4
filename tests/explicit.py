"""The network that Equivalent Pruning stands for: real layers before and after every pruned one. No fold anywhere."""

from __future__ import annotations

import copy

import torch
from prunable import Pruned
from torch import Tensor, nn

from obc.equivalent import EquivalentPruning


def mix(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Channels along ``dim`` of an activation mixed by (to, from), or by the blocks of a block-diagonal matrix."""
    blocks = matrix if matrix.dim() == 3 else matrix[None]
    x = x.movedim(dim, -1).unflatten(-1, (blocks.shape[0], -1))
    return torch.einsum("...bi,bji->...bj", x, blocks).flatten(-2).movedim(-1, dim)


class Explicit(nn.Module):
    """Decompressor, the unpruned layer, compressor."""

    def __init__(
        self, full: nn.Module, compressor: Tensor | None, decompressor: Tensor | None, in_repeat: int = 1
    ) -> None:
        super().__init__()
        self.full, self.in_repeat = full, in_repeat
        self.dim = -1 if isinstance(full, nn.Linear) else 1
        self.compressor = None if compressor is None else nn.Parameter(compressor)
        self.decompressor = None if decompressor is None else nn.Parameter(decompressor)

    def forward(self, x: Tensor) -> Tensor:
        if self.decompressor is not None and self.in_repeat > 1:
            x = mix(x.unflatten(-1, (-1, self.in_repeat)), self.decompressor, -2).flatten(-2)
        elif self.decompressor is not None:
            x = mix(x, self.decompressor, self.dim)
        x = self.full(x)
        return x if self.compressor is None else mix(x, self.compressor, self.dim)


def explicit_model(pruned: Pruned, equivalent: EquivalentPruning) -> nn.Module:
    """The pruned network with explicit layers that start where ``equivalent``'s factors are now."""
    model = copy.deepcopy(pruned.model)
    folded, originals = dict(equivalent.model.named_modules()), dict(pruned.original.named_modules())
    for name in originals:
        if not hasattr(folded[name], "parametrizations"):
            continue
        fold = folded[name].parametrizations.weight[0]
        factors = (None if f is None else f.detach().clone() for f in (fold.compressor, fold.decompressor))
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], Explicit(copy.deepcopy(originals[name]), *factors, fold.in_repeat))
    return model


def explicit_name(name: str, explicit: nn.Module) -> str:
    """The parameter of the explicit model that the folded model's parameter ``name`` is."""
    layer, _, rest = name.partition(".parametrizations.")
    if rest:
        tensor, which = rest.split(".")[0], rest.split(".")[-1]
        return f"{layer}.full.{tensor}" if which == "original" else f"{layer}.{which}"
    layer, _, tensor = name.rpartition(".")
    return f"{layer}.full.{tensor}" if isinstance(explicit.get_submodule(layer), Explicit) else name
