"""Several processes train tiny models together, run after run: `python -m tests.train.ranks JOBS OUT`.

JOBS is a JSON file with a list of `Job`s for each number of processes. OUT/NAME is the run directory of a job.
"""

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # takes long, and every forked process needs it
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from retentive.data.loader import Batch, Batches
from retentive.data.packed import Packed
from retentive.evals.heldout import held_out_loss
from retentive.infer.generate import prefill
from retentive.infer.pieces import prefill_in_pieces
from retentive.models import LanguageModel, build, config_of, twin
from retentive.train import Hooks, TrainConfig, language_modelling, speed, train
from retentive.train.checkpoints import folders
from retentive.train.directory import RunDirectory
from retentive.train.distillation import distillation
from retentive.train.initial import freeze_others
from retentive.train.parallel import ALONE, Cluster, RankFailed
from retentive.train.parallel import checkpoint as sharded
from retentive.train.samples import sample_text
from retentive.train.signals import Interrupted

WAIT = timedelta(seconds=180)
"""Maximum wait of a process for another; beyond it the process fails, and the test with it."""
SMALL = {"dim": 32, "layers": 2, "heads": 4}


@dataclass(frozen=True)
class Job:
    """A run of all processes."""

    name: str
    data: str
    mesh: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Mesh of the ranks; with one rank, the first process runs alone."""
    model: str = "retnet"
    wide: bool = False
    """float64 instead of float32."""
    mode: Any = "reset"
    batch: int = 4
    length: int = 64
    stop: int = -1
    """The batch before which all processes crash."""
    sigterm: int = -1
    """The batch before which only the last process gets a SIGTERM."""
    full: int = -1
    """The batch before which only the last process's disk becomes full."""
    resume: bool = False
    steps: int = 20
    save_every: int = 1000
    checkpoint_activations: bool = False
    changes: dict = field(default_factory=dict, hash=False)
    """Changes to the model's config."""
    precision: Any = "fp32"
    optimizer: Any = "adamw"
    ema: float = 0.0
    async_save: bool = False
    compile: bool = False
    learns: str = ""
    """As in TrainRun, from a Transformer of the same width and depth."""
    evaluate: bool = False
    """Evaluate at the second step and at the end, and write a sample."""


class Crash(Exception):
    """Error that no code of the package catches."""


def no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Disturbed:
    """Batches with a disturbance before one of them: a crash, a SIGTERM or a full disk."""

    def __init__(self, batches: Batches, crash: int, sigterm: int, full: int, run: Path):
        self.batches, self.length, self.run = batches, batches.length, run
        self.crash, self.sigterm, self.full = crash, sigterm, full

    def __getitem__(self, index: int) -> Batch:
        if index == self.crash:
            raise Crash
        if index == self.sigterm:
            os.kill(os.getpid(), signal.SIGTERM)
        if index == self.full:
            while not folders(self.run):  # a thread may still be writing the first one
                time.sleep(0.01)
            sharded.write = no_space
        return self.batches[index]


def run(job: Job, out: Path, cluster: Cluster = ALONE) -> None:
    packed = Packed(Path(job.data))
    torch.manual_seed(0)
    model = build(config_of(job.model, "1m", vocab_size=packed.meta.vocab_size, **SMALL | job.changes))
    how: dict[str, Any] = {"mode": job.mode, "batch": job.batch, "length": job.length}
    alone = (job.sigterm, job.full) if cluster.rank == cluster.world_size - 1 else (-1, -1)
    batches = Disturbed(
        packed.batches(**how, rank=cluster.dp.rank, world=cluster.dp.size), job.stop, *alone, out / job.name
    )
    directory = RunDirectory(out / job.name, packed.tokenizer, existing="resume" if job.resume else "refuse")
    names = ("steps", "save_every", "checkpoint_activations", "precision", "optimizer", "ema", "async_save", "compile")
    same = {name: getattr(job, name) for name in names}
    every = {"eval_every": 2, "sample_every": 2, "eval_tokens": 300} if job.evaluate else {}
    config = TrainConfig(lr=1e-3, warmup=5, device="cpu", accumulate=2 if job.mode == "carry" else 1, **same, **every)
    evaluate = partial(held_out_loss, data=packed, length=job.length, carry=job.mode == "carry")
    hooks = Hooks(
        (lambda model, tokens: evaluate(model, tokens=tokens)) if job.evaluate else None,
        (lambda model: sample_text(model, packed.tokenizer, "It", tokens=12)) if job.evaluate else None,
        quiet=True,
    )
    real = sharded.write
    try:
        if job.learns == "mixers":
            freeze_others(model, set(model.config.kinds))
        objective = language_modelling if not job.learns else distillation(teacher_of(model, job.wide), job.learns)
        train(model.double() if job.wide else model, batches, objective, config, directory, hooks, cluster)
    except (Crash, Interrupted, RankFailed):
        pass
    except ValueError as error:  # the first process says it
        (out / f"{job.name}.error").write_text(str(error), encoding="utf-8")
    finally:
        sharded.write = real


def teacher_of(model: LanguageModel, wide: bool) -> LanguageModel:
    teacher = build(twin(model.config))
    return teacher.double() if wide else teacher


def bytes_held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this process's parameters, gradients and moments, at the end of a step."""
    total = 0
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        for x in (p, p.grad, *optimizer.state[p].values()):
            total += (x.to_local() if isinstance(x, DTensor) else x).nbytes if isinstance(x, torch.Tensor) else 0
    return total


def agree(out: Path, rank: int, cluster: Cluster) -> None:
    """Record the errors of each process if one alone fails, differs or is late, in the JSON file OUT/agree.RANK."""
    found = {}

    def note(name: str, act: Callable[[], Any]) -> None:
        try:
            found[name] = act()
        except (RankFailed, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    def fail(who: int) -> str:
        with cluster.barrier():
            if rank == who:
                raise ValueError("the disk is full")
        return "went on"

    for who in (-1, 0, 1):
        note(f"fails on {who}", lambda who=who: fail(who))
    note("same", lambda: cluster.check_same({"lr": 1}, "rank {} differs"))
    note("other", lambda: cluster.check_same({"lr": rank}, "rank {} differs"))
    note("first", lambda: cluster.broadcast(rank + 7))
    note("total", lambda: cluster.sum(rank + 1, 0.5))
    for name, folder in (("shared", out), ("own", out / f"own.{rank}")):
        folder.mkdir(exist_ok=True)
        note(name, lambda folder=folder: RunDirectory(folder).check_shared(cluster))
    impatient = Cluster((2, 1, 1, 1), device=torch.device("cpu"), timeout=timedelta(seconds=2))
    dist.barrier()
    if rank == 1:
        time.sleep(6)
    note("late", lambda: impatient.sum(1))
    (out / f"agree.{rank}").write_text(json.dumps(found), encoding="utf-8")


def read_in_pieces(out: Path, rank: int) -> None:
    """Record the differences between prefill by several processes and by one, in the JSON file OUT/pieces.RANK."""
    group, found = dist.new_group(backend="gloo", timeout=WAIT), {}
    for name, model, read, length in (
        ("", "retnet", 14, 43),
        ("paper", "retnet-paper", 13, 40),
        ("short", "retnet", 0, 1),
    ):
        torch.manual_seed(1)
        made = build(config_of(model, "1m", vocab_size=50, **SMALL)).double().eval()
        ids = torch.randint(50, (1, length))
        want, state = prefill(made, ids)
        before = prefill_in_pieces(made, ids[:, :read], group, chunk=5)[1] if read else None
        have, after = prefill_in_pieces(made, ids[:, read:], group, before, chunk=5)
        pairs = [(want, have), *zip(state.settled().tensors(), after.settled().tensors(), strict=True)]
        found[name] = max(float((a - b).abs().max()) for a, b in pairs)
        found[f"{name} position"] = int(after.position) - length
        one, other = (prefill(made, ids[:, :1], x.clone())[0] for x in (state, after))
        found[f"{name} next"] = float((one - other).abs().max())
    (out / f"pieces.{dist.get_world_size()}.{rank}").write_text(json.dumps(found), encoding="utf-8")


def main(rank: int, count: int, jobs: list[dict], out: Path) -> None:
    """Run the jobs as process `rank` of `count`."""
    torch.set_num_threads(1)
    speed.gemm_rate = lambda device, dtype, **how: 1e12  # the machine's speed is of no interest here
    compiled = torch.nn.Module.compile  # traced and differentiated, but not translated to C++, which takes minutes
    torch.nn.Module.compile = lambda module: compiled(module, backend="aot_eager")  # type: ignore[method-assign]
    dist.init_process_group("gloo", f"file://{out}/store.{count}", timeout=WAIT, rank=rank, world_size=count)
    held = {"bytes": 0}
    register_optimizer_step_post_hook(lambda optimizer, *_: held.update(bytes=bytes_held(optimizer)))
    for job in [Job(**fields) for fields in jobs]:
        mesh: Any = tuple(job.mesh)
        if mesh != (1, 1, 1, 1):
            run(job, out, Cluster(mesh, device=torch.device("cpu"), timeout=WAIT))
        elif rank == 0:
            run(job, out)
        if rank == 0:
            (out / f"{job.name}.bytes").write_text(str(held["bytes"]), encoding="utf-8")
    read_in_pieces(out, rank)
    if count == 2:
        agree(out, rank, Cluster((2, 1, 1, 1), device=torch.device("cpu"), timeout=WAIT))
    dist.barrier()
    dist.destroy_process_group()


def fork(count: int, jobs: list[dict], out: Path) -> None:
    """Run the jobs in `count` processes; raises SystemExit if one of them fails."""
    context = multiprocessing.get_context("fork")  # torch is imported once, and has no threads yet
    processes = [context.Process(target=main, args=(rank, count, jobs, out)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        sys.exit(f"processes ended with {codes}")


if __name__ == "__main__":
    for count, jobs in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        fork(int(count), jobs, Path(sys.argv[2]))
