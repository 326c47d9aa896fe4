"""Names of the package: no variable, argument or attribute is a preposition."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import obc

PACKAGE = Path(obc.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def prepositions(source: str) -> list[str]:
    """Line and name of everything called ``of`` or ``of_...``; functions may be, such as ``Slot.of``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: dict[type[ast.AST], str] = {ast.Name: "id", ast.arg: "arg"}
        if type(node) in names:
            name = getattr(node, names[type(node)])
            if name == "of" or name.startswith("of_"):
                found.append(f"line {getattr(node, 'lineno', '?')}: {name}")
    return found


def test_prepositions_are_found() -> None:
    source = "def f(of_group):\n    for of in of_group:\n        slot.of(of)\n    often = 1\n"
    assert prepositions(source) == ["line 1: of_group", "line 2: of", "line 2: of_group", "line 3: of"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_variable_is_a_preposition(path: Path) -> None:
    assert prepositions(path.read_text()) == []
