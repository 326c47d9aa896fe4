"""Products of activations with weights for which no layer is called: parameters outside layers, what is made of them.

Einsum attention, mixtures with stacked experts, splines, kernels that are summed, masked or mixed before a convolution:
such a product is a layer without a module. While a model is probed, its result is computed from invented numbers in
place of the activations, so that it ends what reaches it, as layers do; what it read is noted along one of the
dimensions that it shares with the weight. Which of a parameter's dimensions those are is seen by changing some of their
entries: if the weight changes in some places along a dimension, and not in others, they are its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from obc.model.evaluation import tensors_in

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PLACE_OF_GROUPS = 6  # among the arguments of a convolution
_MOST_DIMENSIONS = 64  # of a tensor
_MATRICES = {
    *(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm),
    *(Tensor.__matmul__, Tensor.__rmatmul__, torch.addmm, Tensor.addmm),
}
_ADDED = {torch.addmm, Tensor.addmm}


class Operand(NamedTuple):
    """An operand of a product: its shape, in which conv groups are a dimension, with one label per dimension."""

    tensor: Tensor
    shape: tuple[int, ...]
    labels: tuple[Hashable, ...]


@dataclass
class Product:
    """One product of every pass.

    Attributes:
        weights: the names of the parameters and buffers that its weight is made of.
        base: the weight when nothing is changed.
        labels: of the weight's dimensions.
        shared: those that the activations have too.
        result: those that the result has.
        channels: parameter and dimension, ``"name:0"`` -> the labels along which its channels lie in the weight.
    """

    weights: tuple[str, ...]
    base: Tensor
    labels: tuple[Hashable, ...]
    shared: frozenset[Hashable]
    result: frozenset[Hashable]
    channels: dict[str, set[Hashable]] = field(default_factory=dict)

    @property
    def read(self) -> list[Hashable]:
        """The dimensions along which activations and parameters have channels."""
        known = {label for labels in self.channels.values() for label in labels}
        return [label for label in self.labels if label in self.shared & known]

    def axis(self, rank: int) -> Hashable:
        """The dimension of this rank along which it reads channels, or the last; None if there is none."""
        return self.read[min(rank, len(self.read) - 1)] if self.read else None

    def sums(self, key: str) -> bool:
        """Whether it sums over the channels of a parameter's dimension, so that the result has none of them."""
        return key in self.channels and self.channels[key].isdisjoint(self.result)


class WeightProducts(TorchFunctionMode):
    """Ends what reaches products with weights; entered around each pass.

    Args:
        rank: of :meth:`Product.axis`.

    Attributes:
        found: the products, in the order in which they run.
        learning: whether what is changed in a pass tells which channels dimensions of parameters have.
        handling: whether a product runs here, which is then a matter of this alone.
    """

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank, self.found, self.learning, self.handling = rank, list[Product](), False, False
        # id of a tensor that is made of parameters -> (it, their names, whether activations went into it).
        self._made: dict[int, tuple[Tensor, tuple[str, ...], bool]] = {}

    def begin(
        self,
        tensors: Iterable[tuple[str, Tensor, bool]],
        changed: frozenset[str] | None,
        size: float,
        calls: Callable[[], int],
        note: Callable[[str, Tensor, int], None],
    ) -> None:
        """Begin a pass.

        Args:
            tensors: (name, tensor, whether it is a buffer) of parameters and buffers, as the model has them now.
            changed: dimensions of parameters along which channels are changed; None if nothing at all is changed.
            size: size and sign of the invented numbers.
            calls: the number of calls of layers so far in this pass; a use of a layer's weight may call it.
            note: told (name of a product, tensor that it reads, dimension).
        """
        self._made, self._buffers = {}, set[str]()
        for name, one, is_buffer in tensors:
            self._made.setdefault(id(one), (one, (name,), False))
            self._buffers |= {name} if is_buffer else set()
        self._changed, self._base = changed or frozenset(), changed is None
        self._size, self._calls, self._note, self._place = size, calls, note, 0

    def meeting(self, key: str) -> set[str]:
        """The products whose weights have channels of this dimension of a parameter."""
        return {_name(place) for place, one in enumerate(self.found) if key in one.channels}

    def reads(self, key: str) -> bool:
        """Whether a product reads the channels of this dimension of a parameter, and does not return them."""
        return any(one.axis(self.rank) in one.channels.get(key, ()) for one in self.found)

    @property
    def ranks(self) -> int:
        """The number of choices of a dimension."""
        return max((len(one.read) for one in self.found), default=0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tensors_in((args, kwargs)) if one.is_floating_point()] if self._made else []
        known = [self._made[id(one)] for one in given if id(one) in self._made]
        if not known:
            return func(*args, **kwargs)
        operands, result_labels = operands_of(func, args, kwargs) or ([], frozenset())
        weight = self._weight(func, operands) if operands else None
        if weight is None:
            result = func(*args, **kwargs)
            self._follow(given, known, result)
            return result
        known_as_none = not self.learning and self.found[self._place].axis(self.rank) is None
        calls, self.handling = self._calls(), not known_as_none
        try:
            result = func(*args, **kwargs)  # which calls a layer, perhaps
            if self._calls() != calls:
                return result
            self._place += 1
            return result if known_as_none else self._ended(func, args, kwargs, operands, weight, result_labels)
        finally:
            self.handling = False

    def _follow(self, given: list[Tensor], known: list[tuple[Tensor, tuple[str, ...], bool]], result: Any) -> None:
        """What is made of parameters, and of smaller tensors that scale or mix them, is made of parameters."""
        size = max(one.numel() for one, _, _ in known)
        others = [one for one in given if id(one) not in self._made]
        if any(one.numel() >= size for one in others):
            return
        names = tuple(dict.fromkeys(name for _, own, _ in known for name in own))
        for one in tensors_in(result):
            if one.is_floating_point() and (not others or one.numel() <= size):
                self._made.setdefault(id(one), (one, names, any(mixed for _, _, mixed in known)))

    def _weight(self, func: Any, operands: list[Operand]) -> int | None:
        """Which operand is the weight: that which is made of parameters, or a layer's function takes for its weight."""
        made = [self._made.get(id(one.tensor)) for one in operands]
        pure = [place for place, one in enumerate(made) if one is not None and not one[2]]
        if pure:
            only = len(pure) == 1 and not self._buffers.issuperset(made[pure[0]][1])  # type: ignore[index]
            return pure[0] if only else None
        layers = func is F.linear or func in _CONVOLUTIONS or func in _TRANSPOSED
        return 1 if layers and made[1] is not None else None

    def _ended(self, func: Any, args: Any, kwargs: Any, operands: list[Operand], weight: int, labels: Any) -> Any:
        """The result of invented numbers in place of the activations."""
        one = operands[weight]
        others = [other for place, other in enumerate(operands) if place != weight]
        names, place = self._made[id(one.tensor)][1], self._place - 1
        if self._base:
            shared = frozenset(label for other in others for label in other.labels) & {*one.labels}
            product = Product(names, one.tensor, one.labels, shared, labels)
            product.channels = self.found[place].channels if place < len(self.found) else {}
            self.found[place : place + 1] = [product]
        product = self.found[place]
        if self.learning:
            self._learned(product, one)
        else:
            axis = product.axis(self.rank)
            own = any(axis in product.channels.get(key, ()) for key in self._changed)
            for tensor, shape, its in [*others, one._replace(tensor=one.tensor if own else product.base)]:
                if axis in its:
                    self._note(_name(place), tensor.reshape(shape), its.index(axis))
        instead = {id(other.tensor): self._invented(other.tensor) for other in others}
        if any(product.sums(key) for key in self._changed):
            instead[id(one.tensor)] = product.base
        args, kwargs = pytree.tree_map(lambda leaf: instead.get(id(leaf), leaf), (args, kwargs))
        ended = func(*args, **kwargs)
        self._made[id(ended)] = (ended, names, True)
        return ended

    def _learned(self, product: Product, weight: Operand) -> None:
        differs = (weight.tensor != product.base).reshape(weight.shape)
        for dim, label in enumerate(weight.labels):
            along = differs.movedim(dim, 0).flatten(1).any(1)
            if bool(along.any()) and not bool(along.all()):
                for key in self._changed:
                    product.channels.setdefault(key, set()).add(label)

    def _invented(self, like: Tensor) -> Tensor:
        numbers = torch.rand(like.shape, generator=torch.Generator().manual_seed(2), device="cpu") + 0.5
        return numbers.to(like) * self._size


def _name(place: int) -> str:
    return f"product {place}"


def is_product(name: str) -> bool:
    """Whether a name among what reads channels is that of a product."""
    return name.startswith("product ")


# --- dimensions -----------------------------------------------------------------------------------------------------


Operands = tuple[list[Operand], frozenset[Hashable]]


def operands_of(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Operands | None:
    """A product's operands and the labels of its result; None for other functions, and for what is not told apart."""
    if func is torch.einsum:
        return _of_einsum(args)
    if func is F.linear or func in _CONVOLUTIONS or func in _TRANSPOSED:
        named = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
        x, weight = named["input"], named["weight"]
        if func is not F.linear:
            groups = kwargs.get("groups", args[_PLACE_OF_GROUPS] if len(args) > _PLACE_OF_GROUPS else 1)
            return _of_convolution(x, weight, groups, func in _TRANSPOSED)
        positions = tuple(range(x.dim() - 1))
        own = ("out", "in") if weight.dim() == 2 else ("in",)
        return [_plain(x, (*positions, "in")), _plain(weight, own)], frozenset((*positions, "out"))
    if func not in _MATRICES or kwargs:
        return None
    one, other = args[1:3] if func in _ADDED else reversed(args) if func is Tensor.__rmatmul__ else args
    left: tuple[Hashable, ...] = (*range(-one.dim(), -2), "rows", "in") if one.dim() > 1 else ("in",)
    right: tuple[Hashable, ...] = (*range(-other.dim(), -2), "in", "columns") if other.dim() > 1 else ("in",)
    return [_plain(one, left), _plain(other, right)], frozenset((*left, *right)) - {"in"}


def _plain(tensor: Tensor, labels: tuple[Hashable, ...]) -> Operand:
    return Operand(tensor, tuple(tensor.shape), labels)


def _of_convolution(x: Tensor, weight: Tensor, groups: int, transposed: bool) -> Operands | None:
    if x.dim() != weight.dim():
        return None  # without samples
    first, second = ("in", "out") if transposed else ("out", "in")
    kernel, positions = ([(kind, dim) for dim in range(x.dim() - 2)] for kind in ("kernel", "position"))
    operands = [
        Operand(x, (len(x), groups, x.shape[1] // groups, *x.shape[2:]), ("sample", "group", "in", *positions)),
        Operand(weight, (groups, len(weight) // groups, *weight.shape[1:]), ("group", first, second, *kernel)),
    ]
    return operands, frozenset(("sample", "group", "out", *positions))


def _of_einsum(args: Any) -> Operands | None:
    tensors = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not isinstance(args[0], str) or not all(isinstance(one, Tensor) for one in tensors):
        return None
    inputs, arrow, output = args[0].replace(" ", "").partition("->")
    found = []
    for letters, tensor in zip(inputs.split(","), tensors, strict=True):
        before, dots, after = letters.partition("...")
        rest = tensor.dim() - len(before) - len(after)
        labels = (*before, *range(-rest, 0), *after) if dots else tuple(letters)
        if len(labels) != len({*labels}):
            return None  # a diagonal
        found.append(_plain(tensor, labels))
    every = [label for one in found for label in one.labels]
    kept = {*output, *range(-_MOST_DIMENSIONS, 0)} if arrow else {one for one in every if every.count(one) == 1}
    return found, frozenset(kept & {*every})
