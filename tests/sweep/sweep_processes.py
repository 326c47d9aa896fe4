"""Jobs in forked processes of their own, with limits of time and memory: one that crashes or hangs is said to."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job", bound=Hashable)
# A process that waits for others to compute is given so many times its limit of CPU time.
_WAITING = 10


def forked(
    jobs: Sequence[Job], work: Callable[[Job], Any], limits: tuple[float, float], at_once: int
) -> Iterator[tuple[Job, Any, str]]:
    """(job, what ``work(job)`` returned, "") as they end; or (job, None, how its process ended).

    Args:
        jobs: in this order.
        work: runs in a fork, which has everything that is imported by then; returns what can be pickled.
        limits: seconds of CPU time and GiB for each.
        at_once: processes.
    """
    late = f"not done after {limits[0]:.0f} s"
    context = multiprocessing.get_context("fork")
    running: dict[Job, tuple[Any, Any, float]] = {}
    waiting = list(jobs)
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, work, limits, theirs))
            process.start()
            theirs.close()
            running[job] = (process, ours, time.monotonic())
        for job, (process, pipe, started) in list(running.items()):
            result, ended = None, ""
            if pipe.poll(0.02):
                try:
                    result = pipe.recv()
                except EOFError:
                    process.join()
                    ended = late if process.exitcode == -signal.SIGXCPU else "the process ended without a word"
            elif time.monotonic() - started > _WAITING * limits[0]:
                process.kill()
                ended = late
            else:
                continue
            process.join()
            del running[job]
            yield job, result, ended


def _work(job: Any, work: Callable[[Any], Any], limits: tuple[float, float], pipe: Any) -> None:
    seconds, gigabytes = limits
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - until the process ends
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    pipe.send(work(job))
