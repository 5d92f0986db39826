"""The training loop: a model, batches and an objective in, a run directory out.

    prepare the model  ->  begin, or restore the newest checkpoint  ->  steps, with reports and checkpoints between them

Everything is a function of the config, the data and the step: on CPU, a run that was killed and resumed ends with the
same bits as an uninterrupted one.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from retentive.models import LanguageModel
from retentive.train import checkpoints
from retentive.train.config import TrainConfig
from retentive.train.directory import RunDirectory, read_options
from retentive.train.hooks import Hooks, report
from retentive.train.log import Silence, check_extras, open_log, say
from retentive.train.objective import Objective
from retentive.train.parallel import ALONE, Cluster
from retentive.train.prepare import prepare
from retentive.train.resume import AUTOMATIC
from retentive.train.signals import Interrupted, Stop, stop_signals
from retentive.train.step import Batches, Training, take_step


def train(
    model: LanguageModel,
    batches: Batches,
    objective: Objective,
    config: TrainConfig,
    out: RunDirectory | str | Path,
    hooks: Hooks | None = None,
    cluster: Cluster = ALONE,
) -> Path:
    """Train `model` in place and return the run directory; resumes from the run's newest checkpoint if told to.

    Args:
        batches: this rank's share of the batches.
        cluster: the ranks that train together; all call this with the same arguments, and rank 0 writes.

    Raises:
        FileExistsError: `out` already holds a run, unless it is a RunDirectory that resumes or overwrites it.
        BlockingIOError: another process is training there.
        FloatingPointError: the loss or the gradient is not finite in more than `skip_nonfinite` steps in a row; the
            last good checkpoint is kept.
        Interrupted: SIGTERM, SIGUSR1 or SIGINT arrived; a checkpoint was saved.
        OSError: a checkpoint could not be written; older ones remain.
    """
    directory, hooks = out if isinstance(out, RunDirectory) else RunDirectory(Path(out)), hooks or Hooks()
    with cluster.barrier():  # check everything before anything is written or moved to a GPU
        check_extras(config)
        directory.check()
        goes_on = directory.existing == "resume" and checkpoints.folders(directory.path)
        before = read_options(directory.path).get("train", {}) if goes_on else {}
    for name, chosen in AUTOMATIC.items():  # settled once a run: what goes on from a checkpoint keeps it
        if getattr(config, name) == chosen:
            config = replace(config, **{name: before.get(name, chosen)})
    training = prepare(model, batches, objective, config, cluster)
    training.run = directory.path
    with cluster.on_main(directory.locked):
        begin(training, directory, hooks)
        if training.step < config.steps:
            rate = f"learning rate {training.config.lr:.2g}"
            title = ", ".join(filter(None, (hooks.title, training.config.precision, rate)))
            if training.step:
                title = resumed_line(training.step, config.steps, before.get("steps", config.steps))
            run_steps(training, directory.path, hooks, title)
    return directory.path


def begin(training: Training, directory: RunDirectory, hooks: Hooks) -> None:
    """Restore the newest checkpoint, or write the initial weights; all ranks must call this."""
    run, cluster, tell = directory.path, training.cluster, partial(say, quiet=hooks.quiet)
    done, steps = 0, training.config.steps
    with cluster.barrier():
        if cluster.main:
            done = checkpoints.newest_whole(run, tell) if directory.existing == "resume" else 0
            directory.write_options(training.config)
    done = cluster.broadcast(done)
    directory.check_shared(cluster)
    if done:
        with cluster.barrier():
            checkpoints.restore(run, done, training)
    else:
        checkpoints.write_first(run, training.model, directory.tokenizer, directory.template, cluster)
    if done >= steps and cluster.main:
        tell(f"done: {run} is at step {done} of {steps} (more steps lengthen it)")


def run_steps(training: Training, run: Path, hooks: Hooks, title: str) -> None:
    """Run all remaining steps; all ranks must call this."""
    writer = checkpoints.Writer(run, training.config.keep, training.cluster, background=training.config.async_save)
    with open_log(training, run, quiet=hooks.quiet) as log, stop_signals() as stop, writer:
        log.say(title)
        while training.step < training.config.steps:
            log.begin_step()
            metrics: dict[str, Any] = {}
            try:
                metrics = take_step(training)
                log.step(training.step, metrics)
            except FloatingPointError as error:
                leave_out(error, training, run, log)
            finish_step(training, hooks, log, writer, stop, metrics)


def finish_step(
    training: Training, hooks: Hooks, log: Silence, writer: checkpoints.Writer, stop: Stop, metrics: dict[str, Any]
) -> None:
    """Finish a step: update averages, and, when due, evaluate, save a checkpoint, or stop after a signal.

    A callback's error is raised after a checkpoint.
    """
    config, step, cluster = training.config, training.step, training.cluster
    if training.ema:
        training.ema.update(step)
    report(training, hooks, log)
    failure = called(training, hooks, metrics) if cluster.main else None
    failed = cluster.max(int(failure is not None)) if hooks.callbacks else 0
    last, stopped = step == config.steps, cluster.max(stop.signal)  # the signal may have reached one rank only
    # After the report: the log of a checkpoint's step is complete, and no resumed run writes it again.
    if last or stopped or failed or step % config.save_every == 0:
        with cluster.barrier():
            log.check()
        writer.save(checkpoints.contents(training))
    if failed:
        log.say(f"a callback failed at step {step}, which is saved; go on with `resume=True`")
        raise cluster.once(failure or RuntimeError("a callback failed"))
    if stopped and not last:
        message = f"stopped at step {step} of {config.steps}, saved; go on with `resume=True`"
        raise Interrupted(message if cluster.main else "", stopped)


def called(training: Training, hooks: Hooks, metrics: dict[str, Any]) -> Exception | None:
    """Call the callbacks; returns the error of the first that fails."""
    for callback in hooks.callbacks:
        try:
            callback(training, metrics)
        except Exception as error:
            return error
    return None


def leave_out(error: FloatingPointError, training: Training, run: Path, log: Silence) -> None:
    """Skip a step, or raise FloatingPointError with advice; all ranks have the same loss and norm."""
    try:
        log.skip(training.step, error)
    except FloatingPointError as last:
        raise training.cluster.once(FloatingPointError(f"{last}: {advice_after_failure(run)}")) from None


def advice_after_failure(run: Path) -> str:
    """Advice for a run that has failed: its last good checkpoint, and what to change."""
    kept = checkpoints.folders(run)
    if kept:
        return f"training stopped, the last good checkpoint is {kept[-1]}; try a lower `lr`, with `overwrite=True`"
    return "training stopped, no checkpoint had been saved yet; try a lower `lr`"


def resumed_line(done: int, steps: int, planned: int) -> str:
    """First line of the log of a resumed run."""
    if steps == planned:
        return f"going on from step {done} of {steps}"
    return f"going on from step {done}, to {steps} instead of {planned}: with the learning rates of a run of {steps}"
