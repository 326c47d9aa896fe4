"""Fixtures of all tests: fixed seeds, poisoned memory, and the backend that a test runs on."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator

import pytest
import torch
from cases import on
from hypothesis import settings
from samples import left_out_of_samples

import obc

# The same examples in every run, so that a failure is reproducible. No deadline, because a loaded machine is slow.
settings.register_profile("obc", derandomize=True, deadline=None, max_examples=200, database=None)
settings.load_profile("obc")


def pytest_report_header() -> list[str]:
    lines = []
    for name, facts in obc.backends.describe().items():
        lines.append(f"backend {name}: " + ("available" if facts["available"] else f"not here: {facts['reason']}"))
    return lines


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without garbage collection, and exempt what was collected from it: a million objects that all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before -m selects by the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are deselected, counted in the closing line; ``-m gpu`` alone is then an error."""
    if addressed := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"processes would not agree on the name of {addressed[0]}: pass ids=")
    for item in left_out_of_samples(items):
        item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    # By the marker: the keywords of a test also have the names of its folders, such as a checkout named gpu.
    deselected = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # which takes a millisecond for the GPUs that are not there
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised, to C++ too, is NaN: an output that a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    before_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all(), "this torch does not fill uninitialised memory in deterministic mode"
    yield
    torch.use_deterministic_algorithms(before, warn_only=before_warn_only)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a (backend, device) of ``cases.TARGETS``, with that backend in use; parametrise indirectly."""
    with on(request.param) as name:
        yield name


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that a test sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
