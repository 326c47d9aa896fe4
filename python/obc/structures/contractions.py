"""Products of activations, and sums, that reduce the dimension along which channels lie: where these channels end.

Queries meet keys in a product over their channels, two towers in one over those of their embeddings. So channel j of
one goes with channel j of the other, though no layer reads them. While a model is probed, such a reduction is a reader
of channels: what it reads is noted along the dimension that it reduces, and its result is that of the unchanged
channels, so that they end here. Whether channels of a source lie along that dimension, or positions, is learned: single
channels change, each in some places of it.

Norms without a module let their input through, as those with one do. Sums, means and variances over channels end them
and do not read them, unless it is a sum of products of two tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from obc.structures.weight_products import operands_of

_LET_THROUGH = {F.normalize, F.layer_norm, F.rms_norm}
# Function -> place of its dimensions among the arguments.
_SUMS = {torch.sum, Tensor.sum}
_MULTIPLICATIONS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply}
_STATISTICS: dict[Any, int] = {
    **dict.fromkeys((*_SUMS, torch.mean, Tensor.mean, torch.var, Tensor.var, torch.std, Tensor.std, torch.var_mean), 1),
    **dict.fromkeys((torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm), 2),
}
_PAIRS = {F.cosine_similarity: 1, F.pairwise_distance: -1}
_LAST = {torch.cdist, F.scaled_dot_product_attention}

# An operand and the dimension of it that is reduced.
_Operand = tuple[Tensor, tuple[int, ...], int]


class Contractions(TorchFunctionMode):
    """Ends channels at functions that reduce their dimension; entered around each pass.

    Attributes:
        learning: whether what is changed in a pass tells where its channels lie.
        products: the reductions that are products, of the last pass in which nothing was changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.learning, self.products = False, set[int]()
        self._ending: dict[str, set[int]] = {}  # key of a source -> the reductions that end its channels
        self._reached: dict[str, set[int]] = {}
        self._operands: dict[int, set[int]] = {}  # those that layers reach; others are constant
        self._places: dict[tuple[str, int, int], set[tuple[int, ...]]] = {}
        self._base: dict[int, list[_Operand]] = {}

    def begin(self, changed: Iterable[str] | None, note: Callable[[str, Tensor, int], None]) -> None:
        """Begin a pass.

        Args:
            changed: keys of the sources whose channels are changed; None if nothing is.
            note: told (name of a reduction, tensor that it reads, dimension).
        """
        self._changed, self._note, self._number = changed, note, 0
        self._multiplied: dict[int, Tensor] = {}
        if changed is None:
            self._base, self.products = {}, set()

    @property
    def placed(self) -> set[str]:
        """Keys of the sources of which a single channel was seen in some places, not in all, of what is reduced."""
        return {key for key, _, _ in self._places}

    def learned(self) -> set[str]:
        """End channels, from now on, where single ones were seen in different places of what is reduced.

        Returns:
            Keys of the sources whose channels end at more reductions than before: others may show behind these.
        """
        more = {(key, number) for (key, number, _), places in self._places.items() if len(places) > 1}
        for key, number in more:
            self._ending.setdefault(key, set()).add(number)
        self._places.clear()
        return {key for key, _ in more}

    @property
    def found(self) -> bool:
        """Whether any product of activations ends channels."""
        return any(self._is_product(number) for numbers in self._ending.values() for number in numbers)

    def meeting(self, key: str) -> set[str]:
        """The reductions that end channels of any source, and that a source reaches."""
        ending = set[int]().union(*self._ending.values())
        return {_name(number) for number in self._reached.get(key, set()) & ending}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LET_THROUGH:
            return args[0].clone()
        if func in _MULTIPLICATIONS:
            return self._noted(func(*args, **kwargs), args, kwargs)
        if not (reductions := _reductions(func, args, kwargs)):
            return func(*args, **kwargs)
        is_product = func not in _STATISTICS or (func in _SUMS and id(args[0]) in self._multiplied)
        instead = dict[int, Tensor]()
        for operands in reductions:
            number, self._number = self._number, self._number + 1
            if self._changed is None:
                self._base[number] = operands
                self.products |= {number} if is_product else set()
            base = self._base.get(number, operands)
            if [one[1] for one in base] != [one[1] for one in operands]:
                continue
            ended = any(number in self._ending.get(key, ()) for key in self._changed or ())
            if self.learning and not ended:
                self._learn(number, base, operands)
            if not any(number in own for own in self._ending.values()):
                continue
            for place, (old, new) in enumerate(zip(base, operands, strict=True)):
                tensor, shape, dim = new if ended else old
                if self._is_product(number):
                    self._note(f"{_name(number)} {place}", tensor.reshape(shape), dim)
                if ended:
                    instead[id(tensor)] = old[0]
        args, kwargs = pytree.tree_map(lambda leaf: instead.get(id(leaf), leaf), (args, kwargs))
        return func(*args, **kwargs)

    def _is_product(self, number: int) -> bool:
        return number in self.products and len(self._operands.get(number, ())) == len(self._base[number])

    def _noted(self, result: Any, args: Any, kwargs: Any) -> Any:
        """The result of a multiplication; that of two tensors is noted, a square is not: its sum is a statistic."""
        one, other = (*args, *kwargs.values())[:2]
        if isinstance(other, Tensor) and one is not other and other.dim() == one.dim():
            self._multiplied[id(result)] = result
        return result

    def _learn(self, number: int, base: list[_Operand], operands: list[_Operand]) -> None:
        for place, (old, (tensor, shape, dim)) in enumerate(zip(base, operands, strict=True)):
            along = (tensor != old[0]).reshape(shape).movedim(dim, 0).flatten(1).any(1)
            for key in self._changed or () if bool(along.any()) else ():
                self._reached.setdefault(key, set()).add(number)
                if ":" not in key:  # no parameter
                    self._operands.setdefault(number, set()).add(place)
                if not bool(along.all()):
                    self._places.setdefault((key, number, place), set()).add(tuple(along.nonzero()[:, 0].tolist()))


def _name(number: int) -> str:
    return f"contraction {number}"


def is_contraction(name: str) -> bool:
    """Whether a name among what reads channels is that of an operand of a reduction."""
    return name.startswith("contraction ")


def contraction_of(name: str) -> str:
    """The reduction among whose operands this one is; another reader of channels as it is."""
    return name.rpartition(" ")[0] if is_contraction(name) else name


def _reductions(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[list[_Operand]]:
    """For every dimension that a function reduces, the operands that have it, if it has several entries."""
    if (place := _STATISTICS.get(func)) is not None:
        return _of_one(args, kwargs, place)
    if func in _PAIRS or func in _LAST:
        named = {**dict(zip(("x1", "x2", "dim"), args, strict=False)), **kwargs}
        one, other = named.get("x1", named.get("query")), named.get("x2", named.get("key"))
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return []
        last = func in _LAST or func is F.pairwise_distance
        dim = -1 if last else named.get("dim", _PAIRS[func])
        if not last:  # dimensions are counted in the result of broadcasting
            dim = dim if dim < 0 else dim - max(one.dim(), other.dim())
        found = [(t, tuple(t.shape), dim % t.dim()) for t in (one, other) if -dim <= t.dim()]
        return [found] if len(found) == 2 and all(t.shape[d] > 1 for t, _, d in found) else []
    found_operands = operands_of(func, args, kwargs)
    if found_operands is None:
        return []
    operands, result = found_operands
    reduced = dict.fromkeys(label for one in operands for label in one.labels if label not in result)
    every = (
        [(one.tensor, one.shape, one.labels.index(label)) for one in operands if label in one.labels]
        for label in reduced
    )
    return [one for one in every if all(shape[dim] > 1 for _, shape, dim in one)]


def _of_one(args: Any, kwargs: Mapping[str, Any], place: int) -> list[list[_Operand]]:
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return []
    dims = kwargs.get("dim", args[place] if len(args) > place else None)
    if dims is None:
        dims = range(x.dim())
    listed = [dims] if isinstance(dims, int) else dims
    if not all(type(one) is int for one in listed):
        return []  # names of dimensions; or the biased variance of everything
    return [[(x, tuple(x.shape), one % x.dim())] for one in listed if x.dim() and x.shape[one] > 1]
