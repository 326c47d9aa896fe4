"""The MACs that a model executes in one forward pass, counted operation by operation, for each module."""

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
    """FLOPs of (rows, in) times (groups, in, out), every row with the matrix of its own group."""
    return 2 * int(torch.Size(a_shape).numel()) * int(b_shape[-1])


def counted_macs(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, float]:
    """MACs of the operations in each module's own forward, without those in modules inside it.

    Products of matrices and convolutions count, attention's as well, by torch's own counter
    (``torch.utils.flop_counter``, two FLOPs a MAC); element-wise operations don't. A module that never ran is left out.

    Args:
        model: run once, in eval mode and without gradients.
        run: ``run(model)`` calls it.

    Raises:
        PruningError: the model fails while it is counted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which import obc does without

    names = {module: name for name, module in named_modules(model)}
    own: dict[str, float] = {}
    # Of every module that is running: FLOPs counted when it began, and those of the modules inside it so far.
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
            parameter.requires_grad_(False)  # torch's counter looks for gradient functions, which nothing has here
        # Fused attention has kernels that torch does not count; plain products of matrices are.
        counting = explained(model, "counting its MACs on the first batch", remedy)
        with counting, evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            run(model)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return own
