"""obc.Coverage: a string with its parts as attributes, through text, pickles and files."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from obc import Coverage

CASES = {
    "gate": Coverage("gate"),
    "gate on a copy (unchecked)": Coverage("gate", copied=True, checked=False),
    "gate, tied with a, b.c": Coverage("gate", tied=["a", "b.c"]),
    "gate, tied with a, out channels from the row of fc, in channels from the row of up": Coverage(
        "gate", tied=["a"], chained=[("out", "the row of fc"), ("in", "the row of up")]
    ),
    "norm gradient": Coverage("norm gradient"),
    "weight gradient: its forward was bypassed: twice, (unchecked)": Coverage(
        "weight gradient", "its forward was bypassed: twice, (unchecked)"
    ),
    "unscored: no rule for LSTM's own parameters (a, b)": Coverage.unscored("no rule for LSTM's own parameters (a, b)"),
}


@pytest.mark.parametrize(("text", "coverage"), CASES.items(), ids=range(len(CASES)))
def test_it_is_its_text(text: str, coverage: Coverage) -> None:
    assert coverage == text
    assert str(coverage) == text
    assert json.dumps(coverage) == json.dumps(text)
    assert coverage.scored != text.startswith("unscored")


@pytest.mark.parametrize(("text", "coverage"), CASES.items(), ids=range(len(CASES)))
def test_text_pickles_and_fields_give_every_part_back(text: str, coverage: Coverage) -> None:
    fields = json.loads(json.dumps(coverage.fields()))
    for again in (Coverage.parse(text), pickle.loads(pickle.dumps(coverage)), copy.deepcopy(coverage)):
        assert (again, again.fields()) == (text, coverage.fields())
    assert Coverage(**fields).fields() == coverage.fields()
    assert Coverage.parse(coverage) is coverage


def test_a_text_of_another_form_is_kept_as_it_is() -> None:
    odd = Coverage.parse(" (unchecked) on a copy, in channels from ")
    assert odd == " (unchecked) on a copy, in channels from "
    assert odd.scored
    assert odd.reason is None
