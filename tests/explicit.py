"""The network that Equivalent Pruning stands for: real layers before and after every pruned one. No fold anywhere."""

from __future__ import annotations

import copy

import torch
from prunable import Pruned
from torch import Tensor, nn

from obc.model.kept import Kept
from obc.recovery import EquivalentPruning
from obc.recovery.folds import FoldedWeight


def mix(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Channels along ``dim`` of an activation mixed by (to, from), or by the blocks of a block-diagonal matrix."""
    blocks = matrix if matrix.dim() == 3 else matrix[None]
    x = x.movedim(dim, -1).unflatten(-1, (blocks.shape[0], -1))
    return torch.einsum("...bi,bji->...bj", x, blocks).flatten(-2).movedim(-1, dim)


def whole(dropped: Tensor, kept: Tensor) -> Tensor:
    """(kept, all) from its columns of the dropped channels; those of the kept ones are the identity, for good."""
    blocks = dropped if dropped.dim() == 3 else dropped[None]
    size = blocks.shape[1] + blocks.shape[2]
    local = kept.reshape(len(blocks), -1) % size
    others = torch.stack([torch.tensor([i for i in range(size) if i not in block.tolist()]) for block in local])
    ones = torch.ones(*local.shape, 1, dtype=dropped.dtype)
    matrix = torch.zeros(*local.shape, size, dtype=dropped.dtype).scatter(2, local[..., None], ones)
    return matrix.scatter(2, others.reshape(len(blocks), 1, -1).expand(blocks.shape), blocks)


class Explicit(nn.Module):
    """Decompressor, the unpruned layer, compressor; with ``kept``, the factors are those of the dropped channels."""

    def __init__(
        self,
        full: nn.Module,
        compressor: Tensor | None,
        decompressor: Tensor | None,
        in_repeat: int = 1,
        kept: Kept | None = None,
    ) -> None:
        super().__init__()
        self.full, self.in_repeat, self.kept = full, in_repeat, kept
        self.dim = -1 if isinstance(full, nn.Linear) else 1
        self.compressor = None if compressor is None else nn.Parameter(compressor)
        self.decompressor = None if decompressor is None else nn.Parameter(decompressor)

    def forward(self, x: Tensor) -> Tensor:
        compressor, decompressor = self.compressor, self.decompressor
        if self.kept is not None:
            compressor = None if compressor is None else whole(compressor, self.kept.out_channels)
            decompressor = None if decompressor is None else whole(decompressor.mT, self.kept.in_channels).mT
        if decompressor is not None and self.in_repeat > 1:
            x = mix(x.unflatten(-1, (-1, self.in_repeat)), decompressor, -2).flatten(-2)
        elif decompressor is not None:
            x = mix(x, decompressor, self.dim)
        x = self.full(x)
        return x if compressor is None else mix(x, compressor, self.dim)


def fold_of(equivalent: EquivalentPruning, layer: str) -> FoldedWeight:
    return equivalent.model.get_submodule(layer).parametrizations.weight[0]


def explicit_model(pruned: Pruned, equivalent: EquivalentPruning) -> nn.Module:
    """The pruned network with explicit layers that start where ``equivalent``'s factors are now."""
    model = copy.deepcopy(pruned.model)
    folded, originals = dict(equivalent.model.named_modules()), dict(pruned.original.named_modules())
    for name in originals:
        if not hasattr(folded[name], "parametrizations"):
            continue
        fold = fold_of(equivalent, name)
        factors = (None if f is None else f.detach().clone() for f in (fold.compressor, fold.decompressor))
        kept = pruned.plan[name] if fold.reduced else None
        explicit = Explicit(copy.deepcopy(originals[name]), *factors, fold.in_repeat, kept)
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], explicit)
    return model


def explicit_name(name: str, explicit: nn.Module) -> str:
    """The parameter of the explicit model that the folded model's parameter ``name`` is."""
    layer, _, rest = name.partition(".parametrizations.")
    if rest:
        tensor, which = rest.split(".")[0], rest.split(".")[-1]
        return f"{layer}.full.{tensor}" if which == "original" else f"{layer}.{which}"
    layer, _, tensor = name.rpartition(".")
    return f"{layer}.full.{tensor}" if isinstance(explicit.get_submodule(layer), Explicit) else name


def as_stored(name: str, tensor: Tensor, explicit: nn.Module, pruned: Pruned) -> Tensor:
    """The explicit model's ``tensor`` as the folded model's ``name`` orders it: for reduced factors kept ones first."""
    layer = name.partition(".parametrizations.")[0]
    if not name.endswith(".original") or explicit.get_submodule(layer).kept is None:
        return tensor
    kept, module = pruned.plan[layer], pruned.model.get_submodule(layer)
    groups = getattr(module, "groups", 1)
    transposed = isinstance(module, nn.ConvTranspose2d) and tensor.dim() > 1
    for channels, dim in ((kept.out_channels, int(transposed)), (kept.in_columns, int(not transposed))):
        if channels is None or dim >= tensor.dim():
            continue
        blocks = groups if groups > 1 or dim == 1 else kept.out_blocks
        tensor = _kept_first(tensor, channels, dim, blocks, grouped_columns=groups > 1 and dim == 1)
    return tensor


def _kept_first(tensor: Tensor, kept: Tensor, dim: int, blocks: int, grouped_columns: bool) -> Tensor:
    size = tensor.shape[dim] if grouped_columns else tensor.shape[dim] // blocks
    parts = []
    rows = tensor.unflatten(0, (blocks, -1)) if grouped_columns else tensor.unflatten(dim, (blocks, -1)).movedim(dim, 0)
    for part, block in zip(rows, kept.reshape(blocks, -1) % size, strict=True):
        order = block.tolist() + [i for i in range(size) if i not in block.tolist()]
        parts.append(part.index_select(dim, torch.tensor(order)))
    return torch.cat(parts, 0 if grouped_columns else dim)
