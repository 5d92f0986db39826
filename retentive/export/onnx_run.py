"""Model in an ONNX graph, run by onnxruntime. Needs only numpy, tokenizers and onnxruntime.

    model = OnnxModel("novels/model.onnx")
    logits = model.read([5, 6, 7])        and on from there: the state is kept

Each memory is bound to its input and its output at once, so that it is not copied for each token. Runtimes do not
promise that this works. Opening a graph tries it, and otherwise two copies take turns.

Caches of attention grow with the text. With a window they are rings of constant size.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retentive.export.writing import check_ids

FORMAT, READ = "retentive-onnx-2", ("retentive-onnx-1", "retentive-onnx-2")
CHUNK = 512
"""Maximum tokens of a prompt read at once."""
SLOTS = 256
"""Slots by which a cache without a window grows."""


class OnnxModel:
    """Graph of `retentive export`, with the state of one sequence."""

    def __init__(self, path: str | Path, *, threads: int = 0):
        """
        Args:
            threads: threads of a call; 0 leaves the number to onnxruntime.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: onnxruntime cannot run the graph, or another program wrote it.
            ImportError: onnxruntime is missing (extra `onnx`).
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
        if said.get("format") not in READ:
            raise ValueError(f"{path}: not a graph of `retentive export`; write one with `to='onnx'`")
        self.config: dict[str, Any] = json.loads(said["config"])
        self.eos = int(said["eos"])
        self.vocab_size = int(self.config["vocab_size"])
        self._memories = {x.name: x.shape for x in self.session.get_inputs() if x.name not in ("input_ids", "position")}
        windows = json.loads(said.get("windows", "[]"))  # the first format had no caches
        self._windows = {name: windows[int(name.split(".")[1])] for name in self._memories if _is_cache(name)}
        self._chunk = min([CHUNK, *filter(None, self._windows.values())])
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._logits = self._value(np.zeros((1, self.vocab_size), np.float32))
        self.in_place = self._same_in_place()
        self.reset()

    def reset(self) -> None:
        """Clears the memories and the position."""
        self.resume(self._zeros(SLOTS), 0)

    @property
    def states(self) -> dict[str, np.ndarray]:
        """Copy of each block's memory, float32: `state.i`, `rows.i`, or the slots of attention in use so far."""
        used = {name: self.position for name, window in self._windows.items() if not window}
        return {name: value.numpy()[:, :, : used.get(name)].copy() for name, value in self._states.items()}

    def resume(self, states: dict[str, np.ndarray], position: int) -> None:
        """Continues from `states` of an earlier moment and the number of tokens read by then."""
        self.position = position
        self._bind({name: np.array(x, np.float32, order="C") for name, x in states.items()})  # copies: written in place

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Reads the ids and returns the logits, float32 `[vocabulary]`.

        Raises:
            ValueError: there are no ids, or some are outside the vocabulary.
        """
        check_ids(ids, self.vocab_size)
        for begin in range(0, len(ids), self._chunk):
            part = ids[begin : begin + self._chunk]
            self._reserve(self.position + len(part))
            logits = self._call(part)
        return logits

    def _zeros(self, slots: int) -> dict[str, np.ndarray]:
        """Returns memories before the first token, with `slots` slots in caches without a window."""
        found = {}
        for name, shape in self._memories.items():
            shape = [1, *shape[1:]]
            if name in self._windows:
                window = self._windows[name]
                shape[2] = window + self._chunk - 1 if window else slots
            found[name] = np.zeros(shape, np.float32)
        return found

    def _reserve(self, tokens: int) -> None:
        """Gives caches without a window room for `tokens` tokens in total."""
        growing = [name for name, window in self._windows.items() if not window]
        if all(self._states[name].shape()[2] >= tokens for name in growing):
            return
        slots, states = -(-tokens // SLOTS) * SLOTS, {}
        for name, value in self._states.items():
            more = [(0, 0)] * len(value.shape())
            if name in growing:
                more[2] = (0, slots - value.shape()[2])
            states[name] = np.pad(value.numpy(), more)  # a copy: the memory of `value` goes with it
        self._bind(states)

    def _bind(self, states: dict[str, np.ndarray]) -> None:
        """Uses these arrays as memories, which calls write in place."""
        self._states = self._others = {name: self._value(x) for name, x in states.items()}
        if not self.in_place:
            self._others = {name: self._value(np.zeros_like(x)) for name, x in states.items()}
        self._bindings = [self._bound(self._states, self._others), self._bound(self._others, self._states)]

    def _bound(self, before: dict[str, Any], after: dict[str, Any]) -> Any:
        """Binds all but ids and position, since binding each time would cost 0.1 ms a token."""
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
        """True if results are the same when memories are written where they are read."""
        found = []
        for self.in_place in (True, False):
            self.reset()
            some = [n % self.vocab_size for n in range(1, 8)]
            logits = [self.read(some), self.read(some[:1]), self.read(some[1:2])]
            found.append([*logits, *self.states.values()])
        return all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def _is_cache(name: str) -> bool:
    """True for keys, values and gates, which have slots."""
    return name.startswith(("keys.", "values.", "gates."))
