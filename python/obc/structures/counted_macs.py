"""Counts the MACs that a model executes in one forward pass, per module and operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from obc.model.errors import explained
from obc.model.evaluation import evaluating
from obc.model.names import named_modules


def _grouped_product(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of (rows, in) times (groups, in, out), where every row uses the matrix of its group."""
    return 2 * int(torch.Size(a_shape).numel()) * int(b_shape[-1])


def counted_macs(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, float]:
    """MACs of the operations in each module's own forward, without those in modules inside it.

    Matrix products and convolutions count, including attention's, by torch's own counter (``torch.utils.flop_counter``,
    two FLOPs per MAC); element-wise operations don't. Modules that never ran are omitted.

    Args:
        model: the model, run once, in eval mode and without gradients.
        run: ``run(model)`` calls it.

    Raises:
        PruningError: the model fails while it is counted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which importing obc avoids

    names = {module: name for name, module in named_modules(model)}
    own: dict[str, float] = {}
    # For every running module: FLOPs counted when it began, and those of the modules inside it so far.
    running: list[list[float]] = []
    grouped = torch.ops.aten._grouped_mm
    counter = FlopCounterMode(display=False, custom_mapping={grouped: _grouped_product})

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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)  # torch's counter looks for gradient functions, which don't exist here
        # torch does not count kernels of fused attention, but it counts plain matrix products.
        counting = explained(model, "counting its MACs on the first batch", remedy)
        with counting, evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            run(model)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return own
