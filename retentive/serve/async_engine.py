"""The engine for coroutines: it steps in its own thread, and what steps make is handed to the event loop together.

Each hand-over wakes the loop, and each event sent costs it as much as a small model's share of a step; so steps that
follow each other within TICK are handed over as one. Nobody reads faster than that.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial

from retentive.infer.engine import Engine
from retentive.infer.generate import Token

Item = Token | Exception | None
TICK = 0.02
"""Seconds between two hand-overs, while the engine has work."""


class Mailbox:
    """What the streams of one request deliver, in order, for one reader on the event loop.

    It holds no more than the request's max_tokens: a reader that is slow takes no slot and no more memory than that.
    """

    def __init__(self) -> None:
        self.items: list[tuple[int, Item]] = []
        self.waiter: asyncio.Future[None] | None = None

    def put(self, stream: int, item: Item) -> None:
        """From the event loop's thread."""
        self.items.append((stream, item))
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def take(self) -> list[tuple[int, Item]]:
        """All that has come since the last time, at least one."""
        if not self.items:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
            self.waiter = None
        items, self.items = self.items, []
        return items


class AsyncEngine(Engine):
    """An engine whose streams are read by coroutines of one event loop."""

    loop: asyncio.AbstractEventLoop | None = None
    handed_at = 0.0

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # of the engine's thread alone, so it needs no lock
        self.made: list[tuple[Mailbox, int, Item]] = []

    def into(self, mailbox: Mailbox, first: int, n: int) -> list[Callable[[Item], None]]:
        """Callbacks of n streams, for `submit(deliver=…)`, that are called the streams `first`, first + 1, … there."""
        self.loop = asyncio.get_running_loop()
        return [partial(self._post, mailbox, first + i) for i in range(n)]

    def _post(self, mailbox: Mailbox, stream: int, item: Item) -> None:
        self.made.append((mailbox, stream, item))

    def step(self) -> bool:
        worked = super().step()
        now = time.monotonic()
        if self.made and self.loop is not None and (now - self.handed_at >= TICK or not worked):
            made, self.made, self.handed_at = self.made, [], now
            try:
                self.loop.call_soon_threadsafe(_hand_out, made)
            except RuntimeError:  # the loop has ended, and its readers with it
                return worked
        return worked


def _hand_out(made: list[tuple[Mailbox, int, Item]]) -> None:
    for mailbox, stream, item in made:
        mailbox.put(stream, item)
