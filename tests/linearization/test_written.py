"""Conversations that a teacher writes by itself."""

import json

import pytest
import torch

pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

from retentive.checkpoint import ModelFolder, save_model
from retentive.data.chats import chats
from retentive.data.templates import TURNS, load_template
from retentive.data.tokenizer import ByteTokenizer
from retentive.linearization import written
from retentive.linearization.written import before_question, write_chats
from retentive.models import build, transformer


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A teacher that often ends its messages."""
    monkeypatch.setattr(written, "TOGETHER", 4)
    torch.manual_seed(0)
    model = build(transformer(vocab_size=257, dim=32, layers=1, heads=2))
    with torch.no_grad():
        model.head.weight[:32] = model.head.weight[127:256] = 0  # mostly letters
        model.head.weight.mul_(0.02)  # every one about as likely as the next, the end among them
    save_model(tmp_path / "teacher", model, ByteTokenizer(), template=TURNS)
    return ModelFolder.open(tmp_path / "teacher")


def test_questions_and_answers_are_conversations(teacher, tmp_path):
    seen = []
    number = write_chats(teacher, tmp_path / "c.jsonl", 800, progress=lambda *now: seen.append(now))
    found = list(chats(tmp_path / "c.jsonl"))
    assert len(found) == number > 1 and seen[-1] == ("writing conversations", 800, 800)
    for each in found:
        assert [message["role"] for message in each.messages] == ["user", "assistant"]
        assert all(message["content"] for message in each.messages)
    assert len({each.text for each in found}) == number  # each has its own seed
    again = write_chats(teacher, tmp_path / "again.jsonl", 800)
    assert again == number and (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert write_chats(teacher, tmp_path / "other.jsonl", 800, seed=1)
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "c.jsonl").read_bytes()
    assert json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0]).keys() == {"messages"}


def test_stopped_and_called_again_it_writes_the_same(teacher, tmp_path):
    class Stop(BaseException):
        pass

    def stop(*now):
        raise Stop

    number = write_chats(teacher, tmp_path / "whole.jsonl", 2000)
    stops = 0
    for _ in range(100):
        try:
            assert write_chats(teacher, tmp_path / "c.jsonl", 2000, progress=stop) == number
        except Stop:
            stops += 1
            assert not (tmp_path / "c.jsonl").exists()
        if (tmp_path / "c.jsonl").exists():
            break
    assert stops > 2
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*partial*"))


def test_given_questions_are_asked_in_turn(teacher, tmp_path):
    asked = [f"What is {n}?" for n in range(40)]
    write_chats(teacher, tmp_path / "c.jsonl", 1500, questions=asked)
    found = [each.messages[0]["content"] for each in chats(tmp_path / "c.jsonl")]
    at = [asked.index(text) for text in found]  # those that were not answered are left out
    assert len(at) > 3 and at == sorted(at)


def test_a_question_begins_where_the_template_expects_it():
    template = load_template({"chat_template": TURNS}, ByteTokenizer())
    begin = before_question(template)
    whole = template.first([{"role": "user", "content": "Who?"}])
    assert whole[: len(begin)] == begin and bytes(whole[len(begin) :]).startswith(b"Who?")


def test_a_teacher_that_ends_nothing_is_named(teacher, tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(written, "TRIES", 2)
    monkeypatch.setattr(written, "LONGEST", {"user": 1, "assistant": 1})
    with refuses("ends none of the messages that it writes: leave out `from_teacher`"):
        write_chats(teacher, tmp_path / "c.jsonl", 100)
    assert not (tmp_path / "c.jsonl").exists()
