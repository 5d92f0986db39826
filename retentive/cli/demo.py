"""`retentive demo`: in a few minutes, from the source of Python's standard library to a RetNet that writes Python.

It trains on text that every machine has and holds whole modules out. Then it shows held-out bits per byte beside two
yardsticks, that the three forms of the trained model agree, what the model writes, and what its memory costs beside a
Transformer's.
"""

import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from retentive.bench import decode
from retentive.bench.run import keep
from retentive.checkpoint import ModelFolder
from retentive.cli.errors import flags
from retentive.cli.parsing import parse
from retentive.data.pack import check_free, pack
from retentive.data.packed import Packed
from retentive.data.sources import Document
from retentive.data.tokenizer import train_bpe
from retentive.evals import heldout
from retentive.files import make_folder, write_json
from retentive.models import LanguageModel, retnet
from retentive.native import with_engine
from retentive.ops import using
from retentive.tables import counted
from retentive.train import Interrupted, TrainConfig, TrainRun
from retentive.train.log import read_metrics
from retentive.train.samples import sample_text

CONTEXTS = (256, 1024, 4096, 16384)
"""Tokens of context at which memory and time are measured."""
HELD_OUT = ("asyncio", "http", "json", "argparse.py", "statistics.py", "tarfile.py", "turtle.py")
"""Well-known packages and modules that are held out as a whole, with their tests."""
SKIPPED = (
    "site-packages",
    "dist-packages",
    "lib2to3",
    "__pycache__",
    "idlelib",
    "pydoc_data",
    "bad_coding",
    "badsyntax",
)
"""Parts of paths to leave out: installed packages, caches, and test files that are not valid Python."""


@dataclass(frozen=True)
class DemoCommand:
    """Train on the source of Python's standard library, then see what a RetNet does and what it costs."""

    out: Path = Path("runs/demo")
    """Run directory to make. The data go into a folder beside it."""
    minutes: float = 4.0
    """Training time in minutes. The number of steps is chosen for the speed of this machine."""
    size: str = "1m"
    """Size of the model. In a few minutes the smallest one learns most, since it reads the most text."""
    vocab_size: int = 4096
    """Number of tokens in the vocabulary."""
    overwrite: bool = False
    """Replace the run and the data of an earlier demo."""


def main(argv: list[str]) -> None:
    run(parse(DemoCommand, "retentive demo", argv))


def run(command: DemoCommand) -> None:
    """Run the whole demo, step by step."""
    console, began = Console(highlight=False), time.monotonic()
    if not command.out.name:
        raise ValueError(f"--out {command.out} has no name of its own: the data go beside it, to NAME-data")
    data = command.out.with_name(command.out.name + "-data")
    check(command, data)
    console.rule("1. Text: the Python standard library")
    prepare(console, data, command)
    console.rule("2. Training")
    training = planned(command, data)
    tokens = f"{training.batch} x {training.length} tokens"
    console.print(f"{counted(training.train.steps, 'step')} of {tokens} fit {command.minutes:g} min on this machine.")
    try:
        training.run()
    except Interrupted as stop:
        console.print(f"{flags(str(stop))}: retentive train --data {data} --out {command.out} --resume", markup=False)
        sys.exit(128 + stop.number)
    folder = ModelFolder.open(command.out)
    model, tokenizer = folder.model(), folder.tokenizer_for_text()
    console.rule("3. How good is it? Held-out modules, bits per byte")
    yardsticks(console, data, command.out)
    console.rule("4. One model, three forms")
    forms(console, model, data)
    console.rule("5. What it writes")
    writer = with_engine(model)
    for prompt in ("def ", "class ", '"""Return '):
        console.print(sample_text(writer, tokenizer, prompt, tokens=90), markup=False)
        console.print("[dim]" + "·" * 40 + "[/dim]")
    console.rule("6. What its memory costs")
    costs(console, command)
    console.rule(f"Done in {(time.monotonic() - began) / 60:.1f} minutes. Go on with")
    console.print(
        f"  retentive generate {command.out} --prompt 'import '      let it write\n"
        f"  retentive info {command.out}                           what it is made of\n"
        f"  retentive data MY_TEXTS --out data/mine              pack text of your own\n"
        f"  retentive train --data data/mine --out runs/mine     train on it\n"
        f"  retentive --help                                     all there is",
        markup=False,
    )


def check(command: DemoCommand, data: Path) -> None:
    """Raises ValueError or OSError for invalid options, before any work is done."""
    if not 0 < command.minutes < math.inf:
        raise ValueError(f"--minutes must be above 0 and finite, got {command.minutes:g}")
    if command.out.exists() and not command.out.is_dir():
        raise FileExistsError(f"--out {command.out} is a file: choose a folder for the run")
    if command.vocab_size < 257:
        raise ValueError(f"--vocab-size must be at least 257 (all bytes and an end of text), got {command.vocab_size}")
    retnet(command.size, vocab_size=command.vocab_size)  # raises for an unknown size
    if not command.overwrite and ((command.out / "train.json").exists() or data.exists()):
        raise FileExistsError(f"{command.out} or {data} exists: add --overwrite to begin anew, or choose another --out")
    make_folder(command.out.parent)
    check_free(data, overwrite=command.overwrite)


def library() -> Iterator[tuple[Document, bool]]:
    """Yields (module's source, True if it is held out), in the order of names.

    Tests of held-out modules are in neither split: they quote the modules.
    """
    root = Path(sysconfig.get_path("stdlib"))
    tests = {f"test_{Path(name).stem}" for name in HELD_OUT}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in str(name) for part in SKIPPED):
            continue
        held = name.parts[0] in HELD_OUT
        if not held and any(Path(part).stem in tests for part in name.parts):
            continue
        try:
            yield Document(name.as_posix(), path.read_text(encoding="utf-8")), held
        except UnicodeDecodeError:  # a few test files are in other encodings on purpose
            continue


def prepare(console: Console, data: Path, command: DemoCommand) -> None:
    """Train a tokenizer on the training modules and pack both splits."""
    documents = list(library())
    train = [d for d, held in documents if not held]
    valid = [d for d, held in documents if held]
    tokenizer = train_bpe((d.text for d in train[::2]), command.vocab_size)  # half of them are enough
    meta = pack(data, tokenizer, train, valid, overwrite=command.overwrite)
    for name, split in meta.splits.items():
        console.print(
            f"{name}: {split.documents:,} modules, {split.bytes / 1e6:.1f} MB, {split.tokens / 1e6:.2f} M tokens "
            f"({split.bytes / split.tokens:.2f} bytes a token)"
        )
    console.print(f"held out, with their tests: {', '.join(HELD_OUT)}")


def planned(command: DemoCommand, data: Path) -> TrainRun:
    """Returns a training run of about the given minutes, by the time of a few steps on this machine."""
    # small batches: with few tokens, many small steps learn more than half as many large ones
    first = TrainRun(data, command.out, size=command.size, batch=4, length=512, overwrite=command.overwrite)
    overhead = 1.12  # for evaluations, samples and checkpoints
    steps = max(20, min(20_000, int(command.minutes * 60 / (overhead * first.seconds_per_step()))))
    often, width = max(steps // 4, 1), retnet(command.size, vocab_size=command.vocab_size).dim
    options = TrainConfig(
        steps=steps,
        lr=2.0 / width,  # 0.016 for 1m (docs/LOG.md), less for wider ones
        warmup=min(50, steps // 10 + 1),
        eval_every=often,
        save_every=max(steps // 2, 1),
        sample_every=often,
        sample_prompt="def ",
    )
    return replace(first, train=options)


def yardsticks(console: Console, data: Path, out: Path) -> None:
    """Print held-out bits per byte of the model, of order-0 entropy and of xz -9, on the same bytes."""
    marks = heldout.yardsticks(Packed(data))
    final = next(r["final_bits_per_byte"] for r in reversed(read_metrics(out)) if "final_bits_per_byte" in r)
    figures = {name: marks[name] for name in heldout.YARDSTICKS} | {"this model": final}
    for name, value in figures.items():
        console.print(f"  {name:<26}{value:6.3f}")
    write_json(out / "held_out.json", {**figures, "bytes": marks["bytes"]})


@torch.inference_mode()
def forms(console: Console, model: LanguageModel, data: Path) -> None:
    """Print the float32 error of logits on held-out text, in each form and across a change of form."""
    ids = next(Packed(data).held_out(length=1024)).ids
    with using(form="recurrent"):
        exact, _ = model.double()(ids)  # in place; float32 values survive the round trip
    model.float()
    results = {}
    for form in ("parallel", "recurrent", "chunkwise"):
        with using(form=form):
            results[form], _ = model(ids)
    with using(form="parallel"):  # prompt in one form, then token by token; 777 is not a multiple of the chunk size
        first, state = model(ids[:, :777])
    rest = []
    for t in range(777, ids.shape[1]):
        logits, state = model(ids[:, t : t + 1], state)
        rest.append(logits)
    results["parallel, then token by token"] = torch.cat((first, *rest), 1)
    console.print(f"largest logit {float(exact.abs().max()):.1f}; in float32, the largest difference from float64:")
    for name, logits in results.items():
        console.print(f"  {name:<32}{float((logits - exact).abs().max()):.1e}")


def costs(console: Console, command: DemoCommand) -> None:
    """Print memory and time of a decoding step by context, beside the twin; write JSON and a picture beside the run."""
    # both depend on the sizes of models, not on their weights
    options = decode.Options(
        size=command.size,
        vocab_size=command.vocab_size,
        contexts=CONTEXTS,
        batches=(1,),
        models=("retnet", "transformer"),
        precision="fp32",
        device="cpu",
    )
    result = decode.measure(options)
    console.print(Markdown(decode.table(result)))
    try:
        keep(command.out / "decode.json", decode, result, "retentive demo")
        console.print(f"the picture: {command.out / 'decode.png'}")
    except ModuleNotFoundError as missing:  # matplotlib is an extra: the demo does without the picture
        console.print(str(missing), markup=False)
