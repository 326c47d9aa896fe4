"""The project's dependencies: a lock of the development environment, and the commands that list and check it."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from obc.distribution import DISTRIBUTION

ROOT = Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, str]:
    """Package -> version."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_the_lock_has_every_package_that_the_project_names() -> None:
    """The requirements in its metadata; pip, which wrote the file, adds theirs."""
    required = importlib.metadata.requires(DISTRIBUTION) or []
    named = {re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!;(]", line)[0]).lower() for line in required}
    tools = {"setuptools", DISTRIBUTION}  # pip's own, which it doesn't freeze, and obc
    assert len(named) > 15
    assert named - tools <= pins("constraints-lock.txt").keys()


def test_the_lock_keeps_what_is_pinned() -> None:
    lock = pins("constraints-lock.txt")
    assert {name: lock[name] for name in pins("constraints.txt")} == pins("constraints.txt")
    assert not [version for version in lock.values() if "+" in version]  # one lock for CPU and CUDA builds


@pytest.mark.parametrize("target", ["audit", "licences", "lock", "sbom", "wheel"])
def test_commands_of_the_supply_are_there_and_explained(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}: .*## \w", makefile, re.MULTILINE)
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("SECURITY.md", "docs/install.md"))
    assert f"`make {target}`" in pages


def test_runtime_dependencies_are_those_that_the_security_page_names() -> None:
    required = importlib.metadata.requires(DISTRIBUTION) or []
    runtime = {re.split(r"[\s\[<>=!;(]", line)[0] for line in required if "extra ==" not in line}
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    listed = text.split("Runtime dependencies:")[1].split("Everything else")[0]
    assert runtime == set(re.findall(r"(\w+) \([A-Z]", listed))
