"""Quantised layers: the weights that they represent, and plain layers to replace them.

A packed weight stores other numbers than the matrix it represents, often in another shape, so no row or column can be
removed from it. Scoring is unaffected, because it reads activations and their gradients. Pruning refuses such layers by
name; :func:`dequantize` replaces them by plain layers first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from obc.model.arguments import instance
from obc.model.evaluation import device_of
from obc.model.kept import PlanError
from obc.model.names import named_modules
from obc.model.plain_layers import put_in_place
from obc.model.refusals import refuse_adapted
from obc.model.rules import is_packed, packed_weight
from obc.model.usable import refuse_non_modules

# How much a plain layer may differ from its quantised one, relative to the largest output. Kernels multiply in float16
# or bfloat16, whose steps are 2^-10 and 2^-8 of a number; a wrong scale or order differs by far more.
_TOLERANCE = 2e-2
# Number of unit vectors per call: more would take as much memory as another weight for a layer with many inputs.
_CHUNK = 512
_COLUMNS_CHECKED = 16


@dataclass(frozen=True)
class QuantisedKind:
    """A way to store weights.

    Attributes:
        name: for messages.
        matches: tells whether a module is stored this way.
        weight: computes the matrix that such a module represents, laid out as in a plain layer: (out, in), for a
            convolution (out, in, *kernel), for an embedding (entries, features).
    """

    name: str
    matches: Callable[[Any], bool]
    weight: Callable[[Any], Tensor]


_KINDS: dict[str, QuantisedKind] = {}


def register(kind: QuantisedKind) -> None:
    """Register another kind of quantised layer for :func:`dequantize`.

    Raises:
        ValueError: the name is taken.
    """
    if _KINDS.get(kind.name, kind) is not kind:
        raise ValueError(f"a kind {kind.name!r} is registered already; choose another name")
    _KINDS[kind.name] = kind


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights are stored packed, by name."""
    return {name: module for name, module in named_modules(model) if is_quantised(module)}


def refuse_quantised(model: nn.Module) -> None:
    """Raise if a model has quantised layers.

    Raises:
        PlanError: names the first such layer and the remedy.
    """
    for name, module in quantised_layers(model).items():
        raise PlanError(why_not_sliced(name, module))


def why_not_sliced(name: str, module: nn.Module) -> str:
    """Why channels can't be removed from a quantised layer, and what to do about it."""
    stored = ""
    if (key := packed_weight(module)) is not None:
        tensor = getattr(module, key)
        shape = tuple(tensor.shape)
        stored = f", as {type(tensor).__name__} {shape} of {tensor.dtype}"
    return (
        f"{name} is a {type(module).__name__} that stores its weight packed{stored}, so that no channel can be taken "
        "out of it; make plain layers of all quantised ones with obc.dequantize(model), then prune; for the command "
        "line, model.save_pretrained(DIR) in Python after that, and prune DIR"
    )


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Replace every quantised layer by a plain one, in place, so that the model can be pruned.

    These are read from what they store: layers of bitsandbytes (8 and 4 bits), optimum-quanto and compressed-tensors,
    torchao's and every other tensor class with ``dequantize()``, and transformers' ``FP8Linear``; :func:`register`
    adds kinds. Any other linear layer is read from its outputs: its output on the unit vector e_i, minus that on
    zeros, is the i-th column of its weight. It is refused unless the plain layer then computes the same on other
    inputs. If a quantised linear layer runs on its device, the plain one is compared with it.

    Afterwards the config of a transformers model says that nothing is quantised, so that ``save_pretrained`` writes a
    plain model. This includes models loaded from a GGUF file, whose weights are plain already. If anything raises,
    the model is left as it was.

    Args:
        model: the model, changed in place.
        dtype: dtype of the plain weights and biases; by default that of the model's first parameter that is neither
            packed nor an integer.

    Returns:
        The names of the replaced layers.

    Raises:
        PlanError: a layer can't be read, or its plain layer computes something else; the model itself is such a layer,
            has unmerged adapters, or has hooks that move a layer's weight between devices.
        ValueError: ``dtype`` is None and no parameter provides it.
    """
    refuse_non_modules(model)
    instance("dtype", dtype, (torch.dtype, type(None)), "a torch.dtype")
    refuse_adapted(model)
    layers = quantised_layers(model)
    if "" in layers:
        raise PlanError("the model is itself a quantised layer; pass the model that it is part of")
    if layers:
        dtype = dtype or _own_dtype(model)
        put_in_place(model, {module: _plain(name, module, dtype) for name, module in layers.items()})
    _forget_quantisation(model)
    return list(layers)


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is stored packed."""
    return packed_weight(module) is not None or any(kind.matches(module) for kind in _KINDS.values())


def _own_dtype(model: nn.Module) -> torch.dtype:
    for parameter in model.parameters():
        if not is_packed(parameter):
            return parameter.dtype
    raise ValueError("every parameter is packed, so the dtype of the plain layers is unknown; pass dtype=")


def _plain(name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if hasattr(module, "_hf_hook"):
        raise PlanError(
            f"{name}: accelerate moves this {type(module).__name__} between devices; load the model on one device "
            "(without device_map), then dequantise it"
        )
    kind = next((kind for kind in _KINDS.values() if kind.matches(module)), None)
    weight = kind.weight(module) if kind is not None else _by_unit_vectors(name, module, dtype)
    plain = _with_weight(name, module, weight.to(dtype), kind)
    _compare(name, module, plain, known=kind is not None)
    return plain


def _with_weight(name: str, module: nn.Module, weight: Tensor, kind: QuantisedKind | None) -> nn.Module:
    found: Any = module
    bias = found.bias() if callable(getattr(found, "bias", None)) else getattr(found, "bias", None)
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            plain: Any = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
            for key in ("max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
                setattr(plain, key, getattr(module, key))
        elif isinstance(module, _ConvNd):
            base: Any = next(cls for cls in type(module).__mro__ if cls.__module__ == "torch.nn.modules.conv")
            keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            options = {key: getattr(module, key) for key in (*keys, "padding_mode")}
            if module.transposed:
                options["output_padding"] = module.output_padding
            plain = base(**options, bias=bias is not None)
        elif hasattr(module, "in_features"):
            plain = nn.Linear(found.in_features, found.out_features, bias is not None)
        else:
            known = ", ".join(_KINDS)
            raise PlanError(
                f"{name} is a {type(module).__name__} that stores its weights packed, and no layer that obc can make "
                f"a plain one of (linear and convolutional layers and embeddings of {known}); load the model "
                "unquantised"
            )
    if plain.weight.shape != weight.shape:
        raise PlanError(
            f"{name}: a {type(module).__name__} ({kind.name if kind else 'unknown'}) stands for a weight of shape "
            f"{tuple(plain.weight.shape)}, but {tuple(weight.shape)} was read; load the model unquantised"
        )
    plain.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight))
    return plain.train(module.training)


def _by_unit_vectors(name: str, module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Read a linear layer's weight from its outputs: column i is y(e_i) - y(0)."""
    found: Any = module
    features, device = getattr(found, "in_features", None), device_of(module)
    if type(features) is not int:
        raise PlanError(
            f"{name} is a {type(module).__name__} that stores its weights packed, and not of a kind that obc can read "
            f"({', '.join(_KINDS)}); load the model unquantised, or obc.model.quantized.register the kind"
        )
    columns = []
    try:
        zero = found(torch.zeros(1, features, dtype=dtype, device=device))
        for start in range(0, features, _CHUNK):
            some = torch.arange(start, min(start + _CHUNK, features), device=device)
            units = nn.functional.one_hot(some, features).to(dtype)
            columns.append((found(units) - zero).T)
    except Exception as error:
        raise PlanError(
            f"{name} is a {type(module).__name__}, not a kind whose weight obc can read ({', '.join(_KINDS)}), and it "
            f"does not run on {device} either: {type(error).__name__}: {error}; load the model unquantised, or "
            "obc.model.quantized.register the kind"
        ) from error
    return torch.cat(columns, 1)


def _compare(name: str, module: nn.Module, plain: nn.Module, known: bool) -> None:
    """Raise if a plain layer computes something else than the quantised one.

    Compares on unit vectors, which survive rounding of activations exactly, or on other inputs if the weight was read
    from unit vectors.
    """
    if not isinstance(plain, nn.Linear):
        return
    features = plain.in_features
    if known:
        some = torch.linspace(0, features - 1, min(features, _COLUMNS_CHECKED), device="cpu").long()
        x = nn.functional.one_hot(some, features).to(plain.weight)
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, features, generator=generator, device="cpu").to(plain.weight)
    try:
        found = module(x)
    except Exception:  # its kernels may need another device, which says nothing about the weight
        if known:
            return
        raise
    expected = plain(x)
    worst = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
    if not worst <= _TOLERANCE:
        remedy = "load the model unquantised" if known else "obc.model.quantized.register its kind"
        raise PlanError(
            f"{name}: a plain layer with the weight that was read from this {type(module).__name__} differs from it by "
            f"{worst:.2g} of the largest output (at most {_TOLERANCE:g}); {remedy}"
        )


def _forget_quantisation(model: Any) -> None:
    """Make a transformers model, and its config, say that nothing is quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
        if flag in vars(model):
            setattr(model, flag, False)
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config


# --- kinds -----------------------------------------------------------------------------------------------------------


def _is(module: Any, package: str, name: str) -> bool:
    """Whether a module's class is, or derives from, ``name`` of a package; does not import the package."""
    return any(cls.__name__ == name and cls.__module__.partition(".")[0] == package for cls in type(module).__mro__)


def _bitsandbytes_four(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if module.weight.quant_state is None:
        raise PlanError(f"{type(module).__name__} was never moved to a device, and so not quantised; call .to(device)")
    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def _bitsandbytes_eight(module: Any) -> Tensor:
    """Row i is CB[i] * SCB[i] / 127 (LLM.int8(), arXiv 2208.07339, row-wise absmax)."""
    scale = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return module.weight.data.float() * (scale.float() / 127).unsqueeze(1)


def _fp8(module: Any) -> Tensor:
    """weight * weight_scale_inv, with one scale in total or one per block of rows and columns."""
    weight, scale = module.weight.float(), module.weight_scale_inv.float()
    if module.block_size is not None:
        for dim, size in enumerate(module.block_size):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight * scale


def _compressed(module: Any) -> Tensor:
    from compressed_tensors.compressors.base import decompress_module

    plain = copy.deepcopy(module)
    decompress_module(plain)
    weight: Tensor = plain.weight.detach()
    return weight


def _tensor_class(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and is_packed(weight) and is_traceable_wrapper_subclass(weight)


for _kind in (
    QuantisedKind(
        "bitsandbytes, 4 bits",
        lambda module: _is(module, "bitsandbytes", "Linear4bit") and is_packed(module.weight),
        _bitsandbytes_four,
    ),
    QuantisedKind(
        "bitsandbytes, 8 bits",
        lambda module: _is(module, "bitsandbytes", "Linear8bitLt") and is_packed(module.weight),
        _bitsandbytes_eight,
    ),
    QuantisedKind("FP8Linear", lambda module: _is(module, "transformers", "FP8Linear"), _fp8),
    QuantisedKind(
        "compressed-tensors",
        lambda module: getattr(getattr(module, "quantization_status", None), "value", "") == "compressed",
        _compressed,
    ),
    QuantisedKind(
        "tensor classes of torchao and optimum-quanto", _tensor_class, lambda module: module.weight.dequantize()
    ),
):
    register(_kind)
