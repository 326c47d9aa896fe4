"""Removes channels from any model's layers: what each layer keeps, in one step and over all steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from obc.model.kept import Kept, PlanError, kept_of, staying
from obc.model.layouts import held_width, is_depthwise, is_in_attention, layout_of
from obc.model.names import tensor_named
from obc.model.recurrent import is_recurrent
from obc.model.rules import Rule, rule_for
from obc.model.slicing import same_values, sliced
from obc.structures.masking import Lost


def step_of(
    modules: Mapping[str, nn.Module], lost: Lost, dims: Mapping[str, int], in_dims: Mapping[str, int]
) -> dict[str, Kept]:
    """The channels that every module keeps of its present ones.

    Args:
        lost: (module, side) -> removed channels; parameters outside any layer have their own names.
        dims: name of such a parameter -> the dimension that loses those of side "out".
        in_dims: the same for side "in".

    Returns:
        A plan for this step alone, for :func:`obc.model.cutting.cut`.
    """
    step: dict[str, Kept] = {}
    for (name, side), channels in lost.items():
        module = modules.get(name)
        if module is None:
            shape, one = tensor_named(modules, name).shape, step.get(name, Kept())
            if side == "out":
                size = shape[dims[name]]
                step[name] = replace(one, out_channels=staying(size, channels), dim=dims[name], out_size=size)
            else:
                size = shape[in_dims[name]]
                step[name] = replace(one, in_channels=staying(size, channels), in_dim=in_dims[name], in_size=size)
        elif isinstance(module, nn.MultiheadAttention):
            if side == "in":  # its outputs are queries, keys and values, which are cut accordingly
                stay = staying(module.embed_dim, channels)
                step[name] = Kept(stay, stay, out_size=module.embed_dim, in_size=module.embed_dim)
        elif not is_in_attention(modules, name):
            size, one = size_of(module, side), step.get(name, Kept())
            depthwise = is_depthwise(module)  # it reads the channels that it writes
            if side == "out" or depthwise:
                one = replace(one, out_channels=staying(size, channels), out_size=size)
            if side == "in" or depthwise:
                one = replace(one, in_channels=staying(size, channels), in_size=size)
            step[name] = one
    return step


def size_of(module: nn.Module, side: str) -> int:
    """The number of channels on one side of the present module; norms and similar modules have one side."""
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim) * (3 if side == "out" else 1)
    if is_recurrent(module):
        return module.hidden_size if side == "out" else module.input_size
    if (width := held_width(module)) is not None:
        return width
    layout, rule = layout_of(module), rule_for(module)
    weight = getattr(module, rule.weight if isinstance(rule, Rule) else "weight", None)
    assert isinstance(weight, Tensor)
    return weight.shape[-1] if layout is None else layout.sizes(weight)[0 if side == "out" else 1]


def refuse_untied(model: nn.Module, shared: Sequence[Sequence[str]], step: Mapping[str, Kept]) -> None:
    """Refuse a step after which layers that share a parameter would need different ones.

    Raises:
        PlanError: names the parameter by both its names.
    """
    for names in shared:
        left = [_left_of(model, name, step) for name in names]
        for name, other in zip(names[1:], left[1:], strict=True):
            if other.shape != left[0].shape or not same_values(other, left[0]):
                raise PlanError(f"{names[0]} and {name} share one parameter, but would lose different channels of it")


def _left_of(model: nn.Module, name: str, step: Mapping[str, Kept]) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor, weight = getattr(module, attribute).detach(), getattr(module, "weight", None)
    return sliced(module, attribute, tensor, kept_of(step, owner, name), name, weight)
