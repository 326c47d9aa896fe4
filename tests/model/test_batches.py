"""Facts read from a batch besides its tensors."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from obc.model.batches import attention_mask, inputs_of, part_of, samples_in

MASK = torch.tensor([[1, 1, 0]])


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize(
    "as_batch", [lambda x: x, lambda x: (x, "labels"), lambda x: [x]], ids=["alone", "pair", "list"]
)
def test_the_mask_is_found_wherever_the_model_gets_it(kind: Any, as_batch: Any) -> None:
    """The mask of (inputs, labels), whose first entry call_on_batch passes to the model."""
    assert attention_mask(as_batch(kind({"attention_mask": MASK}))).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    "mask",
    [
        MASK.bool(),
        MASK.double(),
        (1 - MASK) * -1e9,
        (1 - MASK.half()) * torch.finfo(torch.float16).min,
        torch.zeros(1, 3).masked_fill(MASK == 0, -torch.inf),
        MASK[:, None, None],
        torch.zeros(1, 1, 1, 3).masked_fill(MASK == 0, -torch.inf),
    ],
    ids=["bool", "float", "added", "added, half", "added infinity", "all heads", "all heads, added"],
)
def test_masks_of_all_kinds_say_what_counts(mask: torch.Tensor) -> None:
    found = attention_mask({"attention_mask": mask})
    assert found is not None
    assert found.tolist() == [[True, True, False]]


@pytest.mark.parametrize("batch", [None, (), torch.ones(2), {"attention_mask": None}, ({"x": MASK}, MASK)], ids=repr)
def test_no_mask(batch: Any) -> None:
    assert attention_mask(batch) is None


def test_inputs() -> None:
    assert inputs_of((MASK, 1)) is MASK
    assert inputs_of(MASK) is MASK
    assert inputs_of([]) == []


def ones(*lengths: int) -> list[torch.Tensor]:
    return [torch.ones(length, 3) for length in lengths]


# Batch of 4 samples -> its second and third.
PARTS: dict[str, tuple[Any, Any]] = {
    "tensors": ((ones(4)[0], torch.arange(4)), (ones(2)[0], torch.tensor([1, 2]))),
    "names": ({"x": ones(4)[0], "name": list("abcd"), "n": 4}, {"x": ones(2)[0], "name": list("bc"), "n": 4}),
    "other mapping": (UserDict(x=ones(4)[0], y=[1, 2, 3, 4]), UserDict(x=ones(2)[0], y=[2, 3])),
    "tuple of names": ((ones(4)[0], tuple("abcd")), (ones(2)[0], tuple("bc"))),
    "lists of lists": ((ones(4)[0], [[1], [2, 2], [], [3]]), (ones(2)[0], [[2, 2], []])),
    "targets of a detector": (
        (ones(4)[0], [{"boxes": boxes} for boxes in ones(1, 4, 2, 4)]),
        (ones(2)[0], [{"boxes": boxes} for boxes in ones(4, 2)]),
    ),
    "images of a detector": (
        (ones(3, 3, 3, 3), [{"boxes": boxes} for boxes in ones(1, 4, 2, 4)]),
        (ones(3, 3), [{"boxes": boxes} for boxes in ones(4, 2)]),
    ),
    "sequences of different lengths": (({"ids": ones(5, 4, 4, 6)},), ({"ids": ones(4, 4)},)),
    "one tensor for each layer": ((ones(4, 4, 4, 4), ones(4)[0]), (ones(2, 2, 2, 2), ones(2)[0])),
    "pairs": (((ones(4)[0], None), ones(4)[0]), ((ones(2)[0], None), ones(2)[0])),
    "names of classes": ((ones(4)[0], ["cat", "dog"]), (ones(2)[0], ["cat", "dog"])),
    "the batch itself": ([torch.arange(4), ones(4)[0]], [torch.tensor([1, 2]), ones(2)[0]]),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_hold_all_that_belongs_to_their_samples(kind: str) -> None:
    batch, want = PARTS[kind]
    assert samples_in(batch) == 4
    part = part_of(batch, 1, 3, 4)
    if isinstance(batch, UserDict):
        part, want = dict(part), dict(want)
    torch.testing.assert_close(_plain(part), _plain(want))


def _plain(value: Any) -> Any:
    """Texts and None, which assert_close does not compare, as numbers."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [len(value), *map(_plain, value)]
    return value if isinstance(value, (torch.Tensor, int)) else hash(value)


@pytest.mark.parametrize("batch", [{"x": []}, (["a", "b"], {"y": [1]}), torch.tensor(1.0), [[{"y": 1}]]], ids=repr)
def test_a_batch_without_tensors_can_not_be_split(batch: Any) -> None:
    with pytest.raises(ValueError, match="has no tensor to split along its samples; leave micro_batch out"):
        samples_in(batch)
