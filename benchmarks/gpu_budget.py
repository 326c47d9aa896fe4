"""A pytest plugin: past the moment OBC_TESTS_END (seconds since the epoch) tests are skipped and named as such."""

from __future__ import annotations

import os
import time

import pytest

REASON = "the time for the tests was spent"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ["OBC_TESTS_END"]):
        pytest.skip(REASON)
