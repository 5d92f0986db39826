"""Texts by context length, windows scored alone as the oracle; the hidden number, with models that know it."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from retentive.cli import main
from retentive.evals import contexts
from retentive.evals.contexts import score_contexts
from retentive.models import LanguageModel

TEXTS = ["".join(chr(97 + (n * n + k) % 26) for n in range(400)) for k in range(3)] + ["too short"]


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "perplexity.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_all_lengths_predict_the_same_tokens_from_what_stands_before(model, tokenizer, folder):
    rows, records = score_contexts(model, tokenizer, ["perplexity"], folder, [300, 20, 50], last=8)
    assert {(r["line"], r["end"]) for r in records if r["context"] == 20} == {
        (r["line"], r["end"]) for r in records if r["context"] == 300
    }
    assert {r["line"] for r in records} == {1, 2, 3}  # the fourth has fewer than 300 tokens
    for r in records:
        ids = torch.tensor(tokenizer.encode(TEXTS[r["line"] - 1])[r["end"] - r["context"] : r["end"]])
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
        assert r["logprob"] == pytest.approx(-float(losses[-8:].sum()), rel=1e-9)  # float64
    for context in (20, 50, 300):
        mine = [r for r in records if r["context"] == context]
        (row,) = [r for r in rows if r["context"] == context and r["metric"] == "perplexity"]
        total = -sum(r["logprob"] for r in mine)
        assert row["n"] == len(mine) and row["value"] == pytest.approx(math.exp(total / (8 * len(mine))))
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
    assert [r["context"] for r in rows if r["metric"] == "bits_per_byte"] == [20, 50, 300]


@pytest.mark.parametrize(("longest", "last", "places"), [(100, 10, 8), (350, 20, 3), (380, 20, 2), (390, 20, 1)])
def test_windows_end_at_places_spread_over_the_document(model, tokenizer, folder, longest, last, places):
    _, records = score_contexts(model, tokenizer, ["perplexity"], folder, [longest], last=last, limit=1)
    ends = sorted(r["end"] for r in records)
    assert len(ends) == places <= contexts.WINDOWS and ends[-1] == 400 and ends[0] >= longest
    assert all(b - a >= last for a, b in pairwise(ends))  # no token is predicted twice


def test_bytes_are_those_of_the_text_where_a_window_cuts_characters(model, tokenizer, tmp_path):
    """Tokens are bytes here, so every window has as many bytes as tokens."""
    text = json.dumps({"text": "“é€” " * 40}, ensure_ascii=False)
    (tmp_path / "perplexity.jsonl").write_text(text, encoding="utf-8")
    _, records = score_contexts(model, tokenizer, ["perplexity"], tmp_path, [50], last=12)
    ends = {r["end"] % 12 for r in records}
    assert len(ends) > 1 and sum(r["bytes"] for r in records) == pytest.approx(12 * len(records), abs=3)
    one, two = (contexts._bytes(tokenizer, tokenizer.encode("“é€”"), *span) for span in ((0, 5), (5, 11)))
    assert one + two == len("“é€”".encode())


def test_a_context_that_tells_is_worth_something(bigram, tokenizer, folder):
    """A bigram model gains nothing from a longer context: equal numbers at every length."""
    rows, _ = score_contexts(bigram(torch.randn(257, 257)), tokenizer, ["perplexity"], folder, [20, 40, 80], last=8)
    values = [row["value"] for row in rows if row["metric"] == "perplexity"]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("context", [330, 600])
def test_a_hidden_number_is_asked_for_within_its_context(tokenizer, context):
    asked = contexts._hidden_numbers(tokenizer, [context])
    assert len(asked) == contexts.KEYS
    for about, group in asked:
        lengths = [len(r.context) + len(r.continuation) for r in group]
        assert max(lengths) <= context and max(lengths) > context - 110  # one more filler sentence would not fit
        text = tokenizer.decode(group[0].context[1:])
        assert text.count(str(about["key"])) == 2 and tokenizer.decode(group[0].continuation).strip() == str(
            about["key"]
        )
        assert len({tuple(r.continuation) for r in group}) == contexts.OTHERS + 1
    depths = [tokenizer.decode(group[0].context[1:]).index("The pass key is") for _, group in asked]
    assert depths == sorted(depths) and depths[0] < 120 and depths[-1] > context - 320


class Reader(LanguageModel):
    """Remembers what it has read: after two characters it predicts what followed them before."""

    def __init__(self, sure: float):
        torch.nn.Module.__init__(self)
        self.config = SimpleNamespace(keeps_state=True, attends=True)
        self.embed, self.sure = torch.nn.Embedding(257, 1), sure
        self.head = torch.nn.Identity()

    def init_state(self, batch):
        return _Seen([[] for _ in range(batch)])

    def hidden(self, ids, state=None, *, lengths=None):
        B, T = ids.shape
        seen = [list(x) for x in (state or self.init_state(B)).rows]
        logits = torch.zeros(B, T, 257, dtype=torch.float64)
        counts = [T] * B if lengths is None else lengths.tolist()
        for b in range(B):
            for t in range(counts[b]):
                seen[b].append(int(ids[b, t]))
                row, n = seen[b], len(seen[b])
                for k in range(n - 8, 5, -1):
                    if row[k - 6 : k] == row[n - 6 :]:
                        logits[b, t, row[k]] = self.sure
                        break
        return logits, _Seen(seen)


class _Seen:
    nbytes = 8

    def __init__(self, rows):
        self.rows = rows

    def select(self, index):
        return _Seen([list(self.rows[n]) for n in index.tolist()])


@pytest.mark.parametrize(("sure", "right"), [(20.0, 1.0), (-20.0, 0.0)])
def test_whoever_remembers_is_right_and_whoever_knows_the_contrary_is_wrong(tokenizer, sure, right):
    rows, records = score_contexts(Reader(sure), tokenizer, ["passkey"], None, [360])
    assert {row["metric"]: row["value"] for row in rows}["acc"] == right
    assert len(records) == contexts.KEYS
    if right:
        assert {row["metric"]: row["value"] for row in rows}["written"] == 1


def test_bad_input_is_one_line(model, tokenizer, folder, refuses):
    for names, lengths, last, words in (
        (["hellaswag"], [20], 8, "task 'hellaswag' has no contexts to vary"),
        (["perplexity"], [8, 20], 8, "`contexts`: 8 tokens leave none before the 8"),
        (["perplexity"], [20], 0, "`last=0`: must be at least 1"),
        (["perplexity"], [500], 8, "no document has the 500 tokens of the longest context"),
        (["passkey"], [100], 8, "passkey needs at least"),
        ([], [100], 8, "`tasks` is empty"),
    ):
        with refuses(words):
            score_contexts(model, tokenizer, names, folder, lengths, last=last)
    with refuses("`limit=0`: must be at least 1"):
        score_contexts(model, tokenizer, ["perplexity"], folder, [20], last=8, limit=0)
    with refuses("`data` is needed: the folder"):
        score_contexts(model, tokenizer, ["perplexity"], None, [20], last=8)
    with refuses("no such file", FileNotFoundError):
        score_contexts(model, tokenizer, ["novels"], folder, [20], last=8)


def test_a_folder_of_text_files_is_a_file_of_texts(model, tokenizer, tmp_path, refuses):
    (tmp_path / "novels" / "valid").mkdir(parents=True)
    for n, text in enumerate(TEXTS[:2]):
        (tmp_path / "novels" / "valid" / f"{n}.txt").write_text(text, encoding="utf-8")
    _, records = score_contexts(model, tokenizer, ["novels"], tmp_path, [100], last=8)
    assert {r["line"] for r in records} == {1, 2}
    (tmp_path / "novels" / "valid" / "1.txt").write_text("", encoding="utf-8")
    with refuses("1.txt: the document is empty"):
        score_contexts(model, tokenizer, ["novels"], tmp_path, [100], last=8)
    (tmp_path / "novels" / "valid" / "0.txt").write_bytes(b"\xff\xfe\x00")
    with refuses("0.txt is not UTF-8 text"):
        score_contexts(model, tokenizer, ["novels"], tmp_path, [100], last=8)


def test_the_command(folder, tmp_path, capsys):
    from retentive.checkpoint import save_model
    from retentive.data.tokenizer import ByteTokenizer
    from retentive.models import build, retnet

    save_model(tmp_path / "m", build(retnet(dim=32, layers=1, heads=2)), ByteTokenizer())
    out = tmp_path / "out.json"
    base = ["eval", str(tmp_path / "m"), "--tasks", "perplexity", "--data", str(folder)]
    main([*base, "--contexts", "20", "40", "--last", "8", "--json", str(out), "--limit", "2"])
    assert capsys.readouterr().out.startswith("| task | context |")
    assert [row["context"] for row in json.loads(out.read_text(encoding="utf-8"))["results"]] == [20, 20, 40, 40]
    with pytest.raises(SystemExit):
        main([*base, "--contexts", "20", "--shots", "2"])
    assert "--contexts is for texts; leave out --shots" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*base, "--contexts", "20", "--lm-eval"])
    assert "--contexts are for our own scorer; leave them out with --lm-eval" in capsys.readouterr().err
