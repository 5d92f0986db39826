"""Soak test: kills one of a run's two processes at random steps, and compares its end with an undisturbed run.

    python -m tests.train.soak --kills 20 --out results/training-soak_MACHINE_YYYYMM.json

torchrun restarts the processes (--max-restarts), and they resume from the newest checkpoint (--resume). A checkpoint is
written at every step, so that many kills hit the writing of one.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retentive.data.pack import pack
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.machine import describe
from tests.train.conftest import story

EACH = 6
"""Maximum steps from one kill to the next; the minimum is one."""
PATIENCE = 300
"""Seconds without a step until the run counts as lost."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file of JSON for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), options.kills, random.Random(options.seed))
    command = f"python -m tests.train.soak --kills {options.kills}"
    result = {"command": command, "what": "killed training", "hardware": describe(), **result}
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)


def soak(folder: Path, kills: int, chance: random.Random) -> dict:
    documents = [Document(str(n), story(n)) for n in range(36)]
    pack(folder / "data", ByteTokenizer(), documents[:30], documents[30:])
    steps = kills * EACH + 20
    small = ["--size", "1m", "--set", "dim=32", "layers=2", "heads=2", "--batch", "4", "--length", "32", "--lr", "1e-3"]
    small += ["--steps", str(steps), "--precision", "fp32", "--device", "cpu", "--save-every", "1"]
    small += ["--eval-every", "0", "--sample-every", "0", "--data", str(folder / "data"), "--resume"]
    alone = [sys.executable, "-m", "retentive", "train", *small, "--out", str(folder / "alone")]
    subprocess.run(alone, check=True, capture_output=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(3 * kills), "-m", "retentive", "train", *small, "--dp-shard", "2"]
    run = folder / "killed"
    events = []
    with started([*command, "--out", str(run)], folder / "stderr") as agent:
        for _ in range(kills):
            begun = time.monotonic()
            at = steps_of(run) + chance.randint(1, EACH)
            wait_for_step(run, at, agent)
            back = time.monotonic() - begun
            time.sleep(chance.uniform(0, 0.2))
            victim = chance.choice(workers_of(agent.pid))
            reached = steps_of(run)
            os.kill(victim, signal.SIGKILL)
            events.append({"step": reached, "seconds_since_last": round(back, 1)})
            print(events[-1], file=sys.stderr, flush=True)
            while victim in workers_of(agent.pid):
                time.sleep(0.05)
        agent.wait(timeout=PATIENCE)
    errors = (folder / "stderr").read_text(encoding="utf-8")
    found, wanted = losses(run), losses(folder / "alone")
    return {
        "kills": len(events),
        "steps": steps,
        "exit_code": agent.returncode,
        # lines of torchrun: one for each restart of all processes, and the reason of each end
        "failures": [
            line.split("] ")[-1].split(" (pid")[0] for line in errors.splitlines() if "failed (exitcode" in line
        ],
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(found, wanted, strict=True)),
        "events": events,
    }


@contextmanager
def started(command: list[str], errors: Path) -> Iterator[subprocess.Popen]:
    with errors.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        agent = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            yield agent
        except BaseException:
            print(errors.read_text(encoding="utf-8"), file=sys.stderr)
            raise
        finally:
            agent.terminate()
            agent.wait(timeout=60)


def workers_of(agent: int) -> list[int]:
    """Living processes that torchrun has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text(encoding="utf-8").rpartition(") ")
            words = (status.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        state, parent = rest.split()[:2]
        if int(parent) == agent and state != "Z" and (b"retentive" in words or any(b"spawn_main" in w for w in words)):
            found.append(int(name.split()[0]))
    return found


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [x["loss"] for x in map(json.loads, lines) if "loss" in x]


def steps_of(run: Path) -> int:
    """Number of steps in the log, without a line that is being written."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b'"loss"') if file.is_file() else 0


def wait_for_step(run: Path, step: int, agent: subprocess.Popen) -> None:
    last, moved = steps_of(run), time.monotonic()
    while (now := steps_of(run)) < step or len(workers_of(agent.pid)) < 2:
        if now != last:
            last, moved = now, time.monotonic()
        if time.monotonic() - moved > PATIENCE or agent.poll() is not None:
            raise TimeoutError(f"the run is lost at step {now}")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
