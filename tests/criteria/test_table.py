"""The table of criteria lists every one, and every criterion says what it is."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from obc import criteria
from obc.cli import main
from obc.commands.criteria import PASSES, rows

FOLDER = Path(criteria.__file__).parent
PROTOCOL = criteria.Criterion.__module__


def test_the_command_lists_every_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["criteria"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == criteria.available()


@pytest.mark.parametrize(("name", "criterion", "about"), rows(), ids=criteria.available())
def test_every_criterion_says_what_it_is(name: str, criterion: criteria.Criterion, about: criteria.About) -> None:
    assert criterion.name == name
    assert criterion.about is not None, f"{type(criterion).__name__}: fill in its attribute about"
    assert about.passes in PASSES
    assert about.system
    assert about.source
    assert about.formula
    backward = {"rows", "gradient_moments", "weight_gradients"}
    needs = {one if isinstance(one, str) else one.name for one in criterion.needs}
    if not hasattr(criterion, "measure"):
        assert (about.passes in ("labels", "gradients")) == bool(needs & backward)
        assert (about.passes == "weights") == (not needs)


def classes() -> list[type[criteria.Criterion]]:
    """Every criterion that a file of obc/criteria defines; a base of others has no name of its own."""
    modules = [importlib.import_module(f"obc.criteria.{path.stem}") for path in FOLDER.glob("[!_]*.py")]
    found = {one for module in modules for one in vars(module).values() if inspect.isclass(one)}
    derived = (one for one in found if issubclass(one, criteria.Criterion) and one.__module__ != PROTOCOL)
    return sorted((one for one in derived if one.name or not one.__subclasses__()), key=lambda one: one.__name__)


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_a_criterion_stands_in_every_place(kind: type[criteria.Criterion]) -> None:
    places = {
        "obc/criteria/__init__.py: its object in CRITERIA": kind in map(type, criteria.CRITERIA),
        "obc/criteria/__init__.py: its name in __all__": kind.__name__ in criteria.__all__,
    }
    missing = [place for place, found in places.items() if not found]
    assert not missing, f"{kind.__name__} is missing in:\n" + "\n".join(missing)
