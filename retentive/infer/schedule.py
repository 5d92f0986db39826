"""Scheduling of prefill: the number of tokens that a step reads of each prompt."""

from collections.abc import Sequence

from retentive.infer.requests import Prompt

LEAST = 128
"""Smallest part of a long prompt that a step reads, in tokens: smaller ones cost more for each (docs/LOG.md)."""


def shared(
    reading: Sequence[Prompt], chunk: int, every: int | None, least: int = LEAST
) -> list[tuple[Prompt, list[int]]]:
    """Divide the prefill chunk among prompts: returns (prompt, its next ids) for each that the step reads.

    The oldest prompt is always among them, so none waits for ever. The others are those with the fewest tokens left, so
    a long prompt does not hold up short ones. There are only as many as give each `least` tokens (at most half of the
    chunk), or all that it needs. Shares are equal; tokens that short prompts leave go to longer ones. Encoders of
    pictures and sound read at most as many rows as the chunk has tokens, or one picture.

    Args:
        reading: prompts in order of admission.
        every: tokens between cached states: parts end there (`Prompt.until_kept`). None without a cache.
    """
    least = min(least, max(chunk // 2, 1))  # so that a short one is read beside the oldest
    room, wanted, most = chunk, 0, dict[Prompt, int]()  # pictures are encoded whole, and may have to wait for room
    for prompt in [*reading[:1], *sorted(reading[1:], key=lambda prompt: prompt.left)]:
        if wanted >= chunk:
            break
        ahead = prompt.left if every is None else prompt.until_kept(every)
        end = prompt.read + min(ahead, chunk)
        if prompt.placeholders is not None:
            end, room = prompt.placeholders.within(prompt.read, end, room)
        most[prompt] = end - prompt.read
        wanted += min(most[prompt], least)
    prompts = sorted((prompt for prompt in most if most[prompt]), key=lambda prompt: most[prompt])
    budget, parts = chunk, []
    for n, prompt in enumerate(prompts):
        take = min(most[prompt], budget // (len(prompts) - n))
        parts.append((prompt, prompt.ids[prompt.read : prompt.read + take]))
        budget -= take
    return parts
