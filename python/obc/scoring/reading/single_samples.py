"""Batches of one sample: torch's BatchNorm and InstanceNorm on the CPU misread the layout of some gradients.

A gradient of shape (1, C, *S) whose channels lie innermost, for example after a transposed tensor of tokens, counts
as contiguous in two memory formats if the meaningless stride of its first dimension is not C times the positions. The
backward of these norms then assumes the wrong format, and the gradients of input, weight and bias are wrong (torch
2.13, eval and train mode, all dtypes), with or without obc.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, contiguous_format, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from obc.model.hooks import hook_before_others


def guard(module: nn.Module) -> RemovableHandle | None:
    """Protect the norm's backward from such gradients until the handle is removed; None if the module needs none."""
    if not isinstance(module, _NormBase):
        return None
    # First, so that it is the last hook to see the gradient, as the norm would get it.
    return hook_before_others(module, _guard_output)


def _guard_output(module: nn.Module, args: Any, output: Any) -> None:
    if not isinstance(output, Tensor) or output.shape[0] != 1 or output.device.type != "cpu" or is_compiling():
        return
    if output.requires_grad:
        output.register_hook(_with_plain_strides)


def _with_plain_strides(grad: Tensor) -> Tensor | None:
    """A contiguous copy if the stride of the only sample is not the number of its elements."""
    return None if grad.stride(0) == grad.numel() else grad.clone(memory_format=contiguous_format)
