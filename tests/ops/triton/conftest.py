"""The kernels on what is here: compiled where there is a GPU, else in Triton's interpreter, on the CPU."""

from importlib.util import find_spec

import torch

from tests.ops.triton import interpreted

if find_spec("triton") and not torch.cuda.is_available():
    interpreted.enable()
