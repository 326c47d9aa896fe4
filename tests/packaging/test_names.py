"""Names: no variable and no argument is a preposition; a class name stands for one class."""

from __future__ import annotations

import ast
import collections
import re
from pathlib import Path

import pytest

import obc

PACKAGE = Path(obc.__file__).parent
ROOT = Path(__file__).parents[2]
FOLDERS = [PACKAGE, *(ROOT / name for name in ("obc_kernels", "benchmarks", "examples", "tests"))]
FILES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))

# ``before``, ``after`` and ``out`` make sense alone; these need the noun that follows them.
PREPOSITIONS = {"of", "at", "around", "behind", "beside", "through"}
# What a bound name is followed by, so that most files need not be parsed.
BOUND = re.compile(rf"\b(?:{'|'.join(sorted(PREPOSITIONS))}|of_\w+)\s*(?:[=,:)\]}}]|in\b)")
PUBLISHED = {"of_medians"}  # a field of the result files in benchmarks/results


def prepositions(source: str) -> list[str]:
    """Line and name where a variable gets such a name, or ``of_...``; functions may have one, such as ``Slot.of``."""
    found = []
    for node in ast.walk(ast.parse(source)) if BOUND.search(source) else ():
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        name = node.id if stored else node.arg if isinstance(node, ast.arg) else ""
        if (name in PREPOSITIONS or name.startswith("of_")) and name not in PUBLISHED:
            found.append(f"line {getattr(node, 'lineno', '?')}: {name}")
    return found


def test_prepositions_are_found() -> None:
    source = "def f(of_group):\n    for of in of_group:\n        slot.of(of)\n    often = at = 1\n"
    assert sorted(prepositions(source)) == ["line 1: of_group", "line 2: of", "line 4: at"]
    for one in ("at, b = c", "b, at = c", "[\n  of\n] = c", "lambda of: 1", "with c as at:\n  pass", "at: int = 1"):
        assert len(prepositions(one)) == 1, one


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_no_variable_is_a_preposition(path: Path) -> None:
    assert prepositions(path.read_text()) == []


def test_no_two_classes_have_one_name() -> None:
    """A name that means two things has to be looked up; private classes of files that nobody else imports may agree."""
    files = collections.defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files[node.name].append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in files.items() if len(paths) > 1} == {}
