"""The structure of the package, read from its imports: no two files import each other, and no import runs upward."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import obc

PACKAGE = Path(obc.__file__).parent

# A folder may import from the folders of lower floors and from its own.
FLOORS = (
    ("reference", "distribution", "files"),
    ("model", "tensor_file", "page"),
    ("backends",),
    ("ops",),
    ("scoring", "selection"),
    ("statistics",),
    ("criteria", "structures"),
    ("recovery",),
    ("pruning",),
    ("integrations",),
    ("quality",),
    ("demo", "info"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
# Names that older code imports, and nothing else: they may name anything.
RE_EXPORTS = ("obc", "obc.equivalent", "obc.integrations.transformers")


def _files() -> dict[str, Path]:
    """Every module of the package under its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = _files()


def _imports(name: str) -> set[str]:
    """The modules of the package that this one imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # The folder's own file is imported for its names, and only then.
            found |= {other if other in FILES else node.module for other in inner}
    return {other for other in found if other in FILES and other != name}


def _floor(name: str) -> int:
    room = name.split(".")[1]
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), -1)


def circles() -> list[str]:
    """Pairs of files that reach each other through imports."""
    graph = {name: _imports(name) for name in FILES if name not in RE_EXPORTS}
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        reached[start] = seen
    return [f"{a} <-> {b}" for a in reached for b in reached[a] if a < b and a in reached.get(b, ())]


def upward() -> list[str]:
    """Imports that run from a lower floor to a higher one."""
    return [
        f"{name} imports {other}"
        for name in FILES
        if name not in RE_EXPORTS
        for other in _imports(name)
        if other != "obc" and _floor(other) > _floor(name)
    ]


def test_every_folder_stands_on_a_floor() -> None:
    homeless = [name for name in FILES if name not in RE_EXPORTS and _floor(name) < 0]
    assert not homeless, f"add these to FLOORS: {homeless}"


def test_no_two_files_import_each_other() -> None:
    assert not circles()


def test_no_import_runs_upward() -> None:
    assert not upward()


def test_no_file_of_the_package_imports_its_public_names() -> None:
    """``import obc`` inside the package waits for everything; only commands and the demo are above it."""
    above = ("commands", "demo", "cli")
    names = [name for name in FILES if "obc" in _imports(name) and name.split(".")[1] not in above]
    assert not names


def test_reference_imports_torch_alone() -> None:
    assert not _imports("obc.reference")


HEAVY = "datasets lm_eval matplotlib pandas scipy sklearn torch._dynamo torch_pruning torchvision transformers triton"


def test_the_command_line_starts_without_heavy_packages() -> None:
    """obc.cli imports all that obc does, and the commands; what torch itself imports does not count."""
    code = "import sys, torch; before = set(sys.modules); import obc.cli; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "obc.cli" in done.stdout.split()
    assert not set(HEAVY.split()) & set(done.stdout.split())


ROOT = Path(__file__).parents[2]
# The package may be installed elsewhere; the other sources exist only in the repository.
SOURCES = [
    *FILES.values(),
    *(path for folder in ("obc_kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    *(path for ending in ("cpp", "h", "cu", "cuh") for path in (ROOT / "csrc").rglob(f"*.{ending}")),
]


@pytest.mark.parametrize("path", sorted(SOURCES), ids=lambda path: "/".join(path.parts[-2:]))
def test_no_file_is_longer_than_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


OLD_NAMES = {
    "obc.integrations.transformers": "TransformersStructure load_pruned save_pruned transformer_groups",
    "obc.integrations.torch_pruning": "JacobianImportance prune_step",
    "obc.equivalent": "EquivalentPruning Kept PlanError PruningPlan compensate equivalent_pruning merge",
    "obc.pruning": "PruningReport PruningResult Structure prune",
}


@pytest.mark.parametrize("module", OLD_NAMES)
def test_names_that_readme_gave_can_be_imported_from_there(module: str) -> None:
    __import__(module)
    assert all(hasattr(sys.modules[module], name) for name in OLD_NAMES[module].split())
