"""The table of criteria lists every one, and every criterion says what it is."""

from __future__ import annotations

import pytest

from obc import criteria
from obc.cli import main
from obc.commands.criteria import PASSES, rows


def test_the_command_lists_every_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["criteria"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == criteria.available()


@pytest.mark.parametrize(("name", "criterion", "about"), rows(), ids=criteria.available())
def test_every_criterion_says_what_it_is(name: str, criterion: criteria.Criterion, about: criteria.About) -> None:
    assert criterion.name == name
    assert about.passes in PASSES
    assert about.system
    assert about.source
    assert about.formula
    backward = {"rows", "gradient_moments", "weight_gradients"}
    needs = {one if isinstance(one, str) else one.name for one in criterion.needs}
    if not hasattr(criterion, "measure"):
        assert (about.passes in ("labels", "gradients")) == bool(needs & backward)
        assert (about.passes == "weights") == (not needs)
