"""Generation tasks: answers equal those of `generate`, metrics are checked by hand; and refusals."""

import json

import pytest
import torch

pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.data.chats import Conversation
from retentive.data.templates import BUILT_IN, TURNS, ChatTemplate
from retentive.data.tokenizer import ByteTokenizer
from retentive.evals import generation_tasks
from retentive.evals.generation_tasks import (
    Answered,
    answers,
    dialogue,
    generate_answers,
    lead,
    loss,
    score_generation_tasks,
    summarisation,
    transcription,
    translation,
)
from retentive.infer import SamplingParams, generate
from retentive.models import build, retnet, twin

TINY = retnet(vocab_size=257, dim=32, layers=1, heads=2)


def asked(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(texts[0], [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)])


def peaked(config):
    model = build(config).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return model


@pytest.mark.parametrize("config", [TINY, twin(TINY)], ids=["retnet", "twin"])
@pytest.mark.parametrize("source", [TURNS, BUILT_IN], ids=["token", "text"])
def test_answers_are_those_of_generate(config, source):
    model, template = peaked(config), ChatTemplate(source, ByteTokenizer(), {}, own=True)
    text = "It was night. " * 20  # more than SHARED tokens, so it is read once for both
    conversations = [asked("Who?", "Me."), asked("a" * 60, "b", "And then?", "c"), asked("é", "d")]
    conversations += [asked(f"{text} {question}", "e") for question in ("Who?", "Why is it so?")]
    seen = []
    found = generate_answers(model, template, conversations, max_tokens=30, done=seen.append)
    for each, got in zip(conversations, found, strict=True):
        ids = template.first(each.messages[:-1])
        tokens = [t.id for t in generate(model, ids, SamplingParams(temperature=0), max_tokens=30, stop_ids=[256])]
        text = template.tokenizer.decode(tokens)
        assert got.answer == (text.split("\nUser:")[0] if source == BUILT_IN else text).strip()
        assert got.ended == (len(tokens) < 30 or (source == BUILT_IN and "\nUser:" in text))
        assert (got.question, got.reference) == (each.messages[-2]["content"], each.messages[-1]["content"])
    assert seen[-1] == 5
    drawn = [
        generate_answers(model, template, conversations, max_tokens=9, sampling=SamplingParams(temperature=5.0))
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] != found
    best = generate_answers(model, template, conversations, max_tokens=30, beams=2)
    assert [each.reference for each in best] == [each.reference for each in found]
    alone = [generate_answers(model, template, [each], max_tokens=30, beams=2)[0] for each in conversations]
    assert best == alone
    cut = generate_answers(model, template, conversations[-1:], max_length=40, max_tokens=30)
    tokens = [t.id for t in generate(model, ids[-40:], SamplingParams(temperature=0), max_tokens=30, stop_ids=[256])]
    assert cut[0].answer.startswith(template.tokenizer.decode(tokens).split("\nUser:")[0].strip())


def test_the_loss_of_peoples_answers():
    model, template = peaked(TINY), ChatTemplate(TURNS, ByteTokenizer(), {}, own=True)
    conversations = [asked("Who?", "Me."), asked("aa", "b", "And then?", "cc")]
    (row,) = loss(model, template, conversations, max_length=None)
    total = count = 0.0
    for each in conversations:  # by the definition: each token given those before it
        answer = [*template.tokenizer.encode(" " + each.messages[-1]["content"]), 256]
        ids = torch.tensor([*template.first(each.messages[:-1]), *answer])
        logprobs = model(ids[None])[0][0].log_softmax(-1).detach()
        total -= float(logprobs[-len(answer) - 1 : -1].gather(1, ids[-len(answer) :, None]).sum())
        count += len(answer)
    assert row["value"] == pytest.approx(total / count, rel=1e-12) and row["interval"][0] < row["value"]
    # a template that ends no answer with a token leaves the targets undefined
    assert loss(model, ChatTemplate(BUILT_IN, ByteTokenizer(), {}, own=True), conversations, max_length=None) == []


def made(*pairs: tuple[str, str], question: str = "") -> list[Answered]:
    return [Answered("", question, reference, answer, True) for reference, answer in pairs]


def by_metric(rows) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


def test_translations():
    pytest.importorskip("sacrebleu")
    right = made(("the cat sat on the mat", "the cat sat on the mat"), ("a dog ran", "a dog ran"))
    rows = translation(right)
    assert by_metric(rows) == pytest.approx({"bleu": 100, "chrf": 100})
    assert all(row["signature"].startswith("nrefs:1|") and "version:" in row["signature"] for row in rows)
    half = made(("the cat sat on the mat", "the cat sat on a rug"), ("a dog ran", "a dog ran away"))
    for row in translation(half):
        assert 10 < row["value"] < 90 and row["interval"][0] <= row["value"] + 15


def test_summaries_beside_the_first_sentences():
    pytest.importorskip("rouge_score")
    text = "One thing. Two things! Three things? Four things."
    assert lead(text) == "One thing. Two things! Three things?" and lead("No end") == "No end"
    found = by_metric(summarisation(made(("one thing", "one thing"), ("x y", "one thing"), question=text)))
    assert found["rouge1"] == found["rouge2"] == found["rougeL"] == 50
    # both words of the reference are among the lead's six: 2 * (2/6 * 1) / (2/6 + 1); of "x y" none
    assert found["lead_rouge1"] == pytest.approx(25)


def test_short_answers_and_talk():
    (row,) = answers(made(("In Paris.", " in  PARIS"), ("Rome", "Rome, I think")))
    assert (row["metric"], row["value"]) == ("exact", 0.5)
    found = by_metric(dialogue(made(("a b c", "Yes yes"), ("a b", "yes no"))))
    assert found == {"distinct1": 2 / 4, "distinct2": 1.0, "people_distinct1": 3 / 5, "people_distinct2": 2 / 3}


def test_word_errors():
    pytest.importorskip("jiwer")
    # "2" is missing and "4 4" is extra; the second answer misses its only word; the third differs in case and space
    (row,) = transcription(made(("1 2 3", "1 3 4 4"), ("5", ""), ("A  b", "a B ")))
    assert (row["metric"], row["value"]) == ("wer", 4 / 6) and row["interval"][0] <= 4 / 6 <= row["interval"][1]
    (row,) = transcription(made(("one two three", "one too three")))
    assert (row["value"], row["interval"]) == (1 / 3, None)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model("run", build(TINY), ByteTokenizer(), template=TURNS)
    said = [{"prompt": f"Where is {n}?", "completion": f"At {n}."} for n in range(4)]
    for name in ("en-de", "answers"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in said))
    return tmp_path


def test_the_command(place, capsys):
    pytest.importorskip("sacrebleu")
    main(["eval", "run", "--tasks", "translation:en-de,answers", "--data", ".", "--max-tokens", "5", "--limit", "3",
          "--json", "out.json", "--examples", "out.jsonl"])  # fmt: skip
    table = capsys.readouterr().out
    assert "| translation:en-de | 0 | 3 | bleu |" in table and "| answers | 0 | 3 | exact |" in table
    records = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [r["reference"] for r in records[:3]] == ["At 0.", "At 1.", "At 2."] and {"answer", "ended"} <= set(
        records[0]
    )
    rows = json.loads((place / "out.json").read_text())["results"]
    assert "tok:13a" in next(row["signature"] for row in rows if row["metric"] == "bleu")


def test_what_cannot_be_asked(place, refuses, monkeypatch):
    model, template = build(TINY), ChatTemplate(TURNS, ByteTokenizer(), {}, own=True)
    monkeypatch.setattr(generation_tasks, "find_spec", lambda name: name)  # the scorers are extras
    with refuses("task summarisation needs summarisation.jsonl: no such file", FileNotFoundError):
        score_generation_tasks(model, template, ["summarisation"], place.relative_to(place))
    (place / "answers.jsonl").write_text('{"prompt": "a", "completion": " "}\n')
    with refuses("answers.jsonl:1 cannot be taken: message 2, by assistant, is empty"):
        score_generation_tasks(model, template, ["answers"], place)
    monkeypatch.setattr(generation_tasks, "find_spec", lambda name: None)
    with refuses("translation is scored by sacrebleu: pip install 'retentive[eval]'", ImportError):
        score_generation_tasks(model, template, ["translation:en-de"], place)
    with refuses("`beams=0`: must be at least 1"):
        score_generation_tasks(model, template, ["answers"], place, beams=0)


def test_with_other_tasks_they_are_refused(place, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "run", "--tasks", "answers,piqa", "--data", "."])
    assert "generation tasks (answers) exclude other tasks: use a call for each kind" in capsys.readouterr().err
