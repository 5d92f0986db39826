"""The library's threads, and the number of them that a call is worth, found by timing.

A second thread nearly halves the time of a large model's token. A small model's token is finished before a second
thread wakes up. Next to another busy program, threads wait for each other. So each kind of call is timed with each
number of threads. The fastest is kept, and its neighbours are tried again from time to time, for at most a twentieth
of the time.
"""

import ctypes
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

from retentive.native.library import library


class Pace:
    """Finds the fastest number of threads, of 1, 2, 4, … most, for calls of about the same work."""

    TRIES, LONG = 3, 0.1
    """Calls whose mean time rates a number of threads; seconds of calls after which fewer calls are enough."""
    SHARE = 0.05
    """Largest share of the time for trying other numbers: a long prompt with half the threads takes twice as long."""
    SOON, SELDOM = 0.02, 1.0
    """Seconds until other numbers are tried again: after the fastest has changed, and while it stays the same."""
    EQUAL, MUCH = 1.05, 1.5
    """Relative time up to which fewer threads count as equally fast, and beyond which even fewer are not tried."""

    def __init__(self, most: int):
        self.numbers = [n for n in (1, 2, 4, 8, 16, 32) if n < most] + [most]
        self.seconds = dict.fromkeys(self.numbers, math.inf)
        """Recent seconds of a call, by number of threads; inf: never tried."""
        self.best, self.tried = most, list(self.numbers)
        self.times: list[float] = []
        self.spent, self.spent_now = 0.0, 0.0
        """Seconds spent on trying since the last decision, and on the number that is tried now."""
        self.wait, self.changed, self.again, self.cold = self.SOON, 0.0, 0.0, True

    def threads(self, now: float) -> int:
        """Number of threads for the next call."""
        if not self.tried and now >= self.again and len(self.numbers) > 1:
            at = self.numbers.index(self.best)
            self.tried, self.times = [n for n in self.numbers[max(at - 1, 0) : at + 2] if n != self.best], []
        return self.tried[-1] if self.tried else self.best

    def note(self, threads: int, seconds: float, now: float, took: float = 0.0) -> None:
        """Record a call with `threads` threads: its seconds for equal work, and those that it took."""
        if self.cold:  # the first call also makes its work space, and wakes the threads for the first time
            self.cold = False
            return
        if not self.tried:
            self.seconds[threads] += (seconds - self.seconds[threads]) / 4
            if self._fastest() != self.best:  # for example, another busy program has started
                often = now - self.changed < 2 * self.SELDOM
                self.wait = min(4 * self.wait, self.SELDOM) if often else self.SOON
                self.best, self.changed, self.again = self._fastest(), now, now + self.wait
            return
        self.times.append(seconds)
        self.spent_now += took
        if len(self.times) < self.TRIES and self.spent_now < self.LONG:
            return
        tried, mean = self.tried.pop(), sum(self.times) / len(self.times)
        if mean > self.MUCH * min(self.seconds.values()) and tried < self.best:
            self.tried = [n for n in self.tried if n > tried]  # even fewer would be slower
        self.seconds[tried], self.times = mean, []
        self.spent, self.spent_now = self.spent + self.spent_now, 0.0
        if not self.tried:
            stays = self._fastest() == self.best
            pause = max(self.SELDOM if stays else self.wait, self.spent / self.SHARE)
            self.best, self.again, self.spent = self._fastest(), now + pause, 0.0

    def _fastest(self) -> int:
        least = min(self.seconds.values())
        return next(n for n in self.numbers if self.seconds[n] <= self.EQUAL * least)


class Threads:
    """Thread pool of the library, for one caller at a time."""

    def __init__(self, threads: int):
        """
        Raises:
            MemoryError: no memory for the threads.
        """
        self._lock, self._paces = threading.Lock(), dict[tuple[Any, ...], Pace]()
        self._close = library().native_close  # when the interpreter ends, `library` may be gone first
        self._pool = library().native_open(threads)
        if not self._pool:
            raise MemoryError("no memory for the native engine's threads")
        MADE.add(self)

    def __del__(self):
        if getattr(self, "_pool", None):
            self._close(self._pool)

    def call(self, function: Any, call: Any, tokens: int, before: Callable[[], None]) -> None:
        """Call a function of the library for `tokens` tokens, with at most torch's number of threads.

        Args:
            before: called first, while no other thread is in a call.

        Raises:
            MemoryError: the library found no memory.
        """
        with self._lock:
            before()
            most, began = torch.get_num_threads(), time.perf_counter()
            # one Pace per power of two of tokens: a token takes about as long within it
            kind = function.__name__, tokens.bit_length(), most
            pace = self._paces.get(kind) or self._paces.setdefault(kind, Pace(most))
            asked = pace.threads(began)
            call.pool, call.threads = self._pool, asked  # fewer work if the system gave the pool fewer
            failed = function(ctypes.byref(call))
            took = time.perf_counter() - began
            pace.note(asked, took / tokens, began, took)
        if failed:
            raise MemoryError("the native engine found no memory for its work space")


MADE: weakref.WeakSet[Threads] = weakref.WeakSet()


def unlock() -> None:
    """Renew the locks in a forked child process: the thread that held one is not there to release it."""
    for each in MADE:
        each._lock = threading.Lock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=unlock)
