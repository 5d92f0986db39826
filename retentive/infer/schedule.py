"""Scheduling of prefill: the number of tokens that a step reads of each prompt."""

from collections.abc import Sequence

from retentive.infer.requests import Prompt


def shared(reading: Sequence[Prompt], chunk: int, every: int | None) -> list[tuple[Prompt, list[int]]]:
    """Divide the prefill chunk equally: returns (prompt, its next ids) for each prompt that the step reads.

    Tokens that short prompts leave go to longer ones. So a long prompt does not hold up short ones, nor many short ones
    a long one. Encoders of pictures and sound read at most as many rows as the chunk has tokens, or one picture.

    Args:
        reading: prompts in order of admission.
        every: tokens between cached states: parts end there (`Prompt.until_kept`). None without a cache.
    """
    room, most = chunk, dict[Prompt, int]()  # pictures are encoded whole, and the newest may have to wait for room
    for prompt in reading:
        ahead = prompt.left if every is None else prompt.until_kept(every)
        end = prompt.read + min(ahead, chunk)
        if prompt.placeholders is not None:
            end, room = prompt.placeholders.within(prompt.read, end, room)
        most[prompt] = end - prompt.read
    prompts = sorted((prompt for prompt in most if most[prompt]), key=lambda prompt: most[prompt])
    budget, parts = max(chunk, len(prompts)), []
    for n, prompt in enumerate(prompts):
        take = min(most[prompt], budget // (len(prompts) - n))
        parts.append((prompt, prompt.ids[prompt.read : prompt.read + take]))
        budget -= take
    return parts
