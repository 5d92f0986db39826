"""`complete`, and `retentive.generate` over it: the same text as one prompt at a time."""

import math

import pytest
import torch

import retentive
from retentive.checkpoint import ModelFolder, save_model
from retentive.data.templates import TURNS, load_template
from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.infer import SamplingParams
from retentive.infer.completions import Completion, complete
from retentive.infer.conversation import Conversation
from retentive.infer.engine import Engine
from retentive.infer.memory import blank
from retentive.models import retnet
from tests.export.variants import TINY, peaked_model

PROMPTS = ["the cat", "the dog sat on", "", "a"]
ASKED = [{"role": "user", "content": "who?"}]
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def words():
    return train_bpe(["the cat and the dog sat on the mat " * 9], 300)


@pytest.fixture(scope="module")
def model(words):
    return peaked_model(retnet(**{**TINY, "vocab_size": words.vocab_size}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop", [(), ("t",)], ids=["no stop", "stop"])
def test_each_text_is_that_of_its_prompt_alone(temperature, stop, model, words):
    how = dict(temperature=temperature, top_p=1.0, seed=3, max_tokens=12, stop=stop)
    alone = [retentive.generate(model, words, prompt, **how) for prompt in PROMPTS]
    assert retentive.generate(model, words, PROMPTS, **how) == alone
    assert any(alone)


def test_the_last_token_of_a_prompt_is_sampled_again(model, words):
    """A prompt that ends within a word's tokens: its healed text appears once, also in a list."""
    how = dict(temperature=0.0, max_tokens=5)
    for prompt in ("the c", "the ca", "do"):
        alone = retentive.generate(model, words, prompt, **how)
        assert retentive.generate(model, words, [prompt, "x"], **how)[0] == alone


def test_seeds_of_several_texts_follow_each_other(model, words):
    how = dict(temperature=1.0, top_p=1.0, max_tokens=6)
    three = retentive.generate(model, words, "the", n=3, seed=5, **how)
    assert three == [retentive.generate(model, words, "the", seed=5 + i, **how) for i in range(3)]
    assert retentive.generate(model, words, ["the", "a"], n=3, seed=5, **how)[0] == three


def test_log_probabilities_are_the_models(model, words):
    [found] = retentive.generate(model, words, ["zz"], temperature=0.0, max_tokens=4, logprobs=True)
    assert isinstance(found, Completion) and str(found) == found.text and found.reason == "length"
    ids = [words.eos_id, *words.encode("zz")]
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids + found.ids]))
    logprobs = logits[0].log_softmax(-1)
    for at, (id, logprob) in enumerate(zip(found.ids, found.logprobs, strict=True)):
        assert math.isclose(logprob, float(logprobs[len(ids) - 1 + at, id]), abs_tol=1e-4)


def test_a_stop_string_ends_with_the_reason_stop(model, words):
    whole = retentive.generate(model, words, "the dog", temperature=0.0, max_tokens=12)
    [found] = retentive.generate(
        model, words, ["the dog"], temperature=0.0, max_tokens=12, stop=whole[2:4], logprobs=True
    )
    assert found.reason == "stop" and found.text == whole[: whole.index(whole[2:4])]


@pytest.mark.parametrize("way", ["memory", "folder"])
def test_chats_are_answered_by_the_template(way, model, tmp_path):
    own = ByteTokenizer()
    model = peaked_model(retnet(**TINY))
    save_model(tmp_path, model, own, template=TURNS)
    template = ModelFolder.open(tmp_path).template(own) if way == "folder" else load_template({}, own)
    conversation = Conversation(Engine(model, slots=1).start(), own, template, blank(model))
    wanted = "".join(conversation.say("who?", GREEDY, max_tokens=8))
    given = (tmp_path, None) if way == "folder" else (model, own)
    how = dict(temperature=0.0, max_tokens=8)
    assert retentive.generate(*given, ASKED, **how) == wanted
    assert retentive.generate(*given, [ASKED, ASKED], **how) == [wanted, wanted]
    mixed = retentive.generate(*given, [ASKED, "text"], **how)
    assert mixed == [wanted, retentive.generate(*given, "text", **how)]
    conversation.engine.close()


def test_prompts_continue_a_memory(tmp_path, words, model):
    (tmp_path / "book.txt").write_text("the cat sat on the mat")
    memory = retentive.memory(model, tmp_path / "book.txt", tmp_path / "book.mem", tokenizer=words)
    how = dict(temperature=0.0, max_tokens=5, memory=memory)
    alone = [retentive.generate(model, words, prompt, **how) for prompt in PROMPTS[:2]]
    assert retentive.generate(model, words, PROMPTS[:2], **how) == alone


@pytest.mark.parametrize(
    ("options", "words_of_error"),
    [
        (dict(prompt=[]), "`prompt` is an empty list"),
        (dict(prompt=[3]), "a prompt is a text, or messages"),
        (dict(prompt=[[]]), "a prompt is a text, or messages"),
        (dict(prompt=["a"], n=0), "`n=0`: must be at least 1"),
        (dict(prompt=["a"], max_tokens=0), "`max_tokens=0`: must be at least 1"),
        (dict(prompt=["a"], beams=2), "`beams` is for one text after one prompt"),
        (dict(prompt=["a"], heat=2), "generate has no option 'heat'"),
        (dict(prompt=[{"content": "a"}]), "a message needs a role and a content, got {'content': 'a'}"),
    ],
    ids=str,
)
def test_bad_input(options, words_of_error, model, words):
    with pytest.raises((TypeError, ValueError)) as raised:
        retentive.generate(model, words, **options)
    assert words_of_error in str(raised.value)


def test_logits_that_are_not_finite(words):
    broken = peaked_model(retnet(**{**TINY, "vocab_size": words.vocab_size}))
    with torch.no_grad():
        broken.embed.weight[:] = float("nan")
    with pytest.raises(ArithmeticError, match="not finite"):
        complete(broken, words, ["a"], max_tokens=2)
