"""The parametrisations of a folded layer: its weight and bias as folds of the original ones.

``factors="full"``: C is (kept out, out) and D (in, kept in), starting as rows and columns of the identity.
``factors="reduced"``: they hold only the dropped channels and start as zeros; the kept ones' part is the identity and
is never multiplied. The original weight is stored with the kept channels of each block before the dropped ones.

As long as the factors have their initial values, a forward selects the kept channels instead of multiplying. The values
are compared each time until a change is first seen, whatever caused it: an optimizer, a loaded state dict, or a write
that bumps no version counter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from obc import ops
from obc.backends import gemm
from obc.model.kept import Kept
from obc.model.rules import Rule
from obc.model.slicing import sliced_weight


class FoldedTensor(nn.Module):
    """A parametrisation: one tensor of a layer as a fold of the original's.

    Attributes:
        held: the folded tensor shared by every forward inside :meth:`EquivalentPruning.accumulate`.
        parameter_names: the layer's parameters in order, to restore it when merging.
    """

    def __init__(self, parameter_names: tuple[str, ...]) -> None:
        super().__init__()
        self.parameter_names = parameter_names
        self.held: Tensor | None = None

    def forward(self, original: Tensor) -> Tensor:
        """The folded tensor: the held one, or a new fold."""
        return self.fold(original) if self.held is None else self.held

    def fold(self, original: Tensor) -> Tensor:
        """Compute the pruned tensor from the original one."""
        raise NotImplementedError


class FoldedWeight(FoldedTensor):
    """weight = C W D.

    Attributes:
        kept: positions of the kept channels in the stored original, while the factors have their initial values; else
            None.
    """

    def __init__(
        self,
        parameter_names: tuple[str, ...],
        compressor: nn.Parameter | None,
        decompressor: nn.Parameter | None,
        layout: Rule,
        kept: Kept,
        reduced: bool,
    ) -> None:
        super().__init__(parameter_names)
        self.compressor, self.decompressor = compressor, decompressor
        self.layout, self.in_repeat, self.reduced = layout, kept.in_repeat, reduced
        self.kept: Kept | None = kept

    @property
    def groups(self) -> int:
        """The number of groups of a convolution; 1 for other layers."""
        return self.layout.groups

    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """The factors for the stored weight's rows and columns; a transposed convolution stores (in, out)."""
        if not self.layout.transposed:
            return self.compressor, self.decompressor
        rows, columns = (None if factor is None else factor.mT for factor in (self.decompressor, self.compressor))
        return rows, columns

    def multiplications(self, original: Tensor) -> int:
        """Multiplications of one fold in a forward."""
        return min(gemm.multiplications(original, *self.factors(), self.groups, self.in_repeat, self.reduced))

    def fold(self, original: Tensor) -> Tensor:
        """(out kept, in kept, *kernel) C W D."""
        rows, columns = self.factors()
        if self.kept is not None and self._comparable(original):
            if self._unchanged():
                return _Kept.apply(original, rows, columns, self)
            self.kept = None
        if self.reduced:
            return gemm.fold(original, rows, columns, self.groups, self.in_repeat, reduced=True)
        return ops.fold(original, rows, columns, self.groups, self.in_repeat)

    @staticmethod
    def _comparable(original: Tensor) -> bool:
        """Whether values can be compared: not in a traced graph, nor while a CUDA graph is recorded."""
        if torch.compiler.is_compiling() or type(original) not in (Tensor, nn.Parameter):
            return False
        return not (original.is_cuda and torch.cuda.is_current_stream_capturing())

    def _unchanged(self) -> bool:
        assert self.kept is not None
        decompressor = None if self.decompressor is None else self.decompressor.mT
        sides = ((self.compressor, self.kept.out_channels), (decompressor, self.kept.in_channels))
        return all(
            factor is None or (not factor.any() if self.reduced else is_selection(factor, kept))
            for factor, kept in sides
        )


def is_selection(factor: Tensor, kept: Tensor | None) -> bool:
    """Whether (kept, all), or its diagonal blocks, has ones at the columns ``kept`` and zeros elsewhere."""
    if kept is None or int(factor.count_nonzero()) != len(kept):
        return False
    local = (kept.to(factor.device) % factor.shape[-1]).reshape(factor.shape[:-1])
    return bool((factor.gather(-1, local[..., None]) == 1).all())


class _Kept(torch.autograd.Function):
    """A fold with identity factors: the kept channels of the weight, with the fold's gradients."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, rows: Tensor | None, columns: Tensor | None, fold: FoldedWeight) -> Tensor:
        ctx.save_for_backward(original, rows, columns)
        ctx.form = (fold.groups, fold.in_repeat, fold.reduced)
        assert fold.kept is not None
        return sliced_weight(original, fold.layout, fold.kept).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        groups, in_repeat, reduced = ctx.form
        needs = ctx.needs_input_grad[:3]
        original, rows, columns = ctx.saved_tensors
        found = gemm.fold_backward(grads[0], original, rows, columns, groups, in_repeat, needs=needs, reduced=reduced)
        return (*found, None)


class FoldedBias(FoldedTensor):
    """bias = C b, with the C of the layer's weight."""

    def __init__(self, parameter_names: tuple[str, ...], compressor: nn.Parameter, reduced: bool) -> None:
        super().__init__(parameter_names)
        self.compressor, self.reduced = compressor, reduced

    def fold(self, original: Tensor) -> Tensor:
        """(out kept,) C b."""
        if self.reduced:
            return gemm.fold(original[:, None], self.compressor, reduced=True)[:, 0]
        return ops.fold(original[:, None], self.compressor)[:, 0]
