"""`retentive info`: architecture of a model, and its costs in memory and arithmetic."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from retentive import machine, native
from retentive.checkpoint import rwkv
from retentive.checkpoint.find import shipped
from retentive.checkpoint.quantize import Quantization
from retentive.cli.loading import Limits
from retentive.cli.parsing import parse
from retentive.cli.train import read_changes
from retentive.files import check_places, write_json
from retentive.models import (
    ARCHITECTURES,
    NAMES,
    PRESETS,
    ModelConfig,
    config_of,
    cost,
    retnet,
)
from retentive.models.encoders import Config as EncoderConfig
from retentive.models.encoders import ImageConfig, encoder_of
from retentive.models.presets import flat
from retentive.ops import backends
from retentive.options import known, option
from retentive.tables import counted
from retentive.train.log import read_metrics

CONTEXTS = (512, 2048, 8192, 32768, 131072)
"""Context lengths for which memory is shown."""
WIDE = 1000
"""Width in columns outside a terminal, so that nothing is cut or wrapped in a pipe."""


@dataclass(frozen=True)
class InfoCommand(Limits):
    """Show architecture, parameters and FLOPs of a model, and its memory beside a Transformer's."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """Run directory, model folder, .gguf file, shipped model (novels; in a clone also smollm2-retnet-135m), a size
    (5m), or an architecture (hybrid)."""
    sizes: bool = False
    """List the named sizes."""
    vocab_size: int = 32000
    """Vocabulary size for a named size or architecture."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Changes to a named size or architecture, as for `retentive train`, such as attention=[0] convolution=4."""
    size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = ""
    """Size of a named architecture; 5m by default."""
    to: Annotated[str, tyro.conf.arg(metavar="gguf")] = ""
    """Also say how `retentive export --to gguf` would write the model; if it cannot, all that the model would need."""
    json: Path | None = None
    """File for the config, parameters, FLOPs, and memory by context beside a Transformer's."""
    machine: bool = False
    """Show this machine: processor, torch, and the engines that run models on it."""


def main(argv: list[str]) -> None:
    command = parse(InfoCommand, "retentive info", argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    with console.capture() as shown:  # printed at once, so that an error leaves no partial page
        config = show(console, command)
    if command.json:
        if config is None:
            raise ValueError("`json` is for one model: name a run, a size or an architecture")
        check_places(command.json)
        write_json(command.json, numbers(config))
    print(shown.get(), end="")


def numbers(config: Any) -> dict[str, Any]:
    """Returns the config and its costs."""
    found = {
        "model": config.name,
        "config": config.written(),
        "parameters": cost.parameters(config),
        "block_parameters": cost.block_parameters(config),
    }
    if config.library:  # its memory and FLOPs are not known here
        return found
    return found | {
        "weight_bytes_float32": cost.weight_bytes(config),
        "flops_per_token": cost.flops_per_token(config, 2048),
        # states of float32, caches of 16 bits
        "memory_bytes": {str(n): cost.memory_bytes(config, n, bytes_per_value=2) for n in CONTEXTS},
        "kv_cache_bytes_per_token": cost.attention_cache_bytes(config),  # of a Transformer in its place
        "break_even": cost.break_even(config),
    }


def show(console: Console, command: InfoCommand) -> Any:
    """Print the requested page; returns the config of the model that it is about, None for other pages."""
    config: Any = None
    if command.to not in ("", "gguf"):
        raise ValueError(f"`to={command.to!r}`: expected gguf")
    if command.run and command.sizes:
        raise ValueError(f"`sizes` lists those of RetNets: leave out {command.run}")
    if command.size and command.run not in NAMES:
        raise ValueError(f"{option('size', command.size)} is for an architecture, such as hybrid: leave it out")
    named = command.run in (*PRESETS, *NAMES) and not Path(command.run).exists()  # a folder may be called 5m
    if command.set and not named and (command.run or command.sizes or command.machine):
        raise ValueError("`set` changes a size or an architecture, such as hybrid: leave it out")
    if command.vocab_size != InfoCommand.vocab_size and (command.run or command.machine) and not named:
        raise ValueError("`vocab_size` is for a size or an architecture, such as hybrid: leave it out")
    if command.sizes:
        console.print(sizes(command.vocab_size))
    elif command.machine:
        for name, value in of_machine().items():
            console.print(f"  {name:<10} {value}", markup=False, soft_wrap=True)
    elif not command.run:
        raise ValueError(
            f"info needs a run, a model folder, a size (retentive info --sizes lists them) or an architecture "
            f"({', '.join(NAMES)})"
        )
    elif named:
        sized = command.run in PRESETS
        name, size = ("retnet", command.run) if sized else (command.run, command.size or "5m")
        config = config_of(name, size, vocab_size=command.vocab_size, **read_changes(list(command.set)))
        config = config.with_window(command.window, command.sinks)
        title = f"size {size}" if sized else f"architecture {name} in size {size}"
        describe(console, config, title + (f", with {' '.join(command.set)}" if command.set else ""))
        if command.run in ARCHITECTURES and not command.set:
            console.print("\n" + differences(config, size, command.vocab_size), markup=False, soft_wrap=True)
    else:
        if re.fullmatch(r"[\w.-]+", command.run) and not Path(command.run).exists():
            known([command.run], (*PRESETS, *NAMES, *shipped()), "model folder, size or architecture")
        folder = command.limited(command.run)
        config = folder.config
        kind = f"GGUF of {', '.join(folder.gguf.types)}" if folder.gguf else f"{folder.layout} layout"
        describe(console, config, f"{command.run} ({kind})", folder.quantization)
        for line in senses(folder.encoders, config.dim):
            console.print(f"  {line}", soft_wrap=True)
        progress(console, folder.path)
    if config is None:
        return None
    if command.to:
        console.print(f"  llama.cpp runs it as {rwkv.architecture_for(config)} (retentive export --to gguf)")
    backend = backends.describe()
    console.print(f"\n  backend of retention on this machine's CPU: {backend}", markup=False, soft_wrap=True)
    return config


def of_machine() -> dict[str, str]:
    """Returns lines on the processor and on the engines that run models on it."""
    free = decimal(machine.free_memory(torch.device("cpu")))
    return {
        "processor": f"{machine.cpu_name()}, {counted(os.cpu_count() or 1, 'core')}, {free} of memory free",
        "torch": f"{torch.__version__}, {counted(torch.get_num_threads(), 'thread')}",
        "retention": backends.describe(),
        "native": native.describe(),
    }


def describe(console: Console, config: Any, title: str, quantized: Quantization | None = None) -> None:
    """Print the config and its costs."""
    console.print(f"[bold]{config.name}[/bold], {title}")
    for line in fields_of(config):
        console.print("  " + line, markup=False, soft_wrap=True)
    parameters = f"{cost.parameters(config):,} parameters, {cost.block_parameters(config):,} of them in the blocks"
    console.print(f"\n  {parameters}")
    if config.library:  # its memory and FLOPs are not known here
        return
    if quantized:
        weights = f"weights of {quantized.bits} bits, a scale for each {quantized.group}"
    else:
        weights = f"{decimal(cost.weight_bytes(config))} of weights in float32"
    console.print(
        f"  {weights}, {cost.flops_per_token(config, 2048) / 1e6:,.1f} MFLOP a token forward (context 2048)\n"
    )
    # a RetNet beside a Transformer in its place; a Transformer by itself
    per_token = cost.attention_cache_bytes(config)
    precisions = ["states in float32"] * config.retains + ["KV caches in 16 bits"]
    table = Table(title=f"memory of one sequence ({', '.join(precisions)})", title_justify="left")
    table.add_column("context")
    for n in CONTEXTS:
        table.add_column(f"{n:,}", justify="right")
    own = "KV cache" if not config.retains else "states and KV cache" if config.attends else "RetNet's state"
    table.add_row(own, *[decimal(cost.memory_bytes(config, n, bytes_per_value=2)) for n in CONTEXTS])
    if per_token is not None:
        table.add_row("a Transformer's KV cache", *[decimal(n * per_token) for n in CONTEXTS])
    console.print(table)
    least = cost.break_even(config)
    if least is not None:
        console.print(f"  Its memory is smaller than the Transformer's from {counted(least, 'token')} of context.")


def fields_of(config: Any) -> Iterator[str]:
    """Yields the config's fields in lines: the model's, and those of the layers once for equal blocks."""
    written = config.written()
    runs = written.pop("blocks", [])
    yield "  ".join(f"{k}={v}" for k, v in written.items())
    different: list[tuple[Any, Any]] = []
    order: list[int] = []
    for run in runs:
        block = (run["mixer"], run["ffn"])
        if block not in different:
            different.append(block)
        order += [different.index(block) + 1] * run["repeat"]
    apart = len(runs) > len(different)  # some equal blocks
    for number, (mixer, ffn) in enumerate(different, 1):
        name = f"({number}) {order.count(number)} x" if apart else f"{order.count(number)} x"
        yield f"{name} {mixer['kind']}: " + "  ".join(f"{k}={v}" for k, v in mixer.items() if k != "kind")
        layer = "  ".join(f"{k}={v}" for k, v in ffn.items()) if ffn else "none"
        yield f"{' ' * len(name)} feed-forward: {layer}"
    if apart:
        yield "in the order " + " ".join(map(str, order))
    mixers = config.without_convolutions().mixers if different else ()
    if len(mixers) < len(order):
        kinds = ", ".join(f"{n} {mixer.kind}" for n, mixer in enumerate(mixers))
        yield f"`attention` counts the blocks that are no convolutions: {kinds}"


def senses(encoders: Mapping[str, EncoderConfig], dim: int) -> Iterator[str]:
    """Yields a line for each encoder beside a model of this width: its input and its size."""
    for kind, config in encoders.items():
        count = sum(p.numel() for p in encoder_of(config, dim).parameters())
        if isinstance(config, ImageConfig):
            side, colours = config.size, "grey" if config.channels == 1 else "in colours"
            takes = f"{config.tokens} tokens of a picture, {side} x {side} {colours}, patches of {config.patch}"
        else:
            takes = f"{config.tokens_per_second:g} tokens of a second of sound, {config.rate:,} Hz, {config.mels} bands"
        yield f"{kind}: {takes}; an encoder of {count:,} parameters more, {decimal(4 * count)} in float32"


def differences(config: ModelConfig, size: str, vocab_size: int) -> str:
    """Returns the fields in which the config differs from this package's RetNet of that size."""
    ours = flat(retnet(size, vocab_size=vocab_size), "info")
    theirs = {name: value for name, value in flat(config, "info").items() if value != ours[name]}
    if not theirs:
        return "  This is `--model retnet`."
    each = ", ".join(f"{name}={value} (ours: {ours[name]})" for name, value in theirs.items())
    return f"  Differs from `--model retnet`: {each}"


def progress(console: Console, folder: Path) -> None:
    """Print the progress of training, if the folder is a run directory."""
    if not (folder / "metrics.jsonl").is_file():
        return
    records = read_metrics(folder)
    steps = [r for r in records if "loss" in r]
    held = [r for r in records if "bits_per_byte" in r or "final_bits_per_byte" in r]
    if steps:
        console.print(f"  trained {counted(steps[-1]['step'], 'step')}, loss {steps[-1]['loss']:.3f} nats per token")
    if held:
        last = held[-1]
        bits = last.get("final_bits_per_byte", last.get("bits_per_byte"))
        at = f"step {last['step']:,}" + (f", by {last['weights']} of the weights" if "weights" in last else "")
        console.print(f"  held-out text ({decimal(last['bytes'])}): {bits:.3f} bits per byte at {at}")


def sizes(vocab_size: int) -> Table:
    """Returns a table of the named sizes with their costs."""
    title = f"sizes, with a vocabulary of {vocab_size:,}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))  # 80 columns hold it
    for name in ("size", "dim", "layers", "heads", "K x V", "parameters", "state"):
        table.add_column(name, justify="left" if name == "size" else "right", no_wrap=True)
    for name in PRESETS:
        c = retnet(name, vocab_size=vocab_size)
        H, K, V = c.all_retention("info").head_shape
        head = f"{K} x {V}"
        table.add_row(
            name,
            *map(str, (c.dim, c.layers, H)),
            head,
            f"{cost.parameters(c) / 1e6:,.1f} M",
            decimal(cost.state_bytes(c)),
        )
    return table
