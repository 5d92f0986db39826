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
    prompts = sorted((p for p in reading if p.left), key=lambda p: p.left)
    budget, ends = max(chunk, len(prompts)), dict[Prompt, int]()
    for n, prompt in enumerate(prompts):
        take = min(prompt.left, budget // (len(prompts) - n))
        if every is not None:
            take = min(take, prompt.until_kept(every))
        ends[prompt] = prompt.read + take
        budget -= take
    room = chunk  # pictures are encoded whole, even if only a part is read now: the newest may have to wait
    for prompt in reading:
        if prompt in ends and prompt.placeholders is not None:
            ends[prompt], room = prompt.placeholders.within(prompt.read, ends[prompt], room)
    return [(prompt, prompt.ids[prompt.read : end]) for prompt, end in ends.items() if end > prompt.read]
