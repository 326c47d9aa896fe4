"""Models for the tests of ``obc.collect``, and what every layer of them is called with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import models
import torch
import transformers_families as families
from models import Case
from torch import Tensor, nn

import obc

CASES: dict[str, Callable[[], Case]] = {
    "cnn": models.residual_cnn,
    "conv2d": lambda: models.convolutions(2),
    "vit": models.vit,
    "llama": models.llama,
    "gpt2": models.gpt2,
    "mixtral": families.FAMILIES["mixtral"],
}

FORWARD = ("moments", "gram", "blocks", "experts")


def inputs_of(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple) else batch


def forward(model: nn.Module, batch: Any) -> Any:
    x = inputs_of(batch)
    return model(x.to(models.dtype_of(model)) if x.is_floating_point() else x)


def statistics_of(name: str) -> list[str]:
    absent = {"cnn": ("experts", "blocks"), "conv2d": ("experts", "blocks"), "mixtral": ()}
    return [one for one in FORWARD if one not in absent.get(name, ("experts",))]


def double(case: Case) -> nn.Module:
    model = copy.deepcopy(case.model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def input_layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"}


def seen_inputs(model: nn.Module, case: Case) -> Iterator[tuple[str, list[Tensor]]]:
    """Layer name -> its inputs (samples, positions, channels), batch by batch."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module) -> Callable[..., None]:
        dim = -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1

        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].detach().movedim(dim, -1)
            seen.setdefault(name, []).append(x.reshape(len(x), -1, x.shape[-1]))

        return hook

    handles = [module.register_forward_pre_hook(note(name, module)) for name, module in input_layers(model).items()]
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            handles.append(
                module.register_forward_pre_hook(lambda m, args, name=name: note_experts(seen, name, m, *args))
            )
    with torch.no_grad():
        for batch in case.batches:
            forward(model, batch)
    for handle in handles:
        handle.remove()
    yield from seen.items()


def note_experts(seen: dict[str, list[Tensor]], name: str, experts: Any, hidden: Any, indices: Any, _: Any) -> None:
    """The inputs of every expert's down projection, with each token as a sample."""
    rows: dict[int, list[Tensor]] = {}
    for token, chosen in enumerate(indices.tolist()):
        for expert in chosen:
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            rows.setdefault(expert, []).append((experts.act_fn(gate) * up).detach())
    for expert, found in rows.items():
        seen.setdefault(f"{name}[{expert}]", []).append(torch.stack(found)[:, None])


def close(got: Any, expected: Any, rtol: float = 2e-5) -> None:
    got, expected = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def assert_same(one: obc.Statistics, other: obc.Statistics, statistic: str, exact: bool = True) -> None:
    mine, yours = getattr(one, statistic), getattr(other, statistic)
    assert list(mine) == list(yours)
    for module in mine:
        for field in fields(mine[module]):
            a, b = getattr(mine[module], field.name), getattr(yours[module], field.name)
            if isinstance(a, Tensor):
                assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
            elif a is not None and b is not None:
                assert a == b if exact else math.isclose(a, b, rel_tol=1e-5)


ALL = ["rows", "moments", "gram", "gradient_moments", "blocks"]
