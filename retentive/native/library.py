"""The compiled library: the structs of `c/model.h`, `c/block.h` and `c/read.c`, and its functions."""

import ctypes
import functools
from pathlib import Path

from retentive.ops.compiler import FLAGS, NotBuilt, Source, load
from retentive.ops.cpu import FOLDER as OPS
from retentive.ops.cpu import struct

FOLDER = Path(__file__).with_name("c")
SOURCE = Source("native", (FOLDER / "read.c",), (FOLDER, OPS), (*FLAGS, f"-I{OPS}"))
KINDS = ("float32", "bfloat16", "int8", "int4")
"""Kinds of weights, numbered as in `c/weights.h`."""


class Matrix(ctypes.Structure):
    """struct Matrix of c/weights.h."""

    _fields_ = struct("N K kind group least narrow", "lines scales minimums")


class Turn(ctypes.Structure):
    """struct Turn of c/model.h."""

    _fields_ = struct("K H halves row_norm at", "frequency log_decay", real="position_scale")


class Layer(ctypes.Structure):
    """struct Layer of c/model.h."""

    _fields_ = [
        *struct(
            "kind H kv K V F gate gate_activation gated normed_heads joint activation ffn_gate window sinks taps", ""
        ),
        *struct("", "turn log_decay mixer_norm ffn_norm", real="eps decay_scale"),
        *struct("", "q_norm k_norm q_bias k_bias decay_bias in_bias head_norm convolution far_turn"),
        *((name, Matrix) for name in ("in_", "out", "up", "down")),
    ]


class Model(ctypes.Structure):
    """struct Model of c/model.h."""

    _fields_ = [
        *struct("D layers vocab turns", "turn layer embed_norm final_norm", real="eps embed_scale"),
        ("embed", Matrix),
        ("head", Matrix),
    ]


class Memory(ctypes.Structure):
    """struct Memory of c/block.h."""

    _fields_ = [*struct("", "state k v decay written folded"), *struct("slots state_dtype", "")]


class Reading(ctypes.Structure):
    """struct Reading of c/block.h."""

    _fields_ = struct("N steps dtype threads", "pool model ids begin position rows memory x")


class Heading(ctypes.Structure):
    """struct Heading of c/read.c."""

    _fields_ = [*struct("n dtype threads", "pool head x logits"), ("room", ctypes.c_byte * 88)]


@functools.cache
def library() -> ctypes.CDLL | NotBuilt:
    """Compile and load the library once a process, even if that fails; NotBuilt says why there is none."""
    built = load(SOURCE)
    if not isinstance(built, NotBuilt):
        built.packed_bytes.restype = ctypes.c_int64
        built.native_open.restype = ctypes.c_void_p
        built.native_open.argtypes = [ctypes.c_int64]
        built.native_close.argtypes = [ctypes.c_void_p]
        built.native_instructions.restype = ctypes.c_char_p
    return built


def describe() -> str:
    """One line about the engine: its CPU instructions, or the reason why there is none."""
    built = library()
    if isinstance(built, NotBuilt):
        return f"none, torch reads and decodes instead ({built})"
    return f"the whole model in C: {built.native_instructions().decode()}"
