"""Conversations: answers from a state, turn by turn, equal answers after reading the whole conversation anew."""

from contextlib import closing

import numpy as np
import pytest
import torch

pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

from retentive.data.media import Media, rows_of
from retentive.data.templates import BUILT_IN, ChatTemplate
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams, generate
from retentive.infer.conversation import Conversation
from retentive.infer.engine import Engine
from retentive.infer.memory import blank
from retentive.models import build, retnet, twin
from retentive.models.encoders import ImageConfig, encoders_of, with_encoders

CONFIG = retnet(vocab_size=257, dim=32, layers=2, heads=2)
TOKENIZER = ByteTokenizer()
# ASCII alone, so that its text encodes to its own ids
GREEDY = SamplingParams(temperature=0, bias={i: -100.0 for i in range(257) if not 32 <= i < 127})


@pytest.fixture(params=["retnet", "transformer"])
def conversation(request):
    model = build(CONFIG if request.param == "retnet" else twin(CONFIG)).eval()
    for p in model.parameters():  # peaked enough that greedy choices are no ties
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    engine = Engine(model, slots=1).start()
    yield Conversation(engine, TOKENIZER, ChatTemplate(BUILT_IN, TOKENIZER, {}, own=False), blank(model))
    engine.close(drain=False)


def say(conversation, message: str) -> str:
    return "".join(conversation.say(message, GREEDY, max_tokens=12))


def anew(conversation, ids: list[int]) -> str:
    """Answer after `ids` by the plain loop."""
    return TOKENIZER.decode([t.id for t in generate(conversation.engine.model, ids, GREEDY, max_tokens=12)])


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_three_turns_from_a_state_are_those_of_the_whole_text(conversation):
    template, ids = conversation.template, []
    for n, message in enumerate(["Hello", "And then?", "Why"]):
        ids += template.next(user(message)) if n else template.first(user(message))
        want = anew(conversation, ids)
        assert say(conversation, message) == want
        ids += TOKENIZER.encode(want)
        assert conversation.memory.tokens + len(conversation.memory.pending) == len(ids)
    assert conversation.made == 12


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_came(conversation):
    with closing(conversation.say("Hello", GREEDY, max_tokens=12)) as pieces:
        part = next(pieces) + next(pieces)
    ids = [*conversation.template.first(user("Hello")), *TOKENIZER.encode(part)]
    assert conversation.memory.pending == ids and conversation.engine.taken == 0
    ids += conversation.template.next(user("Go on"))
    assert say(conversation, "Go on") == anew(conversation, ids)


def test_a_stop_string_ends_an_answer_and_is_not_remembered(conversation):
    ids = conversation.template.first(user("Hello"))
    whole = anew(conversation, ids)
    conversation.template.stop = (whole[5:8],)
    cut = whole[: whole.find(whole[5:8])]
    assert say(conversation, "Hello") == cut
    ids += TOKENIZER.encode(cut)
    assert conversation.memory.pending == ids
    conversation.template.stop = ()
    ids += conversation.template.next(user("More"))
    assert say(conversation, "More") == anew(conversation, ids)


def test_the_end_of_text_is_left_to_the_template(conversation):
    ids = conversation.template.first(user("Hello"))
    first = next(iter(generate(conversation.engine.model, ids, GREEDY, max_tokens=1))).id
    conversation.template.stop_ids = frozenset({first})
    assert say(conversation, "Hello") == ""
    assert conversation.memory.pending == [] and conversation.memory.tokens == len(ids)


def test_what_is_remembered_has_no_room_in_it_but_its_own(conversation):
    """Files and sessions hold plain tensors without free room."""
    say(conversation, "Hello")
    memory = conversation.memory
    fresh = conversation.engine.model.init_state(1).reserve(memory.tokens)
    assert memory.nbytes == fresh.nbytes and all(type(x) is torch.Tensor for x in memory.state.named().values())
    assert conversation.nbytes == memory.nbytes + 8 * len(memory.pending)


def test_many_may_begin_from_the_same_memory(conversation):
    start = conversation.memory
    other = Conversation(conversation.engine, TOKENIZER, conversation.template, start)
    first = say(conversation, "Hello")
    say(conversation, "And then?")
    assert say(other, "Hello") == first and start.tokens == 0


def test_a_text_goes_on_after_what_was_read(conversation):
    assert conversation.lead == [256] and not conversation.begun
    conversation.put_off([256, 65])
    assert conversation.lead == [256, 65] and conversation.begun
    say(conversation, "Hello")
    assert conversation.lead == conversation.memory.pending and len(conversation.lead) == 1


@pytest.fixture
def looking(conversation, monkeypatch):
    """(conversation with a model that reads pictures, rows of each call of its encoder)."""
    model, calls = conversation.engine.model, []
    with_encoders(model, {"image": ImageConfig(token=257, size=8, patch=4, channels=1, dim=16, layers=1)})
    encoder = encoders_of(model)["image"]
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    own = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda rows: calls.append(len(rows)) or own(rows))
    engine = Engine(model, slots=1).start()
    yield Conversation(engine, TOKENIZER, conversation.template, blank(model)), calls
    engine.close(drain=False)


SHOWN = [Media("image", np.arange(64, dtype=np.uint8).reshape(4, 16)), "What?"]


@pytest.mark.parametrize("ending", ["whole", "closed", "stop string"])
def test_a_picture_is_read_once_however_its_answer_ends(looking, ending):
    conversation, calls = looking
    template, messages = conversation.template, user(SHOWN)
    ids, rows = template.first(messages), rows_of(messages)

    def whole(ids) -> str:
        tokens = generate(conversation.engine.model, ids, GREEDY, rows=rows, max_tokens=12)
        return TOKENIZER.decode([t.id for t in tokens])

    want = whole(ids)
    if ending == "stop string":
        template.stop = (want[5:8],)
        want = want[: want.find(want[5:8])]
    calls.clear()
    with closing(conversation.say(SHOWN, GREEDY, max_tokens=12)) as pieces:
        said = next(pieces) + next(pieces) if ending == "closed" else "".join(pieces)
    assert want.startswith(said) and (said == want or ending == "closed")
    template.stop = ()
    memory = conversation.memory
    ids += TOKENIZER.encode(said)
    assert memory.tokens + len(memory.pending) == len(ids) and max(memory.pending) < 257
    ids += template.next(user("And now?"))
    assert say(conversation, "And now?") == whole(ids)
    assert calls == [4, 4]  # that of `say`, and the last one of `whole`


def test_a_picture_that_was_not_read_is_forgotten(looking):
    """The picture's rows are not in the ids, so the conversation cannot continue from it."""
    conversation, calls = looking
    say(conversation, "Hello")
    before = conversation.memory
    conversation.engine.close()
    conversation.engine = engine = Engine(conversation.engine.model, slots=1)  # nobody steps it
    pieces = conversation.say(SHOWN, GREEDY, max_tokens=12)
    engine.submit = lambda *given, **how: given and ended(Engine.submit(engine, *given, **how))

    def ended(streams):
        streams[0].cancel()
        while engine.step():
            pass
        return streams

    assert list(pieces) == [] and calls == [] and conversation.memory is before
