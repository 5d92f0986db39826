"""The training loop: batches and an objective in, a run directory out.

Everything is a function of the config, the data and the step: a run that was killed and resumed ends, on CPU, in the
same bits as one that was not. Autocast, compilation and recomputation are applied from outside: no model knows them.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from torch.utils.checkpoint import checkpoint

from retentive.evals.heldout import HeldOut
from retentive.files import write_json
from retentive.machine import gemm_rate, peak_memory, pick_device
from retentive.models import LanguageModel, cost
from retentive.train import checkpoints
from retentive.train.config import Precision, TrainConfig
from retentive.train.directory import RunDirectory, read_options
from retentive.train.ema import EMA
from retentive.train.log import Log, Silence, check_extras, say
from retentive.train.objective import Objective
from retentive.train.optim import learning_rate, optimizer_of
from retentive.train.parallel import clip_gradients, objective_of, parallelize, reading
from retentive.train.processes import ALONE, Processes
from retentive.train.signals import Interrupted, stop_signals
from retentive.train.skips import Skips


class Batches(Protocol):
    """What the loop reads: a pure function of the index, so that a resumed run reads what it would have read."""

    length: int
    """Tokens of a row, on which the FLOPs of a token depend."""

    def __getitem__(self, index: int, /) -> Any:
        """The batch of any index from 0 on; the j-th of a step has the index step * accumulate + j.

        A batch has `ids` and `to(device)`; what else it has concerns the objective alone.
        """


@dataclass(frozen=True)
class Hooks:
    """What a run does beside its steps, and what it prints."""

    evaluate: Callable[[LanguageModel, int], HeldOut] | None = None
    """(model, tokens at most) -> held-out loss, called every `eval_every` steps and at the end."""
    sample: Callable[[LanguageModel], str] | None = None
    """model -> text, called every `sample_every` steps."""
    title: str = ""
    """The line that the log begins with."""
    quiet: bool = False
    """Write metrics.jsonl only, and print nothing."""


def train(
    model: LanguageModel,
    batches: Batches,
    objective: Objective,
    config: TrainConfig,
    out: RunDirectory | str | Path,
    hooks: Hooks | None = None,
    here: Processes = ALONE,
) -> Path:
    """The run directory, once `model` is trained in place, from the run's newest checkpoint where it is resumed.

    Args:
        batches: this process's share of them, where there are several.
        here: the processes that train together; all call this with the same arguments, the first one writes.

    Raises:
        FileExistsError: `out` holds a run already, and is not a RunDirectory that says what to do with it.
        BlockingIOError: another process is training there.
        FloatingPointError: the loss or the gradient is not finite, at the first step that this happens or, by
            `skip_nonfinite`, after so many in a row; the last good checkpoint is kept.
        Interrupted: SIGTERM, SIGUSR1 or SIGINT, after a checkpoint was saved.
        OSError: a checkpoint could not be written; older ones remain.
    """
    directory = out if isinstance(out, RunDirectory) else RunDirectory(Path(out))
    run, hooks = directory.path, hooks or Hooks()
    # What can be refused is refused before anything is written or moved to a GPU.
    with here.together():
        check_extras(config)
        directory.check()
        device, resume = here.device or pick_device(config.device), directory.existing == "resume"
        before = read_options(run).get("train", {}) if resume else {}
        if config.precision == "auto":  # measured once a run: a resumed one keeps what was found then
            config = replace(config, precision=before.get("precision", "auto"))
        check_together(config, here)
        model = parallelize(model, device, here).train()
        wrap_blocks(model, config)
    config = replace(config, precision=agreed_precision(config.precision, device, here))
    objective = objective_of(model, objective, here)
    optimizer, ema = optimizer_of(model, config), EMA(model, config.ema) if config.ema else None
    with here.on_first(directory.locked):
        with here.together():
            tell, done, carried = partial(say, quiet=hooks.quiet), 0, None
            if here.main:
                done = checkpoints.newest_whole(run, tell) if resume else 0
                write_json(run / "train.json", {"train": asdict(config), **directory.record})
        done = here.first(done)
        directory.check_shared(here)
        with here.together():
            if done:
                carried = checkpoints.restore(run, done, model, optimizer, ema, here)
        if done >= config.steps:
            if here.main:
                say(f"done: {run} is at step {done} of {config.steps} (more --steps lengthen it)", quiet=hooks.quiet)
            return run
        if done == 0:
            checkpoints.write_first(run, model, directory.tokenizer, directory.template, here)
        mfu_per_rate = utilisation(model, batches.length, config, device) / here.world
        writer = checkpoints.Writer(run, config.keep, here, background=config.async_save)
        with here.together():
            skips = Skips(run, done, config.skip_nonfinite)
            logs = Log(run, config, start=done, quiet=hooks.quiet) if here.main else Silence()
        with logs as log, stop_signals() as stop, writer:
            title = ", ".join(filter(None, (hooks.title, config.precision)))
            log.say(resumed_line(done, config.steps, before.get("steps", config.steps)) if done else title)
            for step in range(done, config.steps):
                began = time.perf_counter()
                try:
                    metrics, carried = take_step(model, batches, objective, config, optimizer, step, carried, here)
                except FloatingPointError as error:
                    skipped(skips, error, run, log, step + 1, here)  # and `carried` stays as it was
                else:
                    skips.in_a_row = 0
                    rate = metrics.pop("tokens") / (time.perf_counter() - began)
                    speed = {"tokens_per_second": rate, "mfu": rate * mfu_per_rate, "memory": peak_memory(device)}
                    log.step({"step": step + 1, **metrics, **speed})
                if ema:
                    ema.update(step + 1)
                with ema.in_place() if ema else nullcontext():
                    report(model, config, hooks, log, step + 1, here)
                last, stopped = step + 1 == config.steps, here.largest(stop.signal)  # it may have come to one of them
                # After the report: the log of a checkpoint's step is whole, and no resumed run writes it again.
                if last or stopped or (step + 1) % config.save_every == 0:
                    with here.together():
                        log.check()
                    found = checkpoints.contents(model, optimizer, ema, step=step + 1, state=carried, here=here)
                    writer.save(found)
                if stopped and not last:
                    message = f"stopped at step {step + 1} of {config.steps}, saved; go on with --resume"
                    raise Interrupted(message if here.main else "", stopped)
    return run


def take_step(
    model: LanguageModel,
    batches: Batches,
    objective: Objective,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    step: int,
    carried: Any = None,
    here: Processes = ALONE,
) -> tuple[dict[str, Any], Any]:
    """(loss, lr, grad_norm and tokens of optimiser step `step`, from 0; the state to go on from).

    Of several processes: loss, norm and tokens of all together.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; weights and moments are as before.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    # Dropout is a function of the step too. Seeds are far apart, so that runs of neighbouring seeds do not share them.
    # So do processes that read other tokens; those that divide the same ones by heads must drop the same.
    torch.manual_seed(config.seed * 1_000_003 + step + here.share * 10**14)
    loss, tokens, carried = accumulate_gradients(model, batches, objective, config, step, carried, here)
    norm = clip_gradients(model, config.clip or math.inf, here)  # inf: measured, not clipped
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"loss {loss:.4g} and gradient norm {norm:.4g} at step {step + 1}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "tokens": tokens}, carried


def accumulate_gradients(
    model: LanguageModel,
    batches: Batches,
    objective: Objective,
    config: TrainConfig,
    step: int,
    carried: Any = None,
    here: Processes = ALONE,
) -> tuple[float, int, Any]:
    """(mean loss, tokens, the state to go on from) of one step; its gradients are left in the parameters.

    Every batch of the step weighs the same, whatever the number of its losses; every target of a batch does, whichever
    process has it.
    """
    device = model.device
    total, tokens = 0.0, 0
    for micro in range(config.accumulate):
        batch = batches[step * config.accumulate + micro].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses, count, carried = objective(model, batch, carried)
            (count_of_all,) = here.total(count)
            loss = losses / max(count_of_all, 1)
        # outside of autocast, as torch asks for; gradients are averaged over the shares, and their sum is meant
        (loss * here.shares / config.accumulate).backward()
        total += loss.item() / config.accumulate
        tokens += batch.ids.numel()
    total, all_tokens = here.total(total, tokens / here.cp)
    return total, int(all_tokens), carried


def report(
    model: LanguageModel, config: TrainConfig, hooks: Hooks, log: Log | Silence, done: int, here: Processes = ALONE
) -> None:
    """Evaluates and samples after `done` steps, where it is time to: the first process, or all that divide the model.

    Those compute the same numbers together, and the first one writes them down.
    """
    last = done == config.steps
    evaluates = hooks.evaluate and (last or (config.eval_every and done % config.eval_every == 0))
    samples = hooks.sample and config.sample_every and (last or done % config.sample_every == 0)
    if not (evaluates or samples) or not (here.divided or here.main):
        return
    with reading(model, here):
        if hooks.evaluate and evaluates:
            found = hooks.evaluate(model, config.eval_tokens)
            log.held_out(done, found)
            if last:
                all_text = found.exhausted(config.eval_tokens)
                log.held_out(done, found if all_text else hooks.evaluate(model, 10 * config.eval_tokens), last=True)
        if hooks.sample and samples:
            log.sample(done, hooks.sample(model))


def utilisation(model: LanguageModel, length: int, config: TrainConfig, device: torch.device) -> float:
    """MFU (model FLOPs utilisation: PaLM, arXiv 2204.02311) of one token a second.

    The peak that it is a fraction of is the rate of a large matrix product on this machine, measured now.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    flops = cost.training_flops_per_token(model.config, length)
    return flops / gemm_rate(device, dtype, size=1024, repeats=4)


def resumed_line(done: int, steps: int, planned: int) -> str:
    """The first line of the log of a resumed run."""
    if steps == planned:
        return f"going on from step {done} of {steps}"
    return f"going on from step {done}, to {steps} instead of {planned}: with the learning rates of a run of {steps}"


def skipped(
    skips: Skips, error: FloatingPointError, run: Path, log: Log | Silence, done: int, here: Processes = ALONE
) -> None:
    """Leaves a step out, or raises FloatingPointError with what to do; all processes have the same loss and norm."""
    try:
        line = skips.skip(error)
    except FloatingPointError as last:
        raise here.said_by_first(FloatingPointError(f"{last}: {advice_after_failure(run)}")) from None
    log.skipped(done, skips.total, line)


def check_together(config: TrainConfig, here: Processes) -> None:
    """Raises ValueError for options that do not go with the way in which processes divide the model."""
    if config.compile and here.cp * here.tp > 1:
        raise ValueError("--compile cannot look into what processes exchange in a block: leave it or --cp, --tp out")
    if config.optimizer == "muon" and here.tp > 1:
        raise ValueError("--optimizer muon needs whole matrices, and --tp divides them: leave either out")


def advice_after_failure(run: Path) -> str:
    """What a run that cannot go on has saved, and what to do."""
    kept = checkpoints.folders(run)
    if kept:
        return f"training stopped, the last good checkpoint is {kept[-1]}; try a lower --lr, with --overwrite"
    return "training stopped, no checkpoint had been saved yet; try a lower --lr"


def pick_precision(name: Precision, device: torch.device) -> Precision:
    """fp32 or bf16; "auto" is bf16 where a matrix product is 1.3 times as fast in it or more, measured now."""
    if name != "auto":
        return name
    if device.type == "mps":
        return "fp32"
    bf16 = fp32 = 0.0
    for _ in range(8):  # in turn: what a busy neighbour takes, it takes from both
        bf16 = max(bf16, gemm_rate(device, torch.bfloat16, size=1024, repeats=1))
        fp32 = max(fp32, gemm_rate(device, torch.float32, size=1024, repeats=1))
    return "bf16" if bf16 > 1.3 * fp32 else "fp32"


def agreed_precision(name: Precision, device: torch.device, here: Processes) -> Precision:
    """`pick_precision`, of which the first process's measurement holds for all."""
    names = get_args(Precision)
    return names[here.first(names.index(pick_precision(name, device)))]


def wrap_blocks(model: LanguageModel, config: TrainConfig) -> None:
    """Compiles the blocks, or has them recomputed in the backward pass (activation checkpointing), as the config says.

    Raises:
        ValueError: a model whose blocks are another library's.
    """
    if not len(model.blocks) and (config.compile or config.checkpoint_activations):
        raise ValueError("the blocks are another library's here: leave out --compile and --checkpoint-activations")
    for block in model.blocks:
        if config.compile:
            block.compile()  # in place: names of parameters, and so checkpoints, stay as they are
        if config.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
