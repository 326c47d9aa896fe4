"""Modules that break naive hooks: in-place operations, reuse, checkpointing, bypassed weights and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import Case, case, dtype_of, floats, regression_losses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class InPlaceAfterConv(nn.Module):
    """ReLU and a sum, both in place, straight on a convolution's and on a linear layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu_()
        y = self.conv2(x)
        y += x
        z = self.fc(y.mean((2, 3)))
        z.mul_(2).tanh_()
        return self.head(z)


class InPlaceAfterNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.group = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.fc, self.layer, self.head = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.batch(self.conv(x)), inplace=True)
        y = self.group(self.conv2(x))
        y += x
        z = self.layer(self.fc(y.mean((2, 3))))
        z.mul_(1.5).sigmoid_()
        return self.head(z)


class InputChanged(nn.Module):
    """A residual stream changed in place under the layers that read it.

    Plain autograd can't give the weights of these layers a gradient; ``in_place=False`` is what it can differentiate.
    """

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.up, self.down, self.head = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 4)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        update = self.down(F.gelu(self.up(x)))
        x = x.add_(update) if self.in_place else x + update
        return self.head(x)


class Shared(nn.Module):
    """One convolution used twice on different inputs, one linear layer three times on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(x)))
        x = F.gelu(self.norm(self.conv(x))).mean((2, 3))
        for _ in range(3):
            x = x + F.gelu(self.fc(x))
        return self.head(x)


class Checkpointed(nn.Module):
    """Two blocks under activation checkpointing of the given kind."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for _ in range(2)
        )
        self.head = nn.Linear(8, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x.mean((2, 3)))


class KeywordLinear(nn.Linear):
    """Takes its input by keyword alone."""

    def forward(self, *, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)


class KeywordsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(3, 6, 3, padding=1), KeywordLinear(6, 5)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, *, signal: Tensor) -> Tensor:
        x = F.gelu(self.conv(input=signal)).mean(2)
        return self.head(self.norm(input=F.gelu(self.fc(input=x))))


def keyword_losses(model: nn.Module, batch: Any) -> Tensor:
    x, target = batch
    return regression_losses(model(signal=x.to(dtype_of(model))), target)


class Attention(nn.Module):
    """nn.MultiheadAttention reads out_proj's weight without calling out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc(x))
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x + y))


class EncoderFirst(nn.Module):
    """nn.TransformerEncoderLayer as first layer: with frozen weights its inference fast path skips every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class FunctionalWeight(nn.Module):
    """The layer is never called, only its weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.functional, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("...i,oi->...o", F.gelu(self.fc(x)), self.functional.weight)
        return self.head(F.gelu(x + self.functional.bias))


class PartialBypass(nn.Module):
    """The layer is called once and its weight used once more directly, which no hook on the layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.both, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.both(F.gelu(self.fc(x))))
        return self.head(F.gelu(torch.einsum("...i,oi->...o", x, self.both.weight)))


class Cube(torch.autograd.Function):
    """A custom function that saves its input and computes its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = Cube.apply(self.norm(Cube.apply(self.fc1(x))))
        return self.head(torch.tanh(self.fc2(x)))


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank path of its own beside the weight: its output is not weight times input."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        self.down, self.up = nn.Parameter(torch.randn(2, width_in) / 2), nn.Parameter(torch.randn(width_out, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class PairLinear(nn.Linear):
    """Returns a pair, as Megatron's linear layers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora, self.pair, self.head = LoRALinear(6, 8), PairLinear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.pair(F.gelu(self.lora(x)))
        return self.head(F.gelu(x))


class Hooked(nn.Module):
    """The user's own hooks scale a layer's input and its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv1d(3, 6, 3), nn.Linear(6, 6), nn.Linear(6, 4)
        self.conv.register_forward_hook(lambda module, args, output: output * 1.5)
        self.fc.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        self.fc.register_forward_hook(lambda module, args, output: output.mul_(2).sin_())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(F.gelu(self.conv(x)).mean(2)))


class Branches(nn.Module):
    """``unused`` is never called; ``late`` only where the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.late, self.unused, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.late_norm = nn.LayerNorm(6)

    def forward(self, x: Tensor, use_late: bool) -> Tensor:
        x = F.gelu(self.fc(x))
        if use_late:
            x = x + F.gelu(self.late_norm(self.late(x)))
        return self.head(x)


def branch_losses(model: nn.Module, batch: Any) -> Tensor:
    x, target, use_late = batch
    return regression_losses(model(x.to(dtype_of(model)), use_late), target)


def branches(*use_late: bool) -> Case:
    """One batch per flag, which says whether that batch uses the late layers."""
    batches = [(x, target, late) for (x, target), late in zip(floats(6, batches=len(use_late)), use_late, strict=True)]
    return case(Branches, batches, branch_losses)


class LateInPlace(nn.Module):
    """Changes a layer's output (or its input) in place only where the batch says so."""

    def __init__(self, change: str = "output", in_place: bool = True) -> None:
        super().__init__()
        self.fc, self.watched, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.change, self.in_place = change, in_place

    def forward(self, x: Tensor, flag: bool) -> Tensor:
        x = F.gelu(self.fc(x))
        y = self.watched(x)
        if not flag:
            return self.head(F.gelu(y))
        if self.change == "output":
            return self.head(y.mul_(2) if self.in_place else y * 2)
        x = x.mul_(0.5) if self.in_place else x * 0.5
        return self.head(F.gelu(y) + x)


def late_in_place(change: str, *flags: bool) -> Case:
    batches = [(x, target, flag) for (x, target), flag in zip(floats(6, batches=len(flags)), flags, strict=True)]
    return case(lambda: LateInPlace(change), batches, branch_losses, oracle=lambda: LateInPlace(change, False))


class FixedDropout(nn.Module):
    """Dropout whose mask is drawn in float32 whatever the input's dtype, so that float64 sees the same mask."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape) > 0.3) / 0.7 if self.training else x


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm, self.drop = nn.LayerNorm(8), FixedDropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.fc1(x)))
        return self.head(self.drop(self.norm(F.gelu(self.fc2(x)))))


# Each builds a Case whose scores must equal the oracle's for batch rows and for sample rows.
NASTY: dict[str, Callable[[], Case]] = {
    "in-place-after-conv": lambda: case(InPlaceAfterConv, floats(3, 6, 6)),
    "in-place-after-norm": lambda: case(InPlaceAfterNorm, floats(3, 6, 6)),
    "input-changed": lambda: case(InputChanged, floats(5, 6), oracle=lambda: InputChanged(in_place=False)),
    "used-twice": lambda: case(Shared, floats(3, 6, 6)),
    "checkpoint-reentrant": lambda: case(
        lambda: Checkpointed(True), floats(3, 6, 6), oracle=lambda: Checkpointed(False)
    ),
    "checkpoint": lambda: case(lambda: Checkpointed(False), floats(3, 6, 6)),
    "keywords-only": lambda: case(KeywordsOnly, floats(3, 8), keyword_losses),
    "multihead-attention": lambda: case(Attention, floats(5, 6)),
    "encoder-layer-first": lambda: case(EncoderFirst, floats(5, 8)),
    "functional-weight": lambda: case(FunctionalWeight, floats(5, 6)),
    "partial-bypass": lambda: case(PartialBypass, floats(5, 6)),
    "adapted": lambda: case(Adapted, floats(5, 6)),
    "user-hooks": lambda: case(Hooked, floats(3, 8)),
    "custom-function": lambda: case(CustomFunction, floats(6)),
}
