"""Facts read from a batch besides its tensors."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from obc.model.batches import attention_mask, inputs_of

MASK = torch.tensor([[1, 1, 0]])


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize(
    "as_batch", [lambda x: x, lambda x: (x, "labels"), lambda x: [x]], ids=["alone", "pair", "list"]
)
def test_the_mask_is_found_wherever_the_model_gets_it(kind: Any, as_batch: Any) -> None:
    """The mask of (inputs, labels), whose first entry call_on_batch passes to the model."""
    assert attention_mask(as_batch(kind({"attention_mask": MASK}))) is MASK


@pytest.mark.parametrize("batch", [None, (), torch.ones(2), {"attention_mask": None}, ({"x": MASK}, MASK)], ids=repr)
def test_no_mask(batch: Any) -> None:
    assert attention_mask(batch) is None


def test_inputs() -> None:
    assert inputs_of((MASK, 1)) is MASK
    assert inputs_of(MASK) is MASK
    assert inputs_of([]) == []
