"""The options of training, apart from the model and the data."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from retentive.options import check_type

Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
Optimizer = Literal["adamw", "muon"]
QAT = Literal["none", "int8", "int4"]
LARGEST_SEED = 10**12
"""Largest seed: each step's own seed is more than a million times as large, and torch takes 64 bits."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of `train`; the command line is derived from the text under each field."""

    steps: int = 1000
    """Optimiser steps."""
    lr: float = 0.0
    """Peak learning rate. 0 for 1 / width of a new model (7.8e-3 for 1m, 3.9e-3 for 5m), for 1e-3 if the model is
    trained already, and for 2e-3 in a comparison."""
    optimizer: Optimizer = "adamw"
    """adamw or muon. Muon steps the matrices of the blocks, at the same learning rate and weight decay, AdamW the
    rest."""
    schedule: Schedule = "cosine"
    """Learning rate schedule after the warm-up; wsd keeps the peak and falls linearly at the end."""
    warmup: int = 50
    """Warm-up: steps over which the learning rate rises from 0 to its peak."""
    final_lr: float = 0.1
    """Final learning rate, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Fraction of all steps in which the learning rate falls, with schedule wsd."""
    weight_decay: float = 0.05
    """Weight decay of matrices; vectors (norm gains) have none."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient."""
    clip: float = 1.0
    """Gradient clipping: largest norm of the gradient; 0 for no clipping."""
    skip_nonfinite: int = 0
    """Consecutive steps to skip if their loss or gradient is not finite, before the run stops; 0 stops at the first."""
    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999; 0 for none. The average is evaluated and saved as the
    run's model. Costs 4 bytes a parameter."""
    accumulate: int = 1
    """Gradient accumulation: batches per optimiser step."""
    precision: Precision = "auto"
    """Precision of matrix products (autocast); auto takes bf16 if this machine multiplies faster in it."""
    qat: QAT = "none"
    """Quantisation-aware training: compute with weights rounded as `retentive quantize` rounds them without text."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    compile: bool = False
    """torch.compile each block (needs a C++ compiler)."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    seed: int = 0
    """Seed of initialisation, data order, dropout and samples."""
    eval_every: int = 250
    """Steps between evaluations on held-out text; 0 evaluates at the end only."""
    eval_tokens: int = 65536
    """Held-out tokens of an evaluation, the same every time; the last evaluation reads up to ten times as many."""
    save_every: int = 250
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy in CPU memory of 12 bytes a parameter."""
    sample_every: int = 250
    """Steps between samples of text; 0 for none."""
    sample_prompt: str = ""
    """Prompt of the samples; the start of a document if empty."""
    tensorboard: bool = False
    """Write TensorBoard events into the run directory as well."""
    wandb: str = ""
    """Weights & Biases project to log to as well."""

    def __post_init__(self):
        for f in fields(self):
            check_type(f.name, getattr(self, f.name), type(f.default))
        kinds = {"schedule": Schedule, "precision": Precision, "optimizer": Optimizer, "qat": QAT}
        for name, names in ((name, get_args(kind)) for name, kind in kinds.items()):
            if getattr(self, name) not in names:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {', '.join(names)}")
        for name, least in {"steps": 1, "accumulate": 1, "save_every": 1, "keep": 1, "eval_tokens": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")
        for name in ("warmup", "eval_every", "sample_every", "lr", "weight_decay", "clip", "skip_nonfinite"):
            if not getattr(self, name) >= 0:  # NaN neither
                raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"`final_lr` must be in [0, 1], a fraction of lr, got {self.final_lr}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"`decay_fraction` must be in (0, 1], a part of the steps, got {self.decay_fraction}")
        for name in ("lr", "weight_decay"):
            if math.isinf(getattr(self, name)):
                raise ValueError(f"`{name}` must be finite, got {getattr(self, name)}")
        if abs(self.seed) > LARGEST_SEED:
            raise ValueError(f"`seed` must be from -{LARGEST_SEED:,} to {LARGEST_SEED:,}, got {self.seed}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
