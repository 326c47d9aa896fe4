"""A batch: its inputs, its attention mask, and its parts along the samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree

from obc.model.evaluation import tensors_in

RowKind = Literal["batch", "sample"]
"""What one row of scores is the gradient of: the loss of a batch, or of a sample."""


def inputs_of(batch: Any) -> Any:
    """The first entry of a tuple or list, such as (inputs, labels); otherwise the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def attention_mask(batch: Any) -> Tensor | None:
    """The mask of a mapping, or of the mapping in (mapping, labels); None if there is none."""
    inputs = inputs_of(batch)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def usable_in_autograd(batch: Any) -> Any:
    """The batch, with clones of tensors made inside ``torch.inference_mode()``, which autograd does not save."""
    if not any(tensor.is_inference() for tensor in tensors_in(batch)):
        return batch
    return _map_tensors(batch, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def samples_in(batch: Any) -> int:
    """The number of entries along dim 0 of a batch's first tensor.

    Raises:
        ValueError: the batch contains no tensor.
    """
    found: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() > 0:
            found.append(len(tensor))
        return tensor

    _map_tensors(batch, note)
    if not found:
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no tensor to split along its samples; leave micro_batch out, "
            "or pass tensors in tuples, lists and mappings"
        )
    return found[0]


def part_of(batch: Any, start: int, stop: int, samples: int) -> Any:
    """Samples ``start:stop``: tensors with ``samples`` entries along dim 0 are cut, everything else is kept."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.dim() > 0 and len(tensor) == samples else tensor

    return _map_tensors(batch, cut)


def parts_of(
    batch: Any, size: int | None, samples: int | None = None, begin: int = 0
) -> Iterator[tuple[Any, int, float]]:
    """The parts of a batch, each with the index of its first sample and its share of all samples.

    Args:
        size: the most samples of a part; None does not split.
        samples: the number of samples; by default :func:`samples_in`.
        begin: the first sample that is wanted.
    """
    if size is None:
        yield batch, 0, 1.0
        return
    samples = samples_in(batch) if samples is None else samples
    if size >= samples and begin == 0:
        yield batch, 0, 1.0
        return
    for start in range(begin, samples, size):
        stop = min(start + size, samples)
        yield part_of(batch, start, stop, samples), start, (stop - start) / samples


def _map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, MutableMapping):  # a mapping that pytree does not know, such as a tokenizer's output
            part = copy.copy(leaf)
            for key, value in leaf.items():
                part[key] = _map_tensors(value, change)
            return part
        return leaf

    return pytree.tree_map(changed, batch)
