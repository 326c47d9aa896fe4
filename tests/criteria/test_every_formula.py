"""Every criterion is held against its formula on every kind of model, or there is nothing in it to score."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import transcribed
from formulas import make_subject
from transcribed import EXEMPT, FOUR, KIND_OF, KINDS, TRANSCRIBED

import obc
from obc import criteria

MODEL_OF = {KIND_OF[name]: name for name in FOUR}


@pytest.fixture(scope="module", autouse=True)
def _tables_of_all_files() -> None:
    """The other files fill the table when they are imported, which those that this process does not run are not."""
    for path in sorted(Path(__file__).parent.glob("test_formulas_*.py")):
        importlib.import_module(path.stem)


def test_every_criterion_is_transcribed_on_every_kind_of_model() -> None:
    lines = [f"{name} on {kind}" for name, kind in transcribed.missing(transcribed.wanted())]
    assert not lines, "no test decorated by transcribed.transcribes holds against its formula: " + ", ".join(lines)


def test_nothing_else_is_in_the_table() -> None:
    """A criterion, a switch or an exemption that is no more is taken out of the tests, too."""
    assert set(TRANSCRIBED) <= set(transcribed.wanted())
    exempt = {(name, kind) for name, kind in EXEMPT if name in criteria.available() and kind in KINDS}
    assert exempt == set(EXEMPT)
    assert not [(name, kind) for name, kind in EXEMPT if kind in TRANSCRIBED.get(name, ())]


class Switched(criteria.Criterion):
    """A criterion that nobody has transcribed."""

    name = "switched"

    def __init__(self, squared: bool = False) -> None:
        self.squared = squared


@pytest.fixture
def _another(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Any = importlib.import_module("obc.criteria.registry")
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    criteria.register("switched", Switched())


@pytest.mark.usefixtures("_another")
def test_a_criterion_that_is_new_is_missing() -> None:
    expected = [(name, kind) for name in ("switched", "switched(squared=True)") for kind in KINDS]
    switched = [name for name in transcribed.wanted() if name.startswith("switched")]
    assert transcribed.missing(switched) == expected


@pytest.mark.sampled(members=5)
@pytest.mark.parametrize(("name", "kind"), EXEMPT, ids=[f"{name}-{kind}" for name, kind in EXEMPT])
def test_what_is_exempt_is_refused_by_name(name: str, kind: str) -> None:
    subject = make_subject(MODEL_OF[kind])
    x = subject.batches[0][0]
    structure: Any = {}
    if kind == "CNN":
        structure = {"example_inputs": x.requires_grad_(), "ignored_layers": ["head"]}
    with pytest.raises(ValueError, match=f"the criterion '{name}'"):
        obc.prune(
            subject.model,
            batches=subject.batches,
            loss_fn=subject.loss_fn,
            forward_fn=subject.forward_fn,
            criterion=name,
            macs=0.9,
            progress=False,
            **structure,
        )
