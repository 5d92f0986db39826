"""Text from tokens: whole characters, stop strings at any border, healed prompts, and the ids of cut text."""

import pytest

from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.infer import SamplingParams, Token, generate
from retentive.infer.text import Text, stream_text, write_on
from retentive.models import build, retnet

GREEDY = SamplingParams(temperature=0)
BYTES = ByteTokenizer()


def stream(parts, *, stop=(), tokenizer=BYTES) -> list[str]:
    return list(stream_text((Token(id, 0.0) for id in parts), tokenizer, stop=stop))


def encoded(text: str) -> list[int]:
    return BYTES.encode(text)


# text, stop strings, what is to come out; every byte is a token, so every stop string crosses borders
STOPS = {
    "none": ("plain text", [], "plain text"),
    "not-there": ("plain text", ["xyz", "text!"], "plain text"),
    "in-the-middle": ("one. two. three.", [". t"], "one"),
    "at-the-start": ("END and more", ["END"], ""),
    "at-the-end": ("some END", ["END"], "some "),
    "the-earlier-of-two": ("a b c d", ["c", "b"], "a "),
    "begun-and-broken-off": ("abababac.", ["abac"], "abab"),
    "begun-at-the-end": ("the EN", ["END"], "the EN"),
    "begun-twice": ("\n\nuser\n\n\nUser: x", ["\n\nUser:"], "\n\nuser\n"),
    "of-several-bytes": ("café 猫が好き", ["猫が"], "café "),
    "one-letter": ("abc", ["b"], "a"),
    "other-text-and-end-of-text-tokens": ("a" + "b" * 50, ["bc"], "a" + "b" * 50),
}


@pytest.mark.parametrize("name", STOPS)
def test_text_ends_before_the_first_stop_string(name):
    text, stop, want = STOPS[name]
    assert "".join(stream(encoded(text), stop=stop)) == want


@pytest.mark.parametrize("name", [n for n in STOPS if n != "none"])
def test_no_part_of_a_stop_string_is_ever_shown(name):
    """Larger tokens, with other borders, stop in the same place."""
    text, stop, want = STOPS[name]
    tokenizer = train_bpe([text, text], 257 + 40)
    assert "".join(stream(tokenizer.encode(text), stop=stop, tokenizer=tokenizer)) == want


def test_text_is_held_back_only_while_a_stop_string_may_have_begun():
    assert stream(encoded("a<b<|c"), stop=["<|end|>"]) == ["a", "<b", "<|c"]
    assert stream(encoded("ab")) == ["a", "b"]


def test_nothing_is_read_after_the_stop():
    def tokens():
        for id in encoded("stop here"):
            yield Token(id, 0.0)
        raise AssertionError("read on")

    assert "".join(stream_text(tokens(), BYTES, stop=["here"])) == "stop "


@pytest.mark.parametrize("text", ["naïve café", "猫が好き", "🙂👩‍👩‍👧", "añb🙂c"])
def test_characters_of_several_tokens_come_whole(text):
    pieces = stream(encoded(text))
    assert "".join(pieces) == text and len(pieces) == len(text)


def test_a_character_that_never_ends_comes_at_the_end():
    assert stream(encoded("ab猫")[:-1]) == ["a", "b", "\ufffd"]
    assert "".join(stream([0x61, 0xFF, 0x62])) == "a\ufffdb"


def test_the_end_of_text_and_an_empty_stream_are_no_text():
    assert stream([]) == [] and stream([*encoded("a"), 256]) == ["a"]


def test_an_empty_stop_string_is_refused(refuses):
    with refuses("a stop string must not be empty"):
        stream(encoded("abc"), stop=["x", ""])


def text_model(vocab_size: int):
    """A small model in float64, which makes choices unambiguous."""
    return build(retnet(vocab_size=vocab_size, dim=24, layers=1, heads=2)).double().eval()


LEARNT = train_bpe(["the fox then saw the other fox over there " * 9], 280)
PROMPTS = ["", "t", "the ", "the fox ", "th", "ov", "The fox\n", "naïve", "猫", "🙂 "]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("tokenizer", [BYTES, LEARNT], ids=["bytes", "bpe"])
def test_what_is_written_begins_with_the_prompt(tokenizer, prompt):
    for seed in range(5):
        params = SamplingParams(seed=seed)
        text = "".join(write_on(text_model(tokenizer.vocab_size), tokenizer, prompt, params, max_tokens=6))
        assert text.startswith(prompt)


def test_the_last_token_of_a_prompt_may_become_a_longer_one():
    """ "the " ends in a space, and the tokenizer has learnt spaces as the beginnings of words."""
    ids = LEARNT.encode("the ")
    longer = [i for i in range(LEARNT.vocab_size) if LEARNT.decode([i]).startswith(" ")]
    assert LEARNT.decode(ids[-1:]) == " " and len(longer) > 1
    model, first = text_model(LEARNT.vocab_size), [LEARNT.eos_id, *ids[:-1]]
    want = list(generate(model, first, GREEDY, max_tokens=6, stop_ids=[LEARNT.eos_id], first_ids=longer))
    assert want[0].id in longer
    text = "".join(write_on(model, LEARNT, "the ", GREEDY, max_tokens=5))
    assert text == "the" + LEARNT.decode([token.id for token in want])


def test_a_stop_string_is_looked_for_in_what_is_new():
    """The prompt's end is written again, but still belongs to the prompt."""
    text = "".join(write_on(text_model(257), BYTES, "one line\n", GREEDY, max_tokens=4, stop=["\n"]))
    assert text.startswith("one line\n")


def test_max_tokens_counts_what_is_new():
    text = "".join(write_on(text_model(257), BYTES, "abc", SamplingParams(seed=0), max_tokens=1))
    assert text.startswith("abc") and len(text) == 4


@pytest.mark.parametrize("name", [n for n in STOPS if n != "none"])
@pytest.mark.parametrize("large", [False, True], ids=["bytes", "bpe"])
def test_the_ids_of_what_was_given_out_are_those_of_its_text(name, large):
    """If a token reaches beyond the stop string, only its text before the stop is kept."""
    said, stop, want = STOPS[name]
    tokenizer = train_bpe([said, said], 257 + 40) if large else BYTES
    text = Text(tokenizer, stop)
    for id in tokenizer.encode(said):
        text.push(id)
        if text.stopped:
            break
    given = "".join(text.pieces)
    assert want.startswith(given) and tokenizer.decode(text.kept_ids()) == given
    if text.stopped:
        assert given == want


def test_the_models_own_ids_are_kept_as_far_as_they_fit():
    """ "the" as three tokens is what the model has read: encoded anew it would be another one."""
    spelt, tail = [LEARNT.encode(c)[0] for c in "the"], LEARNT.encode(" fox")
    assert LEARNT.encode("the") != spelt and len(tail) < 4
    text = Text(LEARNT, ["ox"])
    for id in [*spelt, *tail]:
        text.push(id)
    assert text.stopped and text.kept_ids() == [*spelt, *LEARNT.encode(" f")]


def test_a_character_that_was_not_finished_is_not_kept():
    text = Text(BYTES)
    for id in encoded("aé")[:-1]:
        text.push(id)
    assert text.kept_ids() == encoded("a")
