"""A RetNet in an ONNX graph, run by onnxruntime: numpy, tokenizers and onnxruntime are all it needs.

    model = OnnxModel("novels/model.onnx")
    logits = model.read([5, 6, 7])        and on from there: the state is kept

The state is bound to its input and its output at once, so that it is not copied for each token. Runtimes do not promise
that this is sound: it is tried when a graph is opened, and where it is not, two states take turns.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retentive.export.writing import check_ids

FORMAT = "retentive-onnx-1"
CHUNK = 512
"""Tokens of a prompt that are read at once."""


class OnnxModel:
    """A graph that `retentive export` has written, and the state of one sequence."""

    def __init__(self, path: str | Path, *, threads: int = 0):
        """
        Args:
            threads: that a call uses; as many as onnxruntime thinks, if 0.

        Raises:
            FileNotFoundError: no file there.
            ValueError: no graph that onnxruntime can run, or of another program.
            ImportError: no onnxruntime (extra `onnx`).
        """
        try:
            import onnxruntime as ort
        except ImportError:
            raise ImportError("ONNX graphs are run by onnxruntime: pip install 'retentive[onnx]'") from None
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file at {path}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own classes have no name in common
            raise ValueError(f"onnxruntime {ort.__version__} cannot run {path}: {error}") from None
        said = self.session.get_modelmeta().custom_metadata_map
        if said.get("format") != FORMAT:
            raise ValueError(f"{path}: not a graph of `retentive export`; write one with `to='onnx'`")
        self.config: dict[str, Any] = json.loads(said["config"])
        self.eos = int(said["eos"])
        self.vocab_size = int(self.config["vocab_size"])
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._logits = self._value(np.zeros((1, self.vocab_size), np.float32))
        self.in_place = self._same_in_place()
        self.reset()

    def reset(self) -> None:
        """Forgets all that was read."""
        self.resume(self._zeros(), 0)

    @property
    def states(self) -> dict[str, np.ndarray]:
        """A copy of the state of each layer, float32 `[1,H,K,V]`."""
        return {name: value.numpy().copy() for name, value in self._states.items()}

    def resume(self, states: dict[str, np.ndarray], position: int) -> None:
        """Goes on from states that `states` gave, and the number of tokens that they had read."""
        # copies: these are written in place
        self._states = {name: self._value(np.array(x, np.float32, order="C")) for name, x in states.items()}
        self._others = self._states
        if not self.in_place:
            self._others = {name: self._value(x) for name, x in self._zeros().items()}
        self._bindings = [self._bound(self._states, self._others), self._bound(self._others, self._states)]
        self.position = position

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Logits float32 `[vocabulary]` after the ids, which the state has then read.

        Raises:
            ValueError: no ids, or some that are not in the vocabulary.
        """
        check_ids(ids, self.vocab_size)
        for begin in range(0, len(ids), CHUNK):
            logits = self._call(ids[begin : begin + CHUNK])
        return logits

    def _zeros(self) -> dict[str, np.ndarray]:
        states = [x for x in self.session.get_inputs() if x.name.startswith("state.")]
        return {x.name: np.zeros([1, *x.shape[1:]], np.float32) for x in states}

    def _bound(self, before: dict[str, Any], after: dict[str, Any]) -> Any:
        """All but ids and position: bound at each token, these would cost 0.1 ms of it."""
        binding = self.session.io_binding()
        binding.bind_ortvalue_output("logits", self._logits)
        for name in before:
            binding.bind_ortvalue_input(name, before[name])
            binding.bind_ortvalue_output(f"new_{name}", after[name])
        return binding

    def _call(self, ids: Sequence[int]) -> np.ndarray:
        binding = self._bindings[0]
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("position", np.array([self.position], np.int64))
        self.session.run_with_iobinding(binding)
        self._states, self._others = self._others, self._states
        self._bindings.reverse()
        self.position += len(ids)
        return self._logits.numpy()[0].copy()  # the next call writes there

    def _same_in_place(self) -> bool:
        """Whether the same comes out when states are written where they are read."""
        found = []
        for self.in_place in (True, False):
            self.reset()
            some = [n % self.vocab_size for n in range(1, 8)]
            logits = [self._call(some), self._call(some[:1]), self._call(some[1:2])]
            found.append([*logits, *self.states.values()])
        return all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
