"""Folder for browsers, served by any file server: the chat page, the engine in C, and a model.

The page is that of `retentive serve` with another `server.js`, which runs the model in the browser, in a worker:

    server.js    answers the page's requests        worker.js    the conversation, its state, the saved ones
    engine.js    the functions of retentive.h       files.js     files in memory, which these open (WASI)
    text.js      bytes to text, stop strings        offline.js   keeps the folder, so that it opens without a network
    store.js     saved states (IndexedDB)           thread.js    a thread of the engine

There are two engines, without threads and with them, since only isolated pages may have threads.
"""

import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from retentive.checkpoint import ModelFolder
from retentive.data.templates import ChatTemplate
from retentive.data.tokenizer import Tokenizer
from retentive.files import file_sha256, write_json, write_text
from retentive.infer.memory import fingerprint
from retentive.models import cost
from retentive.native.library import FOLDER, OPS
from retentive.ops.compiler import FLAGS, NotBuilt, cache_folder, run, short_hash
from retentive.page import FILES as PAGE

SCRIPTS = Path(__file__).parent
ZIG = [sys.executable, "-m", "ziglang", "cc"]
FUNCTIONS = "open use_threads vocabulary end states position copy save_memory load read sample encode text"
"""Functions of retentive.h that engine.js calls."""
COMMON = [
    *("-target", "wasm32-wasi", "-mexec-model=reactor"),
    # loops unrolled by the compiler's own choice make the engine a tenth larger and no faster
    *("-Wno-unknown-pragmas", "-fno-unroll-loops", "-Wl,--strip-all", "-lm"),
]
ALONE = ["-mcpu=generic+simd128"]
WITH_THREADS = [
    "-mcpu=generic+simd128+atomics+bulk_memory",
    *("-Wl,--shared-memory", "-Wl,--import-memory", f"-Wl,--max-memory={65535 << 16}"),
    *(f"-Wl,--export={name}" for name in ("__stack_pointer", "__wasm_init_tls", "__tls_size", "retentive_join")),
]
ENGINES = {"engine.wasm": ALONE, "engine-threads.wasm": WITH_THREADS}
NEEDED = (*ENGINES, "model/config.json", "model/model.safetensors", "model/tokenizer.json")
"""Files for the worker, which uses one of the engines."""
POLICY = "default-src 'self' 'wasm-unsafe-eval'; img-src 'self' data:; base-uri 'none'; form-action 'none'"
"""Content security policy of the page, as static servers send none: it needs only its own files."""


def build_engine(name: str = "engine.wasm") -> Path:
    """Returns one of the ENGINES, compiled once and kept in the user's cache.

    Raises:
        ImportError: ziglang is missing (extra `compiler`).
        ValueError: the engine could not be compiled.
    """
    if not find_spec("ziglang"):
        raise ImportError("the engine is compiled for browsers by ziglang: pip install 'retentive[compiler]'")
    exported = [f"-Wl,--export={name}" for name in ("malloc", "free", *(f"retentive_{x}" for x in FUNCTIONS.split()))]
    flags = [
        *(flag for flag in FLAGS if flag != "-fPIC"),
        f"-I{FOLDER}",
        f"-I{OPS}",
        *COMMON,
        *ENGINES[name],
        *exported,
    ]
    texts = [file.read_bytes() for part in (FOLDER, OPS) for file in sorted(part.glob("*.[ch]"))]
    kept = cache_folder() / f"engine-{short_hash(repr((texts, flags)).encode())}.wasm"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            built = Path(scratch) / "engine.wasm"
            try:
                run(ZIG, [*flags, str(FOLDER / "retentive.c"), "-o", str(built)])
            except NotBuilt as error:
                raise ValueError(str(error)) from None
            built.replace(kept)
    return kept


def write_page(folder: Path, tokenizer: Tokenizer, *, name: str) -> None:
    """Writes the page and the engine beside the model in `folder`/model.

    Args:
        name: name of the model on the page.

    Raises:
        ValueError: the engine could not be compiled.
        ImportError: ziglang is missing.
    """
    engines = {name: build_engine(name) for name in ENGINES}
    for file in (*PAGE, *sorted(SCRIPTS.glob("*.js"))):  # its server.js replaces the page's
        shutil.copyfile(file, folder / file.name)
    page = folder / "index.html"
    write_text(page, page.read_text(encoding="utf-8").replace("<meta charset", f"{_meta()}\n  <meta charset", 1))
    for engine, built in engines.items():
        shutil.copyfile(built, folder / engine)
    needed = [folder / name for name in NEEDED]
    found = ModelFolder.open(folder / "model")
    model = found.model()  # loaded as by a server of this folder, so that states fit both
    template = found.template(tokenizer)
    chat = chat_pieces(template)
    write_json(
        folder / "model.json",
        {
            "name": name,
            "kind": model.config.name,
            "parameters": cost.parameters(model.config),
            "state_bytes": cost.state_bytes(model.config),
            "state_bounded": model.config.constant_state,
            "kv_cache_bytes_per_token": cost.attention_cache_bytes(model.config),
            "fingerprint": fingerprint(model),
            "config": model.config.written(),
            "chat": chat,
            "teaches": template.own and chat is not None,
            "page": sorted(file.name for file in folder.iterdir() if file.is_file() and file not in needed),
            "files": {str(file.relative_to(folder)): file.stat().st_size for file in needed},
            "version": file_sha256(*sorted(file for file in folder.rglob("*") if file.is_file())),
        },
    )


def _meta() -> str:
    return f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'


def chat_pieces(template: ChatTemplate) -> dict[str, Any] | None:
    """Returns a template's pieces; None if only Python can render it."""
    try:
        return template.pieces()
    except ValueError:
        return None
