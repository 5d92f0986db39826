"""Names chosen by likelihood: by the definition, in both directions; and refusals."""

import json

import pytest
import torch

pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.data.chats import Conversation
from retentive.data.templates import TURNS, ChatTemplate
from retentive.data.tokenizer import ByteTokenizer
from retentive.evals import likelihood, naming
from retentive.evals.likelihood import Request, score, score_from
from retentive.models import build, retnet, twin
from retentive.native import with_engine

TINY = retnet(vocab_size=257, dim=32, layers=1, heads=2)
NAMES = ["fox", "a red fox", "owl", "ox", "bird of paradise"]


def asked(question: str, name: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": name}]
    return Conversation(f"file:{question}", messages)


@pytest.fixture(params=[TINY, twin(TINY)], ids=["retnet", "twin"])
def model(request):
    model = build(request.param).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return model


def test_scores_from_one_state_are_those_of_whole_rows(model, monkeypatch):
    monkeypatch.setattr(likelihood, "BUDGET", 16)  # several batches
    context, before = [5, 6, 7, 8], [9, 10]
    continuations = [[1], [2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [1, 2], list(range(30))]
    state = model(torch.tensor([context]))[1]
    found = score_from(model, state, [Request(before, each) for each in continuations])
    whole = score(model, [[Request(context + before, each)] for each in continuations])
    assert [each.tokens for each in found] == [each.tokens for (each,) in whole]
    assert [each.logprob for each in found] == pytest.approx([each.logprob for (each,) in whole], rel=1e-12)
    again = score_from(model, state, [Request(before, continuations[0])])  # the state has not changed
    assert again[0].logprob == pytest.approx(found[0].logprob, rel=1e-12)


def test_names_are_ranked_by_the_likelihood_of_the_answer(model, tmp_path):
    template = ChatTemplate(TURNS, ByteTokenizer(), {}, own=True)
    conversations = [asked("Who?", "owl"), asked("What is red?", "fox"), asked("And who?", "owl")]
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\nfox\n", encoding="utf-8")
    rows, records = naming.naming(model, template, conversations, tmp_path)
    p = torch.empty(3, len(NAMES), dtype=torch.float64)
    for n, each in enumerate(conversations):  # by the definition, each row whole
        prompt = template.first(each.messages[:-1])
        for m, name in enumerate(NAMES):
            answer = [*template.tokenizer.encode(" " + name), 256]
            logprobs = model(torch.tensor([prompt + answer]))[0][0].log_softmax(-1).detach()
            p[n, m] = logprobs[-len(answer) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()
    p = p.log_softmax(1)
    got = naming.score_names(model, template, conversations, NAMES)
    torch.testing.assert_close(got, p, rtol=1e-10, atol=1e-10)
    right = [NAMES.index(each.messages[-1]["content"]) for each in conversations]
    ranks = [1 + sum(bool(other > p[n, m]) for other in p[n]) for n, m in enumerate(right)]
    assert [record["rank"] for record in records] == ranks
    assert records[0]["likeliest"] == [NAMES[m] for m in p[0].argsort(descending=True)]
    by_metric = {row["metric"]: row for row in rows}
    assert by_metric["first"]["value"] == sum(rank == 1 for rank in ranks) / 3
    assert by_metric["first10"]["value"] == 1 and by_metric["first"]["names"] == len(NAMES)
    # the reverse direction: "owl" has two questions, of which the better one counts
    owl, fox = NAMES.index("owl"), NAMES.index("fox")
    hits = [bool(max(p[0, owl], p[2, owl]) >= p[1, owl]), bool(p[1, fox] >= max(p[0, fox], p[2, fox]))]
    assert by_metric["found"]["value"] == sum(hits) / 2 and by_metric["found10"]["value"] == 1


def test_the_engine_ranks_alike():
    model = build(TINY).eval()
    if type(reader := with_engine(model)) is type(model):
        pytest.skip("no native engine here")
    template = ChatTemplate(TURNS, ByteTokenizer(), {}, own=True)
    conversations = [asked("Who?", "owl"), asked("What is red?", "fox")]
    want, got = (naming.score_names(each, template, conversations, NAMES) for each in (model, reader))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)  # float32 sums of some twenty tokens


def test_what_cannot_be_chosen_from(model, tmp_path):
    with pytest.raises(ValueError, match="1 names, of which none can be chosen"):
        naming.names_of([asked("Who?", "owl")], tmp_path)
    (tmp_path / "names.txt").write_text("fox\nox\n")
    with pytest.raises(ValueError, match=r"file:Who\?: 'owl' is no line of .*names.txt"):
        naming.names_of([asked("Who?", "owl")], tmp_path)


def test_the_command(tmp_path, capsys):
    save_model(tmp_path / "run", build(TINY), ByteTokenizer())
    (tmp_path / "run/chat_template.jinja").write_text(TURNS)
    lines = [{"prompt": question, "completion": name} for question, name in (("Who?", "owl"), ("Red?", "fox"))]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["eval", str(tmp_path / "run"), "--tasks", "naming:few", "--data", str(tmp_path), "--examples",
          str(tmp_path / "out.jsonl")])  # fmt: skip
    said = capsys.readouterr().out
    for metric in ("first", "first10", "found", "found10", "loss"):
        assert f"| naming:few | 0 | 2 | {metric} |" in said
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["reference"] for record in records] == ["owl", "fox"]
    assert all(sorted(record["likeliest"]) == ["fox", "owl"] for record in records)
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "run"), "--tasks", "naming:few", "--data", str(tmp_path), "--max-length", "9"])
    assert "leave out --max-length" in capsys.readouterr().err
