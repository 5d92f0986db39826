"""The server under random clients for minutes: nothing lost or mixed up, no slot or session left over, memory flat.

A tiny random model in a server process of its own; clients that ask, stream, hang up, flood, read slowly, send invalid
requests and hold conversations (`soak_clients.py`). Afterwards no request may be left in flight and no session; then
SIGTERM comes while streams run, which must reach their ends.
"""

import signal
import subprocess
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retentive import machine
from retentive.bench.lab.options import Say, silent
from retentive.bench.lab.plot import grid
from retentive.bench.lab.server import server
from retentive.bench.lab.tables import markdown
from retentive.bench.soak_clients import Asked, Clients, Tally, ask, conversations, long_requests, requests, send
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import LanguageModel, RetNetConfig, build

SLOTS, QUEUE, THREADS = 8, 16, 20
LITTLE = ["--slots", str(SLOTS), "--queue", str(QUEUE), "--max-tokens", "2000", "--max-prompt", "4000"]
LITTLE += ["--cache", str(4 << 20)]
"""Options of the server: little room for everything, so that its limits are reached."""
PICTURE = "The server under random clients"


@dataclass(frozen=True)
class Options:
    """The server under random clients: no reply lost or mixed up, nothing left over, memory flat, SIGTERM drains."""

    minutes: float = 10
    """How long the clients are at it."""


def measure(options: Options, say: Say = silent, seed: int = 0) -> dict[str, Any]:
    """Counts, memory and what went wrong in so many minutes; `ok` where nothing did."""
    minutes = options.minutes
    if not minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {minutes}")
    model = tiny(seed)
    say("computing what the answers must be")
    single, chats = requests(model, 60, seed), conversations(model, 12, seed)
    long = long_requests(model, SLOTS // 2, 1500)
    tally, samples = Tally(), list[dict[str, float]]()
    with server(model, ByteTokenizer(), *LITTLE) as (process, port):
        clients = Clients(port, single, chats, tally, flood=2 * (SLOTS + QUEUE))
        began = time.monotonic()
        watcher = threading.Thread(target=watch, args=(process, port, began, began + 60 * minutes, samples, say))
        watcher.start()  # only it writes `samples`, which are read after it has ended
        clients.run(THREADS, began + 60 * minutes)
        watcher.join()
        alive, left = process.poll() is None, settle(port)
        drained = drain(process, port, long)
    # the first quarter is left out, in which caches and the allocator still grow
    settled = [s for s in samples if s["seconds"] >= 60 * minutes / 4] or samples
    half = len(settled) // 2 or 1
    rss = [sum(s["rss_mb"] for s in part) / len(part) for part in (settled[:half], settled[half:] or settled)]
    return {
        "minutes": minutes,
        "clients": THREADS,
        "slots": SLOTS,
        "queue": QUEUE,
        "counts": dict(sorted(tally.counts.items())),
        "wrong": tally.wrong[:20],
        "wrong_count": len(tally.wrong),
        "alive": alive,
        "left_over": left,
        "drained": drained,
        "tokens_per_second": tokens_per_second(settled),
        "rss_mb": {"first_half": rss[0], "second_half": rss[1], "growth": rss[1] / rss[0] - 1, "peak": peak(samples)},
        "ok": not tally.wrong and alive and not any(left.values()) and drained["ok"],
        "samples": samples,
        "device": "cpu",
        "hardware": machine.describe(),
    }


def tiny(seed: int) -> LanguageModel:
    """A random model with weights so large that no two tokens are nearly equally likely.

    Else rounding, which differs with the batch that a row is in, would now and then choose another token.
    """
    torch.manual_seed(seed)
    model = build(RetNetConfig(vocab_size=ByteTokenizer.vocab_size, dim=64, layers=2, heads=2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5)
        model.head.weight[128:256] *= 0.2  # few bytes that are not valid UTF-8 by themselves
    return model


def figures(port: int) -> dict[str, float]:
    """The server's metrics by name, as Prometheus would read them."""
    with closing(send(port, "GET", "/metrics")) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


def resident(process: subprocess.Popen) -> float:
    """Megabytes (2^20) of the process in memory; NaN where the system does not say."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.is_file():
        return float("nan")  # not Linux
    line = next((x for x in status.read_text().splitlines() if x.startswith("VmRSS")), "VmRSS: 0 kB")
    return int(line.split()[1]) / 1024


def watch(process: subprocess.Popen, port: int, began: float, until: float, samples: list, say: Say) -> None:
    """Appends a sample to `samples` every second, and says a line every minute, until `until` or the server's end."""
    while time.monotonic() < until and process.poll() is None:
        found, seconds = figures(port), time.monotonic() - began
        samples.append(
            {
                "seconds": seconds,
                "rss_mb": resident(process),
                "tokens": found["retentive_generated_tokens_total"],
                "running": found["retentive_running"],
                "queue": found["retentive_queue_length"],
                "sessions": found["retentive_sessions"],
            }
        )
        if len(samples) % 60 == 0:
            say(f"{seconds:.0f} s: {samples[-1]['tokens']:,.0f} tokens, {samples[-1]['rss_mb']:.0f} MB")
        time.sleep(1)


def settle(port: int, seconds: float = 30) -> dict[str, float]:
    """Requests and sessions that are left after the last client: zeros, once the server has noticed who hung up.

    That may take it a moment, so this waits up to `seconds` for it.
    """
    names, end = ("running", "queue_length", "sessions"), time.monotonic() + seconds
    while True:
        left = {name: figures(port)[f"retentive_{name}"] for name in names}
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.1)


def drain(process: subprocess.Popen, port: int, long: list[Asked]) -> dict[str, Any]:
    """Sends SIGTERM while streams run; `ok` where each came to its end and the process then ended with code 0."""
    tally = Tally()

    def listen(asked: Asked) -> None:
        got = ask(port, asked, stream=True, stream_options={"include_usage": True})
        tally.check("drained", got, (200, asked.texts))

    threads = [threading.Thread(target=listen, args=(asked,)) for asked in long]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    # not before all are in a slot: one that was still queued would prove nothing
    while figures(port)["retentive_running"] < len(threads) and time.monotonic() < end:
        continue
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    code = process.wait(timeout=60)
    return {"streams": len(threads), "wrong": tally.wrong, "exit_code": code, "ok": code == 0 and not tally.wrong}


def tokens_per_second(samples: list[dict[str, float]]) -> float:
    first, last = samples[0], samples[-1]
    return (last["tokens"] - first["tokens"]) / max(last["seconds"] - first["seconds"], 1e-9)


def peak(samples: list[dict[str, float]]) -> float:
    return max(s["rss_mb"] for s in samples)


def table(result: dict[str, Any]) -> str:
    """The counts as a Markdown table, and below it what went wrong."""
    rss, drained = result["rss_mb"], result["drained"]
    lines = [[name, f"{count:,}"] for name, count in result["counts"].items()]
    lines += [
        ["tokens per second", f"{result['tokens_per_second']:,.0f}"],
        ["memory, MB", f"{rss['first_half']:,.1f} -> {rss['second_half']:,.1f} ({rss['growth']:+.2%})"],
        ["left over", f"{sum(result['left_over'].values()):,.0f}"],
        ["SIGTERM", f"{drained['streams']} streams, exit code {drained['exit_code']}"],
        ["wrong replies", f"{result['wrong_count']:,}"],
    ]
    wrong = "\n".join(f"- {line}" for line in (*result["wrong"], *drained["wrong"]))
    return "\n\n".join(part for part in (markdown(["of the server", ""], lines), wrong) if part)


def plot(result: dict[str, Any], path: Path, *, title: str) -> None:
    """Memory and throughput over time."""
    figure, ((memory, speed),) = grid(title, 1, 2)
    samples = result["samples"]
    minutes = [s["seconds"] / 60 for s in samples]
    memory.plot(minutes, [s["rss_mb"] for s in samples])
    memory.set_ylabel("resident memory of the server, MB")
    memory.set_ylim(0, 1.25 * peak(samples))
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
