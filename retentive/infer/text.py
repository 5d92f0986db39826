"""From tokens to text: whole characters, stop strings, and continuing a prompt with token healing.

    stream_text(generate(model, ids), tokenizer, stop=["\\n"])     text in pieces
    write_on(model, tokenizer, "Once upon", max_tokens=50)        the prompt and the model's text after it

Both are built on `Text`, as are the server and the conversation: it takes ids one by one.
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
    """Returns the stop strings as a tuple; a single string is accepted.

    Raises:
        TypeError: a value is not a string.
        ValueError: a string is empty.
    """
    strings = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    for string in strings:
        check_type("a stop string", string, str)
        if not string:
            raise ValueError("a stop string must not be empty")
    return strings


class Text:
    """Decodes ids one by one into whole characters, up to the first of the `stop` strings.

    Holds back text that may be the start of a stop string until this is decided. `stopped` is True after a stop string,
    which is cut off with everything after it. The first `skip` characters are not searched.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), *, skip: int = 0):
        self.tokenizer, self.decoder, self.stop, self.skip = tokenizer, tokenizer.stream(), stops(stop), skip
        self.held, self.stopped = "", False  # held: decoded text that may begin a stop string
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.given = 0
        """Number of characters given out, in `pieces`."""
        self.decoded = 0
        """Number of decoded characters of all ids, without an incomplete one: given out, held back or cut off."""
        self.ends: list[int] = []
        """Value of `decoded` after each id."""

    def push(self, id: int) -> str:
        """Adds an id and returns the text that is now certain, often ""."""
        piece = self._release(self.decoder.push(id))
        self.ids.append(id)
        self.ends.append(self.decoded)
        return piece

    def flush(self) -> str:
        """Ends the text; returns what was held back, and an incomplete character."""
        piece = self._release(self.decoder.flush())
        rest, self.held = self.held, ""
        self._give(rest)
        return piece + rest

    def kept_ids(self) -> list[int]:
        """Returns ids of exactly the text given out, if some was cut off or held back; the model's own where they fit.

        If a token spans the cut, its text before the cut is encoded again.
        """
        fit = bisect_right(self.ends, self.given)
        whole = self.ends[fit - 1] if fit else 0
        # several ids may end at `whole`; those after the first are bytes of an incomplete character
        own = self.ids[: bisect_left(self.ends, whole) + 1] if whole else []
        rest = "".join(self.pieces)[whole:]
        return own + (self.tokenizer.encode(rest) if rest else [])

    def _release(self, piece: str) -> str:
        """Returns what can be given out of `held` and `piece`; holds back the rest, or cuts it off at a stop string."""
        self.decoded += len(piece)
        skipped, piece = piece[: self.skip], piece[self.skip :]
        self.skip -= len(skipped)
        held = self.held + piece
        cut = min((held.find(s) for s in self.stop if s in held), default=-1)
        if cut >= 0:
            self.held, self.stopped = "", True
            return self._give(skipped + held[:cut])
        # the longest end of the text that may begin a stop string
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
    """Yields the text of `tokens` in pieces, up to the first of the `stop` strings; see `Text`."""
    text = Text(tokenizer, stop, skip=skip)
    for token in tokens:
        if piece := text.push(token.id):
            yield piece
        if text.stopped:
            return
    if piece := text.flush():
        yield piece


def from_the_first_word(pieces: Iterable[str]) -> Iterator[str]:
    """Yields a text's pieces without white space before the first word, which templates put before an answer."""
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
    """Yields the prompt and the model's continuation in pieces, up to end of text, a stop string or `max_tokens`.

    A document begins with an end-of-text token, as in training. Token healing: the prompt's last token is removed and
    sampled again among the tokens that begin with its text. "def " ends in a token for the space, but the model has
    learnt the space as part of the next word's token.

    Args:
        state: the model's state before the prompt; consumed.
        pending: ids between that state and the prompt that were sampled but not read.
        how: `generate`, or a function with its signature, such as `speculate`.
    """
    begin = [tokenizer.eos_id] if state is None else pending
    ids = [*begin, *tokenizer.encode(prompt)]
    healed, first_ids = heal(tokenizer, prompt, ids)
    if first_ids:  # the healed token is sampled again: one token more, and its text appears a second time
        ids, prompt, max_tokens = ids[:-1], prompt[: len(prompt) - len(healed)], max_tokens + 1
    yield prompt
    stop_ids = [tokenizer.eos_id]
    tokens = how(model, ids, params, max_tokens=max_tokens, stop_ids=stop_ids, first_ids=first_ids, state=state)
    yield from stream_text(tokens, tokenizer, stop=stop, skip=len(healed))


def heal(tokenizer: Tokenizer, prompt: str, ids: Sequence[int]) -> tuple[str, list[int] | None]:
    """Returns (text of the prompt's last token, tokens that begin with it); ("", None) if nothing is to be healed."""
    tail = tokenizer.decode(ids[-1:]) if len(ids) > 1 else ""
    if not tail or "\ufffd" in tail or not prompt.endswith(tail):  # part of a character, or no text
        return "", None
    first_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).startswith(tail)]
    return (tail, first_ids) if len(first_ids) > 1 else ("", None)  # only itself: no choice
