"""What a public function takes and raises is in its docstring."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from obc.selection.allocation import Allocation
from obc.statistics.reader import Statistic
from obc.structures.protocol import Provable, Structure

PACKAGES = (
    *("obc", "obc.criteria", "obc.integrations.torch_pruning", "obc.model.groups", "obc.ops", "obc.pruning"),
    *(
        "obc.quality",
        "obc.recovery",
        "obc.scoring",
        "obc.selection",
        "obc.selection.allocation",
        "obc.selection.search",
    ),
    *("obc.statistics", "obc.structures.protocol", "obc.structures.transformers"),
)
# Arguments that say what they are.
_PLAIN = {"self", "cls", "path", "args", "kwargs", "options"}
# Their methods are documented here, not where a class implements them.
_PROTOCOLS = (Allocation, Structure, Provable, Statistic)


def _public(package: str) -> dict[str, Any]:
    module = importlib.import_module(package)
    own = [name for name, one in vars(module).items() if getattr(one, "__module__", "") == package]
    names = getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]
    return {f"{package}.{name}": getattr(module, name) for name in names}


def _inherited(one: type, key: str) -> bool:
    described = [protocol for protocol in _PROTOCOLS if one not in _PROTOCOLS]
    return any(hasattr(base, key) for base in (*one.__mro__[1:], *described))


def _callables() -> Iterator[tuple[str, Any, str]]:
    """(name, function, docstring) of every public function, class and method; methods are documented at their base."""
    seen = set()
    for package in PACKAGES:
        for name, one in _public(package).items():
            if one in seen or not (inspect.isfunction(one) or inspect.isclass(one)):
                continue
            seen.add(one)
            if inspect.isfunction(one):
                yield name, one, inspect.getdoc(one) or ""
                continue
            made = "__init__" in vars(one) and not getattr(one, "_is_protocol", False)
            if made and not (issubclass(one, Exception) or dataclasses.is_dataclass(one)):
                yield name, one.__init__, inspect.getdoc(one) or ""
            for key, member in vars(one).items():
                method = inspect.unwrap(getattr(member, "__func__", member))
                if not key.startswith("_") and not _inherited(one, key) and inspect.isfunction(method):
                    yield f"{name}.{key}", method, inspect.getdoc(method) or ""


CALLABLES = {name: (function, text) for name, function, text in _callables()}


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_and_every_error_is_named(name: str) -> None:
    function, text = CALLABLES[name]
    missing = [one for one in inspect.signature(function).parameters if one not in _PLAIN and not _names(text, one)]
    missing += [error for error in _raised(function) if not _names(text, error)]
    refers = re.search(r"(as for|see|of)\s+:(func|class|meth):", text, re.IGNORECASE)
    assert not missing or refers, f"{name}: its docstring does not name {', '.join(missing)}"


def _names(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _raised(function: Any) -> list[str]:
    """The names of the errors that its own statements raise."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = {ast.unparse(error.func if isinstance(error, ast.Call) else error).rpartition(".")[2] for error in raised}
    return sorted(name for name in names if name[0].isupper() and name not in ("NotImplementedError", "AssertionError"))
