"""Decode steps as CUDA graphs: all kernels of a step start at once, without Python in between.

    graphs = Graphs(model)
    step = graphs.step(pool, n)       RecordedStep of the first n sequences; None if this step must be computed as usual
    logits = step.run(ids)            decodes one token of each, in place

A step of a small model is a few hundred kernels of microseconds, and PyTorch takes longer to start them than the GPU to
run them. Source: https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/.
"""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from retentive.layers import RetentionConfig
from retentive.models import LanguageModel
from retentive.models.state import State


class RecordedStep:
    """A decode step of given sequences, recorded once and run any number of times."""

    def __init__(self, model: LanguageModel, view: State, memory: Any = None):
        """Records a step. Nothing is computed: the state is as before.

        A step of as many sequences must have run before, since kernels are compiled and loaded then.

        Args:
            view: state of the sequences, with rings. Its tensors are updated in place.
            memory: `torch.cuda.graph_pool_handle()` for the activations of several recorded steps, one run at a time.

        Raises:
            RuntimeError: an operation of the model cannot be recorded, such as one that waits for the GPU.
        """
        self.view = view  # the graph has the addresses of its tensors, so they must live as long
        self.ids = torch.zeros(len(view.position), 1, dtype=torch.int64, device=model.device)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, which read for another model, may allocate meanwhile
        with torch.cuda.graph(self.graph, pool=memory, capture_error_mode="thread_local"):
            x, state = model.hidden(self.ids, State(view.memories, view.position))
            view.position.copy_(state.position)  # the only part of a state that a model does not write in place
            self.logits = model.head(x[:, -1]).float()

    def run(self, ids: Tensor) -> Tensor:
        """Decodes ids `[n]`; returns logits `[n, vocab]` in float32, which the next call overwrites."""
        self.ids.copy_(ids[:, None])
        self.graph.replay()
        return self.logits


def recordable(config: Any, device: torch.device, state_dtype: torch.dtype | None = None) -> bool:
    """True if steps of such a model can be recorded: a RetNet with a decay per token, on a GPU with Triton.

    Nothing may wait for the GPU in a recorded step. Attention reads a position, to know how large its cache has to be;
    fixed decays are copied to the GPU in each call; and without Triton, or with states that are not of float32,
    `ring.decode_step` reads the number of full rings.
    """
    if device.type != "cuda" or config.attends or state_dtype is not None or not find_spec("triton"):
        return False
    return all(mixer.per_token for mixer in config.mixers if mixer.kind == RetentionConfig.kind)


class Graphs:
    """Recorded steps of a pool, one for each number of sequences, recorded at the second step of that number."""

    def __init__(self, model: LanguageModel, state_dtype: torch.dtype | None = None):
        self.model = model
        self.possible = recordable(model.config, model.device, state_dtype)
        self.memory = torch.cuda.graph_pool_handle() if self.possible else None
        self.forget()

    def forget(self) -> None:
        """Drops all recorded steps, and the pool whose memory they keep."""
        self.pool: State | None = None
        self.steps: dict[int, RecordedStep | None] = {}

    def step(self, pool: State, n: int) -> RecordedStep | None:
        """Returns the recorded step of the pool's first n sequences, or None if there is none (yet)."""
        if not self.possible:
            return None
        if pool is not self.pool:
            self.pool, self.steps = pool, {}
        if n in self.steps and self.steps[n] is None:
            try:
                self.steps[n] = RecordedStep(self.model, pool.view(n), self.memory)
            except RuntimeError as error:
                reason = (str(error).splitlines() or ["no reason given"])[0]
                warnings.warn(f"decoding goes on without CUDA graphs, which is slower: {reason}", stacklevel=2)
                self.possible = False
                self.forget()
        return self.steps.setdefault(n, None) if self.possible else None
