"""Runs tests with the gates in Python, and with those in C++ if they were built."""

from __future__ import annotations

import pytest

from obc.backends import native_gates


@pytest.fixture(params=["native", "python"])
def gates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with gates in C++ and with those in Python."""
    kind: str = request.param
    monkeypatch.setenv(native_gates.SWITCH, "0" if kind == "python" else "1")
    if kind == "native" and (reason := native_gates.why_unavailable()):
        pytest.skip(f"no gates in C++: {reason}")
    return kind
