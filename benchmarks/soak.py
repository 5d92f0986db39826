"""Soak test of the server: minutes of random clients must lose or mix up nothing, leave nothing over, leak no memory.

A server process of its own runs a tiny random model. Clients ask, stream, hang up, flood, read slowly, send invalid
requests and hold conversations (`soak_clients.py`). Afterwards no request may be in flight and no session may be left.
Then SIGTERM arrives while streams run, and these must reach their ends. A server that dies or stops answering ends the
soak at once, with a result that says so.
"""

import signal
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import soak_clients
from benchmarks.soak_clients import Asked, Clients, Tally, ask, conversations, long_requests, requests, send
from retentive import machine
from retentive.bench.lab.options import Say, silent
from retentive.bench.lab.plot import grid
from retentive.bench.lab.server import server
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import LanguageModel, build, retnet
from retentive.tables import markdown

SLOTS, QUEUE, THREADS = 8, 16, 20
LITTLE = ["--slots", str(SLOTS), "--queue", str(QUEUE), "--max-tokens", "2000", "--max-prompt", "4000"]
LITTLE += ["--cache", str(4 << 20)]
"""Options of the server: small limits, so that they are reached."""
SAMPLED = {"tokens": "generated_tokens_total", "running": "running", "queue": "queue_length", "sessions": "sessions"}
"""Metrics of a sample: its own names, and the server's."""
PICTURE = "The server under random clients"


@dataclass(frozen=True)
class Options:
    """Soak test of the server: no reply lost or mixed up, nothing left over, memory flat, SIGTERM drains."""

    minutes: float = 10
    """Minutes that the clients run."""


def measure(options: Options, say: Say = silent, seed: int = 0) -> dict[str, Any]:
    """Counts, memory and errors of the soak; `ok` is true if there were no errors."""
    minutes = options.minutes
    if not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}")
    model = tiny(seed)
    say("computing what the answers must be")
    single, chats = requests(model, 60, seed), conversations(model, 12, seed)
    long = long_requests(model, SLOTS // 2, 1500)
    tally, samples = Tally(), list[dict[str, float]]()
    left = dict[str, float]()
    drained: dict[str, Any] = {"streams": 0, "wrong": [], "exit_code": None, "ok": False}
    with ThreadPoolExecutor(1) as aside, server(model, ByteTokenizer(), *LITTLE) as (process, port):
        # more requests at once than slots and queue have room for
        clients = Clients(port, single, chats, tally, flood=2 * (SLOTS + QUEUE))
        watching = aside.submit(watch, process, port, 60 * minutes, samples, say)
        watching.add_done_callback(lambda _: clients.over.set())  # at the end of the minutes or of the server
        clients.run(THREADS)
        gone = watching.result()
        alive = process.poll() is None
        if not gone:
            try:
                left = settle(port)
                drained = drain(process, port, long)
            except Exception as error:  # a dying server may send anything: keep the result of the minutes before
                gone = f"the server failed after its last client: {type(error).__name__} {error}"
    # leaves out the first quarter, in which caches and the allocator still grow
    settled = [s for s in samples if s["seconds"] >= 60 * minutes / 4] or samples
    return {
        "minutes": minutes,
        "clients": THREADS,
        "slots": SLOTS,
        "queue": QUEUE,
        "counts": dict(sorted(tally.counts.items())),
        "gone": gone,
        "wrong": tally.wrong[:20],
        "wrong_count": len(tally.wrong),
        "alive": alive,
        "left_over": left,
        "drained": drained,
        "tokens_per_second": tokens_per_second(settled),
        "rss_mb": {**halves(settled), "peak": peak(samples)},
        "ok": not gone and not tally.wrong and alive and not any(left.values()) and drained["ok"],
        "samples": samples,
        "device": "cpu",
        "hardware": machine.describe(),
    }


def tiny(seed: int) -> LanguageModel:
    """A random model with weights so large that no two tokens are nearly equally likely.

    Otherwise rounding, which depends on the batch, would sometimes choose another token.
    """
    torch.manual_seed(seed)
    model = build(retnet(vocab_size=ByteTokenizer.vocab_size, dim=64, layers=2, heads=2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5)
        model.head.weight[128:256] *= 0.2  # few bytes that are not valid UTF-8 by themselves
    return model


def figures(port: int) -> dict[str, float]:
    """The server's Prometheus metrics by name."""
    with closing(send(port, "GET", "/metrics")) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


def resident(process: subprocess.Popen) -> float:
    """Resident memory of the process in MiB; NaN if the system does not report it."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.is_file():
        return float("nan")  # not Linux
    line = next((x for x in status.read_text().splitlines() if x.startswith("VmRSS")), "VmRSS: 0 kB")
    return int(line.split()[1]) / 1024


def watch(process: subprocess.Popen, port: int, seconds: float, samples: list[dict[str, float]], say: Say) -> str:
    """Append a sample to `samples` every second, and report a line every minute, for `seconds` seconds.

    Returns:
        the reason as soon as the server is gone; "" if it ran to the end.
    """
    began = answered = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        if process.poll() is not None:
            return f"the server ended by itself after {now - began:.0f} s, exit code {process.returncode}"
        try:
            found = figures(port)
            sample = {"seconds": now - began, "rss_mb": resident(process)}
            sample |= {name: found[f"retentive_{key}"] for name, key in SAMPLED.items()}
        except Exception as error:  # a busy machine may miss one answer, but not many in a row
            if time.monotonic() > answered + soak_clients.PATIENCE:
                silence = f"the server did not answer for {soak_clients.PATIENCE:.0f} s"
                return f"{silence}: {type(error).__name__} {error}"
        else:
            answered = time.monotonic()
            samples.append(sample)
            if len(samples) % 60 == 0:
                say(f"{sample['seconds']:.0f} s: {sample['tokens']:,.0f} tokens, {sample['rss_mb']:.0f} MB")
        time.sleep(1)
    return ""


def settle(port: int, seconds: float = 30) -> dict[str, float]:
    """Requests and sessions left after the last client: zeros, once the server has noticed all disconnects.

    Waits up to `seconds` for that.
    """
    names, end = ("running", "queue_length", "sessions"), time.monotonic() + seconds
    while True:
        left = {name: figures(port)[f"retentive_{name}"] for name in names}
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.1)


def drain(process: subprocess.Popen, port: int, long: list[Asked]) -> dict[str, Any]:
    """Send SIGTERM while streams run; `ok` is true if each reached its end and the process then exited with code 0."""
    tally = Tally()

    def listen(asked: Asked) -> None:
        with tally.noting("drained"):
            got = ask(port, asked, stream=True, stream_options={"include_usage": True})
            tally.check("drained", got, (200, asked.texts))

    threads = [threading.Thread(target=listen, args=(asked,)) for asked in long]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    # only when all are in a slot: a queued one would prove nothing
    while figures(port)["retentive_running"] < len(threads) and time.monotonic() < end:
        time.sleep(0.01)  # each poll is a connection of its own, and a system's ports are limited
    # as a service manager or Kubernetes stops it
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    try:
        code = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        code = None  # `server` kills the process then
    # a stream that was cut off is in `wrong`; the code tells a clean end from a crash after the last stream
    return {"streams": len(threads), "wrong": tally.wrong, "exit_code": code, "ok": code == 0 and not tally.wrong}


def tokens_per_second(samples: list[dict[str, float]]) -> float:
    if not samples:
        return 0.0
    first, last = samples[0], samples[-1]
    return (last["tokens"] - first["tokens"]) / max(last["seconds"] - first["seconds"], 1e-9)


def halves(samples: list[dict[str, float]]) -> dict[str, float]:
    """Mean memory in MiB of the first and second half of the samples, and its relative growth."""
    rss = [s["rss_mb"] for s in samples] or [float("nan")]
    half = len(rss) // 2 or 1
    first, second = (statistics.fmean(part) for part in (rss[:half], rss[half:] or rss))
    return {"first_half": first, "second_half": second, "growth": second / first - 1}


def peak(samples: list[dict[str, float]]) -> float:
    return max((s["rss_mb"] for s in samples), default=float("nan"))


def table(result: dict[str, Any]) -> str:
    """The counts as a Markdown table, and the errors below it, beginning with a server that is gone."""
    rss, drained = result["rss_mb"], result["drained"]
    lines = [[name, f"{count:,}"] for name, count in result["counts"].items()]
    lines += [
        ["tokens per second", f"{result['tokens_per_second']:,.0f}"],
        ["memory, MB", f"{rss['first_half']:,.1f} -> {rss['second_half']:,.1f} ({rss['growth']:+.2%})"],
        ["left over", f"{sum(result['left_over'].values()):,.0f}"],
        ["SIGTERM", f"{drained['streams']} streams, exit code {drained['exit_code']}"],
        ["wrong replies", f"{result['wrong_count']:,}"],
    ]
    gone = [result["gone"]] if result.get("gone") else []  # older files of results have no such line
    wrong = "\n".join(f"- {line}" for line in (*gone, *result["wrong"], *drained["wrong"]))
    return "\n\n".join(part for part in (markdown(["of the server", ""], lines), wrong) if part)


def plot(result: dict[str, Any], path: Path, *, title: str) -> None:
    """Memory and throughput over time."""
    figure, ((memory, speed),) = grid(title, 1, 2)
    samples = result["samples"]
    minutes = [s["seconds"] / 60 for s in samples]
    memory.plot(minutes, [s["rss_mb"] for s in samples])
    memory.set_ylabel("resident memory of the server, MB")
    memory.set_ylim(0, 1.25 * peak(samples) if samples else 1)
    window = 10  # samples, one a second
    pairs = list(zip(samples, samples[window:], strict=False))
    rates = [(b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairs]
    speed.plot(minutes[window:], rates)
    speed.set_ylabel(f"tokens/s (over {window} s)")
    speed.set_ylim(bottom=0)
    for axis in (memory, speed):
        axis.set_xlabel("minutes")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
