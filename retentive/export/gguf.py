"""GGUF files for llama.cpp, ollama and LM Studio (extra `gguf`): RetNets that one of their architectures can run.

    write(model, Path("mine.gguf"), tokenizer, type="q8_0")
    LlamaCpp(Path("mine.gguf")).read(ids)                       logits, by the package llama-cpp-python

Architectures and names of tensors are in `checkpoint/rwkv.py`, which also reads such files back.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np

from retentive.checkpoint import rwkv
from retentive.checkpoint.gguf_tokenizer import add_metadata, written
from retentive.checkpoint.quantize import quantization_of
from retentive.data.tokenizer import Tokenizer
from retentive.export.models import check_model
from retentive.models import LanguageModel

Type = Literal["f32", "f16", "q8_0", "q4_0"]
"""Types of the matrices. All other tensors are float32. The output matrix of q4_0 is q8_0."""
BITS = {"f32": 32, "f16": 16, "q8_0": 8.5, "q4_0": 4.5}
"""Bits of a number in a matrix, its scale included."""
BLOCK = 32
"""Columns of a block of q8_0 and q4_0."""
NAME, TEMPLATE = "general.name", "tokenizer.chat_template"


def check_exportable(model: LanguageModel, type: Type) -> None:
    """Raises ValueError if no architecture of llama.cpp fits the model, or the type is unknown or does not fit.

    The message names all that keeps the model from it.
    """
    if type not in get_args(Type):
        raise ValueError(f"`type={type}`: expected one of {', '.join(get_args(Type))}")
    check_model(model)
    rwkv.architecture_for(model.config)
    if quantization_of(model):
        raise ValueError("an integer model is not written to GGUF: export the model of floats that it was made from")
    width = model.config.blocks[0].ffn.width
    if type[0] == "q" and width % BLOCK:
        raise ValueError(f"`type={type}` has blocks of {BLOCK} columns, the feed-forward layer {width}: take f16")


def write(
    model: LanguageModel,
    path: Path,
    tokenizer: Tokenizer,
    *,
    type: Type = "f16",
    name: str = "",
    template: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Writes a model, tensor by tensor.

    Args:
        name: name of the model in the metadata.
        template: chat template.
        progress: called with what is done, the bytes so far, and all bytes.

    Raises:
        ImportError: the package gguf is missing (extra `gguf`).
        ValueError: as `check_exportable`, or llama.cpp does not know the tokenizer's kind.
    """
    library, config = _library(), model.config
    check_exportable(model, type)
    arch = rwkv.architecture_for(config)
    out = library.GGUFWriter(str(path), arch)
    metadata: dict[str, Any] = {NAME: name} if name else {}
    metadata |= rwkv.metadata(config, arch) | written(tokenizer, config.vocab_size, template)
    add_metadata(out, metadata)
    out.add_file_type(library.LlamaFileType["ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"])
    out.add_quantization_version(library.GGML_QUANT_VERSION)

    def kind_of(item: rwkv.Item) -> Any:
        name = {
            "float": "f32",
            "matrix": type,
            "output": "q8_0" if type == "q4_0" else type,
            "identity": "q4_0" if type == "q8_0" else type,  # 0 and 1 are exact in it; q8_0 divides by 127
        }[item.kind]
        return library.GGMLQuantizationType[name.upper()]

    weights = {key: x.detach() for key, x in model.state_dict().items()}
    total = 0
    for item in rwkv.items(config, weights, arch):
        kind, shape = kind_of(item), tuple(item.values.shape)
        block, size = library.GGML_QUANT_SIZES[kind]
        nbytes = item.values.numel() // block * size
        quantised = kind.name[0] == "Q"
        stored = library.quant_shape_to_byte_shape(shape, kind) if quantised else shape
        dtype = np.dtype(np.uint8 if quantised else np.float16 if kind.name == "F16" else np.float32)
        out.add_tensor_info(item.name, stored, dtype, nbytes, raw_dtype=kind)
        total += nbytes
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    done = 0
    for item in rwkv.items(config, weights, arch):
        data = library.quants.quantize(np.ascontiguousarray(item.values.float().numpy()), kind_of(item))
        out.write_tensor_data(data)
        done += data.nbytes
        if progress:
            progress("writing", done, total)
    out.close()


class LlamaCpp:
    """A GGUF file in llama.cpp, by llama-cpp-python: a `Read` of one sequence.

    Raises:
        ImportError: llama-cpp-python is not installed.
        ValueError: llama.cpp refuses the file, or ids.
    """

    def __init__(self, path: Path, *, tokens: int = 512):
        self.library = llama_cpp = _llama_cpp()[0]
        how = llama_cpp.llama_model_default_params()
        how.n_gpu_layers, how.use_mmap = 0, False  # a mapped file that somebody cuts would end the process
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
        if not self.model:
            raise ValueError(f"llama.cpp refuses {path}: is it of this version?")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = tokens
        context.n_threads = context.n_threads_batch = 1
        self.context = llama_cpp.llama_init_from_model(self.model, context)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Reads more ids of the sequence and returns the logits after the last, float32 `[vocab]`."""
        array = (ctypes.c_int32 * len(ids))(*ids)
        if code := self.library.llama_decode(self.context, self.library.llama_batch_get_one(array, len(ids))):
            raise ValueError(f"llama.cpp could not read {len(ids)} tokens (code {code})")
        logits = self.library.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,)).copy()

    def close(self) -> None:
        """Frees the model."""
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)


@cache
def _llama_cpp() -> tuple[Any, Any]:
    """The package, and the function that it calls in place of its log for as long as the process lives."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, quiet


def _library() -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ImportError("GGUF files are written by gguf: pip install 'retentive[gguf]'") from None
    return gguf
