"""Channel positions in linear and convolutional layers, as slicing, folding and compensation need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from obc.model.groups import Side
from obc.model.linear_like import is_linear
from obc.model.names import joined
from obc.model.rules import Rule, is_packed, is_transformers_conv1d, rule_for


def layout_of(module: nn.Module) -> Rule | None:
    """The rule for the channels of a linear or convolutional layer; None for other modules."""
    if not (isinstance(module, _ConvNd) or is_linear(module) or is_transformers_conv1d(module)):
        return None
    rule = rule_for(module)
    return rule if isinstance(rule, Rule) else None


def layer_of(module: nn.Module) -> tuple[Rule, Tensor]:
    """The rule and the weight of a module known to be a linear or convolutional layer.

    Raises:
        TypeError: it is another module, or its weight is not a tensor.
    """
    rule, weight = layout_of(module), getattr(module, "weight", None)
    if rule is None or not isinstance(weight, Tensor):
        raise TypeError(f"not a linear or convolutional layer with a weight: {type(module).__name__}")
    return rule, weight


def is_depthwise(module: nn.Module) -> bool:
    """Whether an unpruned convolution has one filter per channel, so that pruning slices filters and groups together.

    For a pruned one use :func:`obc.model.slicing.was_depthwise`.
    """
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def has_several_weights(module: nn.Module) -> bool:
    """Whether a module of torch multiplies by several weights of its own: a recurrent layer or an attention."""
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention))


def is_joint_attention(module: nn.Module | None) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is torch's attention with one weight for queries, keys and values: all have its width.

    A subclass with a ``forward`` of its own may read and return something else.
    """
    if not isinstance(module, nn.MultiheadAttention) or module.in_proj_weight is None:
        return False
    return type(module).forward is nn.MultiheadAttention.forward


def attention_parts(name: str, attention: nn.MultiheadAttention) -> list[tuple[str, Side, list[int]]]:
    """(module, side, numbers of that channel) of all that goes with channel 0 of torch's attention of this name.

    Its out channels are those of queries, keys and values, one after the other.
    """
    projection = joined(name, "out_proj")
    thirds = [part * attention.embed_dim for part in range(3)]
    return [(name, "out", thirds), (name, "in", [0]), (projection, "out", [0]), (projection, "in", [0])]


def is_in_attention(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module lies in torch's attention, which uses its weight without calling it."""
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def pads_with_zeros(module: nn.Module) -> bool:
    """Whether a convolution reads zeros beyond its input, so that a constant input is not constant at the border."""
    if not isinstance(module, _ConvNd) or module.padding_mode != "zeros" or module.padding == "valid":
        return False
    return isinstance(module.padding, str) or any(module.padding)


def expand(channels: Tensor, repeat: int) -> Tensor:
    """The columns of ``channels`` if each has ``repeat`` consecutive ones."""
    if repeat == 1:
        return channels
    return (channels[:, None] * repeat + torch.arange(repeat, device=channels.device)).flatten()


def split_by_group(channels: Tensor, size: int, groups: int) -> Tensor | None:
    """(groups, n) indices within each conv group of ``size / groups`` channels; None if groups keep unequal numbers."""
    if size % groups or len(channels) % groups:
        return None
    local = channels.reshape(groups, -1)
    starts = torch.arange(groups, device=channels.device)[:, None] * (size // groups)
    local = local - starts
    inside = (local >= 0) & (local < size // groups)
    return local if bool(inside.all()) else None


def has_own_tensors(module: nn.Module) -> bool:
    """Whether a linear or convolutional layer has tensors, beside weight and bias, of another shape than the weight."""
    weight, tensors = getattr(module, "weight", None), {**module._parameters, **module._buffers}
    own = [tensor for key, tensor in tensors.items() if tensor is not None and key not in ("weight", "bias")]
    return layout_of(module) is not None and any(tensor.shape != getattr(weight, "shape", None) for tensor in own)


# torch's norms, embeddings and PReLU -> the attribute with their number of channels, or with a shape that ends with it.
_WIDTHS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (_NormBase, "num_features"),
    (nn.GroupNorm, "num_channels"),
    ((nn.LayerNorm, nn.RMSNorm), "normalized_shape"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding_dim"),
    (nn.PReLU, "num_parameters"),
)


def held_width(module: nn.Module) -> int | None:
    """The number of channels that a norm, embedding or PReLU of torch holds; None for other modules."""
    held: Any = next((getattr(module, key) for kinds, key in _WIDTHS if isinstance(module, kinds)), None)
    return held[-1] if isinstance(held, tuple) else held


def set_held_width(module: nn.Module, width: int) -> bool:
    """Let a norm, embedding or PReLU of torch hold this number of channels; False for other modules."""
    key = next((key for kinds, key in _WIDTHS if isinstance(module, kinds)), None)
    if key is not None:
        held = getattr(module, key)
        setattr(module, key, (*held[:-1], width) if isinstance(held, tuple) else width)
    return key is not None


def loose_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating buffers with several entries, none of them sparse, of a module for whose tensors there is no rule.

    Examples are the four tensors of a frozen BatchNorm, and the scales of a quantiser.
    """
    if not isinstance(rule_for(module), Rule) and not isinstance(module, (_NormBase, nn.RNNBase)):
        yield from (
            (key, buffer)
            for key, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and buffer.numel() > 1 and buffer.layout is torch.strided
            if not is_packed(buffer)
        )


def is_expanded(tensor: Tensor) -> bool:
    """Whether entries of a tensor share memory, as after ``expand``: torch lets nothing write to it in place."""
    strided = tensor.layout is torch.strided
    return strided and any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model`` came from ``torch.compile`` or compiled itself; does not import Dynamo."""
    return "_orig_mod" in model._modules or model._compiled_call_impl is not None
