"""Random networks for the scorer: any mix of layers, in-place operations, reuse, branches and checkpointing.

``random_case(seed)`` is a :class:`models.Case`. Its oracle model has the same layers and values, but nothing in place
and no reentrant checkpoint, so that plain autograd can differentiate it.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable

import oracle
import torch
import torch.nn.functional as F
from models import Case, case, floats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Of norms over one sample. With the usual 1e-5 a nearly constant sample, or one of a single position, is blown up a
# few hundred times, gradients with it, and float32 has nothing to say about the result, with or without obc.
EPS = 1e-2


class Apply(nn.Module):
    """An activation function; in place where ``in_place``."""

    def __init__(self, name: str, in_place: bool) -> None:
        super().__init__()
        self.name, self.in_place = name, in_place

    def extra_repr(self) -> str:
        return f"{self.name}{'_' if self.in_place else ''}"

    def forward(self, x: Tensor) -> Tensor:
        if self.name in ("relu", "leaky_relu", "silu", "elu"):
            function: Callable[..., Tensor] = getattr(F, self.name)
            return function(x, inplace=self.in_place)
        if self.name == "scale":
            return x.mul_(1.5) if self.in_place else x * 1.5
        return torch.tanh_(x) if self.in_place else torch.tanh(x)


class Residual(nn.Module):
    """x + body(x): as it stands, added into the body's output, or added into the input itself."""

    def __init__(self, body: nn.Module, into: str) -> None:
        super().__init__()
        self.body, self.into = body, into

    def extra_repr(self) -> str:
        return f"into={self.into}"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.into == "output":
            y += x
            return y
        return x.add_(y) if self.into == "input" else x + y


class Repeated(nn.Module):
    """One body used several times, each on its own output."""

    def __init__(self, body: nn.Module, times: int) -> None:
        super().__init__()
        self.body, self.times = body, times

    def extra_repr(self) -> str:
        return f"times={self.times}"

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.body(x)
        return x


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.body, self.use_reentrant = body, use_reentrant

    def extra_repr(self) -> str:
        return f"use_reentrant={self.use_reentrant}"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, x, use_reentrant=self.use_reentrant)
        return y


class Branches(nn.Module):
    """Several layers on one input, joined along the channels, summed, or multiplied; one may serve twice."""

    def __init__(self, branches: list[nn.Module], join: str, dim: int) -> None:
        super().__init__()
        self.branches, self.join, self.dim = nn.ModuleList(branches), join, dim

    def extra_repr(self) -> str:
        return f"join={self.join}"

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.branches]
        if self.join == "cat":
            return torch.cat(outputs, self.dim)
        if self.join == "twice":
            return outputs[0] + torch.sigmoid(self.branches[0](0.5 * x))
        return outputs[0] * torch.sigmoid(outputs[1]) if self.join == "gate" else outputs[0] + outputs[1]


class Unused(nn.Module):
    """Its layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Transposed(nn.Module):
    """(B, C, ...) to tokens (B, T, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    """The mean over everything but samples and channels."""

    def __init__(self, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.channel_dim, 1)
        return x.flatten(2).mean(2) if x.dim() > 2 else x


class Maker:
    """Draws one network. Both of a pair of makers with the same seed draw the same layers in the same order.

    Args:
        seed: of every draw.
        plain: draw what plain autograd can differentiate: nothing in place, no reentrant checkpoint.
    """

    def __init__(self, seed: int, plain: bool) -> None:
        self.random, self.plain = random.Random(seed), plain
        self.dims = 2

    def odds(self, probability: float) -> bool:
        return self.random.random() < probability

    def network(self) -> tuple[nn.Module, tuple[int, ...]]:
        """The network and the shape of one sample."""
        kind = self.random.choice(["image", "image", "signal", "tokens", "vector"])
        width = self.random.choice([3, 4, 6])
        if kind in ("tokens", "vector"):
            shape = (5, width) if kind == "tokens" else (width,)
            layers, width = self.tokens(width, self.random.randint(2, 4))
            return nn.Sequential(*layers, Mean(-1), *self.head(width)), shape
        self.dims = 2 if kind == "image" else 1
        shape = (width, 8, 8) if kind == "image" else (width, 9)
        layers, width = self.maps(width, self.random.randint(2, 4))
        end = self.random.choice(["mean", "flatten", "tokens"])
        if end == "flatten":
            with torch.no_grad():
                columns = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).numel()
            return nn.Sequential(*layers, nn.Flatten(), *self.head(columns)), shape
        if end == "mean":
            return nn.Sequential(*layers, Mean(1), *self.head(width)), shape
        after, width = self.tokens(width, 1)
        return nn.Sequential(*layers, Transposed(), *after, Mean(-1), *self.head(width)), shape

    def head(self, width: int) -> list[nn.Module]:
        hidden = self.random.choice([5, 7])
        layers: list[nn.Module] = [nn.Linear(width, hidden, bias=self.odds(0.7)), self.activation()]
        if self.odds(0.3):
            layers += [nn.Dropout(0.5)]
        if self.odds(0.3):
            layers += [Unused()]
        return [*layers, nn.Linear(hidden, 4)]

    def activation(self) -> nn.Module:
        """An operation after a layer, a norm or a sum, none of which needs its output again."""
        name = self.random.choice(["relu", "leaky_relu", "silu", "elu", "tanh", "scale"])
        in_place = self.odds(0.6)
        return Apply(name, in_place and not self.plain)

    # --- feature maps: images and signals ---

    def maps(self, width: int, stages: int) -> tuple[list[nn.Module], int]:
        layers: list[nn.Module] = []
        for stage in range(stages):
            wider = self.random.choice([4, 6, 8])
            layers += [self.transition(width, wider, stage), *self.norm_and_activation(wider)]
            width = wider
            if self.odds(0.7):
                layers += [self.block(lambda w=width: self.same_maps(w)), self.activation()]
            if self.odds(0.2):
                layers += [(nn.AvgPool1d, nn.AvgPool2d)[self.dims - 1](2, 1)]
        return layers, width

    def conv(self, transposed: bool = False) -> type[nn.Module]:
        if transposed:
            return (nn.ConvTranspose1d, nn.ConvTranspose2d)[self.dims - 1]
        return (nn.Conv1d, nn.Conv2d)[self.dims - 1]

    def groups(self, width_in: int, width_out: int) -> int:
        common = [g for g in range(1, 9) if width_in % g == 0 and width_out % g == 0]
        return self.random.choice(common) if self.odds(0.4) else 1

    def transition(self, width: int, wider: int, stage: int) -> nn.Module:
        groups, bias = self.groups(width, wider), self.odds(0.6)
        if self.odds(0.25):
            return self.conv(transposed=True)(
                width, wider, 3, stride=self.random.choice([1, 2]), padding=1, groups=groups
            )
        if self.odds(0.25):
            half = [self.conv()(width, wider // 2, kernel, padding=kernel // 2) for kernel in (1, 3)]
            return Branches(half, "cat", 1)
        kernel = self.random.choice([1, 3])
        more = {"padding_mode": self.random.choice(["zeros", "circular", "reflect"])} if self.odds(0.3) else {}
        stride = self.random.choice([1, 2]) if stage < 2 else 1
        return self.conv()(width, wider, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias, **more)

    def norm(self, width: int) -> nn.Module:
        norms = {
            "batch": lambda: (nn.BatchNorm1d, nn.BatchNorm2d)[self.dims - 1](width),
            "group": lambda: nn.GroupNorm(self.random.choice([1, 2]), width, eps=EPS),
            "instance": lambda: (nn.InstanceNorm1d, nn.InstanceNorm2d)[self.dims - 1](width, affine=True, eps=EPS),
        }
        return norms[self.random.choice(["batch", "batch", "group", "instance"])]()

    def norm_and_activation(self, width: int) -> list[nn.Module]:
        return [*([self.norm(width)] if self.odds(0.6) else []), self.activation()]

    def same_maps(self, width: int) -> nn.Module:
        """Keeps shape and width; ends with a layer or a norm, whose output may be changed in place."""
        depthwise = self.odds(0.3)
        first = self.conv()(width, width, 3, padding=1, groups=width if depthwise else self.groups(width, width))
        second = self.conv()(width, width, 1) if depthwise else self.conv()(width, width, 3, padding=2, dilation=2)
        return nn.Sequential(first, *self.norm_and_activation(width), second, *([self.norm(width)] * self.odds(0.4)))

    # --- tokens and vectors ---

    def tokens(self, width: int, stages: int) -> tuple[list[nn.Module], int]:
        layers: list[nn.Module] = []
        for _ in range(stages):
            wider = self.random.choice([4, 6, 8])
            layers += [nn.Linear(width, wider, bias=self.odds(0.7)), self.activation()]
            width = wider
            if self.odds(0.8):
                layers += [self.block(lambda w=width: self.same_tokens(w)), self.activation()]
        return layers, width

    def same_tokens(self, width: int) -> nn.Module:
        hidden = self.random.choice([5, 8])
        norm = nn.LayerNorm(width, eps=EPS) if self.odds(0.6) else nn.RMSNorm(width, eps=EPS)
        body: list[nn.Module] = [norm] if self.odds(0.6) else []
        if self.odds(0.3):
            body += [Branches([nn.Linear(width, hidden, bias=False) for _ in range(2)], "gate", -1)]
        else:
            body += [nn.Linear(width, hidden), self.activation()]
        return nn.Sequential(*body, nn.Linear(hidden, width, bias=self.odds(0.5)))

    # --- what goes around a body that keeps its shape ---

    def block(self, body: Callable[[], nn.Module], depth: int = 0) -> nn.Module:
        kind = self.random.choice(["body", "residual", "residual", "repeated", "checkpoint", "checkpoint", "branches"])
        if kind == "branches":
            return Branches([body(), body()], self.random.choice(["sum", "gate", "twice"]), 1)
        inner = self.block(body, depth + 1) if depth < 2 and self.odds(0.3) else body()
        if kind == "residual":
            # The body's own output is free to change only where it is a layer's or a sum's.
            into = self.random.choice(["neither", "output", "input"])
            free = isinstance(inner, nn.Sequential)
            return Residual(inner, "neither" if self.plain or (into == "output" and not free) else into)
        if kind == "repeated":
            return Repeated(nn.Sequential(inner, Apply("tanh", False)), self.random.randint(2, 3))
        if kind == "checkpoint":
            use_reentrant = self.odds(0.5)
            return Checkpointed(inner, use_reentrant and not self.plain)
        return inner


def random_case(seed: int) -> Case:
    """The network number ``seed`` with two batches of three samples; drawn again if it is unsound (:func:`_sound`)."""
    draws = (_case(1000 * seed + attempt) for attempt in itertools.count())
    return next(drawn for drawn in draws if drawn is not None and _sound(drawn))


def _sound(drawn: Case) -> bool:
    """Whether torch can differentiate the network by its input, and its oracle model computes the same.

    Neither holds where something was changed in place that is still needed, by a backward or by another branch.
    """
    x, target = drawn.batches[0]
    with torch.no_grad():
        outputs = [model(x.clone()) for model in (drawn.model, drawn.oracle_model)]
    if not torch.allclose(*outputs, rtol=1e-4, atol=1e-5):
        return False
    drawn.model.requires_grad_(False)
    try:
        drawn.loss(drawn.model, (x.clone().requires_grad_() * 1.0, target)).backward()
    except RuntimeError as error:
        if "inplace" not in str(error) and "in-place" not in str(error):
            raise
        return False
    drawn.model.requires_grad_(True)
    return True


def _case(seed: int) -> Case | None:
    """None where feature maps shrank below what a pooling or a norm takes."""
    network, shape = Maker(seed, plain=True).network()
    try:
        network.eval()(torch.zeros(1, *shape))
    except (ValueError, RuntimeError) as error:
        if "spatial element" not in str(error) and "too small" not in str(error):
            raise
        return None
    return case(
        lambda: Maker(seed, plain=False).network()[0],
        floats(*shape, seed=seed, batches=2, batch=3),
        oracle=lambda: Maker(seed, plain=True).network()[0],
    )


def scales(drawn: Case, rows: str) -> dict[str, float]:
    """Per module the size of what its rows sum up: the root of the sum over rows of (|y| |dL/dy|)^2, y its output.

    No channel's root of a score exceeds it, and rounding is a multiple of it. Where the sums themselves cancel, such as
    in a layer before an InstanceNorm, which takes its scale away, they are far smaller.
    """
    model = copy.deepcopy(drawn.oracle_model).double().eval()
    squares: dict[str, Tensor] = {}
    for x, target in drawn.batches:
        outputs: list[tuple[str, Tensor]] = []
        handles = [
            module.register_forward_hook(lambda module, args, y, name=name, seen=outputs: seen.append((name, y)))
            for name, module in oracle.scorable(model).items()
        ]
        losses = drawn.losses(model, (x.double(), target))
        for handle in handles:
            handle.remove()
        for _, y in outputs:
            y.retain_grad()
        (losses.sum() if rows == "sample" else losses.mean()).backward()
        products: dict[str, Tensor] = {}
        for name, y in outputs:
            if y.grad is None:  # the loss does not depend on it
                continue
            samples = (y.detach().flatten(1), y.grad.flatten(1))
            flat = samples if rows == "sample" else tuple(part.reshape(1, -1) for part in samples)
            products[name] = products.get(name, torch.zeros(())) + flat[0].norm(dim=1) * flat[1].norm(dim=1)
        for name, product in products.items():
            squares[name] = squares.get(name, torch.zeros(())) + product.square().sum()
    return {name: float(square.sqrt()) for name, square in squares.items()}
