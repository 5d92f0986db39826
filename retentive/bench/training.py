"""Training speed: a step of RetNet against a step of its Transformer twin, same parameters, tokens and precision.

Before anything is timed, RetNet's forms must agree on the very model and length that will be: a speed is never shown
for a wrong result.
"""

import gc
import time
from typing import Any

import torch

from retentive.bench import hardware
from retentive.models import Model, RetNet, RetNetConfig, Transformer, cost, twin
from retentive.train.config import TrainConfig
from retentive.train.log import peak_flops
from retentive.train.loss import cross_entropy
from retentive.train.optim import adamw

TOLERANCE = 1e-4
"""Largest difference of logits between forms in float32: rounding of sums over a whole sequence stays well below."""


def measure(
    config: RetNetConfig, *, lengths: tuple[int, ...], tokens: int, precision: str, repeats: int
) -> dict[str, Any]:
    """Tokens/s of both models at each length, `tokens` tokens a step; the models take turns, the best step counts."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows = []
    for length in lengths:
        batch = max(tokens // length, 1)
        retnet = RetNet(config)
        check_forms(retnet.eval(), min(length, 1024))
        retnet.train()
        models: dict[str, Model] = {"retnet": retnet, "transformer": Transformer(twin(config))}
        ids = torch.randint(config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
        optimizers = {name: adamw(model, TrainConfig()) for name, model in models.items()}
        best = dict.fromkeys(models, float("inf"))
        for repeat in range(repeats + 1):
            for name, model in models.items():
                seconds = step(model, optimizers[name], ids, precision)
                if repeat:  # the first step allocates
                    best[name] = min(best[name], seconds)
        row: dict[str, Any] = {"length": length, "batch": batch}
        for name, model in models.items():
            rate = batch * length / best[name]
            flops = cost.training_flops_per_token(model.config, length)
            row[name] = {
                "tokens_per_second": rate,
                "parameters": sum(p.numel() for p in model.parameters()),
                "fraction_of_gemm_rate": rate * flops / peak_flops(torch.device("cpu"), dtype, size=2048),
            }
        row["ratio"] = row["retnet"]["tokens_per_second"] / row["transformer"]["tokens_per_second"]
        rows.append(row)
        del retnet, model, models, optimizers
        gc.collect()
    return {"what": "training step", "precision": precision, "hardware": hardware.describe(), "rows": rows}


def step(model: Model, optimizer: torch.optim.Optimizer, ids: torch.Tensor, precision: str) -> float:
    """Seconds of one whole step: forward, loss, backward, optimiser."""
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        x, _ = model.hidden(ids[:, :-1])
        loss = cross_entropy(x, model.head.weight, ids[:, 1:]) / ids[:, 1:].numel()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


@torch.inference_mode()
def check_forms(model: RetNet, length: int) -> float:
    """The largest difference of float32 logits between the parallel and the other forms.

    Raises:
        ArithmeticError: it is above the tolerance.
    """
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    logits = {form: model(ids, form=form)[0] for form in ("parallel", "chunkwise", "recurrent")}
    worst = max(float((x - logits["parallel"]).abs().max()) for x in logits.values())
    if worst > TOLERANCE:
        raise ArithmeticError(f"RetNet's forms differ by {worst:.1e} at length {length}, above {TOLERANCE}: not timed")
    return worst


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| length | RetNet tokens/s | Transformer tokens/s | ratio | RetNet, of the GEMM rate | Transformer |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        r, t = row["retnet"], row["transformer"]
        lines.append(
            f"| {row['length']:,} | {r['tokens_per_second']:,.0f} | {t['tokens_per_second']:,.0f} | {row['ratio']:.2f} "
            f"| {r['fraction_of_gemm_rate']:.0%} | {t['fraction_of_gemm_rate']:.0%} |"
        )
    return "\n".join(lines)
