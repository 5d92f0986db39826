"""A folder that any C compiler makes a program of: the sources of the library in C, and the model beside them.

    README.md  CMakeLists.txt  write.c    how to build, and a program that writes
    c/                                    the sources, with retentive.h
    model/                                config.json, model.safetensors, tokenizer.json, the chat template

The same C is compiled here, where there is a compiler, and reads that very folder: its logits must be the model's, its
tokens the tokenizer's.
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
LEFT_OUT = ("backward.c", "cpu.c", "rows.c")
"""Of the operator's files those that learning needs, and PyTorch."""
TEXT = "It's the 5th of 1990's days, isn't it?  We'll see:\r\n\n\tnaïve «été» — 東京 🙂 don't end "
"""What is split into tokens by both."""
ERROR_BYTES = 256
README = """# A language model in C

`model/` is the model, `c/` the library that runs it, `write.c` a program that writes text with it.

    cmake -B build . && cmake --build build
    build/write model -p "Once" -n 200

or, without CMake: `cc -O3 -march=native {flags} -Ic c/retentive.c write.c -o write -lm -pthread`.
For another machine, say a phone with 64 bits of Arm, name its compiler and leave `-march=native` out; CMake does so
when a toolchain file tells it that it compiles for another.
`-march=armv8.2-a+dotprod` makes integers faster on the CPUs that have it (most phones since 2018), and a program that
ends on others. Keep {flags}; `-ffast-math` is wrong here.

Your own programs include `c/retentive.h`, which says what there is: open a folder, read, decode, keep and copy states.
Any folder that `retentive train`, `convert` or `quantize` writes can take the place of `model/`.
"""


def check_exportable(model: LanguageModel) -> None:
    """Raises ValueError for a model that C cannot run."""
    check_model(model)
    if reason := unfit(model):
        raise ValueError(f"the C library cannot run this model: {reason}; convert or quantize it first")


def write_sources(folder: Path) -> None:
    """The sources, the program and how to build it, into a folder that there is."""
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
    """A model that the functions of retentive.h have opened, and a sequence that it reads."""

    def __init__(self, built: ctypes.CDLL, folder: Path):
        """
        Raises:
            ValueError: the folder is refused.
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
        """Logits float32 `[vocabulary]` after more ids.

        Raises:
            ValueError: none, or some that are not in the vocabulary.
            MemoryError: no memory.
        """
        check_ids(ids, self._vocab)
        logits = np.empty(self._vocab, np.float32)
        given = (ctypes.c_int64 * len(ids))(*ids)
        to, count = ctypes.c_void_p(logits.ctypes.data), ctypes.c_int64(len(ids))
        if not self._states or not self._built.retentive_read(self._states, ctypes.c_int64(0), given, count, to):
            raise MemoryError("no memory to read with the C library")
        return logits

    def encode(self, text: str) -> list[int] | None:
        """Its ids; None where the library does not know the tokenizer."""
        data = text.encode()
        ids = (ctypes.c_int64 * len(data))()
        count = self._built.retentive_encode(self._model, data, ctypes.c_int64(len(data)), ids)
        return None if count < 0 else ids[:count]


@contextmanager
def opened(folder: Path) -> Iterator[Library | None]:
    """A model folder as programs in C have it; None where no C compiler is.

    Raises:
        ValueError: the folder is refused.
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
    """Raises ValueError where C makes other tokens of a text than the tokenizer does."""
    ids = library.encode(TEXT)
    if ids is None:
        raise ValueError(
            "the C library knows bytes and byte-level BPE with GPT-2's words, this model's tokenizer is another: "
            "programs that have ids from elsewhere can open the model's own folder, without an export"
        )
    if ids != tokenizer.encode(TEXT):
        raise ValueError("the C library makes other tokens of a text than this model's tokenizer does")
