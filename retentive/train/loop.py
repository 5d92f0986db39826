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
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from retentive.checkpoint.io import save_model
from retentive.evals.heldout import HeldOut
from retentive.files import write_json
from retentive.machine import gemm_rate, peak_memory, pick_device
from retentive.models import LanguageModel, cost
from retentive.train import checkpoints
from retentive.train.config import Precision, TrainConfig
from retentive.train.directory import RunDirectory, read_options
from retentive.train.ema import EMA
from retentive.train.log import Log, check_extras, say
from retentive.train.objective import Objective
from retentive.train.optim import learning_rate, optimizer_of
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
) -> Path:
    """The run directory, once `model` is trained in place, from the run's newest checkpoint where it is resumed.

    Raises:
        FileExistsError: `out` holds a run already, and is not a RunDirectory that says what to do with it.
        BlockingIOError: another process is training there.
        FloatingPointError: the loss or the gradient is not finite, at the first step that this happens or, by
            `skip_nonfinite`, after so many in a row; the last good checkpoint is kept.
        Interrupted: SIGTERM or SIGINT, after a checkpoint was saved.
        OSError: a checkpoint could not be written; older ones remain.
    """
    directory = out if isinstance(out, RunDirectory) else RunDirectory(Path(out))
    run, hooks = directory.path, hooks or Hooks()
    # What can be refused is refused before anything is written or moved to a GPU.
    check_extras(config)
    directory.check()
    device, resume = pick_device(config.device), directory.existing == "resume"
    before = read_options(run).get("train", {}) if resume else {}
    if config.precision == "auto":  # measured once a run: a resumed one keeps what was found then
        config = replace(config, precision=before.get("precision", "auto"))
    config = replace(config, precision=pick_precision(config.precision, device))
    model.to(device).train()
    wrap_blocks(model, config)
    optimizer, ema = optimizer_of(model, config), EMA(model, config.ema) if config.ema else None
    with directory.locked():
        done, carried = checkpoints.restore(run, model, optimizer, ema) if resume else (0, None)
        write_json(run / "train.json", {"train": asdict(config), **directory.record})
        if done >= config.steps:
            say(f"done: {run} is at step {done} of {config.steps} (more --steps lengthen it)", quiet=hooks.quiet)
            return run
        if done == 0:
            (run / checkpoints.UNTRAINED).touch()
            # so that the run can be loaded before its first checkpoint
            save_model(run, model, directory.tokenizer, template=directory.template)
        skips = Skips(run, done, config.skip_nonfinite)
        mfu_per_rate = utilisation(model, batches.length, config, device)
        with Log(run, config, start=done, quiet=hooks.quiet) as log, stop_signals() as stop:
            log.say(resumed_line(done, config.steps, before.get("steps", config.steps)) if done else hooks.title)
            for step in range(done, config.steps):
                began = time.perf_counter()
                try:
                    metrics, carried = take_step(model, batches, objective, config, optimizer, step, carried)
                except FloatingPointError as error:
                    skipped(skips, error, run, log, step + 1)  # and `carried` stays as it was
                else:
                    skips.in_a_row = 0
                    rate = metrics.pop("tokens") / (time.perf_counter() - began)
                    speed = {"tokens_per_second": rate, "mfu": rate * mfu_per_rate, "memory": peak_memory(device)}
                    log.step({"step": step + 1, **metrics, **speed})
                if ema:
                    ema.update(step + 1)
                with ema.in_place() if ema else nullcontext():
                    report(model, config, hooks, log, step + 1)
                last = step + 1 == config.steps
                # After the report: the log of a checkpoint's step is whole, and no resumed run writes it again.
                if last or stop.signal or (step + 1) % config.save_every == 0:
                    checkpoints.save(run, model, optimizer, ema, step=step + 1, state=carried, keep=config.keep)
                if stop.signal and not last:
                    message = f"stopped at step {step + 1} of {config.steps}, saved; go on with --resume"
                    raise Interrupted(message, stop.signal)
    return run


def take_step(
    model: LanguageModel,
    batches: Batches,
    objective: Objective,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    step: int,
    carried: Any = None,
) -> tuple[dict[str, Any], Any]:
    """(loss, lr, grad_norm and tokens of optimiser step `step`, from 0; the state to go on from).

    Raises:
        FloatingPointError: the loss or the gradient is not finite; weights and moments are as before.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    # Dropout is a function of the step too. Seeds are far apart, so that runs of neighbouring seeds do not share them.
    torch.manual_seed(config.seed * 1_000_003 + step)
    loss, tokens, carried = accumulate_gradients(model, batches, objective, config, step, carried)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf))  # inf: measured, not clipped
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"loss {loss:.4g} and gradient norm {norm:.4g} at step {step + 1}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "tokens": tokens}, carried


def accumulate_gradients(
    model: LanguageModel, batches: Batches, objective: Objective, config: TrainConfig, step: int, carried: Any = None
) -> tuple[float, int, Any]:
    """(mean loss, tokens, the state to go on from) of one step; its gradients are left in the parameters.

    Every batch of the step weighs the same, whatever the number of its losses.
    """
    device = model.device
    total, tokens = 0.0, 0
    for micro in range(config.accumulate):
        batch = batches[step * config.accumulate + micro].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses, count, carried = objective(model, batch, carried)
            loss = losses / max(count, 1)
        (loss / config.accumulate).backward()  # outside of autocast, as torch asks for
        total += loss.item() / config.accumulate
        tokens += batch.ids.numel()
    return total, tokens, carried


def report(model: LanguageModel, config: TrainConfig, hooks: Hooks, log: Log, done: int) -> None:
    """Evaluates and samples after `done` steps, where it is time to."""
    last = done == config.steps
    if hooks.evaluate and (last or (config.eval_every and done % config.eval_every == 0)):
        found = hooks.evaluate(model, config.eval_tokens)
        log.held_out(done, found)
        if last:
            whole = found.exhausted(config.eval_tokens)
            log.held_out(done, found if whole else hooks.evaluate(model, 10 * config.eval_tokens), last=True)
    if hooks.sample and config.sample_every and (last or done % config.sample_every == 0):
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


def skipped(skips: Skips, error: FloatingPointError, run: Path, log: Log, done: int) -> None:
    """Leaves a step out, or raises FloatingPointError with what to do."""
    try:
        line = skips.skip(error)
    except FloatingPointError as last:
        raise FloatingPointError(f"{last}: {advice_after_failure(run)}") from None
    log.skipped(done, skips.total, line)


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
    bf16, fp32 = (gemm_rate(device, dtype, size=1024, repeats=4) for dtype in (torch.bfloat16, torch.float32))
    return "bf16" if bf16 > 1.3 * fp32 else "fp32"


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
