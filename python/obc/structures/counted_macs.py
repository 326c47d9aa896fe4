"""Counts the MACs that a model executes in one forward pass, per module and operation by operation."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from obc.model.errors import explained
from obc.model.evaluation import Run, evaluating
from obc.model.hooks import hooked
from obc.model.names import named_modules
from obc.model.settings import every_submodule

aten = torch.ops.aten
Sizes = tuple[int, ...]


# --- the sizes of a product, whose product is its MACs; shapes are torch.Size ----------------------------------------


def _matrices(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> Sizes:
    return (*a_shape, b_shape[-1])  # (rows, in) times (in, out); batches first


def _added_matrices(bias_shape: Any, a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> Sizes:
    return _matrices(a_shape, b_shape)


def _convolution(
    x_shape: Any,
    w_shape: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *args: Any,
    out_shape: Any,
    **kwargs: Any,
) -> Sizes:
    """Samples, positions (of the input if transposed, else of the output), and the sizes of the weight."""
    positions = x_shape if transposed else out_shape
    return (x_shape[0], *positions[2:], *w_shape)


# (rows, in) times (groups, in, out), where every row uses the matrix of its group, has the sizes of a plain product.
_PRODUCTS: dict[Any, Callable[..., Sizes]] = {
    aten.mm: _matrices,
    aten.bmm: _matrices,
    aten.addmm: _added_matrices,
    aten.baddbmm: _added_matrices,
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten._grouped_mm: _matrices,
}


@contextlib.contextmanager
def counting_products(model: nn.Module, note: Callable[[Sizes], None] | None = None) -> Iterator[Any]:
    """Torch's counter of FLOPs, two per MAC, under which everything that it can't look into runs as plain products.

    Fused attention, the fast path of torch's encoder layers and the recurrent layers of oneDNN and cuDNN are not used
    inside the block, because the counter does not count their kernels. Gradients are off.

    Args:
        note: called with the sizes of each product as it runs; its MACs are their product.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which importing obc avoids

    def counted(sizes_of: Callable[..., Sizes]) -> Callable[..., int]:
        def flops(*args: Any, **kwargs: Any) -> int:
            sizes = tuple(int(size) for size in sizes_of(*args, **kwargs))
            if note is not None:
                note(sizes)
            return 2 * math.prod(sizes)

        return flops

    counter = FlopCounterMode(display=False, custom_mapping={op: counted(sizes) for op, sizes in _PRODUCTS.items()})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)  # torch's counter looks for gradient functions, which don't exist here
        with (
            sdpa_kernel(SDPBackend.MATH),
            every_submodule.changed(),
            _plain_recurrence(model),
            torch.no_grad(),
            counter,
        ):
            yield counter
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _plain_recurrence(model: nn.Module) -> Iterator[None]:
    """Without the fused kernels of recurrent layers, if the model has any."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            # Entering the block, torch warns of TF32 on devices that are not there.
            warnings.simplefilter("ignore", UserWarning)
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


# --- module by module -------------------------------------------------------------------------------------------


def counted_macs(model: nn.Module, run: Run) -> dict[str, float]:
    """MACs of the operations in each module's own forward, without those in modules inside it.

    Matrix products and convolutions count, including those of attention and of recurrent layers, by torch's own counter
    (``torch.utils.flop_counter``, two FLOPs per MAC); element-wise operations don't. Modules that never ran are
    omitted.

    Args:
        model: the model, run once, in eval mode and without gradients.

    Raises:
        PruningError: the model fails while it is counted.
    """
    names = {module: name for name, module in named_modules(model)}
    own: dict[str, float] = {}
    # For every running module: FLOPs counted when it began, and those of the modules inside it so far.
    running: list[list[float]] = []

    def begin(module: nn.Module, args: Any) -> None:
        running.append([counter.get_total_flops(), 0.0])

    def end(module: nn.Module, args: Any, output: Any) -> None:
        before, inside = running.pop()
        taken = counter.get_total_flops() - before
        own[names[module]] = own.get(names[module], 0.0) + (taken - inside) / 2
        if running:
            running[-1][1] += taken

    handles = []
    for module in names:
        handles += [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)]
    remedy = "pass a structure whose costs need no counting, or params= instead of macs="
    explaining = explained(model, "counting its MACs on the first batch", remedy)
    with hooked(handles), explaining, evaluating(model), counting_products(model) as counter:
        run(model)
    return own
