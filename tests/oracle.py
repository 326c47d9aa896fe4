"""The truth for every test of scores: rows by explicit float64 autograd on the parameters, nothing clever.

One row of a layer with weight w and bias b, for a loss L:

    r_out[o] = <w_o, dL/dw_o> + b_o dL/db_o        r_in[i] = <w_{:,i}, dL/dw_{:,i}>

A norm has r_out = gamma dL/dgamma + beta dL/dbeta alone, an embedding r_out[e] = sum over v of w[v, e] dL/dw[v, e].
No operator of obc is used here, so that an error of theirs can't hide.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Rows = dict[str, tuple[Tensor | None, Tensor | None]]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_norm(module: nn.Module) -> bool:
    """A module with one scale per channel that is named like a norm: torch's own and those of other libraries.

    A LayerNorm over several dimensions has its channels along the last one.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.LayerNorm):
        return isinstance(weight, Tensor)
    return isinstance(weight, Tensor) and weight.dim() == 1 and "norm" in type(module).__name__.lower()


def is_transformers_conv1d(module: nn.Module) -> bool:
    """The Linear of GPT-2, which stores (in, out)."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor)


def scorable(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose rows the oracle computes, by name."""
    kinds = (nn.Linear, nn.Embedding, nn.EmbeddingBag, *_CONVS, *_TRANSPOSED)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) or is_norm(module) or is_transformers_conv1d(module)
    }


def row(module: nn.Module, weight_grad: Tensor, bias_grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(out, in) of one row of one module, from the gradients of its parameters."""
    weight_product = module.weight.detach() * weight_grad.to_dense()
    bias_product = 0.0 if bias_grad is None else module.bias.detach() * bias_grad
    if is_norm(module):
        return (weight_product + bias_product).reshape(-1, module.weight.shape[-1]).sum(0), None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return weight_product.sum(0), None
    if is_transformers_conv1d(module):
        return weight_product.sum(0) + bias_product, weight_product.sum(1)
    per_dim0 = weight_product.flatten(1).sum(1)
    blocks = weight_product.chunk(getattr(module, "groups", 1), dim=0)  # dim 0 holds the groups one after another
    per_dim1 = torch.cat([block.transpose(0, 1).flatten(1).sum(1) for block in blocks])
    if isinstance(module, _TRANSPOSED):
        return per_dim1 + bias_product, per_dim0
    return per_dim0 + bias_product, per_dim1


def rows(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    rows: str = "batch",
    training: bool = False,
) -> Rows:
    """Per scorable module (out (N, C_out) or None, in (N, C_in) or None) in float64, one row per batch or per sample.

    The model is copied, so it is left as it was. Tied parameters are untied in the copy: each module then has the
    row of its own use, and the sum of the uses is the row of the tied parameter. A parameter that the loss does not
    reach has the gradient 0.

    Args:
        loss_fn: (model, batch) -> a scalar, or with ``rows="sample"`` the vector of the samples' losses.
        training: keep the model's training flags; otherwise everything runs in eval mode.
    """
    model = copy.deepcopy(model).double()
    if not training:
        model.eval()
    modules = scorable(model)
    _untie(modules.values())
    owned = [
        (name, key, parameter)
        for name, module in modules.items()
        for key, parameter in module.named_parameters(recurse=False)
        if key in ("weight", "bias")
    ]
    parameters = [parameter.requires_grad_() for _, _, parameter in owned]
    collected: dict[str, list[tuple[Tensor | None, Tensor | None]]] = {name: [] for name in modules}
    for batch in batches:
        losses = loss_fn(model, _double(batch))
        assert losses.dim() == (1 if rows == "sample" else 0), f"rows={rows!r}, but the loss has shape {losses.shape}"
        for loss in losses.reshape(-1):
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            by_key = {(name, key): grad for (name, key, _), grad in zip(owned, grads, strict=True)}
            for name, module in modules.items():
                collected[name].append(row(module, by_key[name, "weight"], by_key.get((name, "bias"))))
    return {
        name: (_stack([out for out, _ in pairs]), _stack([in_ for _, in_ in pairs]))
        for name, pairs in collected.items()
    }


def scores(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    rows: str = "batch",
    training: bool = False,
) -> Rows:
    """Per scorable module (out (C_out,) or None, in (C_in,) or None): the squares of :func:`rows`, summed over rows."""
    found = _rows(model, batches, loss_fn, rows, training)
    return {name: (_sum_of_squares(out), _sum_of_squares(in_)) for name, (out, in_) in found.items()}


_rows = rows  # the argument of scores has the same name


def _stack(vectors: list[Tensor | None]) -> Tensor | None:
    present = [vector for vector in vectors if vector is not None]
    return torch.stack(present) if present else None


def _sum_of_squares(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.square().sum(0)


def _untie(modules: Iterable[nn.Module]) -> None:
    seen: set[int] = set()
    for module in modules:
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, key, nn.Parameter(parameter.detach().clone()))
            seen.add(id(getattr(module, key)))


def _double(value: Any) -> Any:
    """``value`` with every floating tensor in it in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_double(item) for item in value)
    return value
