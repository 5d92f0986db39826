"""Tokens of the engine's thread reach the event loop completely, in order, and together."""

import asyncio

import pytest

from retentive.infer import SamplingParams, generate
from retentive.serve import async_engine
from retentive.serve.async_engine import AsyncEngine, Mailbox
from tests.serve.conftest import tiny

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def engine():
    engine = AsyncEngine(tiny("retnet"), slots=2).start()
    yield engine
    engine.close(drain=False)


async def read(engine: AsyncEngine, *prompts: list[int]) -> tuple[list[list[int]], int]:
    """(the tokens of each stream, how often the mailbox was opened)."""
    mailbox, made = Mailbox(), [[] for _ in prompts]
    for n, prompt in enumerate(prompts):
        engine.submit(prompt, GREEDY, max_tokens=30, deliver=engine.into(mailbox, n, 1))
    left, takes = len(prompts), 0
    while left:
        takes += 1
        for stream, item in await mailbox.take():
            if item is None:
                left -= 1
            else:
                made[stream].append(item.id)
    return made, takes


@pytest.mark.parametrize("tick", [0, 0.02, 60], ids=["each-step", "usual", "at-the-end"])
def test_streams_of_one_mailbox_are_told_apart(engine, tick, monkeypatch):
    monkeypatch.setattr(async_engine, "TICK", tick)
    prompts = [[65, 66], [67], [68, 69, 70]]
    made, takes = asyncio.run(read(engine, *prompts))
    assert made == [[t.id for t in generate(engine.model, ids, GREEDY, max_tokens=30)] for ids in prompts]
    if tick == 60:  # the first step, and whenever there is nothing left to do: at most after each stream
        assert takes <= 4


def test_a_loop_that_has_ended_does_not_end_the_engine(engine):
    async def leave() -> None:
        engine.submit([65], GREEDY, max_tokens=50, deliver=engine.into(Mailbox(), 0, 1))

    asyncio.run(leave())
    [made], _ = asyncio.run(read(engine, [66]))
    assert made == [t.id for t in generate(engine.model, [66], GREEDY, max_tokens=30)]
