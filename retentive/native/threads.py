"""The library's threads, and how many of them a call is worth, which is found by trying.

A second thread nearly halves the token of a large model. That of a small one is over before it has woken up, and beside
another program that needs its core both wait for each other. So a call of every kind is timed with each number of
threads, the fastest is kept, and its neighbours are tried again from time to time.
"""

import ctypes
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
    """The fastest number of threads, of 1, 2, 4, … most, for calls that all do about the same."""

    TRIES = 3
    """Calls whose mean tells how fast a number of threads is."""
    SOON, SELDOM = 0.02, 1.0
    """Seconds until another number is tried again: after it was found slow for once, and while all stays as it is."""
    EQUAL = 1.05
    """Times as long for which one thread fewer is as good."""

    def __init__(self, most: int):
        self.numbers = [n for n in (1, 2, 4, 8, 16, 32) if n < most] + [most]
        self.seconds = dict.fromkeys(self.numbers, 0.0)
        """What a call took lately, by the number of threads."""
        self.best, self.tried = most, list(self.numbers)
        self.times: list[float] = []
        self.wait, self.changed, self.again = self.SOON, 0.0, 0.0

    def threads(self, now: float) -> int:
        """As many as the next call should use."""
        if not self.tried and now >= self.again and len(self.numbers) > 1:
            at = self.numbers.index(self.best)
            self.tried, self.times = [n for n in self.numbers[max(at - 1, 0) : at + 2] if n != self.best], []
        return self.tried[-1] if self.tried else self.best

    def note(self, threads: int, seconds: float, now: float) -> None:
        """A call took so long with so many."""
        if not self.tried:
            self.seconds[threads] += (seconds - self.seconds[threads]) / 4
            if self._fastest() != self.best:  # such as a neighbour that has come
                often = now - self.changed < 2 * self.SELDOM
                self.wait = min(4 * self.wait, self.SELDOM) if often else self.SOON
                self.best, self.changed, self.again = self._fastest(), now, now + self.wait
            return
        self.times.append(seconds)
        if len(self.times) < self.TRIES:
            return
        self.seconds[self.tried.pop()], self.times = sum(self.times) / self.TRIES, []
        if not self.tried:
            stays = self._fastest() == self.best
            self.best, self.again = self._fastest(), now + (self.SELDOM if stays else self.wait)

    def _fastest(self) -> int:
        least = min(self.seconds.values())
        return next(n for n in self.numbers if self.seconds[n] <= self.EQUAL * least)


class Threads:
    """The library's threads, which work for one caller at a time."""

    def __init__(self, threads: int):
        """
        Raises:
            MemoryError: no memory for them.
        """
        self._lock, self._paces = threading.Lock(), dict[tuple[Any, ...], Pace]()
        self._close = library().native_close  # where the interpreter ends, `library` may be gone first
        self._pool = library().native_open(threads)
        if not self._pool:
            raise MemoryError("no memory for the native engine's threads")
        MADE.add(self)

    def __del__(self):
        if getattr(self, "_pool", None):
            self._close(self._pool)

    def call(self, function: Any, call: Any, tokens: int, before: Callable[[], None]) -> None:
        """Calls a function of the library for so many tokens, with at most torch's number of threads.

        Args:
            before: called first, while no other thread is in a call.

        Raises:
            MemoryError: the library found none.
        """
        with self._lock:
            before()
            most, began = torch.get_num_threads(), time.perf_counter()
            # to a power of two of tokens, which take about as long each
            kind = function.__name__, tokens.bit_length(), most
            pace = self._paces.get(kind) or self._paces.setdefault(kind, Pace(most))
            asked = pace.threads(began)
            call.pool, call.threads = self._pool, asked  # fewer work where the system gave the pool fewer
            failed = function(ctypes.byref(call))
            pace.note(asked, (time.perf_counter() - began) / tokens, began)
        if failed:
            raise MemoryError("the native engine found no memory for its work space")


MADE: weakref.WeakSet[Threads] = weakref.WeakSet()


def unlock() -> None:
    """In a child process, which does not have the thread that may have been in a call when it was forked."""
    for each in MADE:
        each._lock = threading.Lock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=unlock)
