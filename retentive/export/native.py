"""Folder for any C compiler: the sources of the C library, with the model beside them.

    README.md  CMakeLists.txt  write.c    how to build, and a program that generates text
    c/                                    the sources, with retentive.h
    model/                                config.json, model.safetensors, tokenizer.json, the chat template

If there is a compiler, the same C is compiled here and reads the folder: its logits must be the model's, and its tokens
the tokenizer's.
"""

import ctypes
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from retentive.data.tokenizer import Tokenizer
from retentive.export.models import check_model
from retentive.export.writing import check_ids
from retentive.files import write_text
from retentive.models import LanguageModel
from retentive.native import unfit
from retentive.native.library import FOLDER, OPS
from retentive.ops.compiler import FLAGS, NotBuilt, Source, load

SOURCE = Source("retentive", (FOLDER / "retentive.c",), (FOLDER, OPS), (*FLAGS, f"-I{OPS}"))
LEFT_OUT = ("backward.c", "cpu.c", "rows.c", "windows.c")
"""Files of the operator for training and PyTorch only."""
TEXT = "It's the 5th of 1990's days, isn't it?  We'll see:\r\n\n\tnaïve «été» — 東京 🙂 don't end "
"""Text that both split into tokens."""
ERROR_BYTES = 256
README = """# A language model in C

`model/` is the model, `c/` the library that runs it, and `write.c` a program that generates text with it.

    cmake -B build . && cmake --build build
    build/write model -p "Once" -n 200

or, without CMake: `cc -O3 -march=native {flags} -Ic c/retentive.c write.c -o write -lm -pthread`.
For another machine, such as a 64-bit Arm phone, use its compiler without `-march=native`. CMake does so if a toolchain
file says that it compiles for another machine.
`-march=armv8.2-a+dotprod` makes integer weights faster on most phones since 2018; the program ends on CPUs without it.
Keep {flags}; `-ffast-math` gives wrong results.

Your own programs include `c/retentive.h`: open a folder, read, decode, keep and copy states. You can replace `model/`
by any folder that `retentive train`, `retentive convert` or `retentive quantize` has written.
"""


def check_exportable(model: LanguageModel) -> None:
    """Raises ValueError if the C library cannot run the model."""
    check_model(model)
    if reason := unfit(model):
        raise ValueError(f"the C library cannot run this model: {reason}; convert or quantize it first")


def write_sources(folder: Path) -> None:
    """Writes the sources, the program and its build files into an existing folder."""
    (folder / "c").mkdir()
    files = [*FOLDER.iterdir(), *(file for file in OPS.iterdir() if file.name not in LEFT_OUT)]
    for file in files:
        if file.suffix in (".c", ".h"):
            shutil.copyfile(file, folder / "c" / file.name)
    for name in ("CMakeLists.txt", "write.c"):
        shutil.copyfile(FOLDER.parent / name, folder / name)
    flags = " ".join(flag for flag in FLAGS if flag not in ("-O3", "-fPIC"))
    write_text(folder / "README.md", README.format(flags=flags))


class Library:
    """Model opened by the functions of retentive.h, with one sequence."""

    def __init__(self, built: ctypes.CDLL, folder: Path):
        """
        Raises:
            ValueError: the library refuses the folder.
        """
        for name in ("open", "states"):
            getattr(built, f"retentive_{name}").restype = ctypes.c_void_p
        for name in ("vocabulary", "encode"):
            getattr(built, f"retentive_{name}").restype = ctypes.c_int64
        error = ctypes.create_string_buffer(ERROR_BYTES)
        model = built.retentive_open(bytes(folder), torch.get_num_threads(), error)
        if not model:
            raise ValueError(f"the C library cannot run this model: {error.value.decode(errors='replace')}")
        self._built, self._model = built, ctypes.c_void_p(model)
        self._states = ctypes.c_void_p(built.retentive_states(self._model, ctypes.c_int64(1)))
        self._vocab = built.retentive_vocabulary(self._model)

    def close(self) -> None:
        self._built.retentive_free(self._states)
        self._built.retentive_close(self._model)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Reads more ids and returns the logits, float32 `[vocabulary]`.

        Raises:
            ValueError: there are no ids, or some are outside the vocabulary.
            MemoryError: there is not enough memory.
        """
        check_ids(ids, self._vocab)
        logits = np.empty(self._vocab, np.float32)
        given = (ctypes.c_int64 * len(ids))(*ids)
        to, count = ctypes.c_void_p(logits.ctypes.data), ctypes.c_int64(len(ids))
        if not self._states or not self._built.retentive_read(self._states, ctypes.c_int64(0), given, count, to):
            raise MemoryError("no memory to read with the C library")
        return logits

    def encode(self, text: str) -> list[int] | None:
        """Returns the text's ids; None if the library does not know the tokenizer."""
        data = text.encode()
        ids = (ctypes.c_int64 * len(data))()
        count = self._built.retentive_encode(self._model, data, ctypes.c_int64(len(data)), ids)
        return None if count < 0 else ids[:count]


@contextmanager
def opened(folder: Path) -> Iterator[Library | None]:
    """Opens a model folder by the C library; yields None without a C compiler.

    Raises:
        ValueError: the library refuses the folder.
    """
    built = load(SOURCE)
    if isinstance(built, NotBuilt):
        yield None
        return
    library = Library(built, folder)
    try:
        yield library
    finally:
        library.close()


def check_words(library: Library, tokenizer: Tokenizer) -> None:
    """Raises ValueError if C splits a text into other tokens than the tokenizer."""
    ids = library.encode(TEXT)
    if ids is None:
        raise ValueError(
            "the C library knows bytes and byte-level BPE with GPT-2's words, not this model's tokenizer; a program "
            "that has token ids can open the model's own folder"
        )
    if ids != tokenizer.encode(TEXT):
        raise ValueError("the C library splits text into other tokens than this model's tokenizer")
