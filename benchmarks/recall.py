"""`python -m benchmarks recall`: associative recall and copying, the weakest tests of states of constant size.

`pairs`: a row names n pairs of a key and a value, drawn anew for every row, and then asks for every key once:

    k1 v1 k2 v2 … kn vn   k7 v7 k2 v2 …        only the values of the second part are predicted

`copy`: a row is a random string of n tokens, a mark, and the same string again, which is predicted:

    a b c … z # a b c … z

A row holds everything that its answers need. Each training step has rows of one n: at first only the smallest, then
larger ones join one after another. Attention that gets all numbers at once does not learn to look up keys. From four
pairs it learns this in some thousand steps. Accuracy is measured for each n.

Sources: Arora et al., Zoology, arXiv 2312.04927 (its queries lie farther from their pairs); Jelassi et al., Repeat
After Me, arXiv 2402.01032.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from retentive import machine
from retentive.bench.lab.options import Say, silent, words
from retentive.bench.lab.plot import LOOKS, MOST, grid, legend, panel
from retentive.compare import VARIANTS, config_of_variant
from retentive.data.loader import Batch
from retentive.machine import pick_device
from retentive.models import Config, LanguageModel, build, cost
from retentive.ops.cross_entropy import IGNORE
from retentive.options import at_least_one, known
from retentive.tables import markdown
from retentive.train import Hooks, TrainConfig, language_modelling, train
from retentive.train.directory import RunDirectory

PAIRS = (4, 8, 16, 32)
KEYS = VALUES = 64
PICTURE = "Associative recall"
ASKED = 4096
"""Minimum answers per accuracy."""
GROWING = 0.5
"""Share of the steps after which all numbers of pairs are in use."""
FEW, LEARNED = 4, 0.9
"""Every model here has room for FEW pairs: an accuracy on them below LEARNED means that it did not learn the task."""
MARK = 0
"""Token between a string and its copy; the string has none."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Associative recall: small models trained to answer from pairs of keys and values earlier in the row."""

    task: str = "pairs"
    """pairs: pairs of keys and values; copy: strings to repeat."""
    out: Path = Path("runs/recall")
    """Folder of the models; existing ones are not trained again."""
    variants: tuple[str, ...] = ("retnet", "retnet-paper", "no-decay", "hybrid-window", "transformer")
    """Model variants, as in `retentive compare --variants`."""
    dims: tuple[int, ...] = (64,)
    """Widths of the models, which have two layers."""
    pairs: tuple[int, ...] = PAIRS
    """Pairs in a row; tokens of a string to copy."""
    steps: int = 6000
    """Training steps."""
    tokens: int = 4096
    """Tokens of a training step."""
    lrs: tuple[float, ...] = (4e-3, 1e-2)
    """Peak learning rates; each model's best counts."""


class Rows:
    """The batches of training: `rows[step]` has rows of one number of pairs, a pure function of (seed, step)."""

    def __init__(self, *, tokens: int, steps: int, task: str = "pairs", pairs: Sequence[int] = PAIRS, seed: int = 0):
        self.tokens, self.task, self.pairs, self.seed = tokens, task, sorted(pairs), seed
        self.grown = max(int(GROWING * steps), 1)
        """Steps until all numbers of pairs are in use."""
        self.length = sum(length(task, n) - 1 for n in pairs) // len(pairs)
        """Mean length of a row, for counting the FLOPs of a step."""

    def __getitem__(self, step: int) -> Batch:
        there = min(1 + step * len(self.pairs) // self.grown, len(self.pairs))
        n = self.pairs[step % there]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return TASKS[self.task](n, max(self.tokens // length(self.task, n), 1), generator)


def length(task: str, n: int) -> int:
    """Tokens of a row with its last answer."""
    return 4 * n if task == "pairs" else 2 * n + 1


def rows(n: int, count: int, generator: torch.Generator) -> Batch:
    """Make `count` rows of n pairs: ids and targets `[B,4n-1]`; all targets but the answers are IGNORE."""
    # argsort of random numbers is a random order: first n different keys, then the order of the questions
    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)[:, :n]
    values = torch.randint(KEYS, KEYS + VALUES, (count, n), generator=generator)
    order = torch.rand(count, n, generator=generator).argsort(-1)
    asked = torch.stack((keys.gather(1, order), values.gather(1, order)), -1)
    ids = torch.cat((torch.stack((keys, values), -1).flatten(1), asked.flatten(1)), 1)
    targets = ids[:, 1:].clone()
    targets[:, : 2 * n] = IGNORE  # the pairs, and the first key that is asked
    targets[:, 1::2] = IGNORE  # after an answer comes the next key, which is random
    return Batch(ids[:, :-1], targets, None, None)


def copies(n: int, count: int, generator: torch.Generator) -> Batch:
    """Make `count` rows of a string of n tokens and its copy: ids and targets `[B,2n]`; only the copy is a target."""
    string = torch.randint(MARK + 1, KEYS + VALUES, (count, n), generator=generator)
    ids = torch.cat((string, torch.full((count, 1), MARK), string), 1)
    targets = ids[:, 1:].clone()
    targets[:, :n] = IGNORE
    return Batch(ids[:, :-1], targets, None, None)


TASKS = {"pairs": rows, "copy": copies}
UNITS = {"pairs": "pairs", "copy": "tokens"}


@torch.no_grad()
def accuracy(
    model: LanguageModel, n: int, *, task: str = "pairs", asked: int = ASKED, seed: int = 10**6
) -> tuple[float, int]:
    """(share of answers that are the likeliest token, number of answers), over rows not seen in training."""
    generator = torch.Generator().manual_seed(seed + n)  # above the seeds of training, which are its steps
    right = total = 0
    while total < asked:
        batch = TASKS[task](n, max(4096 // length(task, n), 1), generator)
        where = batch.targets != IGNORE
        x, _ = model.hidden(batch.ids.to(model.device))
        found = model.head(x[where.to(x.device)]).argmax(-1).cpu()
        right += int((found == batch.targets[where]).sum())
        total += len(found)
    return right / total, total


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per width and variant at its best learning rate: accuracy by number of pairs, and bytes of memory.

    The models are trained in `out`; existing ones are not trained again.

    Raises:
        ValueError: an unknown variant, a number below 1, more pairs than keys, or a model in `out` with other options.
    """
    variants, dims, pairs, steps = words(options.variants), options.dims, options.pairs, options.steps
    known(variants, VARIANTS, "variant")
    known([options.task], TASKS, "task")
    at_least_one(options, "pairs", "dims", "steps", "tokens")
    if not options.lrs:
        raise ValueError("--lrs has no learning rate: give one or more")
    if options.task == "pairs" and max(pairs) > KEYS:
        raise ValueError(f"there are {KEYS} keys, too few for {max(pairs)} pairs")
    trained = {"pairs": list(pairs), "steps": steps, "tokens_per_step": options.tokens, "growing": GROWING}
    if options.task != "pairs":  # folders of before name no task
        trained["task"] = options.task
    found = []
    for dim, variant in product(dims, variants):
        shape = dict(dim=dim, layers=2, heads=2)
        config: Any = config_of_variant(VARIANTS[variant], "1m", vocab_size=KEYS + VALUES, **shape)
        by_rate: dict[float, dict[str, float]] = {}
        for lr in options.lrs:
            folder = options.out / f"{variant}_{dim}_lr{lr:g}"
            model = trained_model(config, folder, trained | {"lr": lr})
            by_rate[lr] = scores = {str(n): accuracy(model, n, task=options.task)[0] for n in pairs}
            shares = ", ".join(f"{n} {UNITS[options.task]} {share:.1%}" for n, share in scores.items())
            say(f"{variant}, width {dim}, lr {lr:g}: {shares}")
        best = max(by_rate, key=lambda lr: sum(by_rate[lr].values()))
        row: dict[str, Any] = {"variant": variant, "dim": dim, "parameters": cost.parameters(config), "lr": best}
        # the cost formulas do not know the peers
        remembers = None if config.library else cost.memory_bytes(config, length(options.task, max(pairs)))
        found.append(row | {"memory_bytes": remembers, "accuracy": by_rate[best]})
    return {
        "what": "associative recall",
        "hardware": machine.describe(),
        "device": pick_device("auto").type,
        **trained,
        "lrs": list(options.lrs),
        "task": options.task,
        "chance": 1 / VALUES if options.task == "pairs" else 1 / (KEYS + VALUES - 1),
        "answers": ASKED,
        "rows": found,
    }


def trained_model(config: Config, folder: Path, options: dict[str, Any]) -> LanguageModel:
    """The model of the folder, trained first if it is missing.

    Raises:
        ValueError: the model was trained with other options.
    """
    check_done(folder, options)  # "resume" below does nothing for a trained model, so check that it is the right one
    steps = options["steps"]
    how = TrainConfig(
        steps=steps, lr=options["lr"], warmup=steps // 10, weight_decay=0.1, eval_every=0, sample_every=0, keep=1
    )
    torch.manual_seed(0)
    model = build(config)
    task = options.get("task", "pairs")
    rows = Rows(tokens=options["tokens_per_step"], steps=steps, task=task, pairs=options["pairs"])
    directory = RunDirectory(folder, record={"recall": options}, existing="resume")
    train(model, rows, language_modelling, how, directory, Hooks(quiet=True))
    return model.eval()


def check_done(folder: Path, options: dict[str, Any]) -> None:
    """Raise ValueError if the folder holds a model trained with other options."""
    file = folder / "train.json"
    if file.is_file():
        had = json.loads(file.read_text(encoding="utf-8")).get("recall")
        if had != options:
            raise ValueError(f"{folder} was trained otherwise ({had}, now {options}): choose another out")


def learned(row: dict[str, Any]) -> bool:
    """True if the model learned the task: a row that fails at FEW pairs measures training, not memory."""
    return all(share >= LEARNED for n, share in row["accuracy"].items() if int(n) <= FEW)


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, and below it the models that did not learn the task."""
    pairs = list(result["rows"][0]["accuracy"])
    task = result.get("task", "pairs")
    longest, unit = length(task, max(int(n) for n in pairs)), UNITS[task]
    heads = ["width", "variant", "parameters", "lr", f"memory, {longest} tokens", *(f"{n} {unit}" for n in pairs)]
    lines = []
    for row in result["rows"]:
        memory = "–" if row["memory_bytes"] is None else decimal(row["memory_bytes"])
        cells = [str(row["dim"]), row["variant"], f"{row['parameters'] / 1e3:,.0f} k", f"{row['lr']:g}", memory]
        lines.append([*cells, *(f"{row['accuracy'][n]:.1%}" for n in pairs)])
    unlearned = [f"{row['variant']} ({row['dim']})" for row in result["rows"] if not learned(row)]
    if not unlearned:
        return markdown(heads, lines)
    return f"{markdown(heads, lines)}\n\n" + (
        f"- {', '.join(unlearned)}: wrong even about {FEW} {unit} or fewer, so not trained to the end in "
        f"{result['steps']:,} steps at these rates. These rows tell of training, not of memory."
    )


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG: accuracy against pairs, a panel a width."""
    dims = list(dict.fromkeys(row["dim"] for row in result["rows"]))
    figure, axes = grid(title, 1, len(dims), size=(5.2, 4))
    for axis, dim in zip(axes[0], dims, strict=True):
        rows = {row["variant"]: row for row in [row for row in result["rows"] if row["dim"] == dim][:MOST]}
        pairs = list(next(iter(rows.values()))["accuracy"])
        points = [(int(n), {name: {"right": row["accuracy"][n]} for name, row in rows.items()}) for n in pairs]
        names = {n: n if learned(row) else f"{n}, not trained to the end" for n, row in rows.items()}
        looks = {
            name: look | {"linestyle": "-" if learned(rows[name]) else ":", "markersize": max(13 - 2 * n, 4)}
            for n, (name, look) in enumerate(zip(rows, LOOKS, strict=False))  # equal curves all stay visible
        }
        label = f"{UNITS[result.get('task', 'pairs')]} to remember"
        panel(axis, points, names, "right", "answers that are right", label, percent=True, looks=looks)
        axis.set_title(f"width {dim}, two layers", fontsize=9)
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")
