"""Rules for the modules that have channels to score: where these channels lie.

A rule says how a module's row can be read: by gates on its input and output, from the gradients of its one-dimensional
parameters, or only from its weight's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from obc.model.experts import DOWN, GATE_UP, UP, fused_experts, is_parallel, is_transposed
from obc.model.linear_like import is_linear
from obc.model.recurrent import is_recurrent
from obc.model.sharding import is_dtensor


@dataclass(frozen=True)
class Rule:
    """The location of a module's channels.

    Attributes:
        kind: "gate" (activation times gradient at input and output), "norm" (one-dimensional weight and bias that scale
            and shift), or "weight" (only the weight's gradient works).
        weight: the weight's attribute name.
        bias: the bias's attribute name, or None.
        out_axis: the weight's dimension of out channels.
        in_axis: the weight's dimension of in channels; None if the module has none.
        out_dim: the output's channel dimension, counted from the end; None if no gate works there.
        in_dim: the same for the input.
        groups: conv groups.
        looks_up: the module selects rows of its weight by integer input (an embedding).
        elementwise: the weight multiplies channels along its last dimension.
        packed: the weight stores other numbers than it represents (a quantised layer), so it has no gradient and its
            shape does not tell the channels.
    """

    kind: Literal["gate", "norm", "weight"]
    weight: str = "weight"
    bias: str | None = None
    out_axis: int = 0
    in_axis: int | None = None
    out_dim: int | None = None
    in_dim: int | None = None
    groups: int = 1
    looks_up: bool = False
    elementwise: bool = False
    packed: bool = False

    @property
    def transposed(self) -> bool:
        """Whether the weight is (in, out / groups, *kernel) instead of (out, in / groups, *kernel)."""
        return self.out_axis == 1

    @property
    def convolution(self) -> bool:
        """Whether channels lie along dim 1 of input and output, before the positions; otherwise along the last dim."""
        return self.out_dim is not None and self.out_dim < -1

    @property
    def inputs_alone(self) -> bool:
        """Whether a gate at the input is all that can be read: of the outputs no weight's row is known."""
        return self.kind == "gate" and self.out_dim is None

    def sizes(self, weight: Tensor) -> tuple[int, int]:
        """(out channels, in channels) of ``weight``, a weight of this layer before or after pruning."""
        rows, columns = weight.shape[0], weight.shape[1] * self.groups
        return (columns, rows) if self.transposed else (rows, columns)


_WIDE = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _bias_name(module: nn.Module) -> str | None:
    return "bias" if getattr(module, "bias", None) is not None else None


def rule_for(module: nn.Module) -> Rule | str | None:
    """The rule of a module, the reason why none fits, or None if the module owns no parameters."""
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        channel_dim = -1 - len(module.kernel_size)
        out_axis, in_axis = (1, 0) if isinstance(module, _TRANSPOSED) else (0, 1)
        return Rule(
            "gate",
            bias=_bias_name(module),
            out_axis=out_axis,
            in_axis=in_axis,
            out_dim=channel_dim,
            in_dim=channel_dim,
            groups=module.groups,
            packed=packed_weight(module) is not None,
        )
    if (packed := packed_weight(module)) is not None and _is_linear(module):
        return Rule("gate", weight=packed, bias=_bias_name(module), in_axis=1, out_dim=-1, in_dim=-1, packed=True)
    if is_linear(module):
        return Rule("gate", bias=_bias_name(module), in_axis=1, out_dim=-1, in_dim=-1)
    if is_transformers_conv1d(module):  # GPT-2's linear layer with its weight stored (in, out)
        return Rule("gate", bias=_bias_name(module), out_axis=1, in_axis=0, out_dim=-1, in_dim=-1)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if packed is not None:
            return f"{type(module).__name__}'s weight is stored packed; obc.dequantize makes a plain layer of it"
        return Rule("gate", out_axis=1, out_dim=-1, looks_up=True)
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return "query, key and value of different widths don't share their in channels"
        bias = None if module.in_proj_bias is None else "in_proj_bias"
        return Rule("weight", weight="in_proj_weight", bias=bias, in_axis=1)
    return _mixture_rule(module) or _elementwise_rule(module)


def scored_rule(module: nn.Module) -> Rule | str | None:
    """:func:`rule_for`, and for a recurrent layer where its inputs lie.

    All its weights that read an input multiply it, so the gate at the input has the sum of their rows.
    """
    if is_recurrent(module):
        return Rule("gate", weight="weight_ih_l0", in_axis=1, in_dim=-1)
    return complex_weight(module) or rule_for(module)


def complex_weight(module: nn.Module) -> str | None:
    """Why a module with a complex weight is not read; None if it has none."""
    weight = module._parameters.get("weight")
    complex_ = weight is not None and weight.is_complex()
    return f"its weight is {weight.dtype}, and only real channels are read" if complex_ else None  # type: ignore[union-attr]


def _mixture_rule(module: nn.Module) -> Rule | None:
    """Experts stored as one tensor, and routers that multiply by a weight of their own.

    For experts the down projections are read, (experts, features, inner) or (experts, inner, features). Out channels
    are whole experts; in channels are the inner channels of every expert. Up projections would give the same apart from
    gates. JetMoE has one module per projection, with one weight (experts, outputs, inputs).
    """
    own = dict(module.named_parameters(recurse=False))
    down, weights = own.get(DOWN), fused_experts(module)
    if down is not None and down.dim() == 3:
        transposed = is_transposed(*weights) if weights is not None else getattr(module, "is_transposed", False)
        return Rule("weight", weight=DOWN, out_axis=0, in_axis=1 if transposed else 2)
    if is_parallel(module):
        return Rule("weight", out_axis=0, in_axis=2)
    if set(own) == {"weight"} and own["weight"].dim() == 2 and isinstance(getattr(module, "top_k", None), int):
        return Rule("weight", in_axis=1)
    return None


def _elementwise_rule(module: nn.Module) -> Rule | str | None:
    """Norms, PReLU, layer scales: a weight, and perhaps a bias, that scale and shift each channel.

    Others may call them gamma and beta, or anything else; those have no buffers. That they do so is only assumed:
    scoring checks it, and for pruning :func:`obc.structures.norm_axis.other_vectors` does.
    """
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return _lacking_weight(module)
    usual = own.keys() <= {"weight", "bias"}
    names = ["weight", *(["bias"] if "bias" in own else [])] if usual else list(own)
    weight, alone = getattr(module, names[0], None), usual or next(module.buffers(), None) is None
    if isinstance(weight, Tensor) and len(names) <= 2 and alone and not list(module.children()):
        bias_name = names[1] if len(names) > 1 else None
        bias = None if bias_name is None else own[bias_name]
        if weight.dim() == 1 and (bias is None or bias.shape == weight.shape):
            out_dim = -1
            if isinstance(module, (_NormBase, nn.GroupNorm, nn.PReLU)):
                out_dim = 1
            return Rule("norm", weight=names[0], bias=bias_name, out_dim=out_dim, elementwise=True)
        # ConvNeXt V2's global response normalisation has one such axis.
        last = isinstance(module, nn.LayerNorm) or (weight.dim() == 4 and weight.numel() == weight.shape[-1])
        if usual and last:  # over several dimensions: channels lie along the last one
            return Rule("gate", bias=bias_name, out_axis=weight.dim() - 1, out_dim=-1, elementwise=True)
    return f"no rule for {type(module).__name__}'s own parameters ({', '.join(sorted(own))})"


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor stores other numbers than it represents: integers, one-byte floats, or a class that contains
    other tensors. DTensors don't count.
    """
    if type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _WIDE:  # nearly all are
        return False
    if is_dtensor(tensor):
        return False
    return not tensor.is_floating_point() or tensor.element_size() == 1 or is_traceable_wrapper_subclass(tensor)


def packed_weight(module: nn.Module) -> str | None:
    """The name of a quantised layer's packed weight, or None if the module is not one.

    Other libraries' linear layers are recognised by ``in_features`` and ``out_features``. Otherwise torch's linear and
    convolutional layers, embeddings, and experts stored as one tensor are recognised.
    """
    if _is_linear(module):
        names: tuple[str, ...] = ("weight", "qweight", "weight_packed")
    elif isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Embedding)):
        names = ("weight",)
    else:
        experts = (GATE_UP, UP, DOWN)
        names = (*experts, *(f"{key}_{packed}" for key in experts for packed in ("blocks", "packed")))
    for name in names:
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is not None and is_packed(tensor):
            return name
    return None


def _is_linear(module: nn.Module) -> bool:
    return all(type(getattr(module, features, None)) is int for features in ("in_features", "out_features"))


def _lacking_weight(module: nn.Module) -> str | None:
    """Why a layer without parameters is not read; None if it has no channels of its own."""
    if _is_linear(module) and not list(module.children()):
        return f"{type(module).__name__} is a linear layer without a weight tensor"
    return None


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, recognised by name so that transformers is not imported."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.dim() == 2


def channel_count(module: nn.Module, rule: Rule, axis: int) -> int:
    """Channels along ``axis`` of the module's weight; dimension 1 of a grouped weight holds one conv group's share."""
    if rule.packed:
        kind = "features" if _is_linear(module) else "channels"
        return int(getattr(module, f"{'out' if axis == rule.out_axis else 'in'}_{kind}"))
    weight = getattr(module, rule.weight)
    return int(weight.shape[axis]) * (rule.groups if axis == 1 else 1)
