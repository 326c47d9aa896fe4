"""How much residual blocks change their input: the statistic of depth pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from obc.model.arguments import one_of, several
from obc.model.depth import Skipped
from obc.model.evaluation import first_floating
from obc.model.names import is_within, joined, named_modules
from obc.scoring.coverage import Coverage
from obc.statistics.errors import NothingToReadError, StatisticsError
from obc.statistics.part import Part, is_running_again
from obc.statistics.reader import Groups, Handle, Reader
from obc.statistics.sums import Sums

Tokens = Literal["all", "last"]


@dataclass(frozen=True, eq=False)
class BlockSums:
    """Sums over tokens of a block's input x and output y (with ``span`` the output of the window's last block).

    Attributes:
        count: tokens, or pixels of feature maps.
        cosine: sum cos(x, y).
        angle: sum arccos(cos(x, y)) / pi, from 0 to 1 per token.
        difference: sum |y - x|^2.
        input: sum |x|^2.
        output: sum |y|^2.
        calls: number of calls behind the entropies; 0 if they were not requested.
        input_entropy: sum over calls of the entropy of x in nats, from a histogram of each dimension.
        output_entropy: the same for y.
    """

    count: int
    cosine: float
    angle: float
    difference: float
    input: float
    output: float
    calls: int = 0
    input_entropy: float = 0.0
    output_entropy: float = 0.0


@dataclass(frozen=True)
class Blocks:
    """Similarity of the inputs and outputs of residual blocks, per token. Forward only.

    Args:
        tokens: "all", or "last": the last token of each sequence that the attention mask keeps.
        span: compare the input of each block with the output of the span - 1 blocks after it, in windows of consecutive
            blocks named after their first.
        modules: names of the blocks, in the order of execution; by default :func:`residual_blocks`.
        entropy_bins: also collect entropies of input and output, from histograms with this many bins; 0 collects none.
    """

    tokens: Tokens = "all"
    span: int = 1
    modules: Sequence[str] | None = None
    entropy_bins: int = 0

    name: ClassVar[str] = "blocks"
    backward: ClassVar[bool] = False

    def reader(self, model: nn.Module, groups: Groups, part: Part) -> Reader:
        """The reader of the blocks of this model."""
        one_of("Blocks(tokens=...)", self.tokens, get_args(Tokens), StatisticsError)
        if self.entropy_bins == 1 or self.entropy_bins < 0:
            raise StatisticsError(f"Blocks(entropy_bins=...) must be 0 or at least 2, got {self.entropy_bins}")
        several("Blocks(modules=...)", self.modules or (), StatisticsError)
        known = dict(named_modules(model))
        names = residual_blocks(model) if self.modules is None else list(self.modules)
        if unknown := [name for name in names if name not in known]:
            raise StatisticsError(f"Blocks(modules=...): the model has no module {unknown[0]!r}")
        if not names:
            reason = f"no residual blocks were found in {type(model).__name__}"
            raise NothingToReadError(self.name, reason, "name them, Blocks(modules=[...])")
        if not 1 <= self.span <= len(names):
            raise StatisticsError(
                f"Blocks(span=...) must be between 1 and {len(names)}, the number of blocks, got {self.span}"
            )
        return _Reader(Sums(self.name), part, {name: known[name] for name in names}, self)


def residual_blocks(model: nn.Module) -> list[str]:
    """Names of likely residual blocks: the members of lists and sequences that hold modules of one kind.

    Only the outermost such lists count, without blocks that pruning removed; members must contain modules. Blocks whose
    output turns out to differ in shape from the input are left out when the model runs.
    """
    found: list[str] = []
    for name, module in named_modules(model):
        if any(is_within(name, block) for block in found):
            continue
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        children = {child: one for child, one in module.named_children() if not isinstance(one, Skipped)}
        kinds = [type(child) for child in children.values()]
        inner = all(any(True for _ in child.children()) for child in children.values())
        if kinds and inner and kinds.count(kinds[0]) == len(kinds):
            found += [joined(name, child) for child in children]
    return found


class _Reader(Reader):
    def __init__(self, sums: Sums, part: Part, blocks: Mapping[str, nn.Module], options: Blocks) -> None:
        super().__init__(sums, part)
        self.blocks, self.options = dict(blocks), options
        self._order = list(blocks)
        self._inputs: dict[str, Tensor] = {}
        windows = self._order[: len(self._order) - options.span + 1]
        self.coverage = dict.fromkeys(windows, Coverage("input and output"))

    def attach(self) -> list[Handle]:
        handles: list[Handle] = []
        for name, block in self.blocks.items():
            if name in self.coverage:
                handles.append(block.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            if (first := self.window(name)) is not None:
                handles.append(block.register_forward_hook(partial(self._after, first)))
        return handles

    def begin(self) -> None:
        super().begin()
        self._inputs.clear()

    def part_ends(self) -> None:
        self._inputs.clear()

    def window(self, block: str) -> str | None:
        if block not in self._order:
            return None
        place = self._order.index(block) - self.options.span + 1
        return self._order[place] if place >= 0 else None

    def take_window(self, block: str, x: Tensor) -> None:
        self._inputs[block] = x

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self.part.reading and not is_running_again():
            x = first_floating(args, kwargs)
            if x is not None:
                self._inputs[name] = x.detach().clone()  # the residual may be added in place

    def _after(self, first: str, module: nn.Module, args: Any, output: Any) -> None:
        """Read the window that begins with the block ``first`` and ends with the one that was called."""
        if not self.part.reading or is_running_again():
            return
        x = self._inputs.pop(first, None)
        y = first_floating([*output] if isinstance(output, (tuple, list)) else [output], {})
        if x is None or y is None:
            self.coverage[first] = Coverage.unread("its input or output is not a floating tensor")
        elif x.shape != y.shape:
            shapes = f"{tuple(x.shape)} to {tuple(y.shape)}"
            self.coverage[first] = Coverage.unread(f"it is not a residual block: its shape changes from {shapes}")
        else:
            self.called.add(first)
            with torch.no_grad():
                self._read(first, x, y.detach().to(x.device))

    def _read(self, name: str, x: Tensor, y: Tensor) -> None:
        dim = channel_dim(self.blocks[name], x)
        valid = self.part.valid_positions(x, dim)
        if self.options.tokens == "last":
            if x.dim() != 3:
                raise StatisticsError(
                    f"Blocks(tokens='last') needs hidden states (B, T, C), {name!r} reads {tuple(x.shape)}"
                )
            last = _last(x, valid)
            x, y = (states[torch.arange(len(states), device=states.device), last] for states in (x, y))
            valid, dim = None if valid is None else valid.any(1), 1
        x, y = (states.movedim(dim, -1).reshape(-1, states.shape[dim]) for states in (x, y))
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(dtype), y.to(dtype)
        if self.options.entropy_bins:
            self._read_entropies(name, x, y, valid)
        cosine = nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1)
        per_token = torch.stack(
            [
                torch.ones_like(cosine),
                cosine,
                cosine.arccos() / math.pi,
                (y - x).square().sum(-1),
                x.square().sum(-1),
                y.square().sum(-1),
            ]
        )
        if valid is not None:
            per_token = per_token.masked_fill(~valid.reshape(-1), 0)
        self.sums.add(name, "sums", per_token.double().sum(1))

    def _read_entropies(self, name: str, x: Tensor, y: Tensor, valid: Tensor | None) -> None:
        if valid is not None:
            x, y = (states[valid.reshape(-1)] for states in (x, y))
        if len(x):
            found = [entropy(states, self.options.entropy_bins) for states in (x, y)]
            self.sums.add(name, "entropies", torch.stack([torch.ones_like(found[0]), *found]).double())

    def result(self, fields: Mapping[str, Tensor]) -> BlockSums:
        count, cosine, angle, difference, before, after = fields["sums"].tolist()
        calls, before_entropy, after_entropy = fields["entropies"].tolist() if "entropies" in fields else (0, 0.0, 0.0)
        sums = (cosine, angle, difference, before, after)
        return BlockSums(int(count), *sums, int(calls), before_entropy, after_entropy)


def entropy(states: Tensor, bins: int) -> Tensor:
    """The sum over dimensions of the entropy of (tokens, dimensions) states, in nats, as EntroDrop estimates it.

    H = - sum over d and b of p_db log p_db, where p_db is the share of tokens whose value in dimension d lies in bin b
    of ``bins`` equal ones between that dimension's minimum and maximum. It belongs to one call, and is not additive
    over tokens.
    """
    low, high = states.amin(0), states.amax(0)
    places = ((states - low) / (high - low).clamp_min(torch.finfo(states.dtype).tiny) * bins).long().clamp_(0, bins - 1)
    counts = torch.zeros(bins, states.shape[1], dtype=states.dtype, device=states.device)
    counts.scatter_add_(0, places, torch.ones_like(states))
    return -torch.xlogy(counts / len(states), counts / len(states)).sum()


def _last(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B,) the position of the last token that counts."""
    if valid is None:
        return torch.full((len(x),), x.shape[1] - 1, device=x.device)
    places = torch.arange(x.shape[1], device=x.device)
    return (valid * places).amax(1)


def channel_dim(block: nn.Module, x: Tensor) -> int:
    """Dimension 1 for feature maps that a convolution of the block reads; otherwise the last."""
    if x.dim() > 3:
        widths = {module.in_channels for module in block.modules() if isinstance(module, _ConvNd)}
        if x.shape[1] in widths:
            return 1
    return x.dim() - 1
