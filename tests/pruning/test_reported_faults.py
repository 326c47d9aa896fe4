"""Scripts that reproduce reported faults, where they lie beside the checkout: each prints OK."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "shared" / "cases"
SCRIPTS = sorted(FOLDER.glob("*.py"))
pytestmark = pytest.mark.slow


@pytest.mark.skipif(not SCRIPTS, reason="there are no scripts of reported faults beside this checkout")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_reported_fault_is_gone(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    said = f"{done.stdout}\n{done.stderr[-3000:]}"
    lines = done.stdout.splitlines()
    assert not any(line.startswith("FAULT") for line in lines), said
    assert any(line.startswith("OK") for line in lines), said
    assert done.returncode == 0, said
