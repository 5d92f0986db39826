"""From tokens to text: whole characters, stop strings, and continuing a prompt (with token healing).

    stream_text(generate(model, ids), tokenizer, stop=["\\n"])     text in pieces
    write_on(model, tokenizer, "Once upon", max_tokens=50)        the prompt and what the model writes after it

`Text` is what both are made of, and the server and the conversation too: ids are pushed into it one by one.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

from retentive.data.tokenizer import Tokenizer
from retentive.infer.generate import Token, generate
from retentive.infer.sample import SamplingParams
from retentive.models import LanguageModel
from retentive.models.state import State
from retentive.options import check_type


def stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings, of which a single one may be given as it is.

    Raises:
        TypeError: something else than strings.
        ValueError: an empty one.
    """
    strings = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    for string in strings:
        check_type("a stop string", string, str)
        if not string:
            raise ValueError("a stop string must not be empty")
    return strings


class Text:
    """The text of ids that are pushed one by one, in whole characters, up to the first of the `stop` strings.

    Text that could be the beginning of a stop string is held back until it is known not to be. `stopped` says that one
    was met; it and what follows are left out. The first `skip` characters are not searched for one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), *, skip: int = 0):
        self.tokenizer, self.decoder, self.stop, self.skip = tokenizer, tokenizer.stream(), stops(stop), skip
        self.held, self.stopped = "", False  # held: decoded, but perhaps the beginning of a stop string
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.given = 0
        """Characters given out, in `pieces`."""
        self.decoded = 0
        """Characters of all ids, without bytes of one that is incomplete: those given out, held back or cut off."""
        self.ends: list[int] = []
        """`decoded` after each of the ids."""

    def push(self, id: int) -> str:
        """The text that is certain after this id; often empty."""
        piece = self._release(self.decoder.push(id))
        self.ids.append(id)
        self.ends.append(self.decoded)
        return piece

    def flush(self) -> str:
        """The rest of the text, when no more ids come: what was held back, and an incomplete character."""
        piece = self._release(self.decoder.flush())
        rest, self.held = self.held, ""
        self._give(rest)
        return piece + rest

    def kept_ids(self) -> list[int]:
        """Ids of exactly the text given out, where some was cut off or held back: the model's own as far as they fit.

        A token may reach over the cut; its text before the cut is then encoded anew.
        """
        fit = bisect_right(self.ends, self.given)
        whole = self.ends[fit - 1] if fit else 0
        # several ids may end at `whole`; those after the first are bytes of a character that is incomplete
        own = self.ids[: bisect_left(self.ends, whole) + 1] if whole else []
        rest = "".join(self.pieces)[whole:]
        return own + (self.tokenizer.encode(rest) if rest else [])

    def _release(self, piece: str) -> str:
        """What can be given out now of `held` and `piece`; the rest is held back, or cut off at a stop string."""
        self.decoded += len(piece)
        skipped, piece = piece[: self.skip], piece[self.skip :]
        self.skip -= len(skipped)
        held = self.held + piece
        cut = min((held.find(s) for s in self.stop if s in held), default=-1)
        if cut >= 0:
            self.held, self.stopped = "", True
            return self._give(skipped + held[:cut])
        # the longest ending of the text that a stop string begins with
        keep = max((n for s in self.stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        self.held = held[len(held) - keep :]
        return self._give(skipped + held[: len(held) - keep])

    def _give(self, piece: str) -> str:
        if piece:
            self.pieces.append(piece)
            self.given += len(piece)
        return piece


def stream_text(
    tokens: Iterator[Token], tokenizer: Tokenizer, *, stop: str | Sequence[str] = (), skip: int = 0
) -> Iterator[str]:
    """The text of `tokens` in pieces, up to the first of the `stop` strings; see `Text`."""
    text = Text(tokenizer, stop, skip=skip)
    for token in tokens:
        if piece := text.push(token.id):
            yield piece
        if text.stopped:
            return
    if piece := text.flush():
        yield piece


def from_the_first_word(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text, without white space before its first word, as templates put it before an answer."""
    begun = False
    for piece in pieces:
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        if piece:
            yield piece


def write_on(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams | None = None,
    *,
    max_tokens: int,
    stop: str | Sequence[str] = (),
    state: State | None = None,
    pending: Sequence[int] = (),
    how: Callable[..., Iterator[Token]] = generate,
) -> Iterator[str]:
    """The prompt and what the model writes after it, in pieces, up to end of text, a `stop` string or `max_tokens`.

    A document begins with an end-of-text token, as in training. Token healing: the prompt's last token is taken back
    and chosen anew among those that begin with its text. "def " ends in a token for the space, but the model has learnt
    the space as part of the next word's token.

    Args:
        state: what the model has read before; used up.
        pending: ids that come between that and the prompt: they were picked but not read.
        how: `generate`, or a function with its signature, such as `speculate`.
    """
    begin = [tokenizer.eos_id] if state is None else pending
    ids = [*begin, *tokenizer.encode(prompt)]
    healed, first_ids = _heal(tokenizer, prompt, ids)
    if first_ids:  # the healed token is made again, so it is one token more, and its text comes out a second time
        ids, prompt, max_tokens = ids[:-1], prompt[: len(prompt) - len(healed)], max_tokens + 1
    yield prompt
    stop_ids = [tokenizer.eos_id]
    tokens = how(model, ids, params, max_tokens=max_tokens, stop_ids=stop_ids, first_ids=first_ids, state=state)
    yield from stream_text(tokens, tokenizer, stop=stop, skip=len(healed))


def _heal(tokenizer: Tokenizer, prompt: str, ids: Sequence[int]) -> tuple[str, list[int] | None]:
    """(text of the prompt's last token, the tokens that begin with it); ("", None) if there is nothing to heal."""
    tail = tokenizer.decode(ids[-1:]) if len(ids) > 1 else ""
    if not tail or "\ufffd" in tail or not prompt.endswith(tail):  # part of a character, or no text
        return "", None
    first_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).startswith(tail)]
    return (tail, first_ids) if len(first_ids) > 1 else ("", None)  # itself alone: nothing to choose
