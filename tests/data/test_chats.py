"""Conversations from files to batches: schemas, errors, the ids of a session, the predicted tokens."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch

from retentive.data.chats import chats, messages_of
from retentive.data.pack import load_meta
from retentive.data.packed import Packed
from retentive.data.prepare import prepare
from retentive.data.templates import BUILT_IN, TURNS, ChatTemplate
from retentive.data.tokenizer import ByteTokenizer, load_tokenizer
from retentive.ops.cross_entropy import IGNORE

IM = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {"<|im_start|>": 256, "<|im_end|>": 255}
EOS = 256


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SAID = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Bye"), turn("assistant", "See you")]
SCHEMAS = {
    "messages": {"messages": SAID, "id": 3},
    "sharegpt": {
        "conversations": [{"from": "gpt" if n % 2 else "human", "value": m["content"]} for n, m in enumerate(SAID)]
    },
    "prompt": {"prompt": SAID[:3], "completion": "See you"},
    "prompt-lists": {"prompt": SAID[:1], "completion": SAID[1:]},
    "spaces": {"messages": [turn(m["role"], f"\n {m['content']}  ") for m in SAID]},
    "parts": {"messages": [turn(m["role"], [{"type": "text", "text": m["content"]}]) for m in SAID]},
    "unanswered": {"messages": [*SAID, turn("user", "Anyone?")]},
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas(schema):
    assert messages_of(SCHEMAS[schema]) == SAID


@pytest.mark.parametrize(
    ("given", "asked"),
    [({}, "Say"), ({"input": ""}, "Say"), ({"input": None}, "Say"), ({"input": "it\ntwice"}, "Say\n\nit\ntwice")],
    ids=str,
)
def test_alpacas_input_ends_the_question(given, asked):
    found = messages_of({"instruction": "Say", **given, "output": "it"})
    assert found == [turn("user", asked), turn("assistant", "it")]


def test_a_system_message_comes_first():
    said = [turn("system", "Be kind."), *SAID]
    assert messages_of({"messages": said}) == said


CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLED = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "rain"},
    {"role": "assistant", "content": "It rains.", "weight": 1},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_calls_of_tools(tmp_path):
    """OpenAI's files: arguments become objects, and what no answer follows is dropped."""
    file = lines(tmp_path / "a.jsonl", {"messages": [*CALLED, *CALLED[:3], CALLED[2]], "tools": TOOLS})
    [found] = chats(file)
    [call] = found.messages[1]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Rome"}} and found.messages[1]["content"] == ""
    assert found.messages[2] == CALLED[2] and found.messages[3]["weight"] == 1
    assert [m["role"] for m in found.messages[-3:]] == ["assistant", "user", "assistant"]
    assert found.tools[0]["function"] == {"name": "weather", "description": "", "parameters": {"type": "object"}}
    assert found.text.split("\n")[:4] == ["Rome?", "", 'weather {"city": "Rome"}', "rain"]
    [again] = chats(lines(tmp_path / "b.jsonl", {"messages": CALLED, "tools": json.dumps(TOOLS)}))
    assert again.tools == found.tools


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ({}, None),
        ({"a": 1}, "tools must be a list, got an object"),
        ("[", "tools are not JSON"),
        ([{"name": "f"}], 'tool 1: expected {"type": "function"'),
    ],
    ids=str,
)
def test_descriptions_of_tools(tools, words, tmp_path, refuses):
    file = lines(tmp_path / "a.jsonl", {"messages": CALLED, "tools": tools})
    if words is None:
        assert list(next(chats(file)).tools) == []
        return
    with refuses(words):
        list(chats(file))


BAD = {
    "a list": ([SAID], "expected an object, got a list"),
    "text": (
        {"text": "Hi", "id": 1},
        "prompt and completion, or instruction and output, got text, id",
    ),
    "nothing": ({}, "got no field"),
    "no list": ({"messages": "Hi"}, "messages must be a list of objects"),
    "no role": ({"messages": [{"content": "Hi"}]}, "messages, entry 1: has no 'role'"),
    "a tool": ({"messages": [*SAID[:1], turn("tool", "7")]}, "message 2 is by the tool, expected the assistant"),
    "a wizard": ({"messages": [*SAID[:1], turn("wizard", "7")]}, "message 2 is by 'wizard', expected one of system"),
    "no answer of a tool": ({"messages": [*CALLED[:2], *SAID]}, "message 3 is by the user, expected the tool"),
    "a call by the user": ({"messages": [SAID[0] | {"tool_calls": [CALL]}]}, "in an assistant's message"),
    "a call of nothing": ({"messages": [SAID[0], {"role": "assistant", "tool_calls": [{}]}]}, "names no function"),
    "arguments cut off": (
        {"messages": [SAID[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "message 2, tool call 1: the arguments are not JSON (Expecting property name",
    ),
    "a list of arguments": (
        {"messages": [SAID[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
        "message 2, tool call 1: the arguments must be a JSON object",
    ),
    "half a weight": ({"messages": [SAID[0], SAID[1] | {"weight": 0.5}]}, "message 2: its weight must be 0 or 1"),
    "out of order": ({"messages": SAID[1:]}, "message 1 is by the assistant, expected the user"),
    "twice": ({"messages": [SAID[0], *SAID]}, "message 2 is by the user, expected the assistant"),
    "system twice": ({"messages": [turn("system", "a"), turn("system", "b")]}, "message 2 is by the system, expected"),
    "empty answer": ({"prompt": "Hi", "completion": " "}, "message 2, by assistant, is empty"),
    "a picture": (
        {"messages": [turn("user", [{"type": "image"}])]},
        "message 1: a part of type 'image' must name its file as 'image', got null",
    ),
    "a film": (
        {"messages": [turn("user", [{"type": "video", "video": "a.mp4"}])]},
        'message 1: expected text, or a file as {"type": "image", "image": FILE} or',
    ),
    "a part without a type": (
        {"messages": [turn("user", [{"image": "a.png"}])]},
        "message 1: each part of its content must be an object with a type, got an object",
    ),
    "a part alone": (
        {"messages": [turn("user", {"type": "image", "image": "a.png"})]},
        "message 1: its content must be text or a list of parts, got an object",
    ),
    "a part of a text that is a number": (
        {"messages": [turn("user", [{"type": "text", "text": 1.5}])]},
        "message 1: a part of type 'text' must name its text as 'text', got a number",
    ),
    "a picture without a name": (
        {"messages": [turn("user", [{"type": "image", "image": ""}])]},
        "message 1: a part of type 'image' must name its file as 'image', got an empty string",
    ),
    "a number": (
        {"prompt": 3, "completion": "4"},
        "message 1: its content must be text or a list of parts, got a number",
    ),
    "null content": ({"messages": [turn("user", None), *SAID[1:]]}, "must be text or a list of parts, got null"),
    "a truth": ([True][0], "expected an object, got true"),
    "null": ({"prompt": "Hi", "completion": None}, "or instruction and output, got prompt, completion (null)"),
    "no output": ({"instruction": "a", "output": None}, "or instruction and output, got instruction, output (null)"),
    "a list of inputs": ({"instruction": "a", "input": ["b"], "output": "c"}, "input must be text, got a list"),
    "an instruction of numbers": ({"instruction": 3, "output": "c"}, "message 1: its content must be text"),
    "half a pair": ({"prompt": "a \ud83d", "completion": "b"}, "message 1, by user, holds half of a surrogate pair"),
    "no answer": ({"messages": SAID[:1]}, "nobody answers in it"),
    "no messages": ({"messages": []}, "nobody answers in it"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_conversation(bad, refuses):
    value, words = BAD[bad]
    with refuses(words):
        messages_of(value)


def lines(path, *values) -> str:
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in values), encoding="utf-8")
    return str(path)


def test_the_line_is_named_or_skipped(tmp_path, refuses):
    file = lines(tmp_path / "a.jsonl", {"messages": SAID}, {"messages": SAID[1:]}, {"prompt": "a", "completion": "b"})
    with refuses(f"{file}:2 cannot be taken: message 1 is by the assistant"):
        list(chats(file))
    said: list[str] = []
    found = list(chats(file, on_bad_text="skip", say=said.append))
    assert [each.name for each in found] == ["a.jsonl:1", "a.jsonl:3"]
    assert said == [
        f"{file}: skipped 1 conversation, the first is {file}:2: message 1 is by the assistant, expected the user"
    ]
    with refuses(f"{file}:2 is not JSON"):
        list(chats(lines(tmp_path / "a.jsonl", {"messages": SAID}, '{"messages": \n')))
    with refuses("no conversations in"):
        list(chats(lines(tmp_path / "a.jsonl", "\n")))


def test_a_folder_of_them(tmp_path, refuses):
    with refuses("no such file or folder", FileNotFoundError):
        chats(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("Hi")
    with refuses("no conversations in"):
        chats(tmp_path)
    lines(tmp_path / "b.jsonl", {"messages": SAID})
    (tmp_path / "a.json").write_text(json.dumps([SCHEMAS["prompt"], SCHEMAS["sharegpt"]]))
    assert [each.name for each in chats(tmp_path)] == ["a.json:1", "a.json:2", "b.jsonl:1"]
    assert all(each.messages == SAID for each in chats(tmp_path))


# training targets of a conversation


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, ByteTokenizer(), NAMES if source == IM else {}, own=True)


@pytest.mark.parametrize("source", [TURNS, IM], ids=["turns", "im"])
@pytest.mark.parametrize("system", [False, True])
def test_what_is_taught_is_what_a_session_reads(source, system):
    made, tokenizer = template(source), ByteTokenizer()
    before = [turn("system", "<|im_end|> and <|endoftext|> are words")] * system
    said = [*SAID[:3], turn("assistant", "<|endoftext|><|im_end|> \ue000\ue001 ☂")]
    ((ids, answers),) = made.taught([[*before, *said]])
    lead, end = (" ", EOS) if source == TURNS else ("", 255)
    first, second = (tokenizer.encode(lead + said[n]["content"]) for n in (1, 3))
    between = made.next([said[2]])
    assert between[0] == end and made.stop_ids >= {end}
    assert ids == [*made.first([*before, said[0]]), *first, *between, *second, end]
    wanted = [False] * len(made.first([*before, said[0]])) + [True] * (len(first) + 1)
    assert answers == wanted + [False] * (len(between) - 1) + [True] * (len(second) + 1)


UNFIT = {
    BUILT_IN: "ends answers with no special token",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}": (
        "shows 'assistant:' before an answer and does not ask for one with it"
    ),
    "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}": "changes the letters of an answer",
    IM.replace("m.content", "(m.content if loop.last else '')"): "does not show each answer once",
    IM.replace("'assistant\n'", "'assistant: '").replace("assistant\n' }}{% endif", "model\n' }}{% endif"): "asks for",
}


@pytest.mark.parametrize("source", UNFIT, ids=["no-end", "does-not-ask", "changes", "hides", "asks-otherwise"])
def test_a_template_that_cannot_be_taught(source, refuses):
    made = ChatTemplate(source, ByteTokenizer(), NAMES, own=True)
    with refuses(UNFIT[source]):
        made.taught([SAID])


@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_the_conversation_that_a_template_refuses_is_named(tokenizer, tmp_path, refuses):
    never = "{% if messages[0].content == 'No' %}{{ raise_exception('Never') }}{% endif %}"
    (tmp_path / "t.jinja").write_text(never + TURNS)
    file = lines(tmp_path / "a.jsonl", {"messages": SAID}, {"prompt": "No", "completion": "b"})
    with refuses("a.jsonl:2: the chat template fails: Never"):
        prepare(
            file, tmp_path / "out", chats=True, tokenizer=tokenizer, template=tmp_path / "t.jinja", valid_fraction=0
        )
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_learnt_from_conversations_knows_the_templates_words(tmp_path):
    """Each turn contains them; encoded as letters they would be most of a short conversation."""
    file = lines(tmp_path / "a.jsonl", *[{"prompt": f"Which digit is {n}?", "completion": str(n)} for n in range(10)])
    prepare(file, tmp_path / "out", chats=True, vocab_size=400, valid_fraction=0)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert len(tokenizer.encode("User")) == len(tokenizer.encode("Assistant")) == len(tokenizer.encode(" digit")) == 1
    assert load_meta(tmp_path / "out").splits["train"].tokens < 10 * 20


# batches


def spelt(n: int, m: int) -> list[dict]:
    return [turn("user", chr(97 + n) * m), turn("assistant", chr(65 + n) * (m % 7 + 1))] * (1 + n % 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Packed:
    folder = tmp_path_factory.mktemp("chats")
    many = [{"messages": spelt(n, m)} for n, m in enumerate((3, 20, 1, 9, 90, 2, 2, 14, 7, 31, 5, 5))]
    prepare(
        lines(folder / "a.jsonl", *many[:9]), folder / "out", chats=True, tokenizer="bytes",
        valid=lines(folder / "v.jsonl", *many[9:]),
    )  # fmt: skip
    return Packed(folder / "out")


def whole(data: Packed, split: str) -> list[tuple[list[int], list[int]]]:
    """Returns (ids, targets) of each conversation, read from the files alone."""
    stream = data.stream(split)
    spans = pairwise([0, *stream.ends_in(0, stream.tokens).tolist()])
    found = []
    for start, stop in spans:
        ids, answered = stream.read(start, stop), stream.answered(start, stop)
        found.append((ids[:-1].tolist(), np.where(answered, ids, IGNORE)[1:].tolist()))
    return found


def test_the_packed_folder_has_what_is_taught(data):
    made = data.template
    assert made is not None and made.source == TURNS and data.meta.chats
    for (ids, targets), (n, m) in zip(whole(data, "train"), enumerate((3, 20, 1, 9)), strict=False):
        ((wanted, answers),) = made.taught([spelt(n, m)])
        assert ids == wanted[:-1]
        assert targets == [id if answered else IGNORE for id, answered in zip(wanted, answers, strict=True)][1:]
    split = data.meta.splits["train"]
    assert split.answers == sum(t != IGNORE for _, targets in whole(data, "train") for t in targets)


def sequences(batch) -> list[tuple[list[int], list[int]]]:
    cu = batch.cu_seqlens.tolist()
    return [(batch.ids[0, a:b].tolist(), batch.targets[0, a:b].tolist()) for a, b in pairwise(cu)]


def test_rows_of_whole_conversations(data):
    batches = data.batches(mode="whole", batch=2, length=64, seed=3)
    kept = sorted(s for n in range(batches.steps_per_epoch) for s in sequences(batches[n]) if set(s[1]) != {IGNORE})
    wanted = []
    for ids, targets in whole(data, "train"):  # only conversations longer than a row are cut
        parts = [(ids[n : n + 64], targets[n : n + 64]) for n in range(0, len(ids), 64)]
        wanted += [part for part in parts if set(part[1]) != {IGNORE}]
    extra = batches.steps_per_epoch * 2 - batches._windows  # rows of the next epoch in the last batch
    assert extra in (0, 1) and len(kept) >= len(wanted)
    assert all(part in kept for part in wanted)
    again = data.batches(mode="whole", batch=2, length=64, seed=3)
    assert all(torch.equal(a, b) for n in (0, 1) for a, b in zip(batches[n][:3], again[n][:3], strict=True))


def test_carried_rows_are_the_conversations_one_after_the_other(data):
    batches = data.batches(mode="carry", batch=2, length=16, seed=1)
    rows: list[list[tuple[list[int], list[int]]]] = [[], []]
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        found, starts = sequences(batch), [*batch.carry.first.tolist(), len(batch.cu_seqlens) - 1]
        for row in (0, 1):
            mine = found[starts[row] : starts[row + 1]]
            if batch.carry.continues[row]:
                rows[row][-1] = tuple(a + b for a, b in zip(rows[row][-1], mine.pop(0), strict=True))
            rows[row] += mine
    wanted = whole(data, "train")
    for row in rows:  # all but the first and last of a row are whole; their last token, elsewhere a target, is read too
        for ids, targets in row[1:-1]:
            assert (ids[:-1], targets[:-1]) in wanted and ids[-1] == EOS and targets[-1] == IGNORE


def test_windows_begin_sequences_where_conversations_do(data):
    batches = data.batches(mode="reset", batch=1, length=50, seed=0)
    first = [ids[0] for ids, _ in whole(data, "train")]
    assert set(first) == {EOS}
    stream = data.stream("train")
    starts = set(stream.ends_in(0, stream.tokens).tolist()) | {0}
    for n in range(batches.steps_per_epoch):
        batch = batches[n]
        at = next(s for s in range(0, stream.tokens, 50) if stream.read(s, s + 50).tolist() == batch.ids[0].tolist())
        assert [at + x for x in batch.cu_seqlens.tolist()[1:-1]] == sorted(s for s in starts if at < s < at + 50)


def test_what_is_held_out_is_read_whole(data):
    found = [sequences(batch) for batch in data.held_out(length=5)]
    assert found == [[each] for each in whole(data, "valid")]
    assert len(list(data.held_out(length=5, tokens=20))) == 1
    said = "".join(chr(65 + n) * (m % 7 + 1) * (1 + n % 3) for n, m in ((9, 31), (10, 5), (11, 5)))
    turns = sum(1 + n % 3 for n in (9, 10, 11))
    assert data.held_out_bytes() == len(said) + turns, "a space before each answer"
    asked, _ = data.first_question()
    assert asked == [EOS, *b"User: ", *b"j" * 31, *b"\nAssistant:"]


def test_a_damaged_file_of_answers(data, tmp_path, refuses):
    copy = tmp_path / "copy"
    shutil.copytree(data.path, copy)
    (copy / "train-00000.ans").write_bytes(b"\1")
    with refuses("train-00000.ans has 1 bytes, expected"):
        Packed(copy)
    (copy / "train-00000.ans").unlink()
    with refuses("train-00000.ans is missing"):
        Packed(copy)
