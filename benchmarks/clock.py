"""Timers that keep their time: event loops count in whole milliseconds, which is too coarse for latencies."""

import asyncio
import contextlib
import ctypes
import heapq
import itertools
import os
import time
from collections.abc import Callable

CLOCK_MONOTONIC, TFD_TIMER_ABSTIME = 1, 1


class _Time(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns"))


class PreciseTimer:
    """Calls back at a time of `time.monotonic()`, exact to some 50 µs. Linux only.

    Interface: https://man7.org/linux/man-pages/man2/timerfd_create.2.html (in Python's os from 3.13 on).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file: int = self._libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        loop.add_reader(self._file, self._due)

    def call_at(self, when: float, callback: Callable[[], object]) -> None:
        """Call back at this time, or at once when it has passed."""
        entry = (when, next(self._numbers), callback)
        heapq.heappush(self._heap, entry)
        if self._heap[0] is entry:
            self._set(when)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> None:
        """Call back after so many seconds."""
        self.call_at(time.monotonic() + seconds, callback)

    def _set(self, when: float) -> None:
        seconds, rest = divmod(max(when, 1e-9), 1.0)
        value = _Time(0, 0, int(seconds), max(int(rest * 1e9), 1))
        self._libc.timerfd_settime(self._file, TFD_TIMER_ABSTIME, ctypes.byref(value), None)

    def _due(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._file, 8)
        try:
            while self._heap and self._heap[0][0] <= time.monotonic():
                heapq.heappop(self._heap)[2]()
        finally:  # a callback that fails must not stop the clock
            if self._heap:
                self._set(self._heap[0][0])
