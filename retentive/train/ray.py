"""Training with Ray Train (extra `ray`): Ray starts and restarts the processes, instead of torchrun.

    from retentive.train import TrainRun
    from retentive.train.ray import fit

    run = TrainRun.of("/shared/data/mine", "/shared/runs/mine", device="cuda", dp_shard=2, resume=True)
    fit(run, workers=8, restarts=3)

Everything else is as under torchrun: the same loop, losses and run directory.
"""

from dataclasses import replace
from pathlib import Path

from retentive.train.run import TrainRun


def fit(run: TrainRun, workers: int, *, cpus: float = 1, restarts: int = 0) -> Path:
    """Train a run with `workers` processes and return its directory; every node must see it and the data.

    Ray's own logs and attempts go to `.NAME.ray` beside the run directory.

    Args:
        cpus: CPU cores per worker; on "cuda" each worker has a GPU as well.
        restarts: how often all workers are restarted after one has failed; needs a run with `resume=True`.

    Raises:
        ImportError: Ray is not installed.
        ValueError: `restarts` with a run that does not resume.
        ray.train.TrainingFailedError: a worker failed once too often.
    """
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        raise ImportError("training with Ray needs ray: pip install 'retentive[ray]'") from None
    if restarts and not run.resume:
        raise ValueError("workers that are started again resume the run: make it with `resume=True`")
    # absolute paths, since each worker has a working directory of its own
    data = tuple(x.resolve() for x in run.data) if isinstance(run.data, tuple) else run.data.resolve()
    init = str(Path(run.init).resolve()) if run.init and Path(run.init).is_dir() else run.init
    run = replace(run, data=data, out=run.out.resolve(), init=init)
    gpu = run.train.device.startswith("cuda")

    def work() -> None:
        """Work of each worker; Ray has already made the process group."""
        run.run()

    trainer = TorchTrainer(
        work,
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=run.parallel.patience),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(
            name="train",
            storage_path=str(run.out.with_name(f".{run.out.name}.ray")),
            failure_config=FailureConfig(max_failures=restarts),
        ),
    )
    trainer.fit()
    return run.out
