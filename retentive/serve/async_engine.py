"""Engine for coroutines: steps in its own thread and hands tokens over to the event loop in batches.

Each hand-over wakes the loop, and each event that the server sends costs as much CPU time as a request's share of a
small model's step. So the tokens of several steps within TICK are handed over at once; nobody reads faster than that.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial

from retentive.infer.engine import Engine
from retentive.infer.generate import Token

Item = Token | Exception | None
TICK = 0.02
"""Minimum seconds between two hand-overs while the engine works."""


class Mailbox:
    """Items that the streams of one request deliver, in order, for one reader on the event loop.

    Needs no bound: a request makes at most max_tokens, so a slow reader costs that much memory and no slot.
    """

    def __init__(self) -> None:
        self.items: list[tuple[int, Item]] = []
        self.waiter: asyncio.Future[None] | None = None

    def put(self, stream: int, item: Item) -> None:
        """Adds an item. Called in the event loop's thread as `take` is, so there is no lock."""
        self.items.append((stream, item))
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def take(self) -> list[tuple[int, Item]]:
        """Returns all new items as (stream, item); waits until there is one."""
        if not self.items:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
            self.waiter = None
        items, self.items = self.items, []
        return items


class AsyncEngine(Engine):
    """Engine whose streams are read by coroutines of one event loop."""

    loop: asyncio.AbstractEventLoop | None = None
    handed_at = 0.0

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # used only by the thread that steps, so it needs no lock
        self.made: list[tuple[Mailbox, int, Item]] = []

    def into(self, mailbox: Mailbox, first: int, n: int) -> list[Callable[[Item], None]]:
        """Returns callbacks for `submit(deliver=…)` of n streams, numbered from `first` in the mailbox."""
        self.loop = asyncio.get_running_loop()
        return [partial(self._post, mailbox, first + i) for i in range(n)]

    def _post(self, mailbox: Mailbox, stream: int, item: Item) -> None:
        self.made.append((mailbox, stream, item))

    def step(self) -> bool:
        """As `Engine.step`; then hands over new tokens if TICK has passed since the last time."""
        worked = super().step()
        now = time.monotonic()
        # without work the engine sleeps next, so the rest must go out now
        if self.made and self.loop is not None and (now - self.handed_at >= TICK or not worked):
            made, self.made, self.handed_at = self.made, [], now
            try:
                self.loop.call_soon_threadsafe(_hand_out, made)
            except RuntimeError:  # the loop and its readers have ended
                return worked
        return worked


def _hand_out(made: list[tuple[Mailbox, int, Item]]) -> None:
    for mailbox, stream, item in made:
        mailbox.put(stream, item)
