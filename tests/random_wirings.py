"""Random wirings between layers, whose truth is known: which input channels of a reader come from which channel.

Every operation between two layers only moves channels, so that it moves the channels' numbers as well: applied to a
tensor that holds in each channel its number, it says where each came to.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Move = Callable[[Tensor], Tensor]


class Stage(nn.Module):
    """The operations between two layers: moves, and layers that keep channels in place."""

    def __init__(self, parts: Sequence[tuple[str, Move | nn.Module]]) -> None:
        super().__init__()
        self.names = [name for name, _ in parts]
        self.parts = [part for _, part in parts]
        self.kept = nn.ModuleList(part for _, part in parts if isinstance(part, nn.Module))

    def extra_repr(self) -> str:
        return ", ".join(self.names)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def sources(self, channels: int, size: int) -> list[int]:
        """The origin of every input channel (in a linear layer: column) of the reader."""
        x = torch.arange(channels, dtype=torch.float64)[None, :, None, None].expand(1, channels, size, size)
        for part in self.parts:
            if not isinstance(part, nn.Module):
                x = part(x)
        x = x if x.dim() == 2 else x[:, :, 0, 0]
        return [int(channel) for channel in x[0].tolist()]


class Wired(nn.Module):
    """Layers with wirings between them: ``layers[i + 1]`` reads what ``stages[i]`` makes of ``layers[i]``."""

    def __init__(self, layers: Sequence[nn.Module], stages: Sequence[Stage], head: nn.Module) -> None:
        super().__init__()
        self.layers, self.stages, self.head = nn.ModuleList(layers), nn.ModuleList(stages), head

    def forward(self, x: Tensor) -> Tensor:
        for layer, stage in zip(self.layers, self.stages, strict=False):
            x = stage(F.relu(layer(x)))
        x = F.relu(self.layers[-1](x))
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


def without(net: Wired, plan: Any, size: int) -> Wired:
    """``net`` with the channels that the plan removed at zero where they are read: the truth that pruning must meet."""
    masked = copy.deepcopy(net)
    layers: list[Any] = [*masked.layers, masked.head]
    for index, layer in enumerate(masked.layers):
        kept = plan[f"layers.{index}"].out_channels if f"layers.{index}" in plan else None
        if kept is None:
            continue
        channels = len(layer.weight)
        gone = set(range(channels)) - set(kept.tolist())
        stage = masked.stages[index] if index < len(masked.stages) else None
        sources = list(range(channels)) if stage is None else stage.sources(channels, size)  # type: ignore[operator]
        zero_inputs(layers[index + 1], [place for place, source in enumerate(sources) if source in gone])
    return masked


def zero_inputs(layer: Any, places: Sequence[int]) -> None:
    groups = getattr(layer, "groups", 1)
    inside, rows = layer.weight.shape[1], len(layer.weight) // groups
    with torch.no_grad():
        for place in places:
            group = place // inside
            layer.weight[group * rows : (group + 1) * rows, place % inside] = 0


# --- moves ----------------------------------------------------------------------------------------------------


def _permuted(rng: random.Random, channels: int) -> tuple[str, Move]:
    order = rng.sample(range(channels), channels)
    return "permuted", lambda x: x[:, order]


def _exchanged(rng: random.Random, channels: int) -> tuple[str, Move]:
    one, other = rng.sample(range(channels), 2)
    order = list(range(channels))
    order[one], order[other] = other, one
    return "two exchanged", lambda x: x[:, order]


def _flipped(rng: random.Random, channels: int) -> tuple[str, Move]:
    return "flipped", lambda x: x.flip(1)


def _rolled(rng: random.Random, channels: int) -> tuple[str, Move]:
    by = rng.randrange(1, channels)
    return f"rolled by {by}", lambda x: x.roll(by, 1)


def _parts_exchanged(rng: random.Random, channels: int) -> tuple[str, Move]:
    cut = rng.randrange(1, channels)
    return f"split at {cut} and exchanged", lambda x: torch.cat(
        x.split([cut, channels - cut] if x.shape[1] == channels else [x.shape[1] // 2, -(-x.shape[1] // 2)], 1)[::-1], 1
    )


def _chunked(rng: random.Random, channels: int) -> tuple[str, Move]:
    return "chunked and put together again", lambda x: torch.cat(x.chunk(2, 1), 1)


def _doubled(rng: random.Random, channels: int) -> tuple[str, Move]:
    return "twice, one after the other", lambda x: torch.cat([x, x], 1)


def _stacked_before(rng: random.Random, channels: int) -> tuple[str, Move]:
    return "stacked before the channels", lambda x: torch.stack([x, x], 1).flatten(1, 2)


def _stacked_behind(rng: random.Random, channels: int) -> tuple[str, Move]:
    return "stacked behind the channels", lambda x: torch.stack([x, x], 2).flatten(1, 2)


def _repeated(rng: random.Random, channels: int) -> tuple[str, Move]:
    return "each repeated", lambda x: x.repeat_interleave(2, 1)


def _shuffled(rng: random.Random, channels: int) -> tuple[str, Move]:
    groups = rng.choice([n for n in (2, 3, 4, 6) if channels % n == 0])
    return f"shuffled by {groups}", lambda x: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _shuffled_back(rng: random.Random, channels: int) -> tuple[str, Move]:
    groups = rng.choice([n for n in (2, 3, 4, 6) if channels % n == 0])
    return f"shuffled back by {groups}", lambda x: x.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)


def _halves_taken(rng: random.Random, channels: int) -> tuple[str, Move]:
    return "even ones, then odd ones", lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1)


def _unbound(rng: random.Random, channels: int) -> tuple[str, Move]:
    return "unbound by view, exchanged", lambda x: torch.cat(x.unflatten(1, (2, -1)).unbind(1)[::-1], 1)


def _as_it_is(rng: random.Random, channels: int) -> tuple[str, Move]:
    return "as it is", lambda x: x


MOVES = (
    _permuted,
    _exchanged,
    _flipped,
    _rolled,
    _parts_exchanged,
    _chunked,
    _doubled,
    _stacked_before,
    _stacked_behind,
    _repeated,
    _shuffled,
    _shuffled_back,
    _halves_taken,
    _unbound,
    _as_it_is,
)


def channels_first(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 2).flatten(1)


def channels_last(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 2).permute(0, 2, 3, 1).flatten(1)


def random_wired(seed: int) -> Wired:
    """Two or three layers of 12 channels, some grouped, with up to three moves between them; float64, in eval mode."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(6, 12, 3, padding=1, groups=rng.choice([1, 1, 1, 2, 3]))]
    stages = []
    for _ in range(rng.choice([1, 1, 2])):
        parts: list[tuple[str, Any]] = []
        channels = 12
        for _ in range(rng.choice([1, 1, 2, 3])):
            if rng.random() < 0.25:
                parts.append(("depthwise", nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)))
            elif rng.random() < 0.2:
                parts.append(("norm", nn.BatchNorm2d(channels, affine=rng.random() < 0.7)))
            parts.append(rng.choice(MOVES)(rng, channels))
            channels = len(Stage([parts[-1]]).sources(channels, 1))
        if rng.random() < 0.25:
            parts.append(rng.choice([("channels first", channels_first), ("channels last", channels_last)]))
            layers.append(nn.Linear(4 * channels, 12))
            stages.append(Stage(parts))
            break
        groups = rng.choice([1, 1, 2, 3]) if channels % 6 == 0 else 1
        layers.append(nn.Conv2d(channels, 12, rng.choice([1, 3]), padding=1, groups=groups))
        stages.append(Stage(parts))
    net = Wired(layers, stages, nn.Linear(12, 5)).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return net
