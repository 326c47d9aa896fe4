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
    """(B, T) bool, True where a position counts, from the mapping, or the mapping in (mapping, labels); or None.

    A mask is 0 at padding; or it is added to attention scores, then 0 elsewhere and negative there. (B, 1, 1, T), for
    all heads and queries, is (B, T). One of another shape, which does not say what is padding, keeps its shape.
    """
    inputs = inputs_of(batch)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    is_added = mask.is_floating_point() and bool((mask < 0).any())
    return mask >= 0 if is_added else mask.bool()


def usable_in_autograd(batch: Any) -> Any:
    """The batch, with clones of tensors made inside ``torch.inference_mode()``, which autograd does not save."""
    if not any(tensor.is_inference() for tensor in tensors_in(batch)):
        return batch

    def usable(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    return _map_values(batch, usable, lambda value: False)


def samples_in(batch: Any) -> int:
    """The number of samples: entries along dim 0 of a batch's first tensor.

    If all tensors are in lists, as a detector's images and targets are, a list of mappings or of tensors of different
    lengths has one entry for each sample.

    Raises:
        ValueError: the batch contains no tensor.
    """
    outside: list[int] = []
    inside: list[int] = []
    lists: list[int] = []

    def note(value: Any) -> Any:
        if isinstance(value, Tensor):
            outside.extend(value.shape[:1])
        elif _is_list(value):
            lengths = [tuple(tensor.shape[:1]) for tensor in tensors_in(value)]
            inside.extend(length for (length,) in filter(None, lengths))
            if all(isinstance(entry, Mapping) for entry in value) or len(set(lengths)) > 1:
                lists.append(len(value))
        return value

    _map_values(batch, note, _is_list)
    if found := outside or (lists if inside else []) or inside:
        return found[0]
    raise ValueError(
        f"a batch of type {type(batch).__name__} has no tensor to split along its samples; leave micro_batch out, or "
        "pass tensors in tuples, lists and mappings"
    )


def has_no_samples(batch: Any) -> bool:
    """Whether a batch has tensors, and no entry in any, as a data loader's last batch after filtering may."""
    tensors = tensors_in(batch)
    return bool(tensors) and not any(tensor.numel() for tensor in tensors)


def refuse_empty(index: int, batch: Any) -> None:
    """Raise a ValueError if batch ``index`` has no samples: it would count as one that changes nothing."""
    if has_no_samples(batch):
        raise ValueError(f"batch {index} has no samples; leave empty batches out")


def _is_list(value: Any) -> bool:
    """Whether it is a list or tuple, not empty, of entries of one kind."""
    return type(value) in (list, tuple) and len({type(entry) for entry in value}) == 1


def part_of(batch: Any, start: int, stop: int, samples: int) -> Any:
    """Samples ``start:stop``: tensors with ``samples`` entries along dim 0 are cut, and lists with one for each sample.

    A list inside a batch has one entry for each sample if it has ``samples`` of one kind, unless these are tensors that
    all have ``samples`` entries themselves. Everything else is kept.
    """

    def is_cut(value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.dim() > 0 and len(value) == samples
        return _is_list(value) and len(value) == samples and not all(isinstance(v, Tensor) and is_cut(v) for v in value)

    return _map_values(batch, lambda value: value[start:stop] if is_cut(value) else value, is_cut)


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


def _map_values(batch: Any, change: Callable[[Any], Any], is_whole: Callable[[Any], bool]) -> Any:
    """``batch`` with changed values, also of what is inside; values that ``is_whole`` are changed as one."""

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, MutableMapping):  # a mapping that pytree does not know, such as a tokenizer's output
            part = copy.copy(leaf)
            for key, value in leaf.items():
                part[key] = change(value) if is_whole(value) else _map_values(value, change, is_whole)
            return part
        return change(leaf)

    return pytree.tree_map(changed, batch, is_leaf=lambda value: value is not batch and is_whole(value))
