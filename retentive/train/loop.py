"""The training loop: batches in, a run directory out.

    RUN/config.json tokenizer.json model.safetensors    what `retentive.load` reads
    RUN/train.json                                      the options, for the record and for --resume
    RUN/metrics.jsonl                                   a line per step, evaluation and sample
    RUN/checkpoints/                                    what --resume goes on from

Everything is a function of the config, the data and the step: a run that was killed and resumed ends, on CPU, in the
same bits as one that was not. Techniques (autocast, compile, recomputation) are put on from outside the model.
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from retentive.checkpoint.io import save_model
from retentive.data.loader import Batch, Batches, Lanes
from retentive.data.tokenizer import Tokenizer
from retentive.files import write_json
from retentive.machine import gemm_rate, peak_memory, pick_device
from retentive.models import Model, cost
from retentive.ops.cross_entropy import IGNORE, cross_entropy
from retentive.train import checkpoints
from retentive.train.config import Precision, TrainConfig
from retentive.train.evaluate import HeldOut
from retentive.train.lanes import lanes_in, lanes_out
from retentive.train.log import Log, check_extras
from retentive.train.optim import adamw, learning_rate


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; a checkpoint was saved."""


def train(
    model: Model,
    batches: Batches,
    config: TrainConfig,
    *,
    out: str | Path,
    tokenizer: Tokenizer | None = None,
    evaluate: Callable[[Model, int], HeldOut] | None = None,
    sample: Callable[[Model], str] | None = None,
    title: str = "",
    record: dict[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Path:
    """Train `model` in place and return its run directory.

    Args:
        batches: `batches[i]` for step i (step * accumulate + j with accumulation), see `retentive.data.loader`.
        evaluate: (model, tokens at most) -> held-out loss, called every `eval_every` steps and at the end.
        sample: model -> text, called every `sample_every` steps.
        title: a line to begin the log with.
        record: what else to keep in train.json, for the record.
        resume: go on from the run's newest checkpoint, if it has one.

    Raises:
        FileExistsError: `out` holds a run and `resume` is not set.
        FloatingPointError: the loss or the gradient is no longer finite; the last good checkpoint is kept.
        Interrupted: SIGTERM or SIGINT, after a checkpoint was saved.
        OSError: a checkpoint could not be written; older ones remain.
    """
    run = Path(out)
    check_extras(config)
    if (run / "train.json").exists():
        if not resume:
            raise FileExistsError(f"{run} already holds a run: add --resume to go on with it, or choose another --out")
    elif (run / "model.safetensors").exists() or (run / "config.json").exists():
        raise FileExistsError(f"{run} holds a model that is no run: choose another --out")
    device = pick_device(config.device)
    if (run / "train.json").exists():  # what "auto" meant then, it means now
        stored = json.loads((run / "train.json").read_text(encoding="utf-8"))["train"]["precision"]
        config = replace(config, precision=stored if config.precision == "auto" else config.precision)
    config = replace(config, precision=pick_precision(config.precision, device))
    model.to(device).train()
    optimizer = adamw(model, config)
    done, carried = checkpoints.restore(run, model, optimizer) if resume else (0, None)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "train.json", {"train": asdict(config), **(record or {})})
    if done == 0:
        save_model(run, model, tokenizer)  # from its first minute the run can be loaded
    wrap_blocks(model, config)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    flops = cost.training_flops_per_token(model.config, batches.length)
    peak = gemm_rate(device, dtype, size=1024, repeats=4)

    with Log(run, config, start=done, quiet=quiet) as log, stop_signals() as stopped:
        if title and done == 0:
            log.say(title)
        for step in range(done, config.steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            torch.manual_seed(config.seed * 1_000_003 + step)  # dropout is a function of the step too
            loss, tokens, carried = accumulate_gradients(model, batches, step, carried, config, device)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            check_finite(loss, float(norm), step, run)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate = tokens / (time.perf_counter() - began)
            log.step(
                {
                    "step": step + 1,
                    "loss": loss,
                    "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": float(norm),
                    "tokens_per_second": rate,
                    "mfu": rate * flops / peak,
                    "memory": peak_memory(device),
                }
            )
            last = step + 1 == config.steps
            if evaluate and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                log.held_out(step + 1, evaluate(model, config.eval_tokens))
            if evaluate and last:
                log.held_out(step + 1, evaluate(model, 10 * config.eval_tokens), last=True)
            if sample and config.sample_every and (last or (step + 1) % config.sample_every == 0):
                log.sample(step + 1, sample(model))
            if last or stopped.is_set() or (step + 1) % config.save_every == 0:
                checkpoints.save(run, model, optimizer, step=step + 1, state=carried, keep=config.keep)
            if stopped.is_set() and not last:
                raise Interrupted(f"stopped at step {step + 1} of {config.steps}, saved; go on with --resume")
    return run


def accumulate_gradients(
    model: Model, batches: Batches, step: int, carried: Any, config: TrainConfig, device: torch.device
) -> tuple[float, int, Any]:
    """(mean loss, tokens, state of the lanes) of one step; its gradients are left in the parameters."""
    total, tokens = 0.0, 0
    for micro in range(config.accumulate):
        batch = to_device(batches[step * config.accumulate + micro], device)
        state: Any = None
        if batch.lanes is not None and batch.cu_seqlens is not None:
            state = lanes_in(model, carried, batch.lanes, len(batch.cu_seqlens) - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            x, state = model.hidden(batch.ids, state, cu_seqlens=batch.cu_seqlens)
            targets = int((batch.targets != IGNORE).sum())
            loss = cross_entropy(x, model.head.weight, batch.targets) / max(targets, 1)
        (loss / config.accumulate).backward()
        if batch.lanes is not None:
            carried = lanes_out(state, batch.lanes)
        total += loss.item() / config.accumulate
        tokens += batch.ids.numel()
    return total, tokens, carried


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all its tensors on the device."""
    if device.type == "cpu":
        return batch

    lanes = None if batch.lanes is None else Lanes(*(x.to(device) for x in batch.lanes))
    cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
    return Batch(batch.ids.to(device), batch.targets.to(device), cu_seqlens, lanes)


def check_finite(loss: float, norm: float, step: int, run: Path) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = checkpoints.folders(run)
    where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been saved yet"
    raise FloatingPointError(
        f"loss {loss} and gradient norm {norm} at step {step + 1}: training stopped, {where}; try a lower --lr"
    )


def pick_precision(name: Precision, device: torch.device) -> Precision:
    """fp32 or bf16; "auto" is bf16 where a matrix product is 1.3 times as fast in it or more, measured now."""
    if name != "auto":
        return name
    if device.type == "mps":
        return "fp32"
    bf16, fp32 = (gemm_rate(device, dtype, size=1024, repeats=4) for dtype in (torch.bfloat16, torch.float32))
    return "bf16" if bf16 > 1.3 * fp32 else "fp32"


def wrap_blocks(model: Model, config: TrainConfig) -> None:
    """Compile the blocks or recompute them in the backward pass, from outside: the model does not know.

    Raises:
        ValueError: a model whose blocks are another library's.
    """
    if not len(model.blocks) and (config.compile or config.checkpoint_activations):
        raise ValueError("the blocks are another library's here: leave out --compile and --checkpoint-activations")
    for block in model.blocks:
        if config.compile:
            block.compile()
        if config.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@contextlib.contextmanager
def stop_signals():
    """An event that SIGTERM and SIGINT set; a second SIGINT interrupts at once. Only the main thread can listen."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number, frame):
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, old in before.items():
            signal.signal(number, old)
