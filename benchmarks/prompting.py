"""Structured prompting: few-shot classification from M groups of demonstrations, merged or in a row.

A task draws four classes of text and gives each a random name from A to D, which only the demonstrations reveal. A
group has one demonstration of each class: a text, its class and the name.

    A man is kneeling on a -> Ice fishing C

A question is a text, and the answer is the name of its class: the model has to recognise the class, and to remember the
name that the demonstrations gave it.

There are two sorts of classes: where a sentence is from (a novel, a report, …), and the activity in the video that a
sentence of HellaSwag describes. The model is trained on such tasks, and measured on held-out texts of classes that it
was trained on and on activities that it has never seen. Demonstrations in a row, and groups that are chained, decay
with their distance from the question; merged groups are all equally near.
"""

import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.prompting_tasks import NAMES, SHOWN, Files, Texts, activities, kinds, line, split, tasks
from retentive import machine
from retentive.bench.lab.options import Say, silent
from retentive.bench.lab.plot import grid
from retentive.checkpoint import ModelFolder, save_model
from retentive.compare.variants import short_head
from retentive.data.sources import Document
from retentive.data.tokenizer import Tokenizer, train_bpe
from retentive.evals.stats import mean_interval
from retentive.infer.memory import Memory, blank
from retentive.infer.merge import chain, chain_errors, keep_size, merge
from retentive.infer.reading import ingest
from retentive.models import ARCHITECTURES, LanguageModel, ModelConfig, build, retnet
from retentive.tables import markdown

GROUPS = (1, 2, 4, 8, 16, 32, SHOWN)
"""Numbers of groups, M."""

WEIGHTS: dict[str, Callable[[Tensor], Any]] = {
    "merged": keep_size,
    "merged: mean": lambda states: 1 / len(states),
    "merged: sum / sqrt(M)": lambda states: len(states) ** -0.5,
    "merged: sum": lambda states: 1,
}
"""The ways of merging, by the weight `c` of the sum of states `[M,H,K,V]` (infer/merge.py)."""
WAYS = ("nothing", "in a row", "chained", *WEIGHTS)
"""The ways of remembering the demonstrations, in the order of the tables."""

PICTURE = "Structured prompting"


@dataclass(frozen=True)
class Options(Files):
    """Structured prompting: few-shot accuracy from merged groups, from groups in a row, and without groups."""

    out: Path = Path("runs/prompting")
    """Folder of the model, which is trained first if it is missing."""
    size: str = "1m"
    """Size of the model."""
    steps: int = 1500
    """Training steps of 8 tasks."""
    episodes: int = 20
    """Tasks to measure for each set of texts."""


# training on tasks


def learn(
    config: ModelConfig,
    tokenizer: Tokenizer,
    families: Sequence[Mapping[str, Sequence[str]]],
    *,
    steps: int,
    batch: int = 8,
    lr: float = 2e-3,
    seed: int = 0,
    say: Say = silent,
) -> LanguageModel:
    """Train a model on `batch` new tasks a step; the loss counts classes and names, not the texts."""
    torch.manual_seed(seed)
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    # 100 steps of warm-up, then a cosine from `lr` down to a twentieth of it
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / 100, 0.05 + 0.95 * (1 + math.cos(math.pi * n / steps)) / 2)
    )
    losses: list[float] = []
    drawn = tasks(families, steps * batch, seed)
    for step in range(1, steps + 1):
        ids, counts = answers_of(tokenizer, [next(drawn) for _ in range(batch)])
        with torch.autocast("cpu", torch.bfloat16):
            x, _ = model.hidden(ids)
            logits = model.head(x[:, :-1][counts[:, 1:]])  # only where the next token counts
        loss = F.cross_entropy(logits.float(), ids[:, 1:][counts[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0 or step == steps:
            say(f"step {step} of {steps}: loss {statistics.mean(losses[-50:]):.3f}")
    return model.eval()


def answers_of(tokenizer: Tokenizer, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """(ids `[N,T]`, padded on the right; bool `[N,T]`, True at the tokens of classes and names)."""
    rows, marks = [], []
    for document in documents:
        row, mark = [tokenizer.eos_id], [False]
        for demonstration in document.text.splitlines(keepends=True):
            text, _, answer = demonstration.rpartition(" -> ")
            # encoded separately, as in Questions: text and answer must not share a token. The last token is the newline
            begin, end = tokenizer.encode(f"{text} ->"), tokenizer.encode(f" {answer}")
            row += begin + end
            mark += [False] * len(begin) + [True] * (len(end) - 1) + [False]
        rows.append(row)
        marks.append(mark)
    return padded(rows), padded(marks)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """`[N,T]`, zeros (or False) on the right of shorter rows."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


# measuring


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Same as `of_model`, for the model in `out` and texts of known kinds, known activities and new activities."""
    known_kinds = split(kinds(options), new=False)
    known_activities = split(activities(options), new=True)
    if not options.out.exists():
        train_model(options, [known_kinds[0], known_activities[0]], say)
    folder = ModelFolder.open(options.out)
    model, tokenizer = folder.model(), folder.tokenizer_for_text()
    if not model.keeps_state or model.config.attends:
        raise ValueError(f"{options.out} holds no RetNet, whose states can be merged: choose another out")
    sets = {
        "kinds of text": known_kinds[1],
        "activities": known_activities[1],
        "activities never seen": known_activities[2],
    }
    return of_model(model, tokenizer, sets, episodes=options.episodes, say=say)


def train_model(options: Options, families: Sequence[Mapping[str, Sequence[str]]], say: Say) -> None:
    """Train a model on tasks from these texts, and save it with its tokenizer to `out`."""
    tokenizer = train_bpe((d.text for d in tasks(families, 3000, seed=1)), 4096)
    # the paper's RetNet with one head: memories with decays per token cannot be chained, and chaining is measured here
    fields = ARCHITECTURES["retnet-paper"] | {"heads": 4, "decay": short_head(4)}
    config = retnet(options.size, vocab_size=tokenizer.vocab_size, **fields)
    save_model(options.out, learn(config, tokenizer, families, steps=options.steps, say=say), tokenizer)


@torch.inference_mode()
def of_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    sets: Mapping[str, Texts],
    *,
    groups: Sequence[int] = GROUPS,
    episodes: int = 40,
    queries: int = 6,
    say: Say = silent,
) -> dict[str, Any]:
    """Accuracy of each way of remembering, for each set of texts and number of groups, over `episodes` tasks.

    All ways see the same demonstrations and answer the same `queries` questions of each class.
    """
    found: dict[str, Any] = {}
    for name, texts in sets.items():
        runs = []
        for n in range(episodes):
            runs.append(episode(model, tokenizer, texts, groups, queries, random.Random(f"{name} {n}")))
            say(f"{name}: task {n + 1} of {episodes}")
        accuracy = {w: {str(m): interval([run[0][w, m] for run in runs]) for m in groups} for w in WAYS}
        found[name] = {
            "classes": sorted(texts.asked),
            "accuracy": accuracy,
            "merged - in a row": {
                str(m): interval([run[0]["merged", m] - run[0]["in a row", m] for run in runs]) for m in groups
            },
            "chain errors": [statistics.mean(errors) for errors in zip(*(run[1] for run in runs), strict=True)],
        }
    return {
        "what": "few-shot accuracy from M groups of four demonstrations, mean and half a 95% interval over tasks",
        "hardware": machine.describe(),
        "device": "cpu",
        "chance": 1 / len(NAMES),
        "groups": list(groups),
        "episodes": episodes,
        "queries": queries * len(NAMES),
        "sets": found,
    }


def interval(values: Sequence[float]) -> list[float]:
    """[mean, half of its 95% confidence interval]; half is 0 where there is one value only."""
    found = mean_interval(values)
    return [round(statistics.mean(values), 5), round((found[1] - found[0]) / 2, 5) if found else 0.0]


def episode(
    model: LanguageModel, tokenizer: Tokenizer, texts: Texts, groups: Sequence[int], queries: int, rng: random.Random
) -> tuple[dict[tuple[str, int], float], list[float]]:
    """({(way, groups): accuracy}, relative error of each layer's state when all groups are chained) for one task."""
    classes = rng.sample(sorted(texts.asked), len(NAMES))
    shown = [rng.sample(texts.shown[c], max(groups)) for c in classes]
    parts = []
    for n in range(max(groups)):
        # classes in a new order in every group, so that the order gives no hint
        order = rng.sample(range(len(NAMES)), len(NAMES))
        parts.append("".join(line(shown[i][n], classes[i], NAMES[i]) for i in order))
    asked = [(text, i) for i, c in enumerate(classes) for text in rng.sample(texts.asked[c], queries)]
    batch = Questions.of(tokenizer, [text for text, _ in asked], classes)
    answers = torch.tensor([i for _, i in asked])
    empty, begin = blank(model, "bench"), [tokenizer.eos_id]

    def remember(ids: Sequence[int]) -> Memory:  # from a clone: `ingest` consumes the memory that it continues from
        return last(ingest(model, [ids], Memory(empty.state.clone(), [], 0, empty.model, [], empty.config)))

    ids = [tokenizer.encode(part) for part in parts]
    apart = [remember(begin + part) for part in ids]
    accuracy: dict[tuple[str, int], float] = {}
    nothing = score(model, remember(begin), batch, answers)
    for m in groups:
        states = {"in a row": remember([*begin, *(i for part in ids[:m] for i in part)]), "chained": chain(apart[:m])}
        states |= {name: merge(apart[:m], weight=weight) for name, weight in WEIGHTS.items()}
        accuracy["nothing", m] = nothing
        for way, memory in states.items():
            accuracy[way, m] = score(model, memory, batch, answers)
    # every group has its own end-of-text token, as those in `apart` do, so that the two are comparable
    whole = remember([i for part in ids for i in begin + part])
    return accuracy, chain_errors(apart, whole)


def last(memories: Iterable[Memory]) -> Memory:
    *_, memory = memories
    return memory


@dataclass(frozen=True)
class Questions:
    """N texts, each followed by each of the C classes: N * C rows, text by text, padded on the right."""

    ids: Tensor
    """`[N * C, T]`."""
    begin: Tensor
    """Tokens of the text, up to the class, `[N * C]`."""
    lengths: Tensor
    """Tokens of text and class, `[N * C]`."""
    names: Tensor
    """The one token of each name, `[C]`."""

    @staticmethod
    def of(tokenizer: Tokenizer, texts: Sequence[str], classes: Sequence[str]) -> "Questions":
        """The questions of N texts and C classes.

        Raises:
            ValueError: a name is more than one token.
        """
        names = [tokenizer.encode(f" {name}") for name in NAMES]
        if any(len(name) != 1 for name in names):
            raise ValueError(f"the names {' '.join(NAMES)} must be one token each: learn a larger vocabulary")
        begins = [tokenizer.encode(f"{text} ->") for text in texts]
        ends = [tokenizer.encode(f" {label}") for label in classes]
        rows = [begin + end for begin in begins for end in ends]
        begin = torch.tensor([len(begin) for begin in begins]).repeat_interleave(len(ends))
        lengths = torch.tensor([len(row) for row in rows])
        return Questions(padded(rows), begin, lengths, torch.tensor([name[0] for name in names]))


def score(model: LanguageModel, memory: Memory, asked: Questions, answers: Tensor) -> float:
    """Accuracy: share of questions whose right name is the likeliest.

    A name's probability is summed over the classes that may stand before it: sum_c p(c | text) p(name | text, c).
    """
    rows, T = asked.ids.shape
    # a copy of the one state for every row
    state: Any = memory.state.select(torch.zeros(rows, dtype=torch.int64))
    x, _ = model.hidden(asked.ids, state, lengths=asked.lengths)
    position = torch.arange(1, T)
    # the tokens of the classes; x at position - 1 predicts them
    of_class = (position >= asked.begin[:, None]) & (position < asked.lengths[:, None])
    each = model.head(x[:, :-1][of_class]).log_softmax(-1).gather(1, asked.ids[:, 1:][of_class][:, None])[:, 0]
    classes = torch.zeros(rows).index_add(0, of_class.nonzero()[:, 0], each)[:, None]
    names = model.head(x[torch.arange(rows), asked.lengths - 1]).log_softmax(-1)[:, asked.names]
    whole = (classes + names).unflatten(0, (len(answers), -1)).logsumexp(1)
    return float((whole.argmax(-1) == answers).float().mean())


# table and picture


def table(result: dict[str, Any]) -> str:
    """A Markdown table for each set: a row for each number of groups, accuracies in percent."""
    parts = []
    for name, found in result["sets"].items():
        lines = []
        for m in result["groups"]:
            cells = [found["accuracy"][way][str(m)] for way in WAYS]
            lines.append([str(m), *(f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in cells)])
        parts.append(f"{name}\n\n{markdown(['groups', *WAYS], lines)}")
    return "\n\n".join(parts)


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """Accuracy against groups as a PNG, a panel for each set."""
    figure, axes = grid(title, 1, len(result["sets"]), size=(4.6, 4.4))
    groups = result["groups"]
    # one scale for all panels
    everywhere = [v for found in result["sets"].values() for row in found["accuracy"].values() for v in row.values()]
    top = max(mean + half for mean, half in everywhere) + 0.02
    styles = dict(zip(WAYS, ("0.6", "C0", "C4", "C3", "C1", "C2", "C5"), strict=True))
    for axis, (name, found) in zip(axes[0], result["sets"].items(), strict=True):
        for way, colour in styles.items():
            means, halves = zip(*(found["accuracy"][way][str(m)] for m in groups), strict=True)
            strong = way in ("in a row", "merged")
            axis.plot(groups, means, color=colour, marker="o" if strong else "", lw=2 if strong else 1.2, label=way)
            if strong:
                low, high = ([m + s * h for m, h in zip(means, halves, strict=True)] for s in (-1, 1))
                axis.fill_between(groups, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(groups, [str(m) for m in groups])
        axis.set_ylim(0.15, top)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("groups of four demonstrations")
        axis.set_ylabel("accuracy")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, format="png", dpi=120)
