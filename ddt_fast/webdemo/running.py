"""Work in the background, with progress: the page shows how far it is, and may end it."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ddt_fast.webdemo.models import DemoModel

T = TypeVar("T")

REPORT_SECONDS = 0.1
"""Between two reports: more often, a page would not show them."""

_REPEAT_SECONDS = 0.5
"""After which the latest progress is yielded again: an iterator that waits inside cannot be closed."""

_END_SECONDS = 30.0
"""Longer than a step takes; work that goes on after it is left behind."""

_at_work: dict[threading.Thread, threading.Event] = {}
"""The threads at work, and what tells each of them to stop."""


@dataclass(frozen=True)
class Progress:
    """How far the work is.

    Attributes:
        text: what it is at.
        done, total: steps; total 0 where there are none to count.
        seconds: since the work began; waiting does not count.
    """

    text: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Finished(Generic[T]):
    """What the work returned."""

    result: T


class Stopped(Exception):
    """Raised in the work when nobody waits for it any more."""


Report = Callable[[str, int, int], None]
"""Called as report(text, done, total) by the work; raises `Stopped` to end it."""


def in_background(model: DemoModel, work: Callable[[Report], T]) -> Iterator[Progress | Finished[T]]:
    """Run the work in a thread while it alone holds the model; yield its latest progress, at last its result.

    Closing the iterator ends the work at its next report.

    Raises:
        ValueError: from the work, or that it ran out of memory; or of another error, whose traceback goes to stderr.
    """
    updates: queue.SimpleQueue[Progress | Finished[T] | Exception] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        try:
            if not model.lock.acquire(blocking=False):
                updates.put(Progress("waiting: the model is drawing for somebody else"))
                while not model.lock.acquire(timeout=REPORT_SECONDS):
                    if stop.is_set():
                        return
            try:
                updates.put(Finished(work(_reporter(updates.put, stop))))
            finally:
                model.lock.release()
        except Stopped:
            pass
        except Exception as error:
            updates.put(error)
        finally:
            del _at_work[threading.current_thread()]

    thread = threading.Thread(target=run, name="draw", daemon=True)
    _at_work[thread] = stop
    thread.start()
    try:
        update: Progress | Finished[T] | Exception = Progress("starting")
        while True:
            with suppress(queue.Empty):
                update = updates.get(timeout=_REPEAT_SECONDS)
            while isinstance(update, Progress) and not updates.empty():
                update = updates.get()
            if isinstance(update, Exception):
                raise _as_message(update) from update
            yield update
            if isinstance(update, Finished):
                return
    finally:
        stop.set()


def end_work() -> None:
    """End all work at its next report, and wait for that: a thread that is inside torch when Python ends takes the
    process down."""
    at_work = dict(_at_work)
    for stop in at_work.values():  # all before the first is waited for, or who waits for its model would begin
        stop.set()
    for thread in at_work:
        thread.join(_END_SECONDS)


def _reporter(put: Callable[[Progress], None], stop: threading.Event) -> Report:
    started = time.perf_counter()
    latest = 0.0

    def report(text: str, done: int, total: int) -> None:
        nonlocal latest
        if stop.is_set():
            raise Stopped
        seconds = time.perf_counter() - started
        if seconds - latest >= REPORT_SECONDS:
            latest = seconds
            put(Progress(text, done, total, seconds))

    return report


def _as_message(error: Exception) -> ValueError:
    if isinstance(error, ValueError):
        return error
    # A CPU allocation that fails is a plain RuntimeError.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return ValueError("out of memory; ask for fewer images")
    traceback.print_exception(error)
    return ValueError("the server met an error, which its log shows")
