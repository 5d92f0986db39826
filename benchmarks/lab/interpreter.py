"""Makes Triton's interpreter round like a GPU: call `enable()` before anything imports `retentive.ops.triton`.

The interpreter of Triton 3.9 stores bfloat16 as integers of its bits. It multiplies those integers, and truncates
float32 where a GPU rounds to nearest. Two of its functions, products and casts, are replaced for these kernels. It does
not model races, layouts, shared memory and TF32.
"""

import os
import sys

import numpy as np


def enable() -> None:
    """Imports the kernels as interpreted ones. The environment is unchanged, since other processes may compile."""
    if "retentive.ops.triton" in sys.modules:
        raise RuntimeError("the kernels have been imported already, and would be compiled")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401  a launch imports it, and it looks at the variable too

    _interpret_the_language()
    _look_at_the_language_once()
    import retentive.ops.triton  # noqa: F401

    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before
    _round_bfloat16()


def _interpret_the_language() -> None:
    """Replaces `tl.sum` and the like, which are kernels too, and compiled if Triton was imported before (by torch)."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted: dict[int, InterpretedFunction] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("triton.language"):
            for key, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    replaced = interpreted.setdefault(id(value), InterpretedFunction(value.fn))
                    setattr(module, key, replaced)


def _look_at_the_language_once() -> None:
    """Patches the language once, so that functions called by a kernel do not search through it again."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # before Triton 3.9
        return
    replace, tl = interpreter._patch_lang, interpreter.tl

    def replace_once(fn):
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in seen):
            return replace(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once


def widen(bits: np.ndarray) -> np.ndarray:
    """Returns float32 from the bits of bfloat16, which are its upper half."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def narrow(x: np.ndarray) -> np.ndarray:
    """Returns the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.reshape(x.shape))


def _round_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def new_convert(x, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return widen(x)
        if (source, target) == (tl.float32, tl.bfloat16):
            return narrow(x)
        return convert(x, source, target, rounding)

    def new_dot(self, a, b, *rest):
        wide = [
            interpreter.TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        ]
        return dot(self, *wide, *rest)

    interpreter._convert_float = new_convert
    interpreter.InterpreterBuilder.create_dot = new_dot


def main(argv: list[str]) -> None:
    """Runs `retentive ARGV` or `benchmarks ARGV` on the CPU with retention in the interpreter in the place of C."""
    enable()
    from retentive.ops import backends

    backends.BACKENDS["cpu"] = backends.Backend(lambda call: None, backends.run_triton, "cpu")
    if argv[0] == "retentive":
        from retentive.cli import main as program

        program(argv[1:])
    else:
        from benchmarks.__main__ import run

        run(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
