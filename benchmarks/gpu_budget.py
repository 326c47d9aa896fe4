"""A pytest plugin of the GPU run: tests end in time, and one that breaks the GPU's context takes no others with it.

Past the moment OBC_TESTS_END (seconds since the epoch) tests are skipped and named as such. After a kernel has failed,
nothing more can be done with the device in that process: a worker of xdist that finds itself so ends, and xdist starts
another for the tests that are left; without xdist the run ends there.
"""

from __future__ import annotations

import os
import sys
import time

import pytest

REASON = "the time for the tests was spent"

_failed = False


def broken() -> bool:
    """Whether the device refuses all further work in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ["OBC_TESTS_END"]):
        pytest.skip(REASON)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    _failed |= report.failed


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Called after the test's report has been passed on."""
    global _failed
    if _failed and broken():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)
        pytest.exit(f"the GPU's context is broken since {nodeid}", returncode=1)
    _failed = False
