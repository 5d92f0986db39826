"""A RetNet in an ExecuTorch program, run by ExecuTorch's own Python runtime.

model = ExecutorchModel("novels/model.pte")
logits = model.read([5, 6, 7])        and on from there: the state is kept
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retentive.export.writing import check_ids


class ExecutorchModel:
    """A program that `retentive export` has written, and the state of one sequence."""

    def __init__(self, path: str | Path):
        """
        Raises:
            FileNotFoundError: no file there.
            ValueError: no program that ExecuTorch can run, or of another program.
            ImportError: no executorch (extra `executorch`).
        """
        try:
            from executorch.runtime import Runtime
        except ImportError:
            raise ImportError("programs of ExecuTorch are run by it: pip install 'retentive[executorch]'") from None
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file at {path}")
        try:
            self._program: Any = Runtime.get().load_program(str(path))
            names = self._program.method_names
        except RuntimeError as error:
            raise ValueError(f"{path} is no program that ExecuTorch can run ({error})") from None
        wanted = ("eos", "vocabulary", "layers", "heads", "key", "value")
        if not {*wanted, "forward"} <= set(names):
            raise ValueError(f"{path} is no program that `retentive export --to executorch` has written")
        facts = [int(self._program.load_method(name).execute([])[0]) for name in wanted]
        self.eos, self.vocab_size, self._layers, *self._shape = facts
        self._step: Any = self._program.load_method("forward")
        self.reset()

    def reset(self) -> None:
        """Forgets all that was read."""
        self.position = 0
        self._states = [torch.zeros(self._shape) for _ in range(self._layers)]

    @property
    def states(self) -> dict[str, np.ndarray]:
        """A copy of the state of each layer, float32 `[H,K,V]`."""
        return {f"state.{i}": x.numpy().copy() for i, x in enumerate(self._states)}

    def resume(self, states: dict[str, np.ndarray], position: int) -> None:
        """Goes on from states that `states` gave, and the number of tokens that they had read."""
        self._states = [torch.from_numpy(x.copy()) for x in states.values()]
        self.position = position

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Logits float32 `[vocabulary]` after the ids, which the state has then read, one by one.

        Raises:
            ValueError: no ids, or some that are not in the vocabulary.
        """
        check_ids(ids, self.vocab_size)
        for id in ids:
            given = (torch.tensor([id]), torch.tensor([self.position]), *self._states)
            logits, *states = self._step.execute(given)
            self._states = [x.clone() for x in states]  # what comes back lies in the program's own memory
            self.position += 1
        return logits.numpy()[0].copy()
