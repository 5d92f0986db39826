"""Many processes train as one does: the same losses and weights on every mesh; they start and stop together.

The oracle is one process. Two runs with another order of sums differ by rounding: about 1e-15 in float64, which shows
that the arithmetic is the same, and FLOAT32 in float32, which users see.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import retentive
from retentive.cli import main
from retentive.data.packed import Packed
from retentive.layers import positions_of
from retentive.models import build, config_of
from retentive.train import Parallel, TrainRun
from retentive.train.checkpoints import folders
from retentive.train.parallel import Cluster, RankFailed, checksum, parallelize, rendezvous
from retentive.train.parallel.context import part_of
from retentive.train.parallel.mesh import Axis
from retentive.train.parallel.rendezvous import joined
from tests.train.ranks import SMALL, Job

LIMIT = 800
"""Seconds until hanging processes are a failure; a loaded machine takes most of a minute to import torch."""
FLOAT32 = 2e-6
"""Four units in the last place of losses of 4 to 8: twenty steps of sums in another order."""
MESHES = {"dp2": (2, 1, 1, 1), "fsdp2": (1, 2, 1, 1), "cp2": (1, 1, 2, 1), "tp2": (1, 1, 1, 2)}
LARGER = {
    "fsdp2-cp2": (1, 2, 2, 1),
    "hsdp": (2, 2, 1, 1),
    "fsdp2-tp2": (1, 2, 1, 2),
    "dp2-cp2": (2, 1, 2, 1),
    "dp2-tp2": (2, 1, 1, 2),
    "cp2-tp2": (1, 1, 2, 2),
    "cp4": (1, 1, 4, 1),
}
WINDOWS = [("window", "cp4"), ("window", "cp2-tp2")]
pytestmark = pytest.mark.timeout(LIMIT + 60)  # the first test of each fixture pays for its runs
WIDE: dict = {"wide": True, "steps": 4, "evaluate": True}
MODELS = ("retnet", "retnet-paper")
BARE = {"attention_window": None, "attention_forget": False, "convolution": 0}
WINDOW = BARE | {"attention_window": 20}
GATE = {"attention_window": 20, "forget_gate": True}
SINKS = {"attention_window": 20, "attention_sinks": 3}


def ranks(jobs: dict[int, list[Job]], folder: Path) -> None:
    """Run jobs by number of processes; fails if one of them fails or takes too long."""
    file = folder / "jobs.json"
    described = {count: [asdict(job) for job in of_count] for count, of_count in jobs.items()}
    file.write_text(json.dumps(described), encoding="utf-8")
    command = [sys.executable, "-m", "tests.train.ranks", str(file), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = parent.communicate(timeout=LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    assert parent.returncode == 0, errors


def values(folder: Path, key: str) -> list:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [x[key] for x in map(json.loads, lines) if key in x]


def losses(folder: Path) -> list[float]:
    return values(folder, "loss")


@pytest.fixture(scope="module")
def runs(packed, once) -> Path:
    """Folder of all runs, made once for all workers, because the runs use all cores."""
    return once("runs", lambda out: train_all(str(packed), out))


def train_all(data: str, out: Path) -> None:
    """Train all runs of one and two processes."""
    out.mkdir()
    jobs = []
    for model in MODELS:
        # 4 x 63 tokens cut in two: the border is inside a document and a row
        base = Job(model, data, model=model, length=63)
        wide = replace(base, name=f"{model}-wide", **WIDE)
        in_float32 = (base,) if model == "retnet" else ()
        jobs += [divided(job, mesh) for job in (*in_float32, wide) for mesh in ("one", *MESHES)]
    window = window_job(data)
    convolution = replace(window, name="convolution", changes={"attention_window": 20})
    others = {
        Job("carry", data, mode="carry", **WIDE): ("dp2", "fsdp2", "tp2"),
        Job("twin", data, model="transformer", changes={"qkv_bias": True}, **WIDE): ("dp2", "fsdp2", "tp2"),
        Job("packed", data, mode="packed", batch=1, length=255, checkpoint_activations=True, **WIDE): ("cp2",),
        Job("fla", data, model="fla", changes={"kv_heads": 2}, **WIDE): ("tp2", "cp2"),
        # attention that reads across the border of a rank: all before it, and a window
        Job("hybrid", data, model="hybrid", changes=BARE, length=63, **WIDE): ("cp2",),
        window: ("cp2", "tp2"),
        convolution: ("cp2", "tp2", "fsdp2"),
        replace(convolution, name="carry-convolution", mode="carry"): ("dp2", "tp2"),
        Job("gate", data, model="transformer", changes=GATE, length=63, **WIDE): ("cp2",),
        Job("sinks", data, model="transformer", changes=SINKS, mode="packed", batch=1, length=255, **WIDE): ("cp2",),
        replace(window, name="carry-window", mode="carry"): ("dp2", "fsdp2", "tp2"),
        Job("bf16", data, precision="bf16", steps=4): ("fsdp2", "cp2", "tp2"),
        replace(window, name="bf16-window", wide=False, precision="bf16"): ("cp2",),
        Job("muon", data, optimizer="muon", **WIDE): ("dp2", "fsdp2", "cp2"),
        Job("ema", data, ema=0.9, async_save=True, **WIDE): ("fsdp2", "tp2"),
        Job("predictions", data, learns="predictions", **WIDE): ("dp2", "fsdp2", "tp2"),
        Job("mixers", data, learns="mixers", **WIDE): ("dp2",),
        Job("first", data, stop=0): ("dp2", "fsdp2", "cp2", "tp2"),
    }
    jobs += [divided(job, mesh) for job, meshes in others.items() for mesh in ("one", *meshes)]
    # processes that crash, one that goes on alone and crashes, two others that do, and two that end what they began
    retnet = Job("retnet", data, length=63, save_every=4)
    for mesh, stop in (("fsdp2", 10), ("one", 14), ("tp2", 18), ("cp2", -1)):
        jobs.append(replace(divided(retnet, mesh), name="retnet-resumed", stop=stop, resume=stop != 10))
    # one of them is told to end: both save, by threads, and two others go on
    told = replace(retnet, async_save=True)
    for mesh, sigterm in (("fsdp2", 6), ("tp2", 13), ("dp2", -1)):
        jobs.append(replace(divided(told, mesh), name="retnet-told", sigterm=sigterm, resume=sigterm != 6))
    # the disk of one is full: at the second checkpoint, and the runs go on from the first
    for save in (False, True):
        full = replace(divided(retnet, "fsdp2"), name=f"retnet-full-{save}", async_save=save)
        jobs += [replace(full, full=5), replace(full, resume=True)]
    for name in ("carry", "carry-window"):
        carry = replace(next(job for job in others if job.name == name), save_every=1)
        for mesh, stop in (("tp2", 3), ("one", 5), ("dp2", -1)):
            jobs.append(replace(divided(carry, mesh), name=f"{name}-resumed", stop=stop, resume=stop != 3))
    ranks({2: jobs}, out)


def window_job(data: str) -> Job:
    return Job("window", data, model="hybrid", changes=WINDOW, length=63, **WIDE)


@pytest.fixture(scope="module")
def more(packed, once) -> Path:
    """Folder of the slow runs: compiled ones, and those of four processes."""
    return once("more", lambda out: train_more(str(packed), out))


def train_more(data: str, out: Path) -> None:
    """Train the slow runs, and what they are compared with."""
    out.mkdir()
    compiled = Job("compiled", data, compile=True, **WIDE)
    larger: dict[Job, tuple[str, ...]] = {Job(m, data, model=m, length=63): ("fsdp2-cp2",) for m in MODELS}
    larger[Job("retnet-wide", data, length=63, **WIDE)] = tuple(LARGER)
    larger[window_job(data)] = tuple(mesh for _, mesh in WINDOWS)
    four = [divided(job, mesh) for job, meshes in larger.items() for mesh in ("one", *meshes)]
    ranks({2: [divided(compiled, mesh) for mesh in ("one", "dp2", "fsdp2")], 4: four}, out)


def divided(job: Job, mesh: str) -> Job:
    """The job for several processes, with the mesh in its name."""
    if mesh == "one":
        return job
    return replace(job, name=f"{job.name}-{mesh}", mesh=(MESHES | LARGER)[mesh])


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_train_as_one(mesh, runs):
    same(runs / "retnet", runs / f"retnet-{mesh}", FLOAT32)
    assert len(losses(runs / "retnet")) == 20 and losses(runs / "retnet")[-1] < losses(runs / "retnet")[0] - 1


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_as_one_in_float64(model, mesh, runs):
    same(runs / f"{model}-wide", runs / f"{model}-wide-{mesh}", 1e-12)
    same_weights(runs / f"{model}-wide", runs / f"{model}-wide-{mesh}")
    assert len(values(runs / f"{model}-wide", "held_out_loss")) == 3 and values(runs / f"{model}-wide", "sample")


def same(one: Path, other: Path, tolerance: float) -> None:
    """Check that two runs have the same losses, samples and gradient norms (with ten times the tolerance).

    Some runs do not evaluate.
    """
    for key, times in (("loss", 1), ("grad_norm", 10), ("held_out_loss", 1)):
        want, have = values(one, key), values(other, key)
        assert max((abs(a - b) for a, b in zip(want, have, strict=True)), default=0) < times * tolerance, key
    assert values(one, "sample") == values(other, "sample")


def same_weights(one: Path, other: Path) -> None:
    """Check that model folder and checkpoint hold the same complete weights and moments, under the same names.

    AdamW's step divides by the root of a mean square, which amplifies rounding near 0.
    """
    for a, b in ((one, other), (folders(one)[-1], folders(other)[-1])):
        for file in a.glob("*.safetensors"):
            want, have = load_file(file), load_file(b / file.name)
            assert list(want) == list(have)
            for name, x in want.items():
                torch.testing.assert_close(have[name], x, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


OTHERS = ["carry-dp2", "carry-fsdp2", "carry-tp2", "twin-dp2", "twin-fsdp2", "twin-tp2", "packed-cp2", "fla-tp2"]
OTHERS += ["fla-cp2", "hybrid-cp2", "window-cp2", "window-tp2", "gate-cp2", "sinks-cp2"]
OTHERS += ["predictions-dp2", "predictions-fsdp2", "predictions-tp2", "mixers-dp2"]
OTHERS += ["carry-window-dp2", "carry-window-fsdp2", "carry-window-tp2"]
OTHERS += ["convolution-cp2", "convolution-tp2", "convolution-fsdp2", "carry-convolution-dp2", "carry-convolution-tp2"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_carried_the_twin_one_long_row_and_shared_heads(name, runs):
    """The long row recomputes blocks in the backward pass, so states are exchanged again."""
    one = runs / re.sub(r"(-(dp|fsdp|cp|tp)\d)+$", "", name)
    same(one, runs / name, 1e-12)
    same_weights(one, runs / name)


@pytest.mark.parametrize("name", ["muon-dp2", "muon-fsdp2", "muon-cp2", "ema-fsdp2", "ema-tp2"])
def test_muons_steps_and_averages_of_weights(name, runs):
    """Muon makes whole matrices orthogonal, in bfloat16, so all meshes round alike."""
    one = runs / name.split("-")[0]
    same(one, runs / name, 1e-12)
    same_weights(one, runs / name)
    assert name.startswith("muon") or (folders(runs / name)[-1] / "ema.safetensors").is_file()


@pytest.mark.parametrize("mesh", MESHES)
def test_the_weights_before_the_first_step(mesh, runs):
    """Runs that crashed before it left the file of one process, and nothing else."""
    one, other = ({f.name: f.read_bytes() for f in (runs / f"first{end}").iterdir()} for end in ("", f"-{mesh}"))
    assert one == other and {"model.safetensors", "config.json", "tokenizer.json", ".untrained"} <= set(one)


@pytest.mark.parametrize(("name", "tolerance"), [("retnet", FLOAT32), ("carry", 1e-12), ("carry-window", 1e-12)])
def test_a_run_goes_on_with_another_number_of_processes(name, tolerance, runs):
    """Two processes, one, and two with another mesh give the losses of an uninterrupted run."""
    same(runs / name, runs / f"{name}-resumed", tolerance)
    assert len(losses(runs / name)) == len(losses(runs / f"{name}-resumed"))


def test_where_one_process_is_told_to_end_all_save_and_end(runs):
    same(runs / "retnet", runs / "retnet-told", FLOAT32)
    steps = [json.loads(line)["step"] for line in (runs / "retnet-told" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))  # steps after the SIGTERM were done once, by the resumed processes


@pytest.mark.parametrize("save", [False, True], ids=["at-once", "async"])
def test_a_full_disk_of_one_process_costs_the_new_checkpoint_only(save, runs):
    """The first process names the rank, nothing half-written is left, and the run resumes from the one before."""
    said = (runs / f"retnet-full-{save}.error").read_text(encoding="utf-8")
    assert said.startswith("rank 1: cannot write") and "step-00000008: No space left on device" in said
    same(runs / "retnet", runs / f"retnet-full-{save}", FLOAT32)
    names = [folder.name for folder in (runs / f"retnet-full-{save}" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000016", "step-00000020"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled-dp2", "compiled-fsdp2"])
def test_compiled_blocks_are_replicated_and_sharded(name, more):
    """They are traced and differentiated as `torch.compile` does, and run by PyTorch itself."""
    same(more / "compiled", more / name, 1e-12)
    same_weights(more / "compiled", more / name)


def test_a_shard_holds_half_of_parameters_gradients_and_moments(runs):
    whole, replica, shard = (int((runs / f"retnet{end}.bytes").read_text()) for end in ("", "-dp2", "-fsdp2"))
    # 4 x 4 bytes a parameter, and the 4 bytes of a count of steps for each
    parameters = sum(x.numel() for x in load_file(runs / "retnet" / "model.safetensors").values())
    assert whole == replica and 0 <= whole - 16 * parameters < 400
    assert shard < 0.51 * whole


@pytest.mark.parametrize(
    ("folder", "count"), [("runs", 2), pytest.param("more", 4, marks=pytest.mark.slow)], ids=["2", "4"]
)
def test_a_prompt_in_pieces_is_the_prompt(folder, count, request):
    """Rounds of 5 tokens a process, from an earlier state, and with fewer tokens than processes."""
    for rank in range(count):
        file = request.getfixturevalue(folder) / f"pieces.{count}.{rank}"
        found = json.loads(file.read_text(encoding="utf-8"))
        assert len(found) == 9 and all(x < 1e-12 for x in found.values()), found  # float64's rounding of sums in pieces


def test_processes_agree_or_fail_together(runs):
    first, second = (json.loads((runs / f"agree.{rank}").read_text(encoding="utf-8")) for rank in (0, 1))
    assert first["fails on -1"] == second["fails on -1"] == "went on"
    assert (first["fails on 0"], second["fails on 0"]) == ("ValueError: the disk is full", "RankFailed: ")
    assert (first["fails on 1"], second["fails on 1"]) == ("ValueError: rank 1: the disk is full", "RankFailed: ")
    assert first["same"] is second["same"] is None
    assert (first["other"], second["other"]) == ("ValueError: rank 1 differs", "RankFailed: ")
    assert first["first"] == second["first"] == 7 and first["total"] == second["total"] == [3, 1]
    assert first["shared"] is second["shared"] is None
    assert "own.1 is another folder than that of rank 0" in first["own"] and second["own"] == "RankFailed: "
    assert not list(runs.rglob(".seen-*"))
    assert first["late"].startswith("RuntimeError") and "gloo" in first["late"]  # instead of an endless wait


@pytest.mark.parametrize("name", ["bf16-fsdp2", "bf16-cp2", "bf16-tp2", "bf16-window-cp2"])
def test_bfloat16_differs_by_its_rounding(name, runs):
    """Products of 8 bits, summed in another order: steps of 2^-8 in single numbers, some 1e-4 in a mean of 250."""
    one, other = losses(runs / name.rpartition("-")[0]), losses(runs / name)
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_shards_and_pieces_at_once(model, more):
    same(more / model, more / f"{model}-fsdp2-cp2", FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), [*(("retnet-wide", mesh) for mesh in LARGER), *WINDOWS])
def test_four_processes_train_as_one(name, mesh, more):
    same(more / name, more / f"{name}-{mesh}", 1e-12)
    same_weights(more / name, more / f"{name}-{mesh}")


@pytest.mark.parametrize(
    ("asked", "world", "sizes"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 6, (6, 1, 1, 1)),
        ({"dp_shard": 2}, 8, (4, 2, 1, 1)),
        ({"dp_shard": -1}, 8, (1, 8, 1, 1)),
        ({"dp_shard": -1, "dp_replicate": 2, "cp": 2}, 8, (2, 2, 2, 1)),
        ({"tp": 2, "cp": -1}, 8, (1, 1, 4, 2)),
        ({"dp_replicate": 2, "dp_shard": 2, "cp": 2, "tp": 2}, 16, (2, 2, 2, 2)),
    ],
)
def test_the_mesh_of_a_number_of_processes(asked, world, sizes):
    assert Parallel(**asked).sizes(world) == sizes


@pytest.mark.parametrize(
    ("asked", "world", "message"),
    [
        ({"tp": 3}, 4, "`tp=3` needs a multiple of 3 processes, there are 4 processes: start as many"),
        ({"dp_shard": 2}, 1, "needs a multiple of 2 processes, there is 1 process: start as many .`nproc=2`"),
        ({"dp_replicate": 2, "cp": 2}, 8, "needs 4 processes, there are 8"),
        ({"dp_shard": -1, "cp": -1}, 8, "`dp_shard` and `cp` are both -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(asked, world, message):
    with pytest.raises(ValueError, match=message):
        Parallel(**asked).sizes(world)


@pytest.mark.parametrize("asked", [{"tp": 0}, {"cp": -2}, {"patience": 0}, {"patience": -1}])
def test_sizes_that_are_none(asked):
    with pytest.raises(ValueError, match=f"{next(iter(asked))} must be at least 1"):
        Parallel(**asked)


class Alone(Cluster):
    """One rank of a mesh without the others: enough for errors that are raised before anything is exchanged."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.dp, self.cp, self.tp = (Axis(n, 0, None) for n in (sizes[0] * sizes[1], *sizes[2:]))
        self.sharded = max(sizes[1:]) > 1


@pytest.mark.parametrize(
    ("model", "changes", "sizes", "message"),
    [
        ("retnet", {}, (1, 1, 1, 3), "heads 4 is not divisible by `tp=3`"),
        ("retnet", {"kv_heads": 1}, (1, 1, 1, 2), "kv_heads 1 is not divisible by `tp=2`"),
        ("retnet", {"ffn_dim": 33}, (1, 1, 1, 2), "ffn_dim 33 is not divisible by `tp=2`"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(model, changes, sizes, message):
    made = build(config_of(model, "1m", vocab_size=9, **SMALL | changes))
    with pytest.raises(ValueError, match=message):
        parallelize(made, torch.device("cpu"), Alone(*sizes))


def test_a_checksum_tells_weights_apart():
    made = [build(config_of("retnet", "1m", vocab_size=9, **SMALL)) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    assert checksum(made[0]) == checksum(made[1])
    with torch.no_grad():
        made[1].blocks[1].ffn.down_proj.weight[0, 0] += 1e-7
    assert checksum(made[0]) != checksum(made[1])


@pytest.mark.parametrize(
    ("how", "sizes", "message"),
    [
        ({"batch": 3}, (2, 1, 1, 1), "`batch=3` is not divisible by the 2 ranks"),
        ({"length": 1}, (1, 1, 2, 1), "`length=1` is shorter than `cp=2`"),
        ({"mode": "carry"}, (1, 1, 2, 1), "use another mode than carry"),
    ],
)
def test_batches_that_cannot_be_divided_are_refused(how, sizes, message, packed):
    with pytest.raises(ValueError, match=message):
        TrainRun.of(packed, "out", **how).batches(Packed(packed), Alone(*sizes))


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("mode", ["reset", "packed", "whole"])
def test_pieces_of_a_batch_are_all_of_it(mode, size, packed):
    """Tokens, targets and positions are in order, with a length that is not divisible."""
    batch = Packed(packed).batches(mode=mode, batch=3, length=31)[1]
    pieces = [part_of(batch, rank, size)[0] for rank in range(size)]
    starts = [part_of(batch, rank, size)[1] for rank in range(size)]
    for name in ("ids", "targets"):
        whole = getattr(batch, name).flatten()
        assert torch.equal(torch.cat([getattr(piece, name)[0] for piece in pieces]), whole)
    want = torch.arange(0, 94, 31, dtype=torch.int32) if batch.cu_seqlens is None else batch.cu_seqlens
    positions = []
    for piece, start in zip(pieces, starts, strict=True):
        before = torch.tensor([start, *[0] * (len(piece.cu_seqlens) - 2)])
        at = positions_of(1, piece.ids.shape[1], before, None, piece.cu_seqlens, piece.ids.device)
        positions.append(at.of_token)
    whole = positions_of(1, 93, None, None, want, want.device).of_token
    assert torch.equal(torch.cat(positions, 1), whole)


def test_the_command_line_trains_in_two_processes(packed, tmp_path):
    """The short form of torchrun: every line is printed once, and the run can be loaded."""
    command = [sys.executable, "-W", "error", "-m", "retentive", "train", "--data", str(packed)]
    small = ["--size", "1m", "--set", "dim=32", "layers=2", "heads=2", "--batch", "4", "--length", "32", "--steps", "2"]
    how = ["--precision", "fp32", "--device", "cpu", "--nproc", "2", "--dp-shard", "2"]
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "retentive",
        "train",
        "--data",
        str(packed),
        "--out",
        str(out),
        *small,
    ]
    done = subprocess.run([*command, *how], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 x cpu (dp_shard 2)") == 1 and len(losses(out)) == 2
    assert retentive.load(out)[0].config.dim == 32


def test_one_process_says_what_is_wrong(monkeypatch, capsys, tmp_path):
    """Among processes of torchrun, rank 0 reports in one line; a rank with an error of its own reports its number."""

    def ends(rank: str, error: Exception) -> tuple[object, str]:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(TrainRun, "run", lambda run, overrides, **how: (_ for _ in ()).throw(error))
        with pytest.raises(SystemExit) as end:
            main(["train", "--data", "d", "--out", str(tmp_path)])
        return end.value.code, capsys.readouterr().err

    assert ends("0", ValueError("no room")) == (2, "retentive: no room\n")
    assert ends("1", RankFailed()) == (2, "")
    assert ends("1", ConnectionError("silent for 5 s")) == (2, "retentive: rank 1: silent for 5 s\n")


@pytest.mark.parametrize(
    ("raised", "how"),
    [
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:34331", "has ended"),
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv", "was silent for 8 s"),
    ],
)
def test_a_lost_rank_has_ended_or_was_silent(raised, how, monkeypatch, refuses):
    """As torch.distributed tells of it among processes of torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rendezvous, "connect", lambda *_: None)
    monkeypatch.setattr(rendezvous, "_cluster", lambda *_: None)
    monkeypatch.setattr(rendezvous.dist, "get_backend", lambda: "nccl")
    words = f"another rank of this run {how}: go on with `resume=True`"
    with refuses(words, ConnectionError), joined(Parallel(patience=8), "cpu"):
        raise RuntimeError(raised)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--nproc"], "--nproc"),
        (["--nproc", "two"], "--nproc"),
        (["--nproc=0"], "--nproc must be at least 1, got 0"),
        (["--nproc", "-1"], "--nproc must be at least 1, got -1"),
    ],
)
def test_a_number_of_processes_that_is_none(given, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--data", "d", "--out", "o", *given])
    assert end.value.code == 2 and words in capsys.readouterr().err
