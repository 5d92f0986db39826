"""Runs the kernels on a GPU if there is one, else in Triton's interpreter on the CPU."""

from importlib.util import find_spec

import torch

from benchmarks.lab import interpreter

if find_spec("triton") and not torch.cuda.is_available():
    interpreter.enable()
